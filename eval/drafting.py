"""Who drafts: a trained drafter, prompt lookup, or nobody. One small interface, called once a round.

Shapes: P verified positions, J drafted tokens, V vocabulary, E hidden size.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data_prep.target import FrozenHead, States
from eval.verification import distribution, sample
from train.attention.visibility import Places, Rows
from train.drafter.memory import Memory
from train.drafter.model import Drafter
from train.objectives.blockwise import block_rows


class Draft(NamedTuple):
    """`q_JV` is what the tokens were drawn from (None: a certain guess); `logits_JV` for those who look inside."""

    tokens: list[int]
    q_JV: Tensor | None = None
    logits_JV: Tensor | None = None


class Drafting(Protocol):
    def begin(self) -> None:
        """A new request."""

    def observe(self, states: States, following: list[int]) -> None:
        """The target has processed P more positions; `following` are the tokens after each, the anchor's being last."""

    def draft(self, tokens: list[int], temperature: float, generator: torch.Generator) -> Draft:
        """Guess what follows `tokens`, the last of which is the anchor."""


class Nobody:
    """Plain decoding: the same loop with no drafter."""

    def begin(self) -> None:
        pass

    def observe(self, states: States, following: list[int]) -> None:
        pass

    def draft(self, tokens: list[int], temperature: float, generator: torch.Generator) -> Draft:
        return Draft([])


class PromptLookup(Nobody):
    """What followed the last occurrence of the newest n-gram, longest n first (n = 3, 2, 1). The control that any
    trained drafter has to beat."""

    def __init__(self, draft_length: int, longest: int = 3):
        self._length, self._longest = draft_length, longest

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
        change: what the drafter is shown instead of the target's states (the controls); gets the states and the
            position of the first of them.
    """

    def __init__(self, drafter: Drafter, head: FrozenHead, attend, change=None):
        self.drafter, self._head, self._attend, self._change = drafter.eval(), head, attend, change
        self.device = head.head_VE.device
        self.begin()

    def begin(self) -> None:
        self.memory: Memory | None = None
        self._length = 0

    @torch.no_grad()
    def observe(self, states: States, following: list[int]) -> None:
        if self._change is not None:
            states = self._change(states, self._length)
        position = torch.arange(self._length, self._length + len(following), device=self.device)
        self._length += len(following)
        self.memory = self.drafter.remember(
            states, self._embed(following), Places(torch.zeros_like(position), position), self._attend, self.memory
        )

    @torch.no_grad()
    def draft(self, tokens: list[int], temperature: float, generator: torch.Generator) -> Draft:
        anchor = torch.tensor([len(tokens) - 1], device=self.device)
        if self.drafter.config.objective == "ttt":
            return self._steps(tokens[-1], anchor, temperature, generator)
        rows = block_rows(torch.zeros_like(anchor), anchor, self.drafter.config.slots)
        output_JE = self.drafter.block(self._embed(tokens[-1:])[None], rows, self.memory, self._attend)[0]
        if self.drafter.sequential is not None:
            return self._corrected(output_JE, tokens[-1], temperature, generator)
        logits = self._logits(output_JE)
        q_JV = distribution(logits, temperature)
        return Draft([sample(q, generator) for q in q_JV], q_JV, logits)

    def _corrected(self, output_JE: Tensor, token: int, temperature: float, generator: torch.Generator) -> Draft:
        """A block's outputs, each corrected by the token drafted before it."""
        tokens, logits, qs, state = [], [], [], None
        for output_E in output_JE:
            output_1E, state = self.drafter.sequential.step(output_E[None], self._embed([token]), state)
            logits.append(self._logits(output_1E))
            qs.append(distribution(logits[-1], temperature))
            token = sample(qs[-1][0], generator)
            tokens.append(token)
        return Draft(tokens, torch.cat(qs), torch.cat(logits))

    def _steps(self, token: int, anchor: Tensor, temperature: float, generator: torch.Generator) -> Draft:
        feature = self.memory.feature[-1:] if self.memory.feature is not None else None
        tokens, logits, qs, earlier, past, zero = [], [], [], None, None, torch.zeros_like(anchor)
        for j in range(1, self.drafter.config.slots + 1):
            rows = Rows(zero, anchor, zero, zero + j, anchor + j - 1)
            output, feature, past = self.drafter.step(
                self._embed([token]), feature, rows, earlier, self.memory, past, self._attend
            )
            earlier = rows if earlier is None else earlier + rows
            logits.append(self._logits(output))
            qs.append(distribution(logits[-1], temperature))
            token = sample(qs[-1][0], generator)
            tokens.append(token)
        return Draft(tokens, torch.cat(qs), torch.cat(logits))

    def _embed(self, tokens: list[int]) -> Tensor:
        return self._head.embed(torch.tensor(tokens, device=self.device))

    def _logits(self, output_JE: Tensor) -> Tensor:
        return self.drafter.head.logits(output_JE, self._head)


def zero_memory(states: States, start: int) -> States:
    """Control: the drafter learns nothing from the target."""
    return states.map(torch.zeros_like)


def memory_of(other: States):
    """Control: the drafter is shown another request's states at the same positions (repeated where it is shorter)."""

    def change(states: States, start: int) -> States:
        def pick(tensor: Tensor, count: int) -> Tensor:
            return tensor[torch.arange(start, start + count, device=tensor.device) % len(tensor)]

        count = len(states.last_hidden)
        return other.map(lambda tensor: pick(tensor, count))

    return change
