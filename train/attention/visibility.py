"""Who sees what: one rule for training and decoding, for every reuse, objective, view and backend.

A draft row (a query) belongs to one anchor. It attends two kinds of keys:

- memory: one key a verified position, from the target's states; a view may hide some of them (`train/views/plan.py`);
- draft: the keys of draft rows, its own included. Rows of query-only drafters have none.

A row that sees no key attends to zeros.

Shapes: Q draft rows (queries), P memory positions, R draft rows (keys), K = P + R keys, H query heads, G key/value
heads, D head size, M groups (an anchor under one view), C chunks of a document, X and Y tiles of rows and of keys.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 128  # rows, and keys, of a tile of FlexAttention


@dataclass(frozen=True)
class DraftRows:
    """Draft rows, all int64 [Q]. `anchor` and `position` count from the start of the row's own document."""

    document: Tensor
    anchor: Tensor  # position of the newest token that is known but not yet processed by the target
    group: Tensor  # which anchor of the batch, under which view, the row belongs to
    slot: Tensor  # 0 = the anchor token itself (block-wise), j = the j-th drafted token
    position: Tensor

    def __add__(self, other: "DraftRows") -> "DraftRows":
        return DraftRows(*(torch.cat([getattr(self, f), getattr(other, f)]) for f in self.__dataclass_fields__))

    @property
    def none(self) -> "DraftRows":
        """No rows at all."""
        return DraftRows(*(getattr(self, f)[:0] for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class Places:
    """Where memory keys sit, int64 [P]: their document and their position in it."""

    document: Tensor
    position: Tensor

    @cached_property
    def bounds(self) -> Tensor:
        """int32 [documents + 1]: where each document of a pack begins."""
        count = self.document.unique_consecutive(return_counts=True)[1]
        return F.pad(count.cumsum(0, dtype=torch.int32), (1, 0))

    def __add__(self, other: "Places") -> "Places":
        return Places(torch.cat([self.document, other.document]), torch.cat([self.position, other.position]))


def known_rows(places: Places) -> DraftRows:
    """One row for each known token, as if the token were the anchor of a round and this its first ttt step: the row sees the
    memory before the token, and itself, but no other row."""
    order = torch.arange(len(places.position), device=places.position.device)
    return DraftRows(places.document, places.position, order, torch.ones_like(order), places.position)


class Anchors(NamedTuple):
    """Where rounds begin, [N] each: the anchor token's place in the pack, its document and its position there."""

    index: Tensor
    document: Tensor
    position: Tensor

    def repeated(self, views: int) -> "Anchors":
        return Anchors(*(t.repeat(views) for t in self))


@dataclass(frozen=True)
class Selection:
    """What a view leaves of one layer's memory: sinks, a tail, and chosen chunks, each KV head its own."""

    index_P: Tensor  # place of the key among its document's keys
    chunk: int  # keys of a document per chunk
    sink: int  # the first keys of every document
    tail_M: Tensor  # index of the tail's first key
    chosen_MGC: Tensor  # bool; C chunks, as many as the longest document has


def sees_memory(q_document, q_anchor, k_document, k_position):
    """Memory *strictly* before the anchor (the target has not processed the anchor token) of the same document."""
    return (q_document == k_document) & (k_position < q_anchor)


def in_view(k_index, sink: int, q_tail, chosen):
    """Keys that a view shows; `chosen`: the query's KV head reads the key's chunk."""
    return (k_index < sink) | (k_index >= q_tail) | chosen


def in_window(q_position, k_position, window: int):
    """A row at position p reads positions p - window + 1 to p, as the queries of a target layer with this window do. Nothing is
    said of later positions, which other rules hide or show."""
    return k_position > q_position - window


def sees_draft(q_group, q_slot, k_group, k_slot, causal: bool):
    """Draft rows of the same anchor; under `causal` only up to the own slot."""
    same = q_group == k_group
    return same & (k_slot <= q_slot) if causal else same


@dataclass(frozen=True)
class Visibility:
    """The rule applied to these rows and keys; keys are ordered memory first, draft rows after.

    `dense` is the oracle's mask; `block_mask` is the same rule for FlexAttention, in memory that grows with tiles instead of with
    rows x keys. Built once, used by every layer that sees the same.
    """

    queries: DraftRows
    memory: Places
    drafts: DraftRows
    causal: bool
    selection: Selection | None = None  # None: all of the memory
    window: int | None = None  # of memory and of draft rows; None: all

    @cached_property
    def dense(self) -> Tensor:
        """bool [Q, P + R], or [G, Q, P + R] under a view; True = attend."""
        q = self.queries
        m = self.memory
        d = self.drafts
        memory = sees_memory(q.document[:, None], q.anchor[:, None], m.document[None], m.position[None])
        drafts = sees_draft(q.group[:, None], q.slot[:, None], d.group[None], d.slot[None], self.causal)
        if self.selection is not None:
            s = self.selection
            chosen_GMP = s.chosen_MGC.transpose(0, 1)[..., s.index_P // s.chunk]
            memory = memory & in_view(s.index_P, s.sink, s.tail_M[q.group][:, None], chosen_GMP[:, q.group])
            drafts = drafts.expand(len(memory), -1, -1)
        seen = torch.cat([memory, drafts], dim=-1)
        if self.window is not None:
            seen = seen & in_window(q.position[:, None], torch.cat([m.position, d.position]), self.window)
        return seen

    def block_mask(self, share: int):
        """`share`: how many query heads read one KV head."""
        from torch.nn.attention.flex_attention import BlockMask

        # Kept in the instance, which is frozen, as `cached_property` does: all layers that see the same share the mask.
        if "_block_mask" not in self.__dict__:
            some_XY, every_XY = self._tiles()
            sizes = (TILE * some_XY.shape[0], TILE * some_XY.shape[1])
            self.__dict__["_block_mask"] = BlockMask.from_kv_blocks(
                *_listed(some_XY & ~every_XY), *_listed(every_XY), BLOCK_SIZE=TILE, mask_mod=self._rule(share), seq_lengths=sizes
            )
        return self.__dict__["_block_mask"]

    def _rule(self, share: int):
        """The predicates over one index of keys. A key that is not of a kind is of document, or group, -1; so are the keys, and
        -2 the rows, that fill up a last tile. In 32 bits: FlexAttention reads all of this for each score of a tile that is not
        whole."""
        q = self.queries
        s = self.selection
        causal = self.causal
        memory = len(self.memory.position)
        drafts = len(self.drafts.group)
        filling = -(memory + drafts) % TILE

        def of_memory(t: Tensor) -> Tensor:
            return F.pad(_narrow(t), (0, drafts + filling), value=-1)

        def of_drafts(t: Tensor) -> Tensor:
            return F.pad(_narrow(t), (memory, filling), value=-1)

        def of_rows(t: Tensor, value: int) -> Tensor:
            return F.pad(_narrow(t), (0, -len(t) % TILE), value=value)

        k_document = of_memory(self.memory.document)
        k_position = of_memory(self.memory.position)
        k_group = of_drafts(self.drafts.group)
        k_slot = of_drafts(self.drafts.slot)
        q_document, q_anchor, q_group, q_slot = (of_rows(t, -2) for t in (q.document, q.anchor, q.group, q.slot))

        def whole(batch, head, i, k):
            in_memory = sees_memory(q_document[i], q_anchor[i], k_document[k], k_position[k])
            return in_memory | sees_draft(q_group[i], q_slot[i], k_group[k], k_slot[k], causal)

        if self.window is not None:
            assert s is None
            window = self.window
            k_place = F.pad(_narrow(torch.cat([self.memory.position, self.drafts.position])), (0, filling), value=-1)
            q_place = of_rows(q.position, 0)
            return lambda batch, head, i, k: whole(batch, head, i, k) & in_window(q_place[i], k_place[k], window)
        if s is None:
            return whole
        k_index = of_memory(s.index_P)
        # Keys that are no memory look up some chunk; `sees_memory` says no to them in any case. So do rows that fill up a tile.
        k_chunk = of_memory(s.index_P // s.chunk).clamp(min=0)
        q_tail = of_rows(s.tail_M[q.group], 0)
        q_selection = of_rows(q.group, 0)
        chosen = s.chosen_MGC
        sink = s.sink

        def viewed(batch, head, i, k):
            in_memory = sees_memory(q_document[i], q_anchor[i], k_document[k], k_position[k])
            in_memory = in_memory & in_view(k_index[k], sink, q_tail[i], chosen[q_selection[i], head // share, k_chunk[k]])
            return in_memory | sees_draft(q_group[i], q_slot[i], k_group[k], k_slot[k], causal)

        return viewed

    def _tiles(self) -> tuple[Tensor, Tensor]:
        """(tiles of which something may be visible, tiles that are visible whole), bool [X, Y] each, from the bounds of their
        rows and keys. The first may hold more than need be, the second less: `_rule` decides in tiles that are not whole."""
        q = self.queries
        m = self.memory
        d = self.drafts
        s = self.selection
        memory = m.position.numel()
        drafts = d.group.numel()
        # 1. Memory: tiles whose ranges of documents meet, before the last anchor. Whole ones: one document, before the first.
        document, anchor, group, slot = (_bounds(t)[:, :, None] for t in (q.document, q.anchor, q.group, q.slot))
        k_document, k_position = (_bounds(t, after=drafts) for t in (m.document, m.position))
        k_group, k_slot = (_bounds(t, before=memory) for t in (d.group, d.slot))
        some = (document[0] <= k_document[1]) & (k_document[0] <= document[1]) & (k_position[0] < anchor[1])
        every = (document[0] == k_document[1]) & (document[1] == k_document[0]) & (k_position[1] < anchor[0])
        if self.window is not None:
            place = _bounds(q.position)[:, :, None]
            some &= in_window(place[0], k_position[1], self.window)
            every &= in_window(place[1], k_position[0], self.window)
        if s is not None:
            # 2. Of these, what the views of some row leave. A chosen chunk makes no tile whole: other rows chose others.
            tail = _bounds(s.tail_M[q.group])[:, :, None]
            k_index = _bounds(s.index_P, after=drafts)
            some &= (
                (k_index[0] < s.sink) | (k_index[1] >= tail[0]) | self._chosen_tiles(_bounds(s.index_P // s.chunk, after=drafts))
            )
            every &= (k_index[1] < s.sink) | (k_index[0] >= tail[1])
        every[:, memory // TILE :] = False  # where drafts or nothing stand among the keys
        # 3. Draft rows of the same anchors. No tile of them counts as whole: a tile holds many anchors.
        between = (group[0] <= k_group[1]) & (k_group[0] <= group[1])
        return some | (between & (k_slot[0] <= slot[1]) if self.causal else between), every

    def _chosen_tiles(self, k_chunk: Tensor) -> Tensor:
        """bool [X, Y]: some row's group has chosen a chunk that reaches into the keys, for one head or another."""
        # By running counts: a range of chunks holds a chosen one if its ends' counts differ.
        chosen_MC = F.pad(self.selection.chosen_MGC.any(1).cumsum(1, dtype=torch.int32), (1, 0))
        low, high = (t.clamp(0, chosen_MC.shape[1] - 2) for t in k_chunk)
        some_QY = (chosen_MC[:, high + 1] > chosen_MC[:, low])[self.queries.group]
        return F.pad(some_QY, (0, 0, 0, -len(some_QY) % TILE)).unflatten(0, (-1, TILE)).any(1) & (k_chunk[0] <= k_chunk[1])


def _narrow(values: Tensor) -> Tensor:
    """In 32 bits. Larger positions, of keys that are not there, stay behind every anchor."""
    return values.clamp(max=torch.iinfo(torch.int32).max).int()


def _bounds(values: Tensor, before: int = 0, after: int = 0) -> Tensor:
    """[2, X]: the least and the greatest value of each tile, with `before` and `after` elements of another kind around them."""
    after += -(before + len(values) + after) % TILE
    limits = torch.iinfo(values.dtype)

    def tiles(filling: int) -> Tensor:
        return F.pad(values, (before, after), value=filling).view(-1, TILE)

    # What fills a tile up must change neither bound; a tile of nothing else gets an empty range, which meets no other.
    return torch.stack([tiles(limits.max).amin(1), tiles(limits.min).amax(1)])


def _listed(tiles_XY: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a mask of tiles: how many there are in each row, and which."""
    indices = tiles_XY.byte().argsort(dim=1, descending=True, stable=True)
    return tiles_XY.sum(1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()
