"""How a budget is divided between sinks, chosen chunks and tail, and where the chunks of a memory are.

Shapes: D documents, P memory positions, C chunks of all documents; M groups (an anchor under one view), K slots for the keys that
one is shown, G key/value heads. In `layout` all tensors are of one shape, whichever it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.attention.visibility import Places
from train.views.recipe import View


class Chunking(NamedTuple):
    """Memory positions by document, and the chunks that each document is cut into. Chunks are listed document by document; the
    last chunk of a document may be shorter than the others."""

    first_D: Tensor  # row of each document's first key
    position_D: Tensor  # position of each document's first key: 0, or 1 where memory holds pairs
    index_P: Tensor  # place of a key among those of its document, from 0; the key is in the document's chunk index // size
    before_D: Tensor  # how many chunks of other documents are listed before a document's own
    document_C: Tensor  # document of each chunk
    start_C: Tensor  # place of a chunk's first key among those of its document


def chunking(places: Places, size: int) -> Chunking:
    """Documents are numbered from 0, in order, and each has a key."""
    document = places.document
    device = document.device
    lengths_D = torch.bincount(document)
    first_D = lengths_D.cumsum(0) - lengths_D
    chunks_D = -(-lengths_D // size)
    before_D = chunks_D.cumsum(0) - chunks_D
    document_C = torch.arange(len(lengths_D), device=device).repeat_interleave(chunks_D)
    start_C = (torch.arange(len(document_C), device=device) - before_D[document_C]) * size
    index_P = torch.arange(len(document), device=device) - first_D[document]
    return Chunking(first_D, places.position[first_D], index_P, before_D, document_C, start_C)


class Layout(NamedTuple):
    """How large the parts of a view are: its sinks, the positions of its chosen chunks, and the index of the tail's first key."""

    sinks: Tensor
    picked: Tensor
    tail: Tensor

    def visible(self, count: Tensor) -> Tensor:
        """How many of the `count` keys before its anchor each is shown."""
        return self.sinks + self.picked + count - self.tail


def in_slots(slot_K: Tensor, parts: Layout, chunk: int, start_MGC: Tensor) -> Tensor:
    """Which key stands in each slot, by its index, [M, K, G], where what is shown stands one behind the other: sinks, chosen
    chunks, tail. What stands behind them means nothing.

    Args:
        start_MGC: index of the first key of each chosen chunk, in the order in which they are to stand.
    """
    sinks_M1, picked_M1, tail_M1 = (t[:, None] for t in parts)
    behind_MK = slot_K - sinks_M1
    chunk_MKG = (behind_MK // chunk).clamp(0, start_MGC.shape[2] - 1)[..., None].expand(-1, -1, start_MGC.shape[1])
    picked_MKG = start_MGC.transpose(1, 2).gather(1, chunk_MKG) + (behind_MK % chunk)[..., None]
    tail_MK = tail_M1 + behind_MK - picked_M1
    rest_MKG = torch.where((behind_MK < picked_M1)[..., None], picked_MKG, tail_MK[..., None])
    return torch.where((slot_K < sinks_M1)[..., None], slot_K[:, None], rest_MKG)


def tail_at(view: View, budget, since):
    """Index of the tail's first key at a selection among `since` keys, below 0 where there are few: `recent` before it, at a
    chunk's edge."""
    # At an edge, because only whole chunks can be chosen: keys of a chunk that is cut in two would be in no part of the view.
    return (since - view.tail_of(budget - view.sink)) // view.chunk * view.chunk


def layout(view: View, budget, count: Tensor, since: Tensor) -> Layout:
    """For anchors with `count` keys before them, `since` of which were there at the selection. Sinks, tail and chunks are at most
    `budget`, or everything where that is enough: then all of it is the tail."""
    room = budget - view.sink
    # The tail reaches to the anchor. Where it has outgrown the budget, its begin moves on, and no chunk is left.
    tail = torch.maximum(tail_at(view, budget, since), count - room)
    picked = (room - (count - tail)) // view.chunk * view.chunk
    hides = count > budget
    return Layout(view.sink * hides, picked * hides, tail * hides)


def check(found: Layout, budget, count: Tensor) -> None:
    """That the budget holds. Waits for the device."""
    assert bool((found.visible(count) <= torch.minimum(budget, count)).all()), "a view shows more than its budget"


def most_chunks(view: View, budget: int) -> int:
    """The most chunks that any anchor is shown: as many as there are at its selection."""
    room = budget - view.sink
    return (room - view.tail_of(room)) // view.chunk


def reserve(view: View, budget: int, count: int) -> tuple[int, int]:
    """Of a selection among `count` keys: (index of the tail's first key, the most chunks that any anchor will be shown)."""
    tail = max(0, tail_at(view, budget, count))
    return tail, max(0, min(most_chunks(view, budget), (tail - view.sink) // view.chunk))
