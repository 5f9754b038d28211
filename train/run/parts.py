"""The parts of a training run, built from its recipe: model, data and checkpoints. `loop.py` runs them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import deepspeed
import numpy as np
import torch

from common.errors import UserError
from common.ranks import from_rank_0, rank
from data_prep.cache.reader import CacheReader
from data_prep.capture.live import LiveReader
from data_prep.target.architecture import target_sizes
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.loading import load_parts
from data_prep.target.parts import TargetParts
from train.build import attention, check_target, drafter_config, engine_config, slot_weights, token_counts, uses_bf16
from train.data.split import split
from train.data.stream import PackStream, Prefix, StreamSettings, ViewDraws, sample_ages
from train.drafter.base import Drafter
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.drafter.warm_start import check_warm_start, loses_clusters, other_positions, warm_start
from train.gate import parameter_groups, start_gates
from train.losses.choose import slower_on_a_gpu
from train.objectives.objective import Objective, Supervision
from train.recipe import TrainRecipe
from train.run.checkpoint import Checkpoints
from train.run.folder import checkpoints_of, latest
from train.views.recipe import FULL


@dataclass(frozen=True)
class RunContext:
    """What all of a run is made from."""

    recipe: TrainRecipe
    run_dir: Path
    device: torch.device
    reader: CacheReader | LiveReader
    say: Callable[[str], None]  # rank 0 prints it


@dataclass(frozen=True)
class ModelParts:
    """`engine` is DeepSpeed's, around the objective: to call it is to call the objective."""

    objective: Objective
    engine: deepspeed.DeepSpeedEngine

    @property
    def drafter(self) -> Drafter:
        return self.objective.drafter


@dataclass(frozen=True)
class DataParts:
    training: PackStream
    validation: PackStream
    budgets: list[int]  # the views under which a checkpoint is judged, the full one first


@dataclass(frozen=True)
class Parts:
    model: ModelParts
    data: DataParts
    checkpoints: Checkpoints


def build_parts(context: RunContext) -> Parts:
    """All parts of a run. Every rank builds them at the same time: to make an engine and checkpoints is to meet in collectives.

    Raises:
        UserError: the target is not the cache's, or the drafter cannot be made from it.
    """
    recipe = context.recipe
    config = drafter_config(recipe, context.reader.manifest)

    # 1. The target, and which documents train.
    target = _read_target(context)
    training, validation = split(context.reader, recipe.train.validation_documents)

    # 2. The drafter, and where its weights start.
    drafter = _make_drafter(context, config, target, training)
    head = target.frozen_head.to(context.device, torch.bfloat16 if uses_bf16(recipe, context.device) else torch.float32)
    del target  # training reads its states from the cache

    # 3. What is learned, and the engine that learns it.
    objective = _make_objective(context, drafter, head)
    engine = _make_engine(context, objective)

    # 4. Data and checkpoints.
    data = _make_data(context, config, training, validation)
    checkpoints = Checkpoints(checkpoints_of(context.run_dir), engine, drafter, rank(), recipe.train.keep_last)
    return Parts(ModelParts(objective, engine), data, checkpoints)


def _read_target(context: RunContext) -> TargetParts:
    """The target on the host, as far as training needs it, checked to be the one that was captured."""
    recipe = context.recipe
    changes = {"device": "cpu"}
    # In a bf16 run there is no use for float32 weights of twice the size.
    if uses_bf16(recipe, context.device) and recipe.target.dtype == "auto":
        changes["dtype"] = "bfloat16"
    target = load_parts(recipe.target.model_copy(update=changes))

    def refusal() -> str | None:
        try:
            check_target(target.architecture, target.weights_hash(), context.reader.manifest, recipe.cache.dir)
        except UserError as error:
            return str(error)

    # One rank reads all of the files, for all.
    if refused := from_rank_0(refusal):
        raise UserError(refused)
    return target


def _make_drafter(context: RunContext, config: DrafterConfig, target: TargetParts, training: np.ndarray) -> Drafter:
    """The drafter with the weights that it starts with, told how to compute."""
    recipe = context.recipe
    counts_V = None  # how often each token is supervised: a reduced vocabulary keeps the most frequent ones
    if config.draft_vocab:
        counts_V = token_counts(context.reader, training, config.architecture.vocab_size)
    drafter = new_drafter(config).start(target, target.frozen_head, counts_V)
    if config.lm and recipe.view.positions == "in_cache":
        drafter.check_in_cache()
    start_gates(drafter, recipe)
    # A run that resumes gets all weights from its checkpoint; only a new one takes another drafter's.
    if recipe.drafter.warm_start and latest(checkpoints_of(context.run_dir)) is None:
        _take_weights(context, config, drafter, target)

    drafter.recompute = recipe.train.recompute
    if recipe.train.fp8:
        drafter.use_fp8()
    # ZeRO-3 gathers weights by hooks around modules, which a compiler does not see.
    if recipe.train.compile and context.device.type == "cuda" and recipe.deepspeed.stage < 3:
        drafter.compile_parts()
    return drafter


