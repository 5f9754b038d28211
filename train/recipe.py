"""What `conf/train.yaml` may say: types, ranges and the rules between keys."""

import importlib.util
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from common.errors import UserError
from common.recipe import Section, what_is_wrong
from common.rules import obeying
from data_prep.recipe import CaptureSections
from train import rules
from train.losses.recipe import LossRecipe
from train.schedules.registry import OBJECTIVES
from train.sizes import sized
from train.views.budgets import ViewSampler
from train.views.recipe import View


class ObjectiveRecipe(Section):
    """How drafting is practised, and what each slot counts."""

    kind: Literal[tuple(OBJECTIVES)]
    """How drafting is practised: token by token (ttt, as EAGLE-3), or a block of slots at once (blockwise, as DFlash)."""
    slots: int = Field(ge=1)
    """ttt: drafted tokens per round. blockwise: slots per block, the anchor's included."""
    shifted: bool = False
    """blockwise: the anchor's slot drafts too, so that a block of B slots drafts B tokens (DSpark)."""
    anchors: int | None = Field(None, ge=1)
    """Anchors drawn per document and pass; null: every position."""
    causal: bool = False
    """blockwise: a slot sees earlier slots of its block only."""
    positions: Literal["advance", "constant"] = "advance"
    """ttt with reuse.own_kv=false: steps stand one behind the other, or all at the last processed position (Gemma 4)."""
    prefix: float | None = Field(None, gt=0, lt=1)
    """blockwise: chance ratio by which blocks are given one more token after the anchor (D2SD uses 0.9); null: never."""
    weights: Literal["decay", "dpace"] = "decay"
    """How slots are weighted: `decay`, or by how much of the expected length depends on them (dpace)."""
    decay: float = Field(gt=0)
    """ttt: step j has weight decay^(j-1). blockwise: slot j has weight exp(-(j-1)/decay)."""
    full: float = Field(1.0, ge=0)
    """BudgetDraft: weight of the loss under the full view."""
    sparse: float = Field(0.0, ge=0)
    """BudgetDraft: weight of the loss under budgets (lambda), shared by the views of a step."""
    budgets: Literal["paper", "sandwich"] = "sandwich"
    """BudgetDraft without view.budget: one of 256 to 2048 per step (paper), or the smallest and `draws` more (sandwich)."""
    smallest: int = Field(256, ge=1)
    """BudgetDraft, sandwich: smallest budget, in memory positions."""
    largest: int = Field(2048, ge=1)
    """BudgetDraft, sandwich: largest budget, in memory positions."""
    draws: int = Field(1, ge=0)
    """BudgetDraft, sandwich: budgets per document beside the smallest, log-uniform up to the largest."""
    detach: bool = False
    """Stop gradients at memory, as BudgetDraft publishes it."""

    @model_validator(mode="after")
    def _a_block_drafts(self):
        return obeying(rules.OBJECTIVE, self)


class GateRecipe(Section):
    """Ways to keep the gate of hybrid drafters from closing early (none of them: KVShot's)."""

    hold_steps: int = Field(0, ge=0)
    """Optimizer steps in which the gate is held at 0.5."""
    floor: float = Field(0.0, ge=0, lt=1)
    """Least value of the gate."""
    zero_delta: bool = False
    """Start W_delta at zero, so that the drafter begins as its hidden-state branch."""
    lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of the gate and W_delta, as a multiple of train.lr."""


class ReuseRecipe(Section):
    """Which target state the drafter reads."""

    kind: Literal["none", "hidden", "kv", "hybrid"]
    """Which states of the target the drafter reads: none, hidden states, K/V, or both."""
    hidden_layers: Literal["auto"] | Annotated[list[int], Field(min_length=1)] = "auto"
    """Layers whose hidden states are read; auto: all that the cache holds."""
    source: Literal["native", "projected", "projected_rope", "head_concat"] = "native"
    """How K/V are read: one layer in place (native), or several layers joined by a projection or side by side."""
    kv_layers: Literal["auto"] | Annotated[list[int], Field(min_length=1)] = "auto"
    """Layers whose K/V are joined, for every source but native; auto: all that the cache holds."""
    fusion: Literal["gated_delta", "cross_only"] = "gated_delta"
    """hybrid: KVShot's gated delta, or attention over the target's K/V alone (cross_only, ttt)."""
    own_kv: bool = True
    """cross_only: draft rows have keys and values of their own; false: queries alone, over the target's cache in place."""
    pairs: bool = False
    """blockwise: build memory from pairs of token and hidden state, as ttt does (P-EAGLE)."""
    gate: GateRecipe = GateRecipe()
    """hybrid: the gate of the gated delta."""

    @model_validator(mode="after")
    def _keys_that_mean_something(self):
        return obeying(rules.REUSE, self)


