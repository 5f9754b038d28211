"""What the views of a pack's anchors leave of its memory: one plan for training and for both ways to carry it out.

The mask of a `Selection` (`attention/visibility.py`) leaves the memory where it is and hides keys: in training, with many anchors
and views in one forward. `gather.py` takes the visible keys out and gives each group of rows its own: decoding
(`eval/caches/sparse.py`), and training with in-cache positions, where the same key has another position for every anchor.

Shapes: N anchors, V views (budgets) of each, M = V x N groups, P memory positions, C chunks of the longest document, G key/value
heads, H query heads, D head size, W observed queries of an anchor, R observed rows, K chunks that are chosen at most.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from train.attention.visibility import Anchors, Places, Selection
from train.drafter.memory import Memory
from train.views.layout import Chunking, check, chunking, layout
from train.views.recipe import View
from train.views.scores import Observed, ranked, scores

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
    queries = seats = None
    if view.window != 0:
        queries, seats = observe(view.window)
    found: Plan = [{} for _ in memory.layers]
    for branch, places in memory.places.items():
        # 1. How large sinks, chunks and tail are: the same for all layers, and known without a score.
        chunks = chunking(places, view.chunk)
        longest = int(chunks.start_C.max()) // view.chunk + 1
        count_N = anchors.position - chunks.position_D[anchors.document]
        parts_VN = layout(view, budget_VN, count_N, count_N - age_N)
        check(parts_VN, budget_VN, count_N)
        tail_VN = parts_VN.tail
        number_VN = parts_VN.picked // view.chunk
        some = (number_VN > 0).any(0).nonzero().squeeze(1)  # anchors that leave something to choose
        # 2. Which chunks: scored once for each anchor, then cut off at each view's number.
        for layer, kinds in enumerate(memory.layers):
            key_PGD = kinds[branch].key
            chosen_VNGC = key_PGD.new_zeros(*budget_VN.shape, key_PGD.shape[1], longest, dtype=torch.bool)
            if len(some):
                observed = queries and _observed(queries[layer][branch], seats, chunks, view.window, some)
                tiles = scores(view, key_PGD, chunks, anchors.document[some], (count_N - age_N)[some], observed)
                for part, scores_NGC in tiles:
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