def _take_weights(context: RunContext, config: DrafterConfig, drafter: Drafter, target: TargetParts) -> None:
    source = context.recipe.drafter.warm_start
    beside = partial(target_sizes, context.recipe.target)
    check_warm_start(source, config, beside)
    taken, left = warm_start(drafter, source, target.frozen_head, beside)
    context.say(f"{source}: {len(taken)} tensors taken, as drafter.start says: {', '.join(left) or 'none'}")
    if loses_clusters(source, config, beside):
        context.say(f"{source} scores clusters of tokens (a centroid head); what is trained from it scores all tokens")
    if other_positions(source, config, beside):
        context.say(f"{source} knows another rotary embedding than the target's, which it gets")


def _make_objective(context: RunContext, drafter: Drafter, head: FrozenHead) -> Objective:
    recipe = context.recipe
    config = drafter.config
    dpace = recipe.objective.weights == "dpace"  # weights slots by what the drafter says of them
    weight_J = None if dpace else slot_weights(recipe.objective, config.draft_length)
    attend = attention(recipe, context.device, config)
    if context.device.type == "cuda" and (line := slower_on_a_gpu(recipe.loss.per_slot)):
        context.say(line)
    supervision = Supervision(recipe.loss, weight_J, recipe.train.chunk_rows, recipe.view)
    if recipe.view_sampler:
        supervision = replace(supervision, view_weights=recipe.view_sampler.weights, detach=recipe.objective.detach)
    return Objective(drafter, head, attend, supervision)


def _make_engine(context: RunContext, objective: Objective) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed moves the objective to the device, to bf16 where that is asked for, and shards what its stage shards. The `lr`
    here is the peak: `train/run/rates.py` sets each step's."""
    recipe = context.recipe
    optimizer = torch.optim.AdamW(
        parameter_groups(objective.drafter, recipe),
        lr=recipe.train.lr,
        betas=recipe.train.betas,
        weight_decay=recipe.train.weight_decay,
        fused=True,
    )
    config = engine_config(recipe, uses_bf16(recipe, context.device))
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    return engine


def _make_data(context: RunContext, config: DrafterConfig, training: np.ndarray, validation: np.ndarray) -> DataParts:
    recipe = context.recipe
    seed = recipe.train.seed
    sampler = recipe.view_sampler
    budgets = sampler.judged if sampler else [FULL]

    def ages(id: str, anchors: np.ndarray, pass_number: int) -> np.ndarray:
        return sample_ages(id, anchors, recipe.view.lasts, seed, pass_number)

    def judged(step: int, id: str) -> list[int]:
        return budgets

    # The target's queries: training needs them where the loss compares with them, diagnostics need them of every layer or not.
    wanted = set(config.query_layers)
    held = wanted & set(context.reader.manifest.query_layers)
    queries = [f"query.{layer}" for layer in sorted(held)]
    learned = queries if recipe.loss.query_align > 0 else []
    diagnosed = queries if held == wanted else []

    learning = StreamSettings(
        pack_tokens=recipe.train.pack_tokens,
        anchors=recipe.objective.anchors,
        seed=seed,
        batch=recipe.train.batch,
        prefix=Prefix(config.draft_length, recipe.objective.prefix) if recipe.objective.prefix else None,
        views=ViewDraws(sampler.budgets, ages) if sampler else None,
    )
    # Every checkpoint is judged on the same packs: no shuffling, and budgets that no step changes.
    judging = StreamSettings(
        pack_tokens=recipe.train.pack_tokens,
        anchors=recipe.train.validation_anchors,
        seed=seed,
        shuffle=False,
        views=ViewDraws(judged, ages) if sampler else None,
    )
    return DataParts(
        training=PackStream(context.reader, training, config.tensors + learned, learning),
        validation=PackStream(context.reader, validation, config.tensors + diagnosed, judging),
        budgets=budgets,
    )