class DrafterRecipe(Section):
    kind: Literal["layers", "gemma4_assistant"] = "layers"
    """Layers as the target's, or an assistant in Gemma 4's format, which reads the target's last layers (target_layers=auto)."""
    layers: int = Field(ge=1)
    """Number of draft layers."""
    target_layers: Literal["auto"] | list[int]
    """One target layer per draft layer, to start from and, with native K/V, to read; auto: spread over those captured."""
    start: Literal["target", "random"]
    """Start draft layers as their target layers, or at random."""
    warm_start: str | None = None
    """A drafter, or a checkpoint of EAGLE-3, P-EAGLE, DFlash, DSpark or speculators, whose fitting weights are taken."""
    attention: Literal["auto", "reference", "flex", "flash"]
    """Attention backend; auto: the reference on a CPU, flash or flex on a GPU."""
    qk_norm: bool | None = None
    """Norm queries and keys; null: as the target does."""
    vocabulary: int | None = Field(None, ge=2)
    """Keep this many of the most frequent tokens; null: all."""
    own_head: bool = False
    """Train an LM head; false: share the target's, frozen."""
    sequential: Literal["markov", "gru"] | None = None
    """blockwise: correct each slot by the token before it, with a Markov head or a GRU."""
    sequential_size: int = Field(256, ge=1)
    """Size of the state of `sequential`."""
    rope_factor: float = Field(1.0, ge=1)
    """Positions are divided by it (linear RoPE scaling)."""
    norm_before_residual: bool = False
    """ttt over hidden states: the residual stream begins as the normed feature."""
    lm: str | None = None
    """A small language model (folder or hub id) that drafts with K/V of its own; needs reuse=none."""
    fc_norm: bool = False
    """Drafters that read pairs: norm each layer's hidden state before fc joins them (EAGLE-3.1)."""
    norm_output: bool = False
    """ttt that reads pairs: the next step reads the stream after the final norm (EAGLE-3.1)."""
    hidden_size: int | None = Field(None, ge=1)
    """Hidden size of the draft layers, between projections from and to the target's; null: as the target."""
    heads: int | None = Field(None, ge=1)
    """Query heads of a draft layer; null: as the target."""
    kv_heads: int | None = Field(None, ge=1)
    """Key/value heads of a draft layer; null: as the target."""
    head_dim: int | None = Field(None, ge=4)
    """Size of a draft layer's heads; null: as the target."""
    intermediate_size: int | None = Field(None, ge=1)
    """Size of a draft layer's MLP; null: as the target."""

    @property
    def named_sizes(self) -> dict[str, int]:
        """Sizes of the draft layers that are not left to the target."""
        names = ("hidden_size", "heads", "kv_heads", "head_dim", "intermediate_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _a_language_model_brings_its_own(self):
        return obeying(rules.DRAFTER, self)


class TrainSection(Section):
    """`max_steps`, `batch`, `pack_tokens`, `save_every` and `lr` may be `auto`: train/sizes.py."""

    max_steps: int = Field(ge=1)
    """Optimizer steps; auto: 2000 on a GPU, 600 on a CPU."""
    batch: int = Field(ge=1)
    """Packs per optimizer step, over all ranks; auto: 8 on a GPU, on a CPU 2 or the next multiple of the ranks."""
    pack_tokens: int = Field(ge=3)
    """Tokens of a pack; auto: 4096 on a GPU, 1024 on a CPU."""
    workers: int = Field(ge=0)
    """Threads that read packs ahead; 0: none."""
    lr: float = Field(gt=0)
    """Peak learning rate; auto: 6e-4 on a GPU, 2e-3 on a CPU."""
    min_lr_ratio: float = Field(ge=0, le=1)
    """Learning rate of the last step, as a share of train.lr."""
    warmup_ratio: float = Field(ge=0, lt=1)
    """Share of max_steps in which the learning rate rises; 0: the first step has the peak."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    """AdamW's betas."""
    weight_decay: float = Field(ge=0)
    """AdamW's weight decay."""
    clip: float = Field(ge=0)
    """Largest norm of the gradient; 0: no limit."""
    precision: Literal["auto", "fp32", "bf16"]
    """Precision of forward and backward; auto: bf16 on a GPU, fp32 on a CPU."""
    fp8: bool = False
    """fp8 products in MLPs and a frozen head; needs bf16, ZeRO 0 to 2 and compute capability 8.9."""
    compile: bool = True
    """torch.compile what stands between a layer's products; on a GPU, without ZeRO-3 and drafter.lm."""
    recompute: bool = False
    """Run draft layers again in the backward: less memory, more time."""
    seed: int
    """Seed of initial weights, order of documents and anchors."""
    chunk_rows: int = Field(ge=1)
    """Rows whose logits exist at a time."""
    log_every: int = Field(ge=1)
    """Optimizer steps between lines of metrics.jsonl."""
    acceptance_every: int = Field(1, ge=0)
    """Of how many steps one counts acceptance for the log; the others leave out what their loss does not read. 0: none."""
    save_every: int = Field(ge=1)
    """Optimizer steps between checkpoints, each judged on validation documents; auto: 200 on a GPU, 300 on a CPU."""
    keep_last: int = Field(ge=1)
    """Number of newest checkpoints that are kept, beside the best."""
    validation_documents: int = Field(ge=1)
    """Documents on which a checkpoint is judged."""
    validation_anchors: int = Field(ge=1)
    """Anchors per validation document."""
    diagnose: bool
    """Diagnose the drafter on one validation pack at every checkpoint."""
    timeout_s: int = Field(600, ge=1)
    """Seconds after which a rank that is not heard of ends the run, 15 at least; saving a checkpoint must fit into it."""


class TrackingRecipe(Section):
    kind: Literal["none", "wandb"]
    """Where metrics go besides files."""
    project: str = "understudy"
    """Project in W&B."""
    entity: str | None = None
    """Team or user in W&B; null: your default."""

    @field_validator("kind")
    @classmethod
    def _is_installed(cls, value: str) -> str:
        if value == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("tracking=wandb, but the package wandb is not installed: pip install wandb, or tracking=none")
        return value


class DeepSpeedRecipe(Section):
    """Passed to DeepSpeed as it is; batch sizes, clipping, precision and schedule come from `train`."""

    zero_optimization: dict
    """DeepSpeed's own section; `stage` is 0, 1, 2 or 3."""

    @field_validator("zero_optimization")
    @classmethod
    def _a_known_stage(cls, value: dict) -> dict:
        if value.get("stage") not in (0, 1, 2, 3):
            raise ValueError(f"zero_optimization.stage is 0, 1, 2 or 3, not {value.get('stage')}")
        return value

    @property
    def stage(self) -> int:
        return self.zero_optimization["stage"]


class RunRecipe(Section):
    dir: str | None
    """Folder of the run; null: runs/ and the names of the overrides, so that the same command resumes."""
    group: str | None = None
    """Group in W&B; a sweep is one group."""


def _with(section: Section, part: dict) -> Section:
    return type(section).model_validate(section.model_dump() | part)


class TrainRecipe(CaptureSections):
    """`deepspeed train/main.py`: a cache -> a drafter. Of `cache` only `dir` counts when a capture is there; the rest, `data`
    and `capture` say what `cache.on_missing=capture|live` makes."""

    view: View = View(kind="full")
    objective: ObjectiveRecipe
    loss: LossRecipe
    reuse: ReuseRecipe
    drafter: DrafterRecipe
    train: TrainSection
    deepspeed: DeepSpeedRecipe
    tracking: TrackingRecipe
    run: RunRecipe

    @model_validator(mode="before")
    @classmethod
    def _sizes_are_numbers(cls, config: dict) -> dict:
        return sized(config)

    def going_on(self, earlier: dict) -> "TrainRecipe":
        """This recipe, for a run that began with `earlier` (its recipe.json): sizes that nobody named are that run's. Raises
        UserError where these are none."""
        sections: dict[str, dict] = {}
        for section, name in (key.split(".") for key in self.chosen):
            if isinstance(earlier.get(section), dict) and name in earlier[section]:
                sections.setdefault(section, {})[name] = earlier[section][name]
        try:
            taken = {name: _with(getattr(self, name), part) for name, part in sections.items()}
        except ValidationError as error:
            raise UserError(f"{self.run.dir}/recipe.json is damaged ({what_is_wrong(error)}); choose another run.dir") from error
        left = tuple(key for key in self.chosen if key.split(".")[1] not in sections.get(key.split(".")[0], {}))
        return self.model_copy(update={**taken, "chosen": left})

    @model_validator(mode="after")
    def _a_cell_that_exists(self):
        return obeying(rules.RECIPE, self)

    @property
    def view_sampler(self) -> ViewSampler | None:
        """The views of a step; None: everything, alone."""
        objective = self.objective
        if not objective.sparse:
            return None
        budget = self.view.budget  # one number stands in the place of all that would be drawn
        return ViewSampler(
            full=objective.full,
            sparse=objective.sparse,
            sampler="fixed" if budget else objective.budgets,
            smallest=budget or objective.smallest,
            largest=objective.largest,
            draws=objective.draws,
            seed=self.train.seed,
        )

    def resumable_differences(self, earlier: dict) -> list[str]:
        """Keys in which a run that is to be resumed differs from how it began. Where it logs or runs does not count."""

        def core(recipe: dict) -> dict:
            free = {("run",), ("tracking",), ("deepspeed",)}
            free |= {("cache",), ("data",), ("capture",)}  # the manifest's hash speaks for the cache
            free |= {("train", "log_every"), ("train", "keep_last"), ("train", "workers"), ("train", "diagnose")}
            free |= {("train", "acceptance_every")}
            free |= {("train", "timeout_s"), ("train", "compile"), ("train", "recompute"), ("train", "chunk_rows")}
            return {
                (s, k): v
                for s, section in recipe.items()
                if isinstance(section, dict) and (s,) not in free
                for k, v in section.items()
                if (s, k) not in free
            }

        try:  # a run of an earlier release does not know the newest keys: it has their defaults
            known = {name: value for name, value in earlier.items() if name in TrainRecipe.model_fields}
            objective = known.get("objective")
            if isinstance(objective, dict) and objective.get("budgets") == "fixed":  # an earlier word for what view.budget says
                known["objective"] = {k: v for k, v in objective.items() if k != "budgets"}
            earlier = TrainRecipe.model_validate(known).model_dump(mode="json")
        except ValidationError:
            pass
        mine = core(self.model_dump(mode="json"))
        theirs = core(earlier)
        return sorted(".".join(k) for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
