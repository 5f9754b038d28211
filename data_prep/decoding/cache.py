"""The target's preallocated keys and values. How much a request has is a number; to lower it rolls back.

Shapes: B requests, T rows of each, L places, G key/value heads, D head size, N layers.
"""

from typing import Self

import torch
from torch import Tensor

from data_prep.decoding.attention import Reading, joined, merge, over_cache, over_rows, sunk
from data_prep.target.target import Target


class StaticCache:
    """The target's keys and values, rotated, [N, B, L, G, D] each."""

    on_device = True
    in_halves = True  # keys are in the layout that drafters read (data_prep/target/rotation.py)

    def __init__(self, layers: int, batch: int, room: int, heads: int, size: int, dtype: torch.dtype, device):
        self.key, self.value = torch.zeros(2, layers, batch, room, heads, size, dtype=dtype, device=device)
        self.row_B1 = torch.arange(batch, device=device)[:, None]

    @classmethod
    def of(cls, target: Target, batch: int, room: int) -> Self:
        """A cache of `batch` requests of `target`, with `room` places for each."""
        layers, heads, size = target.kv_sizes
        made = cls(layers, batch, room, heads, size, target.dtype, target.device)
        made.in_halves = not target.turns_neighbours
        return made

    @property
    def lends(self) -> bool:
        """Whether drafters can read keys and values here as they stand."""
        return self.on_device and self.in_halves

    @property
    def room(self) -> int:
        return self.key.shape[2]

    def first(self, count: int) -> "StaticCache":
        """The first `count` places of the batch, as a cache that shares their memory."""
        # Without the constructor, which would make a cache of its own.
        part = StaticCache.__new__(StaticCache)
        part.key = self.key[:, :count]
        part.value = self.value[:, :count]
        part.row_B1 = self.row_B1[:count]
        part.in_halves = self.in_halves
        return part

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, L, G, D]."""
        return self.key[layer], self.value[layer]

    def write(self, layer: int, place_BT: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> None:
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
        for kind in (self.key, self.value):
            kind[:, self.row_B1, target] = kind[:, self.row_B1, source]
