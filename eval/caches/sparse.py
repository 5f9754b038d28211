"""A drafter's memory of one request, and what its view leaves of it, really taken out: the plan carried out by `gather`.

Shapes: R rows of known tokens, P memory positions, K keys that are visible, C chunks, G key/value heads, H query heads, D head
size.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.target.states import States
from train.attention.backend import AttentionBackend
from train.attention.visibility import Places
from train.drafter.base import Drafter
from train.drafter.layers import KV
from train.drafter.memory import Memory
from train.views.layout import check, chunking, layout, reserve
from train.views.recipe import View
from train.views.scores import Observed, ranked, scores, votes


@dataclass
class Picked:
    """One layer and branch at a selection: the best chunks' keys, best first, and which keys of the request they are [K, G]."""

    kv: KV
    index_KG: Tensor


class Taken(NamedTuple):
    """Which keys of a branch a round reads, `before` of which stand before the anchor: the first `sinks`, the `picked` best ones
    of the chosen chunks, and those from index `tail` on."""

    sinks: int
    picked: int
    tail: int
    before: int

    @property
    def visible(self) -> int:
        return self.sinks + self.picked + self.before - self.tail


class SparseCache:
    """Grows with what is verified; `visible` gives the drafter its memory for a round.

    Memory that no later selection can ask for is dropped, if the drafter makes memory without attention: a drafter whose deeper
    layers read its own memory to make more of it keeps all of it, and drafts from what is taken out.
    """

    def __init__(self, drafter: Drafter, attend: AttentionBackend, view: View | None):
        hides = view is not None and view.kind != "full" and view.budget
        self.drafter = drafter
        self._attend = attend
        self._view = view if hides else None
        # Whether no later selection can ask for a key between the sinks and the tail of now: there will be none, or it takes the
        # newest keys.
        settled = bool(hides) and (view.kind == "sink_recent" or view.refresh == "never")
        self._forgets = settled and not drafter.config.memory_attends
        self.memory: Memory | None = None
        self._first: dict[str, int] = {}  # position of each branch's first key
        self._dropped: dict[str, int] = {}  # keys that are gone, behind the sinks
        self._chosen_at: int | None = None
        self._picked: list[dict[str, Picked]] = []
        self._votes: list[dict[str, Tensor]] = []  # h2o: attention that each key has got, [G, P]
        self._rows: tuple | None = None  # known tokens whose queries the next selection may look at (`Drafter.known_queries`)
        # The most bytes of keys and values: that the rows of a round read, that a selection looked at to choose them, that were
        # kept between rounds, and that there ever were (those of the whole prompt, before some of them were dropped).
        self.bytes = {"read": 0, "searched": 0, "kept": 0, "peak": 0}

    @torch.no_grad()
    def extend(self, states: States, places: Places, token_RE: Tensor, rows: Places) -> None:
        """Remember more verified positions, as `Drafter.remember` does."""
        self.memory = self.drafter.remember(states, places, token_RE, rows, self._attend, self.memory)
        for branch, held in self.memory.places.items():
            self._first.setdefault(branch, int(held.position[0]))
            self._dropped.setdefault(branch, 0)
        self._most("peak", self._held())
        view = self._view
        if view and view.window != 0 and (self._chosen_at is None or view.refresh != "never"):
            feature_RE = token_RE if self.memory.feature is None else self.memory.feature
            new = (token_RE, feature_RE, rows.document, rows.position)
            last = slice(None) if view.window is None else slice(-view.window, None)
            old = self._rows or tuple(t[:0] for t in new)
            self._rows = tuple(torch.cat(pair)[last] for pair in zip(old, new))

    @torch.no_grad()
    def visible(self, anchor: int) -> tuple[Memory, int]:
        """(what the rows of a round may read, the anchor's position for them)."""
        view = self._view
        count = {branch: anchor - first for branch, first in self._first.items()}
        fits = not view or max(count.values()) <= view.budget
        # While everything fits, a selection changes nothing. It is made all the same where it is kept for later rounds, which may
        # not fit; with refresh=verify every round makes its own.
        if view and self._due(anchor) and not (fits and view.refresh == "verify"):
            self._chosen_at = anchor
            self._picked = [{} for _ in self.memory.layers]
            self._select(count)
        found = (self.memory, anchor) if fits else self._taken_out(anchor, count)
        self._most("read", self._read(found[0]))
        self._most("kept", self._held())
        return found

    def _most(self, what: str, nbytes: int) -> None:
        self.bytes[what] = max(self.bytes[what], nbytes)

    def _read(self, memory: Memory) -> int:
        """Bytes of what the rows of a round read: of a layer with a window, that much."""
        config = self.drafter.config
        total = 0
        for layer, kinds in enumerate(memory.layers):
            for branch, kv in kinds.items():
                count = len(kv.key)
                total += kv.nbytes * min(count, config.shape(layer, branch).window or count) // max(count, 1)
        return total

    def _held(self) -> int:
        return self.memory.nbytes() + sum(p.kv.nbytes for layer in self._picked for p in layer.values())

    def _due(self, anchor: int) -> bool:
        refresh = self._view.refresh
        if self._chosen_at is None:
            return True
        if refresh == "verify":
            return anchor > self._chosen_at  # a request that is done waits for others with what it chose last
        return refresh != "never" and anchor - self._chosen_at >= refresh

    def _select(self, count: dict[str, int]) -> None:
        """Rank the chunks as they are now, and take out as many of the best as a round can want."""
        view = self._view
        wanted = {branch: reserve(view, view.budget, n) for branch, n in count.items()}
        if not any(most for _, most in wanted.values()):
            return  # nothing to choose, now or later
        # 1. The queries of the tokens that the view looks at. All layers but the last run for them, and read all of their keys.
        queries = [None] * len(self.memory.layers)
        seats = None
        searched = 0
        if self._rows:
            token_RE, feature_RE, *seats = self._rows
            seats = Places(*seats)
            queries = self.drafter.known_queries(token_RE, feature_RE, seats, self.memory, self._attend)
            searched = sum(kv.nbytes for kinds in self.memory.layers[:-1] for kv in kinds.values())
        if view.window is None:
            self._vote(queries, seats)
        # 2. The best chunks of each layer and branch: their keys are copied out, so that rounds need not look for them.
        for branch, (tail, most) in wanted.items():
            places = self.memory.places[branch]
            chunks = chunking(places, view.chunk)
            one = partial(_one, places.position.device)
            for layer, kinds in enumerate(self.memory.layers):
                if view.window is None:
                    scores_1GC = self._votes[layer][branch][None]
                else:
                    observed = queries[layer] and self._observed(queries[layer][branch], seats, branch)
                    key_PGD = kinds[branch].key
                    ((_, scores_1GC),) = scores(view, key_PGD, chunks, one(0), one(count[branch]), observed)
                searched += kinds[branch].key.nbytes
                chunk_GC = ranked(scores_1GC, chunks, one(0), view, one(tail), most)[0]
                within = torch.arange(view.chunk, device=chunk_GC.device)[:, None]
                index_KG = (chunk_GC.T[:, None] * view.chunk + within).flatten(0, 1)
                head_G = torch.arange(index_KG.shape[1], device=index_KG.device)
                self._picked[layer][branch] = Picked(KV(*(t[index_KG, head_G] for t in kinds[branch])), index_KG)
        self._most("searched", searched)

    def _observed(self, query_RHD: Tensor, seats: Places, branch: str) -> Observed:
        return Observed(query_RHD, seats.document, seats.position - self._first[branch])

    def _vote(self, queries: list[dict[str, Tensor]], seats: Places) -> None:
        """Add the attention of the tokens that became known since the last selection."""
        old = self._votes
        self._votes = [{} for _ in queries]
        for layer, kinds in enumerate(queries):
            for branch, query_RHD in kinds.items():
                chunks = chunking(self.memory.places[branch], 1)
                key_PGD = self.memory.layers[layer][branch].key.float()
                total_GP = votes(self._observed(query_RHD, seats, branch), key_PGD, chunks)
                if old:
                    total_GP[:, : old[layer][branch].shape[1]] += old[layer][branch]
                self._votes[layer][branch] = total_GP
        self._rows = None

    def _taken_out(self, anchor: int, count: dict[str, int]) -> tuple[Memory, int]:
        """Sinks, the best chunks and the tail of every layer and branch, one behind the other."""
        view = self._view
        age = anchor - self._chosen_at
        # 1. Which keys of each branch are read.
        taken: dict[str, Taken] = {}
        for branch, before in count.items():
            budget, count, since = (torch.tensor(n) for n in (view.budget, before, before - age))
            parts = layout(view, budget, count, since)
            check(parts, budget, count)
            taken[branch] = Taken(*map(int, parts), before)
            if self._forgets:
                self._forget(branch, taken[branch].tail)
        room = max(one.visible + self._first[branch] for branch, one in taken.items())
        in_cache = view.positions == "in_cache"
        # 2. They are joined, and moved where positions are those in the cache.
        layers: list[dict[str, KV]] = [{} for _ in self.memory.layers]
        for branch, one in taken.items():
            gone = self._dropped[branch] if one.tail else 0
            for layer, kinds in enumerate(self.memory.layers):
                sinks = KV(*(t[: one.sinks] for t in kinds[branch]))
                tail = KV(*(t[one.tail - gone : one.before - gone] for t in kinds[branch]))
                parts = [sinks, tail]
                index_KG = None
                if one.picked:
                    picked = self._picked[layer][branch]
                    parts.insert(1, KV(*(t[: one.picked] for t in picked.kv)))
                    index_KG = picked.index_KG[: one.picked]
                key, value = (torch.cat(part) for part in zip(*parts))
                if in_cache:
                    moved_KG = self._moved(key, one, index_KG, room, self._first[branch])
                    key = self.drafter.rotate(layer, branch, key, moved_KG)
                layers[layer][branch] = KV(key, value)
        # 3. The rule of visibility shows an anchor the memory before it. All that was taken out is to be seen, so that every key
        # is said to stand at -1, before any anchor. Keys are rotated already, and this changes nothing about them.
        document, before_all = torch.tensor([[0], [-1]], device=key.device)
        places = {branch: Places(document.expand(one.visible), before_all.expand(one.visible)) for branch, one in taken.items()}
        return Memory(layers, places, self.memory.feature), room if in_cache else anchor

    def _moved(self, key_KGD: Tensor, taken: Taken, index_KG: Tensor | None, room: int, first: int) -> Tensor:
        """By how many positions each key moves when visible keys stand one behind the other, the last before `room`, [K, G]."""

        def span(start: int, end: int) -> Tensor:
            return torch.arange(start, end, device=key_KGD.device)[:, None].expand(-1, key_KGD.shape[1])

        chosen = [] if index_KG is None else [index_KG]
        index_KG = torch.cat([span(0, taken.sinks), *chosen, span(taken.tail, taken.before)])
        # Chunks come best first. The argsort of an argsort is each key's rank, its place in the order of the text.
        slot_KG = index_KG.argsort(dim=0).argsort(dim=0)
        return (room - len(index_KG) + slot_KG) - (first + index_KG)

    def _forget(self, branch: str, tail: int) -> None:
        """Drop what lies between the sinks and the tail."""
        sink = self._view.sink
        gone = self._dropped[branch]
        if tail <= sink + gone:
            return

        def cut(t: Tensor) -> Tensor:
            return torch.cat([t[:sink], t[tail - gone :]])

        for kinds in self.memory.layers:
            kinds[branch] = KV(*map(cut, kinds[branch]))
        held = self.memory.places[branch]
        places = self.memory.places | {branch: Places(cut(held.document), cut(held.position))}
        self.memory = replace(self.memory, places=places)
        self._dropped[branch] = tail - sink


def _one(device: torch.device, value: int) -> Tensor:
    """A number as the views' functions take it, for one anchor, [1]."""
    return torch.tensor([value], device=device)
