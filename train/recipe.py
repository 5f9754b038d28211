"""What `conf/train.yaml` may say: types, ranges and the rules between keys."""

import importlib.util
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from common.recipe import Section
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
    slots: int = Field(ge=1)  # block-wise: B, the anchor's slot included; ttt: steps
    shifted: bool = False  # block-wise: the slot at index j - 1 proposes x_{a+j}, so that B tokens are drafted
    anchors: int | None = Field(None, ge=1)  # a document and pass; null: every position
    causal: bool = False  # block-wise: a slot sees earlier slots only
    # block-wise: blocks show v tokens instead of one, with a chance in proportion to prefix^(v-1)
    prefix: float | None = Field(None, gt=0, lt=1)
    weights: Literal["decay", "dpace"] = "decay"
    decay: float = Field(gt=0)  # block-wise: weights exp(-(j-1)/decay); ttt: decay^(j-1)
    # objective=budgetdraft: the weights of the branch that sees everything and of those that see a budget (lambda)
    full: float = Field(1.0, ge=0)
    sparse: float = Field(0.0, ge=0)
    budgets: Literal["paper", "sandwich"] = "sandwich"  # where they come from while view.budget is null
    smallest: int = Field(256, ge=1)
    largest: int = Field(2048, ge=1)
    draws: int = Field(1, ge=0)  # sandwich: budgets beside the smallest
    detach: bool = False  # nothing is learned through memory

    @model_validator(mode="after")
    def _a_block_drafts(self):
        return obeying(rules.OBJECTIVE, self)


class GateRecipe(Section):
    """Ways to keep the gate of hybrid drafters from closing early (none of them: KVShot's)."""

    hold_steps: int = Field(0, ge=0)  # g = 0.5 for so many steps
    floor: float = Field(0.0, ge=0, lt=1)
    zero_delta: bool = False  # W_delta starts at zero: the drafter begins as its hidden-state branch
    lr_ratio: float = Field(1.0, gt=0)  # the gate's and W_delta's learning rate, over train.lr


class ReuseRecipe(Section):
    """Which target state the drafter reads."""

    kind: Literal["none", "hidden", "kv", "hybrid"]
    hidden_layers: Literal["auto"] | Annotated[list[int], Field(min_length=1)] = "auto"  # auto: all that the cache holds
    source: Literal["native", "projected", "projected_rope", "head_concat"] = "native"
    kv_layers: Literal["auto"] | Annotated[list[int], Field(min_length=1)] = "auto"  # of every source but native
    fusion: Literal["gated_delta", "cross_only"] = "gated_delta"
    pairs: bool = False  # block-wise: memory is made of pairs of token and feature, as under ttt (P-EAGLE)
    gate: GateRecipe = GateRecipe()

    @model_validator(mode="after")
    def _keys_that_mean_something(self):
        return obeying(rules.REUSE, self)


class DrafterRecipe(Section):
    layers: int = Field(ge=1)
    target_layers: Literal["auto"] | list[int]  # one a draft layer; auto: the cache's, first to last (one: the last)
    start: Literal["target", "random"]
    warm_start: str | None = None  # a drafter, or a checkpoint of EAGLE-3, DFlash, speculators: what fits replaces `start`
    attention: Literal["auto", "reference", "flex", "flash"]
    qk_norm: bool | None = None  # null: as the target
    vocabulary: int | None = Field(None, ge=1)  # keep so many of the most frequent tokens; null: all
    own_head: bool = False  # train an LM head; false: the target's, frozen
    sequential: Literal["markov", "gru"] | None = None  # block-wise: correct each slot by the token before it
    sequential_size: int = Field(256, ge=1)
    rope_factor: float = Field(1.0, ge=1)  # positions are divided by it
    norm_before_residual: bool = False  # ttt over hidden states: the residual stream begins as the normed feature
    lm: str | None = None  # a language model of its own instead of layers like the target's
    fc_norm: bool = False  # drafters that read pairs: norm each layer's hidden state before fc (EAGLE-3.1)
    norm_output: bool = False  # ttt that reads pairs: the next step reads the stream after the final norm (EAGLE-3.1)

    @model_validator(mode="after")
    def _a_language_model_brings_its_own(self):
        return obeying(rules.DRAFTER, self)


