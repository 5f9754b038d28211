"""Views: which positions of its memory a drafter may read under a budget.

A view of budget b shows an anchor at most b memory positions of its own document: the first ones (sinks), a tail of the last ones,
and between them the chunks that score best, chosen by every layer, branch and KV head for itself. Scores are taken at a
*selection*, which may lie before the anchor (`refresh`); what came since belongs to the tail, and the worst of the chosen chunks
give way to it, so that the budget holds. A budget at or above the context hides nothing.

One plan has two executors. `mask` leaves the memory where it is and hides keys (`attention/visibility.py`): training, with many
anchors and several views in one forward. `gather` takes the visible keys out and gives each group of rows its own: decoding
(`eval/sparse_cache.py`), and training with in-cache positions, where the same key has another position for every anchor.

Shapes: N anchors, V views (budgets) of each, M = V x N groups, P memory positions, C chunks of all documents, G key/value heads,
H query heads, D head size, W observed queries of an anchor, K keys of a group.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from data_prep.recipe import Section
from train.attention.visibility import Anchors, Places, Shown, in_view, sees_memory
from train.drafter.layers import KV
from train.drafter.memory import Memory

FULL = 1 << 40  # a budget above every context
NEVER = 256  # refresh=never: how old a selection gets in training, in tokens (BudgetDraft's continuations)
SCORES = 1 << 26  # numbers of a tile of scores


class View(Section):
    """How memory positions are chosen. Sources: sink_recent, StreamingLLM; topk_chunk, TriForce, Quest, SpecPV and BudgetDraft;
    h2o, H2O with the attention of all queries so far summed in one look; snapkv, SnapKV averaged over a KV head's queries."""

    kind: Literal["auto", "full", "sink_recent", "topk_chunk", "h2o", "snapkv"]  # auto (eval): as the drafter was trained
    budget: int | None = Field(None, ge=0)  # memory positions; eval: null and 0 show everything
    sink: int = Field(0, ge=0)
    recent: int | None = Field(None, ge=0)  # of the tail, at least; null: all that sinks leave (sink_recent), half of it (h2o)
    chunk: int = Field(1, ge=1)
    scorer: Literal["mean", "lastkey", "minmax", "quest"] = "mean"
    pool: int = Field(1, ge=1)  # snapkv: neighbouring positions whose scores are averaged
    positions: Literal["absolute", "in_cache"] = "absolute"
    refresh: Literal["verify", "never"] | int = (
        "verify"  # select anew: in every round, never after the prompt, every so many tokens
    )

    @model_validator(mode="after")
    def _fits_together(self):
        if isinstance(self.refresh, int) and self.refresh < 1:
            raise ValueError(f"view.refresh={self.refresh}: a selection lasts 1 token or more; or verify, or never")
        if self.kind == "full" and self.budget:
            raise ValueError("view=full shows everything; view.budget is for the other views (0: everything)")
        if self.sink % self.chunk:
            raise ValueError(f"view.sink={self.sink} is not whole chunks of view.chunk={self.chunk}")
        if self.kind in ("topk_chunk", "snapkv") and self.recent is None:
            raise ValueError(f"view={self.kind} needs view.recent, the positions that are always visible")
        if self.kind == "sink_recent" and self.recent is not None:
            raise ValueError("view=sink_recent shows all that its sinks leave of the budget; it has no view.recent")
        if self.kind == "snapkv" and not (self.recent and self.pool % 2):
            raise ValueError("view=snapkv observes the last view.recent queries (1 or more), and view.pool is odd")
        if self.budget and self.kind not in ("auto", "full") and self.budget < self.least:
            raise ValueError(f"view.budget={self.budget}: {self.too_small}")
        return self

    @property
    def least(self) -> int:
        """The smallest budget that leaves something to choose."""
        return self.sink + (self.recent or 0) + self.chunk

    @property
    def too_small(self) -> str:
        return f"view={self.kind} always shows {self.sink} sinks and {self.recent or 0} recent positions, and then chunks of " + (
            f"{self.chunk}; the least budget is {self.least}"
        )

    @property
    def window(self) -> int | None:
        """How many of the last queries choose; None: all of them."""
        if self.kind == "topk_chunk":
            return int(self.scorer != "lastkey")
        return {"snapkv": self.recent, "h2o": None}.get(self.kind, 0)

    @property
    def lasts(self) -> int:
        """A selection serves anchors up to so many tokens behind it, in training."""
        return {"verify": 1, "never": NEVER}.get(self.refresh, self.refresh)


class Ground(NamedTuple):
    """Memory positions by document: `first_D`, `position_D` are the row and the position of its first key; a key is the
    `index_P`-th of its document and in chunk `chunk_P`; chunk c begins at index `start_C` of `document_C`."""

    first_D: Tensor
    position_D: Tensor
    index_P: Tensor
    chunk_P: Tensor
    document_C: Tensor
    start_C: Tensor


