"""The files of mode=synthesize: what is there already, and whether it goes on."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from data_prep.recipe import SynthesizeRecipe


@dataclass
class Account:
    """What has become of candidates 0 .. candidates - 1."""

    conversations: int = 0
    tokens: int = 0
    candidates: int = 0
    kinds: Counter = field(default_factory=Counter)  # conversations of each kind
    left_out: Counter = field(default_factory=Counter)  # candidates by reason

    def reached(self, recipe: SynthesizeRecipe) -> bool:
        return self.tokens >= recipe.tokens if recipe.count is None else self.conversations >= recipe.count

    def add(self, candidate: dict, left_out: str | None) -> None:
        self.candidates += 1
        if left_out:
            self.left_out[left_out] += 1
            return
        self.conversations += 1
        self.tokens += candidate["tokens"]
        self.kinds[candidate["kind"]] += 1


class Place:
    """The file to write and what stands beside it: OUT.partial while it is made, OUT.json about it once it is finished."""

    def __init__(self, out: str):
        self.out = Path(out)
        self.partial = Path(f"{out}.partial")
        self.about = Path(f"{out}.json")

    def finished(self, settings: dict) -> Account | None:
        """What the finished file holds. Raises UserError when it is not ours, was changed, or has other settings."""
        if not self.out.exists():
            return None
        try:
            about = json.loads(self.about.read_text())
            _refuse_others(self.out, settings, about["settings"])
            # A size shows that lines were added or removed, and costs nothing to read.
            if about["bytes"] != self.out.stat().st_size:
                raise UserError(f"{self.out} was changed since mode=synthesize wrote it; choose another synthesize.out")
            names = ("conversations", "tokens", "candidates")
            counters = {name: Counter(about[name]) for name in ("kinds", "left_out")}
            return Account(**{name: about[name] for name in names}, **counters)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.out} was not written by mode=synthesize; choose another synthesize.out") from error

    def begun(self, settings: dict) -> dict | None:
        """The first line of the unfinished file, if it was completed. Raises UserError as `finished` does."""
        try:
            with open(self.partial, "rb") as file:
                line = file.readline()
        except FileNotFoundError:
            return None
        try:
            if not line.endswith(b"\n"):
                # The command was killed while it wrote its very first line.
                if b'{"settings": '.startswith(line[:13]):
                    return None
                raise ValueError
            first = json.loads(line)
            _refuse_others(self.partial, settings, first["settings"])
            return first
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.partial} was not written by mode=synthesize; choose another synthesize.out") from error


def _refuse_others(path: Path, settings: dict, earlier: dict) -> None:
    if keys := sorted(key for key in settings.keys() | earlier.keys() if settings.get(key) != earlier.get(key)):
        raise UserError(f"{path} was written with other settings; these differ: {', '.join(keys)}. Choose another synthesize.out")
