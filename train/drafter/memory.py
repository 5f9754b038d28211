"""What a drafter keeps of the verified prefix: for every layer and branch, the keys and values of each position.

Shapes: P positions, E hidden size, G key/value heads, D head size, L source layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data_prep.target.architecture import KVLayer
from data_prep.target.states import States
from train.attention.visibility import Places, Selection
from train.drafter.config import DrafterConfig
from train.drafter.layers import KV, Rope


@dataclass
class Memory:
    """`layers[l][branch]` sits at `places[branch]`. `feature` [P, E] is fc's output of the positions added last
    (ttt with hidden states: the feature at a − 1 enters step 1 of anchor a)."""

    layers: list[dict[str, KV]]
    places: dict[str, Places]
    feature: Tensor | None = None
    selection: list[dict[str, Selection]] | None = None  # what a view leaves of each layer and branch; None: everything

    @staticmethod
    def extended(past: "Memory | None", layers: int, new: dict[str, Places]) -> "Memory":
        """A memory that holds `past` and has the new places announced; the new keys are still to be added."""
        return Memory([{} for _ in range(layers)], dict(new)) if past is None else past.announced(new)

    def announced(self, new: dict[str, Places]) -> "Memory":
        return Memory([dict(layer) for layer in self.layers], {n: self.places[n] + new[n] for n in new})

    def keeps(self, layer: int, branch: str) -> bool:
        """Whether it holds keys of its own there, which have to be made."""
        return True

    def add(self, layer: int, branch: str, kv: KV) -> None:
        old = self.layers[layer].get(branch)
        self.layers[layer][branch] = kv if old is None else old + kv

    def detached(self) -> "Memory":
        """The same keys and values, through which nothing is learned."""
        layers = [{name: KV(*(t.detach() for t in kv)) for name, kv in layer.items()} for layer in self.layers]
        return replace(self, layers=layers)

    def nbytes(self) -> int:
        return sum(kv.nbytes for layer in self.layers for kv in layer.values())


class TargetKV(nn.Module):
    """The target's K/V -> the keys and values that one draft layer attends (KVShot, section 3).

    native: one target layer's, as they are. head_concat: the heads of L layers side by side, each rotated at its position.
    projected: one linear map over the L layers' concatenated keys, rotated as the target's cache holds them, and one over
    their values. projected_rope: the same over keys before RoPE, which is applied after the map (the drafter's own), since the
    map would destroy the positions.
    """

    def __init__(self, config: DrafterConfig, layer: int):
        super().__init__()
        self.source = config.source
        self.layers = config.layers_of(layer)
        self.own = config.own_shape
        self.shapes = [config.kv_shape(i) for i in self.layers]
        if self.source.startswith("projected"):
            inputs = sum(map(_size, self.shapes))
            self.k = nn.Linear(inputs, _size(self.own), bias=False)
            self.v = nn.Linear(inputs, _size(self.own), bias=False)

    def forward(self, states: States, ropes: Callable[[KVLayer], Rope], dtype: torch.dtype) -> KV:
        """`ropes` gives the rotary embedding of a kind of keys, at the states' positions."""
        keys = [states.key[layer].to(dtype) for layer in self.layers]
        values = [states.value[layer].to(dtype) for layer in self.layers]
        # The cache holds keys as they are before RoPE: their rotation is a function of the position alone.
        if self.source != "projected_rope":
            keys = [ropes(shape)(key) for shape, key in zip(self.shapes, keys)]
        if self.source == "native":
            return KV(keys[0], values[0])
        if self.source == "head_concat":
            return KV(torch.cat(keys, dim=1), torch.cat(values, dim=1))
        # Flat before they are joined: layers may have heads of other sizes.
        key, value = (
            project(torch.cat([t.flatten(1) for t in parts], dim=1)).unflatten(-1, (-1, self.own.head_dim))
            for project, parts in ((self.k, keys), (self.v, values))
        )
        return KV(ropes(self.own)(key) if self.source == "projected_rope" else key, value)

    @torch.no_grad()
    def start(self, layer: int) -> None:
        """A projection begins as the choice of one source layer: the draft layer's own, or the nearest to it among those whose
        heads are of the drafter's sizes. Where there is none, nothing is chosen."""
        if not self.source.startswith("projected"):
            return
        own = (self.own.kv_heads, self.own.head_dim)
        alike = [i for i, shape in enumerate(self.shapes) if (shape.kv_heads, shape.head_dim) == own]
        if not alike:
            return
        chosen = min(alike, key=lambda i: abs(self.layers[i] - layer))
        begin = sum(map(_size, self.shapes[:chosen]))
        for module in (self.k, self.v):
            size = module.out_features
            module.weight[:, begin : begin + size] += torch.eye(size, device=module.weight.device)


def _size(shape: KVLayer) -> int:
    """Of all keys, or values, of a position."""
    return shape.kv_heads * shape.head_dim
