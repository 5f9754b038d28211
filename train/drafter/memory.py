"""What a drafter keeps of the verified prefix: for every layer and branch, the keys and values of each position.

Shapes: P positions, E hidden size, G key/value heads, D head size.
"""

from dataclasses import dataclass

from torch import Tensor

from train.attention.visibility import Places
from train.drafter.layers import KV


@dataclass
class Memory:
    """`layers[l][branch]` sits at `places[branch]`. `feature` [P, E] is fc's output of the positions added last
    (ttt with hidden states: the feature at a − 1 enters step 1 of anchor a)."""

    layers: list[dict[str, KV]]
    places: dict[str, Places]
    feature: Tensor | None = None

    @staticmethod
    def extended(past: "Memory | None", layers: int, new: dict[str, Places]) -> "Memory":
        """A memory that holds `past` and has the new places announced; the new keys are still to be added."""
        if past is None:
            return Memory([{} for _ in range(layers)], dict(new))
        return Memory([dict(layer) for layer in past.layers], {n: past.places[n] + new[n] for n in new})

    def add(self, layer: int, branch: str, kv: KV) -> None:
        old = self.layers[layer].get(branch)
        self.layers[layer][branch] = kv if old is None else old + kv

    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for kv in layer.values() for t in kv)
