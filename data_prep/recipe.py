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

    path: str  # one that ends in .gguf is that file
    gguf: str | None = Field(None, pattern=r"\.gguf$")  # a file of the folder or hub id `path`
    fetch: str | None = None  # the command that puts `path` there
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bf16 on a GPU, float32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mask_token_id: int | None = Field(None, ge=0)  # an id that no text uses; block-wise drafting starts its MASK from it

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
    format: Literal["auto", "text", "chat", "tokens"] = "auto"  # which fields of a record count; auto: those it has
    path: str | None = None  # jsonl: the file
    name: str | None = None  # hub: whatever datasets.load_dataset takes
    config: str | None = None
    split: str = "train"
    files: str | list[str] | None = None  # hub: data_files
    streaming: bool = False  # hub: nothing is downloaded whole; documents come in the source's order
    id: str | None = "id"  # the field that names a document; null, or a record without it: its number
    loss_mask: Literal["all_turns", "last_turn", "none"] = "all_turns"  # none: every token is supervised
    template: dict[str, Any] = {}  # what the chat template is given besides the messages, e.g. enable_thinking
    max_length: int = Field(ge=8)
    # Longer than max_length: into pieces, keep the first, leave out. join: all records end to end, cut every max_length tokens.
    long: Literal["split", "cut", "drop", "join"] = "split"
    max_tokens: int | None = Field(None, ge=1)  # stop after this many tokens; null: all; auto: STDLIB_TOKENS

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _auto_is_a_number(cls, value):
        return STDLIB_TOKENS if value == "auto" else value  # training has another for a machine without a GPU: train/sizes.py


class CacheRecipe(Section):
    """Which target states are stored, and how."""

    dir: str
    codec: Literal["fp8", "bf16", "fp32"]
    kinds: list[Literal["hidden", "kv", "query"]] = Field(min_length=1)
    layers: Literal["auto"] | Annotated[list[int], Field(min_length=1)]
    last_hidden: Literal["supervised", "all"]
    shard_bytes: int = Field(ge=1)
    on_missing: Literal["fail", "capture", "live"] = "capture"  # training without a finished cache at `dir`


class FinishedCache(Section):
    """A cache to read: everything else about it stands in its manifest."""

    dir: str


class CaptureRecipe(Section):
    """The target's forward, and how the target is spread over GPUs when one cannot hold it."""

    batch_tokens: int = Field(ge=1)
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"  # auto: flash-attn on a GPU that has it, else sdpa
    spread: Literal["none", "device_map", "tp"] = "none"
    workers: int | None = Field(None, ge=1)  # processes that tokenise; null: one a core


class RegenerateRecipe(Section):
    """`mode=regenerate`: the target answers the prompts itself."""

    out: str | None = None  # the JSONL to write: a source for data=chat
    base_url: str | None = None  # an OpenAI-compatible server, .../v1; null: this process
    model: str | None = None  # its name at the server; null: target.path
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=1)  # of one reply
    thinking: bool | None = None  # enable_thinking of the chat template; null: its own default
    batch: int | None = Field(None, ge=1)  # in this process: conversations at a time; null: what the device holds
    concurrency: int = Field(ge=1)  # at the server: requests at a time
    attempts: int = Field(ge=1)  # of one request
    timeout_s: float = Field(gt=0)  # of one attempt
    seed: int


PLACEHOLDER = re.compile(r"\{(\w+)\}")
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TurnRecipe(Section):
    """How the target writes one turn of a conversation."""

    temperature: Temperature | Annotated[list[Temperature], Field(min_length=1)]  # of several, each conversation draws one
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=1)
    must_end: bool = True  # False: what reaches max_tokens is kept as it stands, and a reply that does is the last


class KindRecipe(Section):
    """One kind of conversation: how its first message of a user comes about.

    A template is that message. {passage} is replaced by a piece of a text, a key of `words` by one of its values, and {user},
    which can only be its end, by what the target writes on as the user.
    """

    share: Share  # of the conversations, in proportion to the other kinds' shares
    templates: list[str] = Field(min_length=1)  # each conversation draws one
    passage: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None  # fewest and most characters
    words: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    until: str | None = Field(None, min_length=1)  # behind the first of it ends what the target writes as the user

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

    user_characters: int = Field(ge=1)  # a user's shorter message is too short
    reply_characters: int = Field(ge=1)
    passage_letters: float = Field(ge=0, le=1)  # the least share of letters among what is no blank; code and tables have fewer
    loop: float = Field(ge=0, le=1)  # the largest share of a turn's 4-grams of words that were there before
    near: float = Field(gt=0, le=1)  # from this similarity on, a first message repeats another conversation's


class SynthesizeRecipe(Section):
    """`mode=synthesize`: the target writes whole conversations, the user's turns included."""

    out: str | None = None  # the JSONL to write: a source for data=chat
    count: int | None = Field(None, ge=1)  # conversations, or
    tokens: int | None = Field(None, ge=1)  # tokens of whole conversations, as the chat template writes them
    turns: Annotated[int, Field(ge=1)] | dict[Annotated[int, Field(ge=1)], Share]  # of a user; several numbers with their shares
    most_tokens: int = Field(ge=8)  # of one conversation
    template: dict[str, Any] = {}  # what the chat template is given besides the messages
    user: TurnRecipe
    reply: TurnRecipe
    texts: str | None = None  # JSONL of {"text", "id"}: what passages are taken from; null: only kinds that need none
    kinds: dict[str, KindRecipe] = Field(min_length=1)
    filters: FiltersRecipe
    batch: int | None = Field(None, ge=1)  # requests at a time; null: chosen by the device
    seed: int

    @property
    def turn_shares(self) -> dict[int, float]:
        return {self.turns: 1.0} if isinstance(self.turns, int) else self.turns

    @property
    def used_kinds(self) -> dict[str, KindRecipe]:
        """Those that take part: all with a share, but without texts none that needs them."""
        return {name: kind for name, kind in self.kinds.items() if kind.share and (self.texts or not kind.needs_texts)}


class InspectRecipe(Section):
    out: str  # the picture
    examples: int = Field(ge=0)


class MergeRecipe(Section):
    sources: list[str] = []  # finished caches of one manifest (the data aside), joined into cache.dir


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
    regenerate: RegenerateRecipe
    synthesize: SynthesizeRecipe
    inspect: InspectRecipe
    merge: MergeRecipe
