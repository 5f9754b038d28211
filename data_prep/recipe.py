"""What `conf/data_prep.yaml` may say: types, ranges and the rules between keys. Hydra composes, pydantic checks."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.errors import UserError
from common.recipe import ROOT, Section

STDLIB_TOKENS = 600_000


class TargetRecipe(Section):
    """A causal LM: a folder or a hub id in the format of transformers, or a GGUF file of either."""

    path: str
    """Folder or hub id of a model in the format of transformers, or a .gguf file."""
    gguf: str | None = Field(None, pattern=r"\.gguf$")
    """A GGUF file inside the folder or hub id `path`."""
    fetch: str | None = None
    """The command that downloads `path`; it is shown when the path is missing."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: its default branch."""
    trust_remote_code: bool = False
    """Run the Python code of a model whose family transformers does not know: it may do all that you may."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision of the weights; auto: bf16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: a GPU if there is one."""
    mask_token_id: int | None = Field(None, ge=0)
    """Id of a token that no text uses; the MASK embedding of block-wise drafting starts from it."""
    server: str | None = Field(None, pattern=r"^(vllm|https?://\S+)$")
    """Where a capture has hidden states computed: vllm starts a server, http://HOST:PORT/v1 asks one; null: in this process."""
    server_args: list[str | int | float] = []
    """target.server=vllm: more flags of the started server, such as [--tensor-parallel-size, 8]."""

    @model_validator(mode="after")
    def _one_file(self):
        if self.gguf and self.path.endswith(".gguf"):
            raise ValueError(f"target.path={self.path} is a GGUF file already: leave out target.gguf")
        return self

    @property
    def id(self) -> str:
        """One name for the whole of it: `path`, with the GGUF file where one is named beside it."""
        return f"{self.path.rstrip('/')}/{self.gguf}" if self.gguf else self.path

    @property
    def location(self) -> str:
        """Where it is loaded from. A relative path that exists in the repository but not here means the repository's,
        so that `target=tiny` works from any folder. Raises UserError when it has yet to be fetched."""
        place = location(self.id)
        if self.fetch and self.path.startswith("data_prep/targets/") and not Path(place).exists():
            raise UserError(f"target.path={self.path} is not there; in the repository, this command puts it there: {self.fetch}")
        return place


def location(path: str) -> str:
    inside = ROOT / path
    return str(inside) if inside.exists() and not Path(path).exists() else path


class DataRecipe(Section):
    """Where documents come from, what of them is supervised and how much of them is used."""

    source: Literal["stdlib", "jsonl", "hub"]
    """Where documents come from: Python's standard library, a JSON Lines file, or the datasets library."""
    format: Literal["auto", "text", "chat", "tokens"] = "auto"
    """Which fields of a record are read; auto: those that it has."""
    path: str | None = None
    """data.source=jsonl: the file."""
    name: str | None = None
    """data.source=hub: the data set, as datasets.load_dataset takes it."""
    config: str | None = None
    """data.source=hub: the configuration of the data set."""
    split: str = "train"
    """data.source=hub: the split of the data set."""
    files: str | list[str] | None = None
    """data.source=hub: `data_files` of datasets.load_dataset."""
    streaming: bool = False
    """data.source=hub: read in the source's order, without downloading it whole."""
    id: str | None = "id"
    """Field that names a document; null, or a record without the field: its number."""
    loss_mask: Literal["all_turns", "last_turn", "none"] = "all_turns"
    """Which assistant turns are supervised; none: every token of the document is."""
    template: dict[str, Any] = {}
    """Options of the chat template, e.g. {enable_thinking: false}."""
    max_length: int = Field(ge=8)
    """Longest document, in tokens."""
    long: Literal["split", "cut", "drop", "join"] = "split"
    """What becomes of longer documents; join: all are put end to end and cut every max_length tokens."""
    max_tokens: int | None = Field(None, ge=1)
    """Stop after this many tokens; null: take all. auto: 600000, or what train/sizes.py says for a CPU."""

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _auto_is_a_number(cls, value):
        return STDLIB_TOKENS if value == "auto" else value  # training has another for a machine without a GPU: train/sizes.py


