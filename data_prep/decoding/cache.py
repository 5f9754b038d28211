"""The target's preallocated keys and values. How much a request has is a number; to lower it rolls back.

Shapes: B requests, T rows of each, L places, G key/value heads, D head size, N layers of one shape.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from data_prep.decoding.attention import Reading, joined, merge, over_cache, over_rows, sunk
from data_prep.target.architecture import CachedLayer
from data_prep.target.target import Target


class StaticCache:
    """The target's keys and values, rotated: of each layer `key` and `value`, [B, L, G, D]. Layers that share them have the same
    tensors here.

    Layers whose heads are as many and as large lie in one tensor of `blocks`, [2, N, B, L, G, D]: what is done to all of them is
    one call.
    """

    on_device = True
    in_halves = True  # keys are in the layout that drafters read (data_prep/target/rotation.py)

    def __init__(self, layers: Sequence[CachedLayer], batch: int, room: int, dtype: torch.dtype, device):
        self.layers = tuple(layers)
        self.row_B1 = torch.arange(batch, device=device)[:, None]
        blocks = []
        for alike in self._alike():
            heads, size, _ = self.layers[alike[0]]
            blocks.append(torch.zeros(2, len(alike), batch, room, heads, size, dtype=dtype, device=device))
        self._hold(blocks)

    @classmethod
    def of(cls, target: Target, batch: int, room: int) -> Self:
        """A cache of `batch` requests of `target`, with `room` places for each."""
        made = cls(target.cached_layers, batch, room, target.dtype, target.device)
        made.in_halves = not target.turns_neighbours
        return made

    def _alike(self) -> list[list[int]]:
        """Layers with keys of their own, those of one shape together."""
        found: dict[tuple[int, int], list[int]] = {}
        for layer, (heads, size, owner) in enumerate(self.layers):
            if owner == layer:
                found.setdefault((heads, size), []).append(layer)
        return list(found.values())

    def _hold(self, blocks: list[Tensor]) -> None:
        """Let each layer find its tensors, or its owner's, in `blocks`."""
        self.blocks = blocks
        own: dict[int, Tensor] = {}
        for block, alike in zip(blocks, self._alike()):
            own |= zip(alike, block.unbind(1))
        self.key = [own[one.owner][0] for one in self.layers]
        self.value = [own[one.owner][1] for one in self.layers]

    @property
    def lends(self) -> bool:
        """Whether drafters can read keys and values here as they stand."""
        return self.on_device and self.in_halves

    @property
    def batch(self) -> int:
        return self.blocks[0].shape[2]

    @property
    def room(self) -> int:
        return self.blocks[0].shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    def first(self, count: int) -> "StaticCache":
        """The first `count` places of the batch, as a cache that shares their memory."""
        # Without the constructor, which would make a cache of its own.
        part = StaticCache.__new__(StaticCache)
        part.layers = self.layers
        part.row_B1 = self.row_B1[:count]
        part.in_halves = self.in_halves
        part._hold([block[:, :, :count] for block in self.blocks])
        return part

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def owns(self, layer: int) -> bool:
        """Whether this layer's keys and values are kept, and not another's read."""
        return self.layers[layer].owner == layer

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, L, G, D]."""
        return self.key[layer], self.value[layer]

    def write(self, layer: int, place_BT: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> None:
        """Nothing for a layer that reads another's: these are that layer's rows, which are there already."""
        if not self.owns(layer):
            return
        self.key[layer].index_put_((self.row_B1, place_BT), k_BTGD)
        self.value[layer].index_put_((self.row_B1, place_BT), v_BTGD)

    def attention(self, base_B: Tensor, rows: int, seen_BTT: Tensor | None = None):
        """What a forward over `rows` new tokens of each request calls in every layer: keep their keys from place `base_B` on, and
        read all that is before them and, of their own, those that `seen_BTT` says; None: the earlier ones and themselves. Of
        both a window leaves the nearest."""
        place_BT = base_B[:, None] + torch.arange(rows, device=base_B.device)

        def attend(layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, reading: Reading) -> Tensor:
            self.write(layer, place_BT, k_BTGD, v_BTGD)
            key, value = self.layer(layer)
            if seen_BTT is None:
                return sunk(over_cache(q_BTHD, key, value, base_B + 1, growing=True, reading=reading), reading.sinks_H)
            near_BTT = seen_BTT
            at_BT = None
            if reading.window is not None:
                # A row sees itself and those on its path, so that their number says how deep it is.
                depth_BT = seen_BTT.sum(-1) - 1
                at_BT = base_B[:, None] + depth_BT
                near_BTT = seen_BTT & (depth_BT[:, :, None] - depth_BT[:, None] < reading.window)
            before = over_cache(q_BTHD, key, value, base_B, growing=False, reading=reading, place_BT=at_BT)
            batch = len(q_BTHD)
            # The rows of all requests are one list of keys here; a row may see those of its own request alone.
            same_BTBT = torch.eye(batch, dtype=torch.bool, device=base_B.device)[:, None, :, None] & near_BTT[:, :, None]
            own = over_rows(q_BTHD, k_BTGD.flatten(0, 1), v_BTGD.flatten(0, 1), same_BTBT.flatten(2), reading.scale)
            if reading.sinks_H is None:
                return merge(before, own)
            return sunk(joined(before, own), reading.sinks_H)

        return attend

    def keep(self, base_B: Tensor, row_BJ: Tensor) -> None:
        """Move the keys of rows `row_BJ` (a path of a tree, from its root) to the places from `base_B` on."""
        # The right side is a copy by indices, made before anything is written: paths may overlap with where they go.
        source = base_B[:, None] + row_BJ
        target = base_B[:, None] + torch.arange(row_BJ.shape[1], device=base_B.device)
        for block in self.blocks:
            block[:, :, self.row_B1, target] = block[:, :, self.row_B1, source]

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Requests at places `source` of the batch to the places `destination`."""
        for block in self.blocks:
            for kept in block.flatten(0, 1):  # one by one: the copy of a whole cache may not fit
                kept[destination] = kept[source]

    def take_over(self, old: "StaticCache") -> None:
        """What a cache of as many requests and less room holds."""
        for new, block in zip(self.blocks, old.blocks):
            new[:, :, :, : old.room] = block
