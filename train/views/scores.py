"""How chunks of memory are scored by what the drafter asks, and their order.

Decoding in batches scores by the same functions over keys that stand elsewhere (`eval/caches/budgeted.py`): `summary_scores`,
`attention`, `pooled` and `best_first`.

Shapes: N anchors, P memory positions, C chunks of all documents, G key/value heads, H query heads, D head size, W observed
queries of an anchor, R observed rows, M memories (of one anchor each, or one for all of them), S query heads of a KV head.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.views.layout import Chunking
from train.views.recipe import View

SCORES = 1 << 26  # numbers of a tile of scores


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
        yield from _summary_scores(view, key_PGD, chunks, document_N, since_N, observed)
    elif view.kind == "snapkv":
        yield from _window_scores(view, key_PGD, chunks, document_N, since_N, observed)
    else:
        yield from _summed_votes(key_PGD, chunks, document_N, since_N, observed)


def tiles(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` items with `size` numbers each, as many items per slice as fit a tile of scores."""
    step = max(1, SCORES // max(1, size))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _summary_scores(view: View, key_PGD, chunks, document_N, since_N, observed):
    """By what a chunk's keys have in common: their mean, or the least and the greatest of each channel."""
    # 1. A summary of each chunk's keys.
    groups = key_PGD.shape[1]
    sizes_D = torch.diff(chunks.first_D, append=chunks.first_D.new_tensor([len(key_PGD)]))
    chunk_P = chunks.before_D.repeat_interleave(sizes_D) + chunks.index_P // view.chunk
    place_PGD = chunk_P[:, None, None].expand_as(key_PGD)
    empty_CGD = key_PGD.new_zeros(len(chunks.start_C), *key_PGD.shape[1:])

    summaries = [empty_CGD.scatter_reduce(0, place_PGD, key_PGD, how, include_self=False)[None] for how in summarised(view)]
    # 2. The query that each anchor scores by.
    if view.scorer == "lastkey":
        query_NHD = key_PGD[chunks.first_D[document_N] + (since_N - 1).clamp(min=0)]
    else:
        query_NHD = observed.query_RHD.float()

    # 3. Scores. Those of chunks of other documents mean nothing (see `ranked`).
    for part in tiles(len(document_N), query_NHD.shape[1] * len(chunks.start_C)):
        yield part, summary_scores(view, query_NHD[part].unflatten(1, (groups, -1)), *summaries)


def summarised(view: View) -> list[str]:
    """What is kept of a chunk's keys, channel by channel, as PyTorch names it."""
    return ["amin", "amax"] if view.scorer in ("minmax", "quest") else ["mean"]


def summary_scores(view: View, query_NGSD: Tensor, low_MCGD: Tensor, high_MCGD: Tensor | None = None) -> Tensor:
    """Of each chunk by its summaries (`summarised`), averaged over the queries that share a KV head, [N, G, C]."""

    def product(query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("ngsd,ncgd->ngsc", query, key)

    if view.scorer == "quest":
        found = product(query_NGSD.clamp(min=0), high_MCGD) + product(query_NGSD.clamp(max=0), low_MCGD)
    elif view.scorer == "minmax":
        found = torch.maximum(product(query_NGSD, high_MCGD), product(query_NGSD, low_MCGD))
    else:
        found = product(query_NGSD, low_MCGD)
    return found.mean(2)


def attention(query_MRHD: Tensor, key_MPGD: Tensor, readable_MRP: Tensor) -> Tensor:
    """Softmax of rows over the keys that each could read, averaged over the queries of a KV head, [M, R, G, P], in float32; zero
    for a row that could read none."""
    query = query_MRHD.float().unflatten(2, (key_MPGD.shape[2], -1)) * key_MPGD.shape[3] ** -0.5
    products = torch.einsum("mrgsd,mpgd->mrgsp", query, key_MPGD.float())
    weights = products.masked_fill(~readable_MRP[:, :, None, None], -torch.inf).softmax(-1)
    # The softmax of nothing is NaN.
    return weights.masked_fill(~readable_MRP.any(2)[:, :, None, None, None], 0).mean(3)


def _attention(observed: Observed, part: slice, key_PGD: Tensor, chunks: Chunking) -> Tensor:
    """That of rows `part`, [r, G, P]."""
    first_R = chunks.first_D[observed.document_R[part]][:, None]
    row_P = torch.arange(len(key_PGD), device=key_PGD.device)
    # A row reads what its document had when the row was made: an attention over later keys would know the future.
    readable_RP = (row_P >= first_R) & (row_P < first_R + observed.count_R[part, None])
    return attention(observed.query_RHD[part][None], key_PGD[None], readable_RP[None])[0]


def votes(observed: Observed, key_PGD: Tensor, chunks: Chunking) -> Tensor:
    """Attention that each key gets from all rows, [G, P]."""
    parts = tiles(len(observed.document_R), observed.query_RHD.shape[1] * len(key_PGD))
    return sum(_attention(observed, part, key_PGD, chunks).sum(0) for part in parts)


def _window_scores(view: View, key_PGD, chunks, document_N, since_N, observed):
    """Attention of the last queries, their own positions left out, pooled over neighbours."""
    window = view.recent
    for part in tiles(len(document_N), window * observed.query_RHD.shape[1] * len(key_PGD)):
        rows = slice(part.start * window, part.stop * window)
        votes_NGP = _attention(observed, rows, key_PGD, chunks).unflatten(0, (-1, window)).sum(1)
        yield part, pooled(view, votes_NGP, chunks.index_P, since_N[part])


def pooled(view: View, votes_NGP: Tensor, index_P: Tensor, since_N: Tensor) -> Tensor:
    """The mean of each key's votes and its neighbours', in float64."""
    # The observed rows' own positions are in the tail, which is visible in any case.
    votes_NGP = votes_NGP.masked_fill((index_P >= (since_N - view.recent)[:, None])[:, None], 0)
    # Neighbours share all but their outermost votes, which float32 would lose beside a large one.
    return F.avg_pool1d(votes_NGP.double(), view.pool, stride=1, padding=view.pool // 2)


def _summed_votes(key_PGD, chunks, document_N, since_N, observed):
    """Attention that every key has got by the selection. Rows are looked at in order: a running sum serves all anchors."""
    total_GP = key_PGD.new_zeros(key_PGD.shape[1], len(key_PGD))
    done = torch.zeros_like(document_N, dtype=torch.bool)
    # Anchor n has seen the rows of its document that could read no more than what was there at the selection.
    for rows in tiles(len(observed.document_R), observed.query_RHD.shape[1] * len(key_PGD)):
        weights = _attention(observed, rows, key_PGD, chunks)
        document_R = observed.document_R[rows]
        count_R = observed.count_R[rows]
        last = document_R[-1]
        count = count_R[-1]
        # Anchors whose selection lies in this tile of rows: they get the sum up to here, and of this tile the rows that they saw.
        here = ~done & ((document_N < last) | ((document_N == last) & (since_N <= count)))
        at = here.nonzero().squeeze(1)
        for some in tiles(len(at), total_GP.numel()):
            part = at[some]
            seen = (document_R == document_N[part, None]) & (count_R <= since_N[part, None])
            yield part, total_GP + torch.einsum("nr,rgp->ngp", seen.float(), weights)
        done |= here
        total_GP += weights.sum(0)


def ranked(scores_NGC: Tensor, chunks: Chunking, document_N: Tensor, view: View, tail_N: Tensor, most: int) -> Tensor:
    """The `most` best whole chunks of each anchor's document between sinks and tail, counted in the document, best first,
    [N, G, most]. Where there are fewer, what follows them means nothing."""
    own_NC = chunks.document_C == document_N[:, None]
    order_NGC = best_first(scores_NGC.masked_fill(~own_NC[:, None], -torch.inf), chunks.start_C, view, tail_N)
    return order_NGC[..., :most] - chunks.before_D[document_N][:, None, None]


def best_first(scores_NGC: Tensor, start_C: Tensor, view: View, tail_N: Tensor) -> Tensor:
    """The order of chunks that begin at `start_C`: those that lie whole between sinks and tail, best first, then the others."""
    outside_NC = (start_C < view.sink) | (start_C + view.chunk > tail_N[:, None])
    # Pooled scores tie: neighbours may share all votes that they got. A stable order breaks ties alike in training, where chunks
    # of many documents are listed, and in decoding.
    return scores_NGC.masked_fill(outside_NC[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
