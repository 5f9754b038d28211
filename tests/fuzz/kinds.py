"""The kinds of things that are mutated: each makes whole ones in a folder, changes one of them, and has doors by which commands
come in."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Protocol

from tests.fuzz import outcome
from tests.fuzz.caches import Caches
from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.configurations import Configurations
from tests.fuzz.reports import Reports


class Kind(Protocol):
    doors: dict[str, Callable[[], str]]

    def __init__(self, folder: Path): ...

    def mutate(self, random: Random) -> str:
        """Change one thing; what, in words."""


KINDS: dict[str, type[Kind]] = {
    "configurations": Configurations,
    "caches": Caches,
    "checkpoints": Checkpoints,
    "reports": Reports,
}


def tried(kind: Kind, seed: int, number: int) -> tuple[str, dict[str, str]]:
    """Mutation `number` of a seed, in words, and its outcome behind each door."""
    said = kind.mutate(Random(f"{seed} {number}"))
    return said, {name: outcome(door) for name, door in kind.doors.items()}
