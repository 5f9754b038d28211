"""A plan carried out by taking the visible keys out, so that each group of rows has a memory of its own.

Shapes: M groups (an anchor under one view), P memory positions, C chunks of a document, K keys of a group, G key/value heads, D
head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from train.attention.visibility import Anchors, Places, Selection
from train.drafter.layers import KV
from train.drafter.memory import Memory
from train.views.layout import Layout, chunking, in_slots
from train.views.plan import Plan


def gather(memory: Memory, found: Plan, anchors: Anchors, rotate: Callable[..., Tensor]) -> tuple[Memory, Anchors]:
    """The visible keys of every group, taken out: each group becomes a document of its own, in which visible keys stand one
    behind the other and the anchor behind the last (in-cache positions).

    Args:
        rotate: (layer, branch, keys [K, G, D], by how many positions [K, G]) -> keys that stand elsewhere.
    """
    # 1. How many keys each group is shown, for each branch, and where its anchor stands then: behind the longest of its branches.
    groups = torch.arange(len(anchors.index), device=anchors.index.device)
    grounds = {branch: chunking(places, 1) for branch, places in memory.places.items()}
    before_M = {branch: anchors.position - g.position_D[anchors.document] for branch, g in grounds.items()}
    count_M = {branch: _parts(found[0][branch]).visible(before_M[branch]) for branch in grounds}  # alike for all layers
    end_M = torch.stack([count_M[branch] + g.position_D[anchors.document] for branch, g in grounds.items()]).amax(0)
    # 2. The keys themselves, each KV head's own.
    out = Memory([{} for _ in memory.layers], {}, memory.feature)
    for branch, places in memory.places.items():
        slot_K = torch.arange(int(count_M[branch].max()), device=groups.device)
        slot_MK = (end_M - count_M[branch])[:, None] + slot_K
        there_MK = slot_K < count_M[branch][:, None]
        for layer, kinds in enumerate(memory.layers):
            index_MKG = _indices(found[layer][branch], slot_K)
            row_MKG = (grounds[branch].first_D[anchors.document][:, None, None] + index_MKG).where(there_MK[..., None], 0)
            head_G = torch.arange(row_MKG.shape[2], device=groups.device)
            key, value = (t[row_MKG, head_G].flatten(0, 1) for t in kinds[branch])
            # Keys of memory are rotated already: they turn by the difference of their positions.
            moved = slot_MK[..., None] - places.position[row_MKG]
            out.layers[layer][branch] = KV(rotate(layer, branch, key, moved.flatten(0, 1)), value)
        # A key that is not there, where a group has fewer than another, stands where no anchor sees it.
        position = torch.where(there_MK, slot_MK, torch.iinfo(torch.int64).max).flatten()
        out.places[branch] = Places(groups.repeat_interleave(len(slot_K)), position)
    return out, Anchors(anchors.index, groups, end_M)


def _parts(selection: Selection) -> Layout:
    """Of each group [M]. A tail that begins at the first key holds the sinks."""
    sinks_M = torch.where(selection.tail_M > 0, selection.sink, 0)
    # Every KV head has chosen as many chunks as the first.
    return Layout(sinks_M, selection.chunk * selection.chosen_MGC[:, 0].sum(-1), selection.tail_M)


def _indices(selection: Selection, slot_K: Tensor) -> Tensor:
    """Which key of its document stands in each slot, in order, [M, K, G]."""
    # Chunks that are chosen, in order of position, before all others: a stable sort keeps them so.
    order_MGC = selection.chosen_MGC.byte().argsort(dim=-1, descending=True, stable=True)
    return in_slots(slot_K, _parts(selection), selection.chunk, order_MGC * selection.chunk)