class TrainSection(Section):
    """`max_steps`, `batch`, `pack_tokens`, `save_every` and `lr` may be `auto`: train/sizes.py."""

    max_steps: int = Field(ge=1)
    batch: int = Field(ge=1)  # packs an optimizer step, over all ranks and accumulation
    pack_tokens: int = Field(ge=2)
    workers: int = Field(ge=0)  # threads that read packs ahead; 0: none
    lr: float = Field(gt=0)
    min_lr_ratio: float = Field(ge=0, le=1)
    warmup_ratio: float = Field(ge=0, lt=1)  # of max_steps
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    weight_decay: float = Field(ge=0)
    clip: float = Field(ge=0)  # of the global gradient norm; 0: none
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 on a GPU, fp32 on a CPU
    fp8: bool = False  # the products of the MLPs and of a frozen head
    compile: bool = True  # on a GPU, where ZeRO-3 does not gather weights layer by layer
    recompute: bool = False  # draft layers run again in the backward: less memory, more time
    seed: int
    chunk_rows: int = Field(ge=1)  # rows whose logits exist at a time
    log_every: int = Field(ge=1)
    save_every: int = Field(ge=1)  # steps between checkpoints, each judged on the validation documents
    keep_last: int = Field(ge=1)
    validation_documents: int = Field(ge=1)
    validation_anchors: int = Field(ge=1)  # a document
    diagnose: bool  # at every checkpoint: train/measure/diagnostics.py, on one validation pack
    timeout_s: int = Field(600, ge=1)  # a rank that does not answer for so long ends the run; one's saving must fit into it


class TrackingRecipe(Section):
    kind: Literal["none", "wandb"]
    project: str = "understudy"
    entity: str | None = None

    @field_validator("kind")
    @classmethod
    def _is_installed(cls, value: str) -> str:
        if value == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("tracking=wandb, but the package wandb is not installed: pip install wandb, or tracking=none")
        return value


class DeepSpeedRecipe(Section):
    """Passed to DeepSpeed as it is; batch sizes, clipping, precision and schedule come from `train`."""

    zero_optimization: dict

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
    dir: str | None  # null: runs/ and the overrides' names
    group: str | None = None  # a sweep is one group


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
        """This recipe, for a run that began with `earlier` (its recipe.json): sizes that nobody named are that run's."""
        sections: dict[str, dict] = {}
        for section, name in (key.split(".") for key in self.chosen):
            if name in earlier.get(section, {}):
                sections.setdefault(section, {})[name] = earlier[section][name]
        taken = {name: getattr(self, name).model_copy(update=part) for name, part in sections.items()}
        left = tuple(key for key in self.chosen if key.split(".")[1] not in sections.get(key.split(".")[0], {}))
        return self.model_copy(update={**taken, "chosen": left})

    @model_validator(mode="after")
    def _a_cell_that_exists(self):
        return obeying(rules.RECIPE, self)

    @property
    def view_sampler(self) -> ViewSampler | None:
        """The views of a step; None: everything, alone."""
        o, budget = self.objective, self.view.budget
        if not o.sparse:
            return None
        sampler, smallest = ("fixed", budget) if budget else (o.budgets, o.smallest)
        return ViewSampler(o.full, o.sparse, sampler, smallest, o.largest, o.draws, self.train.seed)

    def resumable_differences(self, earlier: dict) -> list[str]:
        """Keys in which a run that is to be resumed differs from how it began. Where it logs or runs does not count."""

        def core(recipe: dict) -> dict:
            free = {("run",), ("tracking",), ("deepspeed",)}
            free |= {("cache",), ("data",), ("capture",)}  # the manifest's hash speaks for the cache
            free |= {("train", "log_every"), ("train", "keep_last"), ("train", "workers"), ("train", "diagnose")}
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
            earlier = TrainRecipe.model_validate(known).model_dump(mode="json")
        except ValidationError:
            pass
        mine, theirs = core(self.model_dump(mode="json")), core(earlier)
        return sorted(".".join(k) for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
