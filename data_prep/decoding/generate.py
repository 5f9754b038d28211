"""Many conversations at once: requests take places of a batch, and a place is taken again as soon as its request has ended.

Shapes: P places, L positions of a cache.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

from data_prep.target import Target


class Ask(NamedTuple):
    """Continue `tokens`. At temperature 0 with the likeliest token, else drawn from random numbers of `seed` alone, so that an
    answer does not depend on who is asked beside it (but for rounding)."""

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


class BatchGenerator:
    """Runs dialogues, `places` requests at a time."""

    def __init__(self, target: Target, ends: frozenset[int], places: int | None = None):
        self._target, self._ends, self._places = target, ends, places

    def run(self, dialogues: Iterator[Dialogue]) -> None:
        """Every dialogue to its end. More are started only as places become free."""
        raise NotImplementedError
