"""A drafter's memory as preallocated keys and values. How much a request has is a number; to lower it rolls back.

Shapes: B requests, T rows of each, L places, G key/value heads, D head size, N layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.decoding.attention import Reading, merge, over_cache, over_rows
from train.attention.backend import AttentionBackend, backend
from train.attention.visibility import Places, Visibility, in_window, sees_draft
from train.drafter.config import DrafterConfig
from train.drafter.layers import KV
from train.drafter.memory import Memory


class Joined(NamedTuple):
    """Keys, or values, of a static memory and of draft rows, side by side."""

    memory_BLGD: Tensor
    own_RGD: Tensor


class Filled(NamedTuple):
    """How much of a branch of a static memory its rows see, in the place of `Places`: the first `count_B` places of each request,
    or (None) all that lie before its anchor. `first`: position of place 0."""

    first: int
    count_B: Tensor | None = None

    def count(self, anchor_B: Tensor) -> Tensor:
        return anchor_B - self.first if self.count_B is None else self.count_B


class Part(NamedTuple):
    """One layer and branch of a static memory. Of several layers of the target's cache, whose heads count as side by side, keys
    and values are tuples."""

    key: Tensor | tuple[Tensor, ...]
    value: Tensor | tuple[Tensor, ...]

    def read_bytes(self, places: int) -> int:
        """Of the keys and values of `places` places of a request."""
        return places * sum(t[0, 0].nbytes for t in (*layers_of(self.key), *layers_of(self.value)))

    def __add__(self, own: KV) -> KV:
        return KV(Joined(self.key, own.key), Joined(self.value, own.value))


class StaticMemory(Memory):
    """A drafter's memory whose places are there from the beginning. `Drafter` writes and reads it as any other memory.

    Args:
        borrowed: layers of the target's own cache that serve as they are, by (draft layer, branch): nothing is kept of those.
    """

    def __init__(self, config: DrafterConfig, batch: int, room: int, device, borrowed: dict[tuple[int, str], KV]):
        self.batch = batch
        self.room = room
        self.borrowed = borrowed
        self.row_B1 = torch.arange(batch, device=device)[:, None]
        self.place: dict[str, Tensor] = {}
        # Pairs (x_{i+1}, f_i) begin at position 1.
        places = {name: Filled(int(name == config.own_memory and config.reads_pairs)) for name in config.branches}
        layers: list[dict[str, Part]] = [{} for _ in range(config.depth)]
        for (layer, branch), kv in borrowed.items():
            layers[layer][branch] = Part(*kv)
        super().__init__(layers, places)

    def announced(self, new: dict[str, Places]) -> "StaticMemory":
        for branch, places in new.items():
            self.place[branch] = places.position.view(self.batch, -1) - self.places[branch].first
        return self

    def keeps(self, layer: int, branch: str) -> bool:
        return (layer, branch) not in self.borrowed

    def add(self, layer: int, branch: str, kv: KV) -> None:
        if branch not in self.layers[layer]:
            key, value = (t.new_zeros(self.batch, self.room, *t.shape[1:]) for t in kv)
            self.layers[layer][branch] = Part(key, value)
        # In place, at places that are a tensor: a CUDA graph replays the addresses that it was recorded with, and the places
        # differ from round to round. Keys of refused tokens stay there, and are overwritten before an anchor can see them.
        part = self.layers[layer][branch]
        place = (self.row_B1, self.place[branch])
        part.key.index_put_(place, kv.key.unflatten(0, (self.batch, -1)))
        part.value.index_put_(place, kv.value.unflatten(0, (self.batch, -1)))

    def nbytes(self) -> int:
        kept = (p for i, kinds in enumerate(self.layers) for name, p in kinds.items() if self.keeps(i, name))
        return sum(p.key.nbytes + p.value.nbytes for p in kept)


def static_attention(making_memory: bool = False, seen_QR: Tensor | None = None) -> AttentionBackend:
    """A backend (`train/attention`) over static memory. Rows of one request stand together.

    Args:
        making_memory: the rows are known tokens, one behind the other, whose own keys have just become memory.
        seen_QR: which draft rows each row sees, where the rule of slots does not say it (trees).
    """

    @backend(takes_parts=False)
    def attend(q_QHD: Tensor, key: Joined | Tensor | tuple, value: Joined | Tensor | tuple, visibility: Visibility) -> Tensor:
        joined = isinstance(key, Joined)  # else the rows have no keys of their own
        memories, values = (layers_of(held.memory_BLGD if joined else held) for held in (key, value))
        batch = len(memories[0])
        q_BTHD = q_QHD.unflatten(0, (batch, -1))
        # All rows of a request have one anchor, so that their memory is a number of keys and needs no mask (while memory is
        # made, each row sees one key more than the row before it). The draft rows' own keys are few: they get a mask. The two
        # softmaxes are merged by their log-sum-exps.
        filled: Filled = visibility.memory
        count_B = filled.count(visibility.queries.anchor.view(batch, -1)[:, 0])
        reading = Reading(window=visibility.window)
        place_BT = None if visibility.window is None else visibility.queries.position.view(batch, -1) - filled.first
        parts = [
            over_cache(q, k, v, count_B, making_memory, reading, place_BT)
            for q, k, v in zip(q_BTHD.chunk(len(memories), dim=2), memories, values)
        ]
        if not joined:
            return torch.cat([out for out, _ in parts], dim=2).flatten(0, 1)
        (memory,) = parts
        seen = _seen(visibility) if seen_QR is None else seen_QR
        if visibility.window is not None:
            places = visibility.queries.position[:, None], visibility.drafts.position
            seen = seen & in_window(*places, visibility.window)
        own = over_rows(q_BTHD, key.own_RGD, value.own_RGD, seen.unflatten(0, (batch, -1)))
        return merge(memory, own).flatten(0, 1)

    return attend


def layers_of(held: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return held if isinstance(held, tuple) else (held,)


def _seen(visibility: Visibility) -> Tensor:
    """Which draft rows each row sees, [Q, R]."""
    q = visibility.queries
    k = visibility.drafts
    return sees_draft(q.group[:, None], q.slot[:, None], k.group[None], k.slot[None], visibility.causal)