class CacheRecipe(Section):
    """Which target states are stored, and how."""

    dir: str
    """Folder of the cache."""
    codec: Literal["fp8", "bf16", "fp32"]
    """Number format of the stored states."""
    kinds: list[Literal["hidden", "kv", "query"]] = Field(min_length=1)
    """Which states are stored; `query` is needed by loss.query_align alone."""
    layers: Literal["auto", "assistant"] | Annotated[list[int], Field(min_length=1)]
    """Layers whose states are stored, from 0 (l: its output). auto: three, spread; assistant: a Gemma 4 assistant's."""
    last_hidden: Literal["supervised", "all"]
    """Positions whose final hidden state is stored: those that supervise a prediction, or all."""
    shard_bytes: int = Field(ge=1)
    """Size of a file of the cache, in bytes."""
    on_missing: Literal["fail", "capture", "live"] = "capture"
    """Training without a finished cache: capture one first, run the target live and store nothing, or fail."""


class FinishedCache(Section):
    """A cache to read: everything else about it stands in its manifest."""

    dir: str
    """Folder of a finished cache; mode=score and mode=diagnose read it."""


class CaptureRecipe(Section):
    """The target's forward, and how the target is spread over GPUs when one cannot hold it."""

    batch_tokens: int = Field(ge=1)
    """Tokens of one forward of the target."""
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    """Attention of the target; auto: flash_attention_2 on a GPU that has flash-attn, else sdpa."""
    spread: Literal["none", "device_map", "tp"] = "none"
    """Share one target out: its layers over GPUs (device_map), or tensor parallel over processes (tp)."""
    workers: int | None = Field(None, ge=1)
    """Processes that tokenise; null: one per core."""


class RegenerateRecipe(Section):
    """`mode=regenerate`: the target answers the prompts itself."""

    out: str | None = None
    """JSON Lines file to write; data=chat reads it."""
    base_url: str | None = None
    """OpenAI-compatible server, http://HOST:PORT/v1; null: the target answers in this process."""
    model: str | None = None
    """Name of the target at the server; null: target.path."""
    temperature: float = Field(ge=0)
    """Sampling temperature; 0: greedy."""
    top_p: float = Field(gt=0, le=1)
    """Nucleus sampling: the share of probability that is kept."""
    max_tokens: int = Field(ge=1)
    """Longest reply, in tokens."""
    thinking: bool | None = None
    """`enable_thinking` of the chat template; null: the template's own default."""
    batch: int | None = Field(None, ge=1)
    """Conversations at a time in this process; null: 16 on a CPU, on a GPU what its memory holds (at most 512)."""
    concurrency: int = Field(ge=1)
    """Requests at a time at the server."""
    attempts: int = Field(ge=1)
    """Attempts per request at the server."""
    timeout_s: float = Field(gt=0)
    """Time limit of one attempt, in seconds."""
    seed: int
    """Seed of sampling."""


PLACEHOLDER = re.compile(r"\{(\w+)\}")
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TurnRecipe(Section):
    """How the target writes one turn of a conversation."""

    temperature: Temperature | Annotated[list[Temperature], Field(min_length=1)]
    """Sampling temperature; of a list, each conversation draws one."""
    top_p: float = Field(gt=0, le=1)
    """Nucleus sampling: the share of probability that is kept."""
    max_tokens: int = Field(ge=1)
    """Longest turn, in tokens."""
    must_end: bool = True
    """Drop a conversation whose turn reaches max_tokens; false: keep the turn as it is, and end there if it is a reply."""


class KindRecipe(Section):
    """One kind of conversation: how its first message of a user comes about.

    A template is that message. {passage} is replaced by a piece of a text, a key of `words` by one of its values, and {user},
    which can only be its end, by what the target writes on as the user.
    """

    share: Share
    """How often this kind is drawn, in proportion to the other kinds' shares."""
    templates: list[str] = Field(min_length=1)
    """First messages of a user; each conversation draws one and fills in {passage}, {user} and the keys of `words`."""
    passage: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Fewest and most characters of {passage}, which is cut from `texts`."""
    words: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Values of further placeholders; each conversation draws one value per key."""
    until: str | None = Field(None, min_length=1)
    """The target's text for {user} ends behind the first occurrence of this string."""

    @property
    def needs_texts(self) -> bool:
        return any("{passage}" in template for template in self.templates)

    @model_validator(mode="after")
    def _templates_can_be_filled(self) -> "KindRecipe":
        known = {"passage", "user", *self.words}
        for template in self.templates:
            if unknown := [name for name in PLACEHOLDER.findall(template) if name not in known]:
                raise ValueError(f"a template has {{{unknown[0]}}}, which is neither passage, user nor a key of words")
            if "{user}" in template.removesuffix("{user}"):
                raise ValueError("{user} can only be the end of a template: the target writes on from there")
        if self.needs_texts and self.passage is None:
            raise ValueError("templates with {passage} need passage: [FEWEST, MOST] characters")
        if self.passage and self.passage[0] > self.passage[1]:
            raise ValueError("passage: the fewest characters exceed the most")
        return self


