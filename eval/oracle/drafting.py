"""Who drafts: a trained drafter, prompt lookup, or no drafter at all. One small interface, called once a round.

Shapes: P verified positions, J drafted tokens, V vocabulary, E hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data_prep.decoding.sampling import distribution, sample
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.states import States
from eval.caches.sparse import SparseCache
from train.attention.backend import AttentionBackend
from train.attention.visibility import Places
from train.drafter.base import Drafter
from train.schedules.schedule import Source, Start
from train.views.recipe import View


class Draft(NamedTuple):
    """`q_JV` is what the tokens were drawn from (None: a certain guess); `logits_JV` for those who look inside."""

    tokens: list[int]
    q_JV: Tensor | None = None
    logits_JV: Tensor | None = None


class Drafting(Protocol):
    def begin(self) -> None:
        """A new request."""

    def observe(self, states: States, known: list[int]) -> None:
        """The target has processed P more positions; `known` are the tokens that were not known before, the anchor's being last:
        P + 1 in the first call, P in later ones."""

    def draft(self, tokens: list[int], temperature: float, generator: torch.Generator) -> Draft:
        """Guess what follows `tokens`, the last of which is the anchor."""

    def kv_bytes(self) -> dict[str, int]:
        """The most bytes of keys and values in this request, by what became of them (`SparseCache`)."""


class Nobody:
    """Plain decoding: the same loop with no drafter."""

    def begin(self) -> None:
        pass

    def observe(self, states: States, known: list[int]) -> None:
        pass

    def draft(self, tokens: list[int], temperature: float, generator: torch.Generator) -> Draft:
        return Draft([])

    def kv_bytes(self) -> dict[str, int]:
        return {}


class PromptLookup(Nobody):
    """What followed the last occurrence of the newest n-gram, longest n first (n = 3, 2, 1). The control that any
    trained drafter has to beat."""

    def __init__(self, draft_length: int, longest: int = 3):
        self._length = draft_length
        self._longest = longest

    def draft(self, tokens: list[int], temperature: float, generator: torch.Generator) -> Draft:
        for n in range(self._longest, 0, -1):
            tail = tokens[-n:]
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == tail:
                    return Draft(tokens[start + n : start + n + self._length])
        return Draft([])


class Trained:
    """A drafter with its memory as a KV cache: every verified position is remembered once.

    Args:
        view: what of the memory the drafter may read; None: all of it.
        change: what the drafter is shown instead of the target's states (the controls); gets the states and their positions.
    """

    def __init__(
        self,
        drafter: Drafter,
        head: FrozenHead,
        attend: AttentionBackend,
        view: View | None = None,
        change: Callable[[States, Tensor], States] | None = None,
    ):
        self.drafter = drafter.eval()
        self.attend = attend
        self._head = head
        self._view = view
        self._change = change
        self._product = drafter.head.product(head)
        self.device = head.head_VE.device
        self.begin()

    def begin(self) -> None:
        self.cache = SparseCache(self.drafter, self.attend, self._view)
        self._length = 0  # positions that the target has processed

    @torch.no_grad()
    def observe(self, states: States, known: list[int]) -> None:
        if self._change is not None:
            position_P = torch.arange(self._length, self._length + len(states.last_hidden), device=self.device)
            states = self._change(states, position_P)
        before = self._length
        self._length += len(states.last_hidden)
        # Memory of pairs has no row for the first token, which has no feature before it. Memory of tokens has one.
        rows = known if before == 0 and not self.drafter.config.reads_pairs else known[-(self._length - before) :]
        places = self._places(before, self._length)
        known_places = self._places(self._length + 1 - len(rows), self._length + 1)
        self.cache.extend(states, places, self.embed(rows), known_places)

    @torch.no_grad()
    def draft(self, tokens: list[int], temperature: float, generator: torch.Generator) -> Draft:
        memory, position = self.cache.visible(len(tokens) - 1)
        anchor_1 = torch.tensor([position], device=self.device)
        newest_1E = None if memory.feature is None else memory.feature[-1:]  # fc(f_{a-1}), where the drafter reads pairs
        drawn = _Drawn(self, tokens[-1], temperature, generator)
        start = Start(memory, torch.zeros_like(anchor_1), anchor_1, newest_1E)
        self.drafter.config.schedule.draft(self.drafter, start, drawn)
        return drawn.draft()

    def kv_bytes(self) -> dict[str, int]:
        return self.cache.bytes

    def _places(self, start: int, end: int) -> Places:
        position = torch.arange(start, end, device=self.device)
        return Places(torch.zeros_like(position), position)

    def embed(self, tokens: list[int]) -> Tensor:
        return self.drafter.embed(torch.tensor(tokens, device=self.device), self._head)

    def logits(self, output_JE: Tensor) -> Tensor:
        return self.drafter.head.logits(output_JE, self._head, self._product)


class _Drawn(Source):
    """Each drafted token is drawn from what the drafter proposes, and read in the next pass."""

    def __init__(self, trained: Trained, anchor: int, temperature: float, generator: torch.Generator):
        self.length = trained.drafter.config.draft_length
        self.attend = trained.attend
        self._trained = trained
        self._temperature = temperature
        self._generator = generator
        self._tokens = [anchor]
        self._logits: list[Tensor] = []
        self._q: list[Tensor] = []

    def token(self, slot: int) -> Tensor:
        return self._trained.embed(self._tokens[slot : slot + 1])

    def drafted(self, output_1E: Tensor) -> None:
        self._draw(output_1E)

    def drafted_at_once(self, output_1JE: Tensor) -> None:
        self._draw(output_1JE[0])

    def _draw(self, output_JE: Tensor) -> None:
        logits_JV = self._trained.logits(output_JE)
        q_JV = distribution(logits_JV, self._temperature)
        self._tokens += [sample(q_V, self._generator) for q_V in q_JV]
        self._logits.append(logits_JV)
        self._q.append(q_JV)

    def draft(self) -> Draft:
        return Draft(self._tokens[1:], torch.cat(self._q), torch.cat(self._logits))
