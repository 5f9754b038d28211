"""How a budget is divided between sinks, chosen chunks and tail, and where the chunks of a memory are.

Shapes: D documents, P memory positions, C chunks of all documents. In `layout` all tensors are of one shape, whichever it is.
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


def _tail(view: View, room, since):
    """Index of the tail's first key at a selection among `since` keys: `recent` before it, at a chunk's edge."""
    # At an edge, because only whole chunks can be chosen: keys of a chunk that is cut in two would be in no part of the view.
    return (since - view.tail_of(room)) // view.chunk * view.chunk


def layout(view: View, budget: Tensor, count: Tensor, since: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the tail's first key, how many chunks are chosen), for anchors with `count` keys before them, `since` of which
    were there at the selection. Sinks, tail and chunks are at most `budget`, or everything where that is enough."""
    room = budget - view.sink
    # The tail reaches to the anchor. Where it has outgrown the budget, its begin moves on, and no chunk is left.
    tail = torch.maximum(_tail(view, room, since), count - room)
    chosen = (room - (count - tail)) // view.chunk
    everything = count <= budget
    tail = tail.masked_fill(everything, 0)
    chosen = chosen.masked_fill(everything, 0)
    visible = torch.where(everything, count, view.sink + view.chunk * chosen + count - tail)
    assert bool((visible <= budget).all()), "a view shows more than its budget"
    return tail, chosen


def reserve(view: View, budget: int, count: int) -> tuple[int, int]:
    """Of a selection among `count` keys: (index of the tail's first key, the most chunks that any anchor will be shown)."""
    room = budget - view.sink
    tail = max(0, _tail(view, room, count))
    return tail, max(0, min(room - view.tail_of(room), tail - view.sink) // view.chunk)