def ground(places: Places, chunk: int) -> Ground:
    """Documents are numbered from 0, in order, and each has a key."""
    document, device = places.document, places.document.device
    lengths_D = torch.bincount(document)
    first_D = lengths_D.cumsum(0) - lengths_D
    index_P = torch.arange(len(document), device=device) - first_D[document]
    chunks_D = -(-lengths_D // chunk)
    before_D = chunks_D.cumsum(0) - chunks_D
    document_C = torch.arange(len(lengths_D), device=device).repeat_interleave(chunks_D)
    start_C = (torch.arange(len(document_C), device=device) - before_D[document_C]) * chunk
    return Ground(first_D, places.position[first_D], index_P, before_D[document] + index_P // chunk, document_C, start_C)


def layout(view: View, budget: Tensor, count: Tensor, since: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the tail's first key, how many chunks are chosen), for anchors with `count` keys before them, `since` of which
    were there at the selection. Sinks, tail and chunks are at most `budget`, or everything where that is enough."""
    room = budget - view.sink
    recent = view.recent if view.recent is not None else room if view.kind == "sink_recent" else room // 2
    tail = (since - recent).div(view.chunk, rounding_mode="floor") * view.chunk
    tail = torch.maximum(tail, count - room)
    chosen = (room - (count - tail)) // view.chunk
    everything = count <= budget
    tail, chosen = (t.masked_fill(everything, 0) for t in (tail, chosen))
    visible = torch.where(everything, count, view.sink + view.chunk * chosen + count - tail)
    assert bool((visible <= budget).all()), "a view shows more than its budget"
    return tail, chosen


def reserve(view: View, budget: int, count: int) -> tuple[int, int]:
    """(index of the tail's first key, the most chunks that any anchor served by it is shown) of a selection with `count` keys."""
    room = budget - view.sink
    recent = view.recent if view.recent is not None else room if view.kind == "sink_recent" else room // 2
    tail = max(0, (count - recent) // view.chunk * view.chunk)
    return tail, max(0, min((room - recent) // view.chunk, (tail - view.sink) // view.chunk))


def ranked(scores_NGC: Tensor, land: Ground, document_N: Tensor, view: View, tail_N: Tensor, most: int) -> Tensor:
    """The `most` best whole chunks of each anchor's document between sinks and tail, best first, [N, G, most]. Where there are fewer,
    others follow them."""
    inside = (land.document_C == document_N[:, None]) & (land.start_C >= view.sink)
    inside &= land.start_C + view.chunk <= tail_N[:, None]
    # Pooled scores tie: a stable order breaks ties alike in training and decoding.
    return scores_NGC.masked_fill(~inside[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :most]


def choose(scores_NGC: Tensor, land: Ground, document_N: Tensor, view: View, tail_N: Tensor, count_N: Tensor) -> Tensor:
    """bool [N, G, C]: the `count_N` best chunks."""
    chosen_NGC, most = torch.zeros_like(scores_NGC, dtype=torch.bool), int(count_N.max())
    if most:
        order = ranked(scores_NGC, land, document_N, view, tail_N, most)
        kept = torch.arange(most, device=order.device) < count_N[:, None]
        chosen_NGC.scatter_(2, order, kept[:, None].expand_as(order))
    return chosen_NGC


class Observed(NamedTuple):
    """Queries of rows of known tokens, [R, H, D], and for each row how many keys of which document it could read."""

    query_RHD: Tensor
    document_R: Tensor
    count_R: Tensor


def scores(
    view: View, key_PGD: Tensor, land: Ground, document_N: Tensor, since_N: Tensor, observed: Observed | None
) -> Iterator[tuple[slice, Tensor]]:
    """(some anchors, their chunks' scores [n, G, C] in float32), tile by tile. A chunk is scored by the keys that stood there at
    the selection; `observed` holds each anchor's last W queries, oldest first (h2o: the queries of all rows, in order).

    topk_chunk scores by the last query: `mean` q . mean(k) (TriForce); `lastkey` the same with the last key in place of the query
    (BudgetDraft); `minmax` max(q . max(k), q . min(k)) (SpecPV); `quest` sum_d max(q_d max(k)_d, q_d min(k)_d), a true bound.
    Queries that share a KV head are averaged.
    """
    key_PGD = key_PGD.float()
    if view.kind == "topk_chunk":
        yield from _summaries(view, key_PGD, land, document_N, since_N, observed)
    elif view.kind == "snapkv":
        yield from _snap(view, key_PGD, land, document_N, since_N, observed)
    else:
        yield from _heavy_hitters(key_PGD, land, document_N, since_N, observed)


def _tiles(count: int, size: int) -> Iterator[slice]:
    step = max(1, SCORES // max(1, size))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _summaries(view, key_PGD, land, document_N, since_N, observed):
    chunks, (_, groups, size) = len(land.start_C), key_PGD.shape
    place_PGD = land.chunk_P[:, None, None].expand_as(key_PGD)
    summary = lambda how: key_PGD.new_zeros(chunks, groups, size).scatter_reduce_(0, place_PGD, key_PGD, how, include_self=False)
    if view.scorer in ("mean", "lastkey"):
        low_CGD = high_CGD = summary("mean")
    else:
        low_CGD, high_CGD = summary("amin"), summary("amax")
    if view.scorer == "lastkey":
        query_NHD = key_PGD[land.first_D[document_N] + (since_N - 1).clamp(min=0)]
    else:
        query_NHD = observed.query_RHD.float()
    query_NGJD = query_NHD.unflatten(1, (groups, -1))
    for part in _tiles(len(document_N), query_NHD.shape[1] * chunks):
        q = query_NGJD[part]
        product = lambda q, k: torch.einsum("ngjd,cgd->ngjc", q, k)
        if view.scorer == "quest":
            found = product(q.clamp(min=0), high_CGD) + product(q.clamp(max=0), low_CGD)
        elif view.scorer == "minmax":
            found = torch.maximum(product(q, high_CGD), product(q, low_CGD))
        else:
            found = product(q, high_CGD)
        yield part, found.mean(2)


def _attention(observed: Observed, part: slice, key_PGD: Tensor, land: Ground) -> Tensor:
    """Softmax of rows `part` over the keys that each could read, averaged over the queries of a KV head, [r, G, P]; zero for a row
    that could read none."""
    query = observed.query_RHD[part].float().unflatten(1, (key_PGD.shape[1], -1)) * key_PGD.shape[2] ** -0.5
    readable = (land.document_C[land.chunk_P] == observed.document_R[part, None]) & (land.index_P < observed.count_R[part, None])
    products = torch.einsum("rgjd,pgd->rgjp", query, key_PGD)
    weights = products.masked_fill(~readable[:, None, None], -torch.inf).softmax(-1)
    return weights.masked_fill(~readable.any(1)[:, None, None, None], 0).mean(2)


def votes(observed: Observed, key_PGD: Tensor, land: Ground) -> Tensor:
    """Attention that each key gets from all rows, [G, P]."""
    parts = _tiles(len(observed.document_R), observed.query_RHD.shape[1] * len(key_PGD))
    return sum(_attention(observed, part, key_PGD, land).sum(0) for part in parts)


def _snap(view, key_PGD, land, document_N, since_N, observed):
    window = view.recent
    for part in _tiles(len(document_N), window * observed.query_RHD.shape[1] * len(key_PGD)):
        rows = slice(part.start * window, part.stop * window)
        votes = _attention(observed, rows, key_PGD, land).unflatten(0, (-1, window)).sum(1)
        votes = votes.masked_fill((land.index_P >= (since_N[part] - window)[:, None])[:, None], 0)
        yield part, F.avg_pool1d(votes, view.pool, stride=1, padding=view.pool // 2)


def _heavy_hitters(key_PGD, land, document_N, since_N, observed):
    """Attention that every key has got by the selection. Rows are looked at in order, so that a running sum serves all anchors."""
    total_GP = key_PGD.new_zeros(key_PGD.shape[1], len(key_PGD))
    done = torch.zeros_like(document_N, dtype=torch.bool)
    # Anchor n has seen the rows of its document that could read no more than what was there at the selection.
    for rows in _tiles(len(observed.document_R), observed.query_RHD.shape[1] * len(key_PGD)):
        weights = _attention(observed, rows, key_PGD, land)
        document_R, count_R = observed.document_R[rows], observed.count_R[rows]
        last = torch.stack([document_R[-1], count_R[-1]])
        here = ~done & ((document_N < last[0]) | ((document_N == last[0]) & (since_N <= last[1])))
        for part in here.nonzero().squeeze(1).split(max(1, SCORES // total_GP.numel())):
            seen = (document_R == document_N[part, None]) & (count_R <= since_N[part, None])
            yield part, total_GP + torch.einsum("nr,rgp->ngp", seen.float(), weights)
        done |= here
        total_GP += weights.sum(0)


Plan = list[dict[str, Shown]]  # what a view leaves, for each layer and branch
Observer = Callable[[int | None], tuple[list[dict[str, Tensor]], Places]]  # see `plan`


@torch.no_grad()
def plan(view: View, memory: Memory, anchors: Anchors, age_N: Tensor | None, budget_VN: Tensor, observe: Observer) -> Plan:
    """What each of M = V x N groups is shown, the groups of one view after those of another.

    Args:
        age_N: tokens since the selection; None: it is made at the anchor.
        budget_VN: memory positions.
        observe: W -> (for each layer and branch the queries [R, H, D] of the W tokens up to each selection, oldest first, or of
            every token in order (None); where they sit).
    """
    age_N = torch.zeros_like(anchors.position) if age_N is None else age_N
    queries, seats = observe(view.window) if view.window != 0 else (None, None)
    found: Plan = [{} for _ in memory.layers]
    for branch, places in memory.places.items():
        land = ground(places, view.chunk)
        count_N = anchors.position - land.position_D[anchors.document]
        since_N = count_N - age_N
        tail_VN, chosen_VN = layout(view, budget_VN, count_N, since_N)
        for layer, kinds in enumerate(memory.layers):
            key_PGD = kinds[branch].key
            chosen_VNGC = torch.zeros(
                *budget_VN.shape, key_PGD.shape[1], len(land.start_C), dtype=torch.bool, device=key_PGD.device
            )
            if bool(chosen_VN.any()):
                observed = queries and Observed(
                    queries[layer][branch], seats.document, seats.position - land.position_D[seats.document]
                )
                for part, some in scores(view, key_PGD, land, anchors.document, since_N, observed):
                    for chosen_NGC, tail_N, number_N in zip(chosen_VNGC, tail_VN, chosen_VN):
                        chosen_NGC[part] = choose(some, land, anchors.document[part], view, tail_N[part], number_N[part])
            found[layer][branch] = Shown(land.index_P, land.chunk_P, view.sink, tail_VN.flatten(), chosen_VNGC.flatten(0, 1))
    return found


def gather(memory: Memory, found: Plan, anchors: Anchors, rotate: Callable[[Tensor, Tensor], Tensor]) -> tuple[Memory, Anchors]:
    """The visible keys of every group, taken out: each group becomes a document of its own, in which visible keys stand one behind
    the other and the anchor behind the last (in-cache positions). `rotate`(keys [K, G, D], by so many positions [K, G])."""
    document_M, anchor_M = anchors.document, anchors.position
    kept, room = {}, torch.zeros_like(anchor_M)
    for branch, places in memory.places.items():
        before_MP = sees_memory(document_M[:, None], anchor_M[:, None], places.document, places.position)
        first_M = places.position[(places.document == document_M[:, None]).int().argmax(1)]
        for layer, kinds in enumerate(memory.layers):
            s = found[layer][branch]
            visible_MGP = before_MP[:, None] & in_view(s.index_P, s.sink, s.tail_M[:, None, None], s.chosen_MGC[..., s.chunk_P])
            kept[layer, branch] = _indices(visible_MGP)
        count_M = visible_MGP[:, 0].sum(1)  # alike for all heads and layers
        kept[branch] = count_M
        room = torch.maximum(room, count_M + first_M)
    out = Memory([{} for _ in memory.layers], {}, memory.feature)
    groups = torch.arange(len(anchor_M), device=anchor_M.device)
    for branch, places in memory.places.items():
        count_M = kept[branch]
        slot_K = torch.arange(int(count_M.max()), device=anchor_M.device)
        slot_MK = (room - count_M)[:, None] + slot_K
        there_MK = slot_K < count_M[:, None]
        for layer, kinds in enumerate(memory.layers):
            index_MKG = kept[layer, branch]
            head = torch.arange(index_MKG.shape[2], device=anchor_M.device)
            key, value = (t[index_MKG, head].flatten(0, 1) for t in kinds[branch])
            moved = slot_MK[..., None] - places.position[index_MKG]
            out.layers[layer][branch] = KV(rotate(key, moved.flatten(0, 1)), value)
        # A key that is not there stands where no anchor sees it.
        out.places[branch] = Places(
            groups.repeat_interleave(len(slot_K)), torch.where(there_MK, slot_MK, torch.iinfo(torch.int64).max).flatten()
        )
    return out, Anchors(anchors.index, groups, room)


def _indices(visible_MGP: Tensor) -> Tensor:
    """Positions of the visible keys in order, [M, K, G]; rows with fewer than others end with zeros."""
    m, g, p = visible_MGP.nonzero(as_tuple=True)
    slot = visible_MGP.cumsum(-1, dtype=torch.int32)[m, g, p] - 1
    index_MGK = torch.zeros(*visible_MGP.shape[:2], int(slot.max()) + 1 if len(slot) else 0, dtype=torch.long, device=m.device)
    index_MGK[m, g, slot.long()] = p
    return index_MGK.transpose(1, 2)