class FiltersRecipe(Section):
    """Which conversations of `mode=synthesize` are left out."""

    user_characters: int = Field(ge=1)
    """Least characters of a user's message."""
    reply_characters: int = Field(ge=1)
    """Least characters of a reply."""
    passage_letters: float = Field(ge=0, le=1)
    """Least share of letters among the characters of a passage that are not blank; code and tables have fewer."""
    loop: float = Field(ge=0, le=1)
    """Largest share of a turn's 4-grams of words that are repeats."""
    near: float = Field(gt=0, le=1)
    """Similarity (Jaccard, runs of three words) at which a first message counts as a repeat of another."""


class SynthesizeRecipe(Section):
    """`mode=synthesize`: the target writes whole conversations, the user's turns included."""

    out: str | None = None
    """JSON Lines file to write; data=chat reads it. OUT.json says what was left out, and why."""
    count: int | None = Field(None, ge=1)
    """Number of conversations to write; or set `tokens`."""
    tokens: int | None = Field(None, ge=1)
    """Total tokens of the conversations, as the chat template writes them; or set `count`."""
    turns: Annotated[int, Field(ge=1)] | dict[Annotated[int, Field(ge=1)], Share]
    """User turns per conversation; {1: 0.7, 2: 0.3} draws the number by its share."""
    most_tokens: int = Field(ge=8)
    """Longest conversation, in tokens."""
    template: dict[str, Any] = {}
    """Options of the chat template, e.g. {enable_thinking: false}."""
    user: TurnRecipe
    """How the target writes a user's turns."""
    reply: TurnRecipe
    """How the target writes replies."""
    texts: str | None = None
    """JSON Lines of {"text", "id"} from which passages are cut; null: only kinds without passages are drawn."""
    kinds: dict[str, KindRecipe] = Field(min_length=1)
    """Kinds of conversations, by name."""
    filters: FiltersRecipe
    """Which conversations are left out."""
    batch: int | None = Field(None, ge=1)
    """Requests at a time; null: chosen by the device."""
    seed: int
    """Seed of everything that is drawn."""

    @property
    def turn_shares(self) -> dict[int, float]:
        return {self.turns: 1.0} if isinstance(self.turns, int) else self.turns

    @property
    def used_kinds(self) -> dict[str, KindRecipe]:
        """Those that take part: all with a share, but without texts none that needs them."""
        return {name: kind for name, kind in self.kinds.items() if kind.share and (self.texts or not kind.needs_texts)}


class InspectRecipe(Section):
    out: str
    """Picture to write."""
    examples: int = Field(ge=0)
    """Number of documents to print."""


class MergeRecipe(Section):
    sources: list[str] = []
    """Finished caches to join into cache.dir; they differ in their data alone."""


class CaptureSections(Section):
    """All that a capture needs to know."""

    target: TargetRecipe
    data: DataRecipe
    cache: CacheRecipe
    capture: CaptureRecipe
    # What was said, beside what is meant: no part of the recipe.
    named: tuple[str, ...] = Field((), exclude=True)  # groups and keys that the command line names, as it names them
    chosen: tuple[str, ...] = Field((), exclude=True)  # keys that nobody named and that the device decides: train/sizes.py

    def names(self, *keys: str) -> bool:
        """Whether the line names one of these groups or keys; a group's name stands for its keys too (`data.path` for `data`)."""
        return any(word == key or word.startswith(f"{key}.") for word in self.named for key in keys)


class DataPrepRecipe(CaptureSections):
    """`deepspeed data_prep/main.py`: text -> tokens -> the target's states on disk."""

    mode: Literal["capture", "estimate", "verify", "inspect", "merge", "regenerate", "synthesize"]
    """What to do; regenerate and synthesize write conversations, the others are about a cache."""
    regenerate: RegenerateRecipe
    synthesize: SynthesizeRecipe
    inspect: InspectRecipe
    merge: MergeRecipe
