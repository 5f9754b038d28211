"""What a drafter is: everything `config.json` beside its weights says."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, with_config
from torch import Tensor

from common.errors import UserError
from common.files import read_json
from common.hashing import SUMS, is_changed
from common.recipe import ROOT
from data_prep.target.architecture import Architecture, KVLayer
from train.schedules.registry import OBJECTIVES
from train.schedules.schedule import Schedule

RELEASED = ROOT / "eval/drafters"  # drafters that come with the repository, a folder each


def released() -> list[str]:
    """Names of the drafters that come with the repository."""
    return sorted(path.parent.name for path in RELEASED.glob("*/config.json"))


def folder_of(drafter: str | Path) -> Path:
    """The folder that a drafter's path or name means: a path that exists, else the released drafter of that name. The folder
    need not hold a drafter: `read_fields` raises if it does not."""
    if not Path(drafter).exists() and str(drafter) in released():
        return RELEASED / drafter
    return Path(drafter)


def known_names() -> str:
    """For error messages about a drafter that does not exist: which released ones do."""
    return f"released drafters have names: {', '.join(released())}" if released() else "no drafter is released here"


# Of what is read, nothing is guessed: no number from a text, no key that is not known.
@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
@dataclass(frozen=True)
class DrafterConfig:
    """`architecture` is what the draft layers are: as the target's, unless they have sizes of their own or were imported. A
    drafter of one target is of no use to another (`target`)."""

    objective: str  # a name of train/schedules/registry.py: ttt | blockwise, or one that was added
    reuse: Literal["none", "hidden", "kv", "hybrid"]
    target_layers: list[int]  # one a draft layer: the layer it starts from and, with native K/V, whose K/V it reads in place
    hidden_layers: list[int]  # whose hidden states fc reads ([] for none and kv)
    slots: int  # block-wise: B, the anchor's own slot included; ttt: steps K
    shifted: bool  # block-wise: the slot at index j - 1 proposes x_{a+j} (else the one at index j, and slot 0 nothing)
    causal: bool  # inside a block: see earlier slots only
    seed: int
    start: Literal["target", "random"]
    mask_token_id: int | None
    architecture: Architecture
    target: dict  # id, weights_hash, tokenizer_hash; quantisation, where the target is quantised
    source: Literal["native", "projected", "projected_rope", "head_concat"] = "native"  # how target K/V become memory
    source_layers: list[int] = field(default_factory=list)  # whose K/V every draft layer reads, unless native
    fusion: Literal["gated_delta", "cross_only"] = "gated_delta"  # of hybrid
    own_kv: bool = True  # draft rows have keys and values, which later rows of their anchor read; else queries alone
    constant_positions: bool = False  # all rows of an anchor a sit at a - 1; else step j's at a + j - 1 (ttt)
    gate_floor: float = 0.0
    qk_norm: bool | None = None  # null: as the target
    draft_vocab: int | None = None  # null: the target's whole vocabulary
    own_head: bool = False
    sequential: Literal["markov", "gru"] | None = None  # of block-wise
    sequential_size: int = 256
    rope_factor: float = 1.0  # positions are divided by it
    view: dict | None = None  # under which it was trained (train/views/plan.py), budgets aside; null: everything
    budgets: str | int | None = None  # paper | sandwich | the one budget that it was trained with
    positions: int | None = None  # it knows positions below this; null: all of its target's
    lm: dict | None = None  # a language model of its own: its path, depth and Hugging Face configuration
    pairs: bool = False  # block-wise, hidden: memory is made of (token, feature) pairs, as under ttt (P-EAGLE)
    fc_norm: bool = False  # pairs: each layer's hidden state is normed before fc joins them (EAGLE-3.1)
    norm_output: bool = False  # ttt over pairs: the next step reads the stream after the final norm (EAGLE-3.1)
    norm_before_residual: bool = False  # pairs: the first layer's residual stream begins as its normed feature
    target_hidden: int | None = None  # E of the target; null: the draft layers' own
    own_sizes: list[str] = field(default_factory=list)  # what of `architecture` is other than the target's
    kv_shapes: list[KVLayer] | None = None  # of the target layers whose K/V are read, as `kv_layers`; null: as `architecture`
    imported: str | None = None  # the format that it came in, trained elsewhere; null: trained here
    kind: Literal["layers", "gemma4_assistant"] = "layers"  # what its layers are like: the target's, or an assistant's
    centroids: int | None = None  # an imported assistant's clusters of tokens, of which it says `centroid_top_k` at a time
    centroid_top_k: int = 32

    @property
    def schedule(self) -> Schedule:
        """The loop of its objective, and what follows from it."""
        return OBJECTIVES[self.objective]

    @property
    def state_size(self) -> int:
        """E of the target: the size of its hidden states and embeddings."""
        return self.target_hidden or self.architecture.hidden_size

    @property
    def is_assistant(self) -> bool:
        """Whether it is built as Gemma 4's assistants are (`train/drafter/assistant.py`)."""
        return self.kind == "gemma4_assistant"

    @property
    def output_size(self) -> int:
        """Of what the LM head reads. An assistant's head is of its layers' size; any other could be the target's."""
        return self.architecture.hidden_size if self.is_assistant else self.state_size

    @property
    def feature_size(self) -> int:
        """Of the feature that a row reads beside its token. An assistant's is a state of the target, as it stands."""
        return self.state_size if self.is_assistant else self.architecture.hidden_size

    @property
    def depth(self) -> int:
        return len(self.target_layers) if self.lm is None else self.lm["layers"]

    @property
    def is_bound(self) -> bool:
        """Whether its target's weights are known. A checkpoint in another format does not say them, and is taken beside any
        target of its sizes."""
        return self.imported is None or self.target["weights_hash"] is not None

    @property
    def uses_hidden(self) -> bool:
        return self.reuse in ("hidden", "hybrid")

    @property
    def uses_kv(self) -> bool:
        return self.reuse in ("kv", "hybrid")

    @property
    def branches(self) -> list[str]:
        """The attentions of a draft layer, named after the memory that each reads."""
        if self.reuse == "hybrid":
            return ["kv"] if self.fusion == "cross_only" else ["hidden", "kv"]
        return [{"none": "tokens"}.get(self.reuse, self.reuse)]

    @property
    def kv_layers(self) -> list[int]:
        """Target layers whose K/V are read."""
        return [] if not self.uses_kv else self.target_layers if self.source == "native" else self.source_layers

    def layers_of(self, layer: int) -> list[int]:
        """Target layers whose K/V the draft layer reads that belongs to target layer `layer`."""
        return [layer] if self.source == "native" else self.source_layers

    def kv_shape(self, layer: int) -> KVLayer:
        """What the stored keys and values of target layer `layer` are like."""
        return self.own_shape if self.kv_shapes is None else self.kv_shapes[self.kv_layers.index(layer)]

    @cached_property
    def own_shape(self) -> KVLayer:
        """What keys and values of the architecture's own are like."""
        a = self.architecture
        return KVLayer(a.kv_heads, a.head_dim, a.inv_freq, a.rope_scale)

    def shape(self, layer: int, branch: str) -> KVLayer:
        """What the keys and values are like that draft layer `layer` reads in this branch. Where they are the target's own, in
        place, the window is the target's too. A projection has no window: it mixes layers, each of which may have another."""
        if branch != "kv" or self.source.startswith("projected"):
            return self.own_shape
        return self.kv_shape(self.layers_of(self.target_layers[layer])[0])

    @property
    def windowed(self) -> bool:
        """Whether some draft layer reads memory through a window."""
        return any(self.shape(layer, branch).window for layer in range(len(self.target_layers)) for branch in self.branches)

    @property
    def query_layers(self) -> list[int]:
        """Target layers whose queries ask the same keys as the drafter's."""
        alike = not self.source.startswith("projected") and "heads" not in self.own_sizes
        return self.kv_layers if self.uses_kv and alike else []

    @property
    def reads_in_place(self) -> bool:
        """Whether the target's cache can serve as the memory as it stands. Heads of several layers side by side are copies where
        draft keys stand beside them."""
        return self.uses_kv and (self.source == "native" or (self.source == "head_concat" and not self.own_kv))

    @property
    def normed(self) -> bool:
        """Whether queries and keys pass a norm. In Gemma 4 they do, whose layers have heads of two sizes, of which
        `architecture` says one."""
        if self.is_assistant:
            return True
        return self.architecture.qk_norm if self.qk_norm is None else self.qk_norm

    def row_position(self, anchor: Tensor, slot: Tensor | int) -> Tensor:
        """Where the row of index `slot` (from 0) of each anchor sits."""
        return anchor - 1 if self.constant_positions else anchor + slot

    @property
    def head_copies(self) -> int:
        """head_concat attends the heads of all source layers side by side."""
        return len(self.source_layers) if self.source == "head_concat" else 1

    @property
    def reads_pairs(self) -> bool:
        """EAGLE-3's input path: a row reads its token and a feature."""
        return self.uses_hidden and self.schedule.reads_pairs(self)

    @property
    def injects_hidden(self) -> bool:
        """DFlash's way in: memory is what each draft layer's K and V projections make of fc's normed output."""
        return "hidden" in self.branches and not self.reads_pairs

    @property
    def own_memory(self) -> str | None:
        """The branch whose memory the draft layers compute themselves, in one causal pass over the verified prefix: of (token,
        feature) pairs where a row reads them, of tokens alone for a drafter that reuses nothing."""
        name = self.branches[0]
        return name if name == "tokens" or (name == "hidden" and self.reads_pairs) else None

    @property
    def memory_attends(self) -> bool:
        """Whether memory is made by attending memory (from the second layer on), so that none of it may be dropped."""
        return self.own_memory is not None and self.depth > 1

    @property
    def position_table(self) -> bool:
        """Whether positions are a language model's table: beyond its end there are none."""
        return self.lm is not None and not any(rope_types(self.lm["config"]))

    @property
    def draft_length(self) -> int:
        """γ, tokens drafted a round."""
        return self.slots - self.first_slot

    @property
    def first_slot(self) -> int:
        """How many rows of an anchor come before the row that proposes x_{a+1}."""
        return self.schedule.first_slot(self)

    @property
    def tensors(self) -> list[str]:
        """Names of the cache's tensors that training this drafter reads."""
        return [
            "input_ids",
            "loss_mask",
            "last_hidden",
            *(f"hidden.{i}" for i in self.hidden_layers),
            *(f"{kind}.{i}" for i in sorted(set(self.kv_layers)) for kind in ("key", "value")),
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_fields(folder: str | Path) -> dict:
    """What a drafter's config.json says, in whichever format. Raises UserError when there is none."""
    path = folder_of(folder) / "config.json"
    try:
        fields = read_json(path, "take another drafter, or write that one again")
        refuse_changed(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} holds no drafter (no config.json); expected RUN/checkpoints/best or step-N/drafter, or a checkpoint of "
            f"EAGLE-3, DFlash, Gemma 4's assistants or speculators; {known_names()}"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not the configuration of a drafter: it is no object of keys")
    return fields


def refuse_changed(path: Path) -> None:
    """Raises UserError where a file of a drafter is not as it was written."""
    if is_changed(path):
        raise UserError(
            f"{path} is not what {SUMS} beside it says; copy the drafter again, or remove {SUMS} if you changed it yourself"
        )


def is_foreign(fields: dict) -> bool:
    """Whether a folder's config.json is of a format that is not ours."""
    return "objective" not in fields and bool({"architectures", "speculators_model_type"} & fields.keys())


def rope_types(fields: dict) -> Iterator[str]:
    """Every RoPE type that a Hugging Face configuration names: one for all layers, or one for each kind of layer."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from rope_types(value)
        elif name == "rope_type":
            yield value
