"""Who asks for text and who waits: a dialogue asks, gets an answer and asks again, and a line holds those without a place.

A dialogue is a generator, so that whoever writes one (`data_prep/synthesis/`) says in plain order what it asks and what it makes
of each answer, and need not know that a batch of others is asked beside it.
"""

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

PREFILL_TOKENS = 16384  # of one forward over prompts, padding included


class Ask(NamedTuple):
    """Continue `tokens`. At temperature 0 with the likeliest token, else drawn from random numbers of `seed` alone, so that an
    answer does not depend on who is asked beside it (but for rounding). `tokens` and `max_tokens` fit into the target's
    positions."""

    tokens: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


class Answer(NamedTuple):
    """`tokens` up to the end token, which is not among them; not `ended`: cut at `max_tokens`."""

    tokens: list[int]
    ended: bool


Dialogue = Generator[Ask, Answer, None]  # yields what it asks, gets its answer, and keeps what it makes of it


@dataclass
class Request:
    """What a dialogue asks now."""

    dialogue: Dialogue
    ask: Ask

    @property
    def positions(self) -> int:
        """That prompt and answer may take."""
        return len(self.ask.tokens) + self.ask.max_tokens


class Line:
    """Who waits for a place: dialogues that go on, then those that have not begun."""

    def __init__(self, dialogues: Iterator[Dialogue]):
        self._fresh = dialogues
        self._going_on: deque[Request] = deque()
        self.empty = False  # no dialogue waits, and no new one will come

    def take(self, count: int) -> list[Request]:
        # Those that have begun come first, so that few are held half done.
        taken = [self._going_on.popleft() for _ in range(min(count, len(self._going_on)))]
        while len(taken) < count and (dialogue := next(self._fresh, None)) is not None:
            taken += self._asked(dialogue, None)
        self.empty = len(taken) < count
        return taken

    def put_back(self, requests: list[Request]) -> None:
        self._going_on.extendleft(reversed(requests))
        self.empty = self.empty and not requests

    def answered(self, request: Request, answer: Answer) -> None:
        """The dialogue gets its answer; if it asks again it is the first to get a place."""
        self.put_back(self._asked(request.dialogue, answer))

    def _asked(self, dialogue: Dialogue, answer: Answer | None) -> list[Request]:
        try:
            # A generator that has not begun takes None alone; that is what starts it.
            return [Request(dialogue, dialogue.send(answer))]
        except StopIteration:
            return []


def prefill_groups(requests: list[Request]) -> Iterator[list[Request]]:
    """Requests, the shortest first, cut where a forward over their prompts would take more than `PREFILL_TOKENS`."""
    group: list[Request] = []
    for request in requests:
        # Requests come by length, so that this one is the longest and all of them are padded to it.
        if group and len(request.ask.tokens) * (len(group) + 1) > PREFILL_TOKENS:
            yield group
            group = []
        group.append(request)
    yield group
