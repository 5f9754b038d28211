"""Controls of reuse: what a drafter is shown instead of the target's states, to see what it takes from them.

Shapes: P positions of one request, B requests, T positions of each.
"""

import torch
from torch import Tensor

from data_prep.target.states import States


def zero_memory(states: States, position: Tensor) -> States:
    """Control: the drafter learns nothing from the target."""
    return states.map(torch.zeros_like)


class OtherMemory:
    """Control: each request of a batch is shown another one's states at the same positions (repeated where it is shorter)."""

    def __init__(self, batch: int, room: int):
        self._batch = batch
        self._room = room
        self._held: States | None = None

    def fill(self, b: int, other: States) -> None:
        """Whose states, [P, ...], the request at place b is shown."""
        self._reserve(other)
        self._length_B[b] = len(other.last_hidden)
        for held, new in zip(self._held.tensors(), other.tensors()):
            held[b, : len(new)] = new

    def _reserve(self, like: States) -> None:
        """Once, and in good time: CUDA graphs are recorded before the first request is there."""
        if self._held is None:
            self._held = like.map(lambda t: t.new_zeros(self._batch, self._room, *t.shape[1:]))
            self._length_B = torch.ones(self._batch, dtype=torch.long, device=like.last_hidden.device)

    def __call__(self, states: States, position_BT: Tensor) -> States:
        self._reserve(states.map(lambda t: t[0]))
        place_BT = position_BT % self._length_B[:, None]
        row_B1 = torch.arange(self._batch, device=place_BT.device)[:, None]
        return self._held.map(lambda t: t[row_B1, place_BT])

    def of(self, b: int):
        """The change of the request at place b alone: states and positions [P, ...]."""
        return lambda states, position_P: self._held.map(lambda t: t[b, position_P % self._length_B[b]])
