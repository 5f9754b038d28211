"""`mode=score` and `mode=diagnose`: a drafter on the documents that training held out, teacher-forced, from the cache."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from common.errors import UserError
from data_prep.cache.reader import CacheReader
from data_prep.target.described import Described
from data_prep.target.target import Target
from eval.recipe import EvalRecipe, known_positions, view_of
from train.attention.choose import attention_backend
from train.data.pack import Pack
from train.data.split import judging
from train.data.stream import PackStream, StreamSettings, ViewDraws, sample_ages
from train.drafter.base import Drafter
from train.losses.recipe import LossRecipe
from train.measure import acceptance, copying, diagnostics
from train.objectives.align import Watch
from train.objectives.objective import Objective, Supervision
from train.views.recipe import View


def _objective(recipe: EvalRecipe, target: Described, drafter: Drafter, training: bool, view: View | None = None) -> Objective:
    attend = attention_backend(recipe.attention, target.device, training)
    equal = torch.ones(drafter.config.draft_length)
    supervision = Supervision(LossRecipe(kl=1.0), equal, chunk_rows=1024, view=view)
    return Objective(drafter.eval(), target.frozen_head, attend, supervision).eval()


def _packs(
    recipe: EvalRecipe, target: Described, drafter: Drafter, queries: list[str], view: View | None = None
) -> Iterator[Pack]:
    """Raises UserError when no held-out document is long enough."""
    reader = CacheReader(recipe.cache.dir)
    names = drafter.config.tensors + queries
    span = recipe.span
    longest = recipe.score.pack_tokens
    validation = judging(reader)
    if span:
        longest = max(longest, span[1] + drafter.config.slots)
        lengths = reader.lengths[validation]
        validation = validation[lengths > span[0] + 1]
        if not len(validation):
            raise UserError(
                f"score.context={span[0]}: the longest held-out document of {recipe.cache.dir} has {lengths.max()} "
                "tokens, and a context needs two more than its own; capture with a larger data.max_length (and data.long=join)"
            )
    views = ViewDraws(lambda step, id: [view.budget], partial(_ages, recipe, view)) if view else None
    settings = StreamSettings(longest, recipe.score.anchors, recipe.seed, shuffle=False, views=views, span=span)
    stream = PackStream(reader, validation[: recipe.score.documents], names, settings)
    for indices in stream.passes(0):
        yield stream.read(indices).to(target.device)


def _ages(recipe: EvalRecipe, view: View, id: str, anchors: np.ndarray, pass_number: int) -> np.ndarray:
    """Of the selections that serve anchors: behind a context as in decoding, which selects first at its end; else as in
    training."""
    if recipe.span is None:
        return sample_ages(id, anchors, view.lasts, recipe.seed, pass_number)
    since = anchors - recipe.span[0]
    return since if view.refresh == "never" else since % view.lasts


class Score(NamedTuple):
    """`acceptance`: {"sampled": temperature 1, "greedy": temperature 0}; `kl`: nats a slot; `copies`: acceptance by copy distance
    (train/measure/copying.py); `apart`: tau apart for anchors whose drafts stay within the positions that the drafter knows and
    for those beyond (None: there are none beyond)."""

    acceptance: dict[str, acceptance.Acceptance]
    kl: float
    copies: dict[str, dict]
    apart: dict | None


@torch.no_grad()
def score(recipe: EvalRecipe, target: Described, drafter: Drafter) -> Score:
    view = view_of(recipe, drafter.config)
    known = known_positions(recipe, drafter.config)
    objective = _objective(recipe, target, drafter, training=False, view=view)
    total = copied = loss = slots = 0.0
    parts = {name: {"anchors": 0, "counts": 0.0} for name in ("within", "beyond")}
    for pack in _packs(recipe, target, drafter, [], view):
        outcome = objective(pack)
        total = total + acceptance.counts(outcome)[0].cpu()
        copied = copied + copying.counts(outcome, pack).cpu()
        loss = loss + float(outcome.share)
        slots = slots + int(outcome.valid.sum())
        if known is not None:
            beyond_N = pack.anchors.position + drafter.config.slots > known
            for name, here_N in (("within", ~beyond_N), ("beyond", beyond_N)):
                valid = outcome.valid & here_N[:, None]
                parts[name]["anchors"] += int(valid.any(1).sum())
                parts[name]["counts"] += acceptance.counts(outcome._replace(valid=valid))[0].cpu()
    if not slots:
        raise UserError(f"{recipe.cache.dir}: no drafted token of its held-out documents counts; they are too short")
    return Score(acceptance.summarise(total), loss / slots, copying.summarise(copied), _apart(known, parts))


def _apart(known: int | None, parts: dict[str, dict]) -> dict | None:
    if known is None or not parts["beyond"]["anchors"]:
        return None
    taus = lambda counts: {kind: one.tau for kind, one in acceptance.summarise(counts).items()}
    found = {name: {"anchors": part["anchors"], "tau": taus(part["counts"])} for name, part in parts.items() if part["anchors"]}
    return {"known": known, **found}


def diagnose(recipe: EvalRecipe, target: Target, drafter: Drafter) -> dict:
    """The figures of train/measure/diagnostics.py; gradients are those of the first pack's KL. Queries come from the cache
    where it holds them, else from the target, which then reads the documents again."""
    layers = sorted(set(drafter.config.query_layers))
    cached = set(layers) <= set(CacheReader(recipe.cache.dir).manifest.query_layers)
    packs = list(_packs(recipe, target, drafter, [f"query.{i}" for i in layers] if cached else []))
    if not cached:
        packs = [with_queries(pack, target, layers) for pack in packs]
    objective = _objective(recipe, target, drafter, training=True)
    found = diagnostics.diagnose(objective, packs)
    with product_counter() as counter, _Attended(drafter) as attended:
        objective(packs[0]).share.backward()
    compute = {"gflop_per_anchor": (counter.get_total_flops() + attended.flops()) / 1e9 / len(packs[0].anchor_N)}
    return found | {"gradients": diagnostics.gradients(drafter, int(objective.draft_rows(packs[0]))), "compute": compute}


def product_counter() -> FlopCounterMode:
    """Counts products, but none of attention: PyTorch 2.11's formulas refuse grouped heads."""
    nothing = {op: lambda *_, **__: 0 for op in flop_registry if "attention" in str(op)}
    return FlopCounterMode(display=False, custom_mapping=nothing)


class _Attended(Watch):
    """Counts what attention costs, forward and backward, over visible pairs alone: PyTorch's counter knows some kernels only, and
    counts every pair. Two products a pair forward and four backward, of 2 D operations each."""

    def flops(self) -> int:
        calls = (call for calls in self.calls.values() for call in calls)
        return sum(6 * 2 * q.shape[1] * q.shape[2] * int(visibility.dense.sum()) for q, *_, visibility in calls)


def with_queries(pack: Pack, target: Target, layers: list[int]) -> Pack:
    """The pack, of whole documents, with the queries that the target used for each teacher."""
    target.capture([], [], layers)
    found: dict[int, list] = {layer: [] for layer in layers}
    for document in range(int(pack.places.document.max()) + 1):
        here = pack.places.document == document
        teachers = pack.mask_P[here][1:].nonzero().squeeze(1)
        states = target.forward(pack.ids_P[here][None])
        for layer in layers:
            found[layer].append(states.query[layer][0, teachers])
    return replace(pack, query={layer: torch.cat(parts) for layer, parts in found.items()})
