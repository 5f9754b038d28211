"""Views: which positions of its memory a drafter may read under a budget.

A view of budget b shows an anchor at most b memory positions of its own document: the first ones (sinks), a tail of the last
ones, and between them the chunks that score best, chosen by every layer, branch and KV head for itself. Scores are taken at a
*selection*, which may lie before the anchor (`refresh`); what came since belongs to the tail, and the worst of the chosen chunks
give way to it, so that the budget holds. A budget at or above the context hides nothing.

Two functions carry a plan out. `mask` leaves the memory where it is and hides keys (`attention/visibility.py`): in training, with
many anchors and views in one forward. `gather` takes the visible keys out and gives each group of rows its own: decoding
(`eval/caches/sparse.py`), and training with in-cache positions, where the same key has another position for every anchor.

Shapes: N anchors, V views (budgets) of each, M = V x N groups, P memory positions, C chunks of all documents (of the longest one
where a group chooses among its own), G key/value heads, H query heads, D head size, W observed queries of an anchor, R observed
rows, K keys of a group.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from common.recipe import Section
from common.rules import obeying
from train.attention.visibility import Anchors, Places, Selection
from train.drafter.layers import KV
from train.drafter.memory import Memory
from train.rules import VIEW

FULL = 1 << 40  # a budget above every context
NEVER = 256  # refresh=never: how old a selection gets in training, in tokens (BudgetDraft's continuations)
SCORES = 1 << 26  # numbers of a tile of scores


class View(Section):
    """How memory positions are chosen. Sources: sink_recent, StreamingLLM; topk_chunk, TriForce, Quest, SpecPV and BudgetDraft;
    h2o, H2O with the attention of all queries so far summed in one look; snapkv, SnapKV averaged over a KV head's queries."""

    kind: Literal["auto", "full", "sink_recent", "topk_chunk", "h2o", "snapkv"]
    """How visible memory positions are chosen; auto (evaluation): as the drafter was trained."""
    budget: int | None = Field(None, ge=0)
    """Most memory positions that are visible. Training: null draws budgets. Evaluation: null and 0 show everything."""
    sink: int = Field(0, ge=0)
    """First positions, always visible."""
    recent: int | None = Field(None, ge=0)
    """Last positions, always visible; null: all that sinks leave (sink_recent), or half of that (h2o)."""
    chunk: int = Field(1, ge=1)
    """Positions per chunk; whole chunks are chosen."""
    scorer: Literal["mean", "lastkey", "minmax", "quest"] = "mean"
    """topk_chunk: score of a chunk, by its mean key (TriForce), last key (BudgetDraft) or bounds (SpecPV, Quest)."""
    pool: int = Field(1, ge=1)
    """snapkv: neighbouring positions whose scores are averaged."""
    positions: Literal["absolute", "in_cache"] = "absolute"
    """in_cache: number the visible keys one after the other, so that distances stay below the budget."""
    refresh: Literal["verify", "never"] | int = "verify"
    """When positions are chosen anew: every round (verify), every N verified tokens, or never after the prompt."""

    @model_validator(mode="before")
    @classmethod
    def _unsaid(cls, fields: dict) -> dict:
        return {k: v for k, v in fields.items() if v is not None} if fields.get("kind") == "auto" else fields

    @model_validator(mode="after")
    def _fits_together(self):
        return obeying(VIEW, self)

    @property
    def least(self) -> int:
        """The smallest budget that leaves something to choose."""
        return self.sink + (self.recent or 0) + self.chunk

    @property
    def too_small(self) -> str:
        others = f"{self.recent or 0} recent positions, and then chunks of {self.chunk}"
        others = "the last positions" if self.kind == "sink_recent" else others
        return f"view={self.kind} always shows {self.sink} sinks and {others}; the least budget is {self.least}"

    def tail_of(self, room):
        """How many of the positions that sinks leave of a budget are the tail's, at a selection."""
        if self.recent is not None:
            return self.recent
        return room if self.kind == "sink_recent" else room // 2

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


