"""What `conf/data_prep.yaml` may say: types, ranges and the rules between keys. Hydra composes, pydantic checks."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ROOT = Path(__file__).resolve().parents[1]
STDLIB_TOKENS = 600_000


class Section(BaseModel):
    """A group of keys. Unknown keys are refused; nothing changes after composition."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetRecipe(Section):
    """A Hugging Face causal LM: a folder or a hub id."""

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bf16 on a GPU, float32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mask_token_id: int | None = Field(None, ge=0)  # an id that no text uses; block-wise drafting starts its MASK from it

    @property
    def location(self) -> str:
        """Where it is loaded from. A relative path that exists in the repository but not here means the repository's,
        so that `target=tiny` works from any folder."""
        return location(self.path)


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
    base_url: str | None = None  # an OpenAI-compatible server, .../v1; null: transformers in this process
    model: str | None = None  # its name at the server; null: target.path
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=1)  # of one reply
    thinking: bool | None = None  # enable_thinking of the chat template; null: its own default
    batch: int = Field(ge=1)  # in this process: conversations at a time
    concurrency: int = Field(ge=1)  # at the server: requests at a time
    attempts: int = Field(ge=1)  # of one request
    timeout_s: float = Field(gt=0)  # of one attempt
    seed: int


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

    mode: Literal["capture", "estimate", "verify", "inspect", "merge", "regenerate"]
    regenerate: RegenerateRecipe
    inspect: InspectRecipe
    merge: MergeRecipe
