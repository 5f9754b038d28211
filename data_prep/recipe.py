"""What `conf/data_prep.yaml` may say: types, ranges and the rules between keys. Hydra composes, pydantic checks."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parents[1]


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
        inside = ROOT / self.path
        return str(inside) if inside.exists() and not Path(self.path).exists() else self.path


class DataRecipe(Section):
    """Where documents come from and how much of them is used."""

    source: Literal["stdlib", "jsonl"]
    path: str | None = None  # jsonl: one {"text": ...} a line
    max_length: int = Field(ge=8)  # longer documents are cut into pieces of this many tokens
    max_tokens: int | None = Field(None, ge=1)  # stop after this many tokens; null: all


class CacheRecipe(Section):
    """Which target states are stored, and how."""

    dir: str
    codec: Literal["bf16", "fp32"]
    kinds: list[Literal["hidden", "kv"]] = Field(min_length=1)
    layers: Literal["auto"] | Annotated[list[int], Field(min_length=1)]
    shard_bytes: int = Field(ge=1)


class FinishedCache(Section):
    """A cache to read: everything else about it stands in its manifest."""

    dir: str


class CaptureRecipe(Section):
    """The target's forward."""

    batch_tokens: int = Field(ge=1)


class DataPrepRecipe(Section):
    """`python data_prep/main.py`: text -> tokens -> the target's states on disk."""

    mode: Literal["capture", "verify"]
    target: TargetRecipe
    data: DataRecipe
    cache: CacheRecipe
    capture: CaptureRecipe