class Chunking(NamedTuple):
    """Memory positions by document. `first_D`, `position_D`: the row and the position of a document's first key. `index_P`: a key
    is the so manieth of its document, in the document's chunk index // size. All chunks, document by document: chunk c begins at
    index `start_C` of `document_C`; `before_D` stand before a document's own."""

    first_D: Tensor
    position_D: Tensor
    index_P: Tensor
    before_D: Tensor
    document_C: Tensor
    start_C: Tensor


def chunking(places: Places, size: int) -> Chunking:
    """Documents are numbered from 0, in order, and each has a key."""
    document, device = places.document, places.document.device
    lengths_D = torch.bincount(document)
    first_D = lengths_D.cumsum(0) - lengths_D
    chunks_D = -(-lengths_D // size)
    before_D = chunks_D.cumsum(0) - chunks_D
    document_C = torch.arange(len(lengths_D), device=device).repeat_interleave(chunks_D)
    start_C = (torch.arange(len(document_C), device=device) - before_D[document_C]) * size
    index_P = torch.arange(len(document), device=device) - first_D[document]
    return Chunking(first_D, places.position[first_D], index_P, before_D, document_C, start_C)


def _tail(view: View, room, since):
    """Index of the tail's first key at a selection among `since` keys: `recent` before it, at a chunk's edge."""
    return (since - view.tail_of(room)) // view.chunk * view.chunk


def layout(view: View, budget: Tensor, count: Tensor, since: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the tail's first key, how many chunks are chosen), for anchors with `count` keys before them, `since` of which
    were there at the selection. Sinks, tail and chunks are at most `budget`, or everything where that is enough."""
    room = budget - view.sink
    tail = torch.maximum(_tail(view, room, since), count - room)
    chosen = (room - (count - tail)) // view.chunk
    everything = count <= budget
    tail, chosen = (t.masked_fill(everything, 0) for t in (tail, chosen))
    visible = torch.where(everything, count, view.sink + view.chunk * chosen + count - tail)
    assert bool((visible <= budget).all()), "a view shows more than its budget"
    return tail, chosen


def reserve(view: View, budget: int, count: int) -> tuple[int, int]:
    """Of a selection among `count` keys: (index of the tail's first key, the most chunks that any anchor will be shown)."""
    room = budget - view.sink
    tail = max(0, _tail(view, room, count))
    return tail, max(0, min(room - view.tail_of(room), tail - view.sink) // view.chunk)


def ranked(scores_NGC: Tensor, chunks: Chunking, document_N: Tensor, view: View, tail_N: Tensor, most: int) -> Tensor:
    """The `most` best whole chunks of each anchor's document between sinks and tail, counted in the document, best first,
    [N, G, most]. Where there are fewer, what follows them means nothing."""
    inside = (chunks.document_C == document_N[:, None]) & (chunks.start_C >= view.sink)
    inside &= chunks.start_C + view.chunk <= tail_N[:, None]
    # Pooled scores tie: a stable order breaks ties alike in training and decoding.
    order = scores_NGC.masked_fill(~inside[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return order - chunks.before_D[document_N][:, None, None]


class Observed(NamedTuple):
    """Queries of rows of known tokens, [R, H, D], and for each row how many keys of which document it could read."""

    query_RHD: Tensor
    document_R: Tensor
    count_R: Tensor


def scores(
    view: View, key_PGD: Tensor, chunks: Chunking, document_N: Tensor, since_N: Tensor, observed: Observed | None
) -> Iterator[tuple[slice, Tensor]]:
    """(some anchors, their chunks' scores [n, G, C]), tile by tile, in float32 (snapkv: float64). `observed` holds each anchor's
    last W queries up to its selection, oldest first (h2o: the queries of all rows, in order).

    topk_chunk scores by the last query: `mean` q . mean(k) (TriForce); `lastkey` the same with the last key in place of the query
    (BudgetDraft); `minmax` max(q . max(k), q . min(k)) (SpecPV); `quest` sum_d max(q_d max(k)_d, q_d min(k)_d), a true bound.
    Queries that share a KV head are averaged.
    """
    key_PGD = key_PGD.float()
    if view.kind == "topk_chunk":
        yield from _summaries(view, key_PGD, chunks, document_N, since_N, observed)
    elif view.kind == "snapkv":
        yield from _snap(view, key_PGD, chunks, document_N, since_N, observed)
    else:
        yield from _heavy_hitters(key_PGD, chunks, document_N, since_N, observed)


def _tiles(count: int, size: int) -> Iterator[slice]:
    step = max(1, SCORES // max(1, size))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _summaries(view: View, key_PGD, chunks, document_N, since_N, observed):
    """By what a chunk's keys have in common: their mean, or the least and the greatest of each channel."""
    groups, sizes_D = key_PGD.shape[1], torch.diff(chunks.first_D, append=chunks.first_D.new_tensor([len(key_PGD)]))
    chunk_P = chunks.before_D.repeat_interleave(sizes_D) + chunks.index_P // view.chunk
    place_PGD = chunk_P[:, None, None].expand_as(key_PGD)
    empty_CGD = key_PGD.new_zeros(len(chunks.start_C), *key_PGD.shape[1:])
    summary = lambda how: empty_CGD.scatter_reduce(0, place_PGD, key_PGD, how, include_self=False)
    bound = view.scorer in ("minmax", "quest")
    low_CGD, high_CGD = (summary("amin"), summary("amax")) if bound else [summary("mean")] * 2
    if view.scorer == "lastkey":
        query_NHD = key_PGD[chunks.first_D[document_N] + (since_N - 1).clamp(min=0)]
    else:
        query_NHD = observed.query_RHD.float()
    product = lambda q, k_CGD: torch.einsum("ngjd,cgd->ngjc", q, k_CGD)
    for part in _tiles(len(document_N), query_NHD.shape[1] * len(chunks.start_C)):
        q = query_NHD[part].unflatten(1, (groups, -1))
        if view.scorer == "quest":
            found = product(q.clamp(min=0), high_CGD) + product(q.clamp(max=0), low_CGD)
        elif view.scorer == "minmax":
            found = torch.maximum(product(q, high_CGD), product(q, low_CGD))
        else:
            found = product(q, high_CGD)
        yield part, found.mean(2)


def _attention(observed: Observed, part: slice, key_PGD: Tensor, chunks: Chunking) -> Tensor:
    """Softmax of rows `part` over the keys that each could read, averaged over the queries of a KV head, [r, G, P]; zero for a
    row that could read none."""
    query = observed.query_RHD[part].float().unflatten(1, (key_PGD.shape[1], -1)) * key_PGD.shape[2] ** -0.5
    first_R = chunks.first_D[observed.document_R[part]][:, None]
    row_P = torch.arange(len(key_PGD), device=key_PGD.device)
    readable = (row_P >= first_R) & (row_P < first_R + observed.count_R[part, None])
    products = torch.einsum("rgjd,pgd->rgjp", query, key_PGD)
    weights = products.masked_fill(~readable[:, None, None], -torch.inf).softmax(-1)
    return weights.masked_fill(~readable.any(1)[:, None, None, None], 0).mean(2)


def votes(observed: Observed, key_PGD: Tensor, chunks: Chunking) -> Tensor:
    """Attention that each key gets from all rows, [G, P]."""
    parts = _tiles(len(observed.document_R), observed.query_RHD.shape[1] * len(key_PGD))
    return sum(_attention(observed, part, key_PGD, chunks).sum(0) for part in parts)


def _snap(view: View, key_PGD, chunks, document_N, since_N, observed):
    """Attention of the last queries, their own positions left out, pooled over neighbours."""
    window = view.recent
    for part in _tiles(len(document_N), window * observed.query_RHD.shape[1] * len(key_PGD)):
        rows = slice(part.start * window, part.stop * window)
        votes = _attention(observed, rows, key_PGD, chunks).unflatten(0, (-1, window)).sum(1)
        votes = votes.masked_fill((chunks.index_P >= (since_N[part] - window)[:, None])[:, None], 0)
        # Neighbours share all but their outermost votes, which float32 would lose beside a large one.
        yield part, F.avg_pool1d(votes.double(), view.pool, stride=1, padding=view.pool // 2)


def _heavy_hitters(key_PGD, chunks, document_N, since_N, observed):
    """Attention that every key has got by the selection. Rows are looked at in order: a running sum serves all anchors."""
    total_GP = key_PGD.new_zeros(key_PGD.shape[1], len(key_PGD))
    done = torch.zeros_like(document_N, dtype=torch.bool)
    # Anchor n has seen the rows of its document that could read no more than what was there at the selection.
    for rows in _tiles(len(observed.document_R), observed.query_RHD.shape[1] * len(key_PGD)):
        weights = _attention(observed, rows, key_PGD, chunks)
        document_R, count_R = observed.document_R[rows], observed.count_R[rows]
        last, count = document_R[-1], count_R[-1]
        here = ~done & ((document_N < last) | ((document_N == last) & (since_N <= count)))
        at = here.nonzero().squeeze(1)
        for part in (at[some] for some in _tiles(len(at), total_GP.numel())):
            seen = (document_R == document_N[part, None]) & (count_R <= since_N[part, None])
            yield part, total_GP + torch.einsum("nr,rgp->ngp", seen.float(), weights)
        done |= here
        total_GP += weights.sum(0)


Plan = list[dict[str, Selection]]  # what a view leaves, for each layer and branch
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
        chunks = chunking(places, view.chunk)
        longest = int(chunks.start_C.max()) // view.chunk + 1
        count_N = anchors.position - chunks.position_D[anchors.document]
        tail_VN, number_VN = layout(view, budget_VN, count_N, count_N - age_N)
        some = (number_VN > 0).any(0).nonzero().squeeze(1)  # anchors that leave something to choose
        for layer, kinds in enumerate(memory.layers):
            key_PGD = kinds[branch].key
            chosen_VNGC = key_PGD.new_zeros(*budget_VN.shape, key_PGD.shape[1], longest, dtype=torch.bool)
            if len(some):
                observed = queries and _observed(queries[layer][branch], seats, chunks, view.window, some)
                found_scores = scores(view, key_PGD, chunks, anchors.document[some], (count_N - age_N)[some], observed)
                for part, scores_NGC in found_scores:
                    for chosen_NGC, tail_N, number_N in zip(chosen_VNGC, tail_VN, number_VN):
                        at = some[part]
                        chosen_NGC[at] = _chosen(
                            scores_NGC, chunks, anchors.document[at], view, tail_N[at], number_N[at], longest
                        )
            found[layer][branch] = Selection(chunks.index_P, view.chunk, view.sink, tail_VN.flatten(), chosen_VNGC.flatten(0, 1))
    return found


def _observed(query_RHD: Tensor, seats: Places, chunks: Chunking, window: int | None, some: Tensor) -> Observed:
    """The rows of some anchors (of all, where every row looks at every anchor's memory)."""
    found = Observed(query_RHD, seats.document, seats.position - chunks.position_D[seats.document])
    return found if window is None else Observed(*(t.unflatten(0, (-1, window))[some].flatten(0, 1) for t in found))


def _chosen(scores_NGC, chunks: Chunking, document_N, view: View, tail_N, number_N, longest: int) -> Tensor:
    """bool [N, G, longest]: the `number_N` best chunks of each anchor's document."""
    chosen_NGC = scores_NGC.new_zeros(*scores_NGC.shape[:2], longest, dtype=torch.bool)
    most = int(number_N.max())
    if most:
        order_NGK = ranked(scores_NGC, chunks, document_N, view, tail_N, most)
        kept_NGK = (torch.arange(most, device=order_NGK.device) < number_N[:, None])[:, None].expand_as(order_NGK)
        n, g, _ = kept_NGK.nonzero(as_tuple=True)
        chosen_NGC[n, g, order_NGK[kept_NGK]] = True
    return chosen_NGC


def gather(memory: Memory, found: Plan, anchors: Anchors, rotate: Callable[[Tensor, Tensor], Tensor]) -> tuple[Memory, Anchors]:
    """The visible keys of every group, taken out: each group becomes a document of its own, in which visible keys stand one
    behind the other and the anchor behind the last (in-cache positions).

    Args:
        rotate: (keys [K, G, D], by how many positions [K, G]) -> keys that stand elsewhere.
    """
    groups = torch.arange(len(anchors.index), device=anchors.index.device)
    grounds = {branch: chunking(places, 1) for branch, places in memory.places.items()}
    before_M = {branch: anchors.position - g.position_D[anchors.document] for branch, g in grounds.items()}
    count_M = {branch: _visible(found[0][branch], before_M[branch]) for branch in grounds}  # alike for all layers
    end_M = torch.stack([count_M[branch] + g.position_D[anchors.document] for branch, g in grounds.items()]).amax(0)
    out = Memory([{} for _ in memory.layers], {}, memory.feature)
    for branch, places in memory.places.items():
        slot_K = torch.arange(int(count_M[branch].max()), device=groups.device)
        slot_MK, there_MK = (end_M - count_M[branch])[:, None] + slot_K, slot_K < count_M[branch][:, None]
        for layer, kinds in enumerate(memory.layers):
            index_MKG = _indices(found[layer][branch], slot_K)
            row_MKG = (grounds[branch].first_D[anchors.document][:, None, None] + index_MKG).where(there_MK[..., None], 0)
            head_G = torch.arange(row_MKG.shape[2], device=groups.device)
            key, value = (t[row_MKG, head_G].flatten(0, 1) for t in kinds[branch])
            moved = slot_MK[..., None] - places.position[row_MKG]
            out.layers[layer][branch] = KV(rotate(key, moved.flatten(0, 1)), value)
        # A key that is not there, where a group has fewer than another, stands where no anchor sees it.
        position = torch.where(there_MK, slot_MK, torch.iinfo(torch.int64).max).flatten()
        out.places[branch] = Places(groups.repeat_interleave(len(slot_K)), position)
    return out, Anchors(anchors.index, groups, end_M)


def _sizes(selection: Selection) -> tuple[Tensor, Tensor]:
    """Of each group [M]: (its sinks, positions of its chosen chunks). A tail that begins at the first key holds the sinks."""
    return torch.where(selection.tail_M > 0, selection.sink, 0), selection.chunk * selection.chosen_MGC[:, 0].sum(-1)


def _visible(selection: Selection, before_M: Tensor) -> Tensor:
    """How many of the `before_M` keys before its anchor each group is shown, [M]."""
    return sum(_sizes(selection)) + before_M - selection.tail_M


def _indices(selection: Selection, slot_K: Tensor) -> Tensor:
    """Which key of its document stands in each slot, in order, [M, K, G]: sinks, chosen chunks, tail."""
    lead_M, picked_M = _sizes(selection)
    # Chunks that are chosen, in order, before all others.
    order_MGC = selection.chosen_MGC.byte().argsort(dim=-1, descending=True, stable=True)
    in_chunks_MK = slot_K - lead_M[:, None]
    chunk_MKG = (in_chunks_MK // selection.chunk).clamp(0, order_MGC.shape[2] - 1)[..., None].expand(-1, -1, order_MGC.shape[1])
    picked_MKG = order_MGC.transpose(1, 2).gather(1, chunk_MKG) * selection.chunk + (in_chunks_MK % selection.chunk)[..., None]
    tail_MK = selection.tail_M[:, None] + in_chunks_MK - picked_M[:, None]
    rest_MKG = torch.where((in_chunks_MK < picked_M[:, None])[..., None], picked_MKG, tail_MK[..., None])
    return torch.where((slot_K < lead_M[:, None])[..., None], slot_K[:, None], rest_MKG)
