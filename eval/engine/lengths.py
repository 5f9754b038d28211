"""How many tokens to draft in a round: a number, or what the measured acceptance and latencies make fastest."""

from collections.abc import Sequence


class Lengths:
    """Always `length`."""

    def __init__(self, length: int):
        self.choices: Sequence[int] = [length]

    @property
    def longest(self) -> int:
        return max(self.choices)

    def choose(self) -> int:
        return self.choices[-1]

    def saw(self, length: int, kept: list[int], seconds: float) -> None:
        """A round drafted `length` tokens for each request, kept `kept` of them, and took `seconds`."""


def lengths_of(draft_length: int | str | None, longest: int) -> Lengths:
    """What `draft.length` says, of drafts of at most `longest` tokens (0: plain decoding)."""
    return Adaptive(longest) if longest and draft_length == "adaptive" else Lengths(longest)


class Adaptive(Lengths):
    """Any length up to `longest`: the one that emits most tokens per second by what was seen lately.

    Two things are measured as running means: cond_j, how often the j-th token is kept where the ones before it are, and a round's
    seconds at each length. A token that was not drafted says nothing, so cond_j does not change until rounds reach slot j again.
    Every `explore`-th round drafts one token more than seems best, or one fewer, by turns: a length may seem slow only because
    the machine was slow when it was tried. Old measurements of seconds give way to new ones. The length is chosen before a
    round's tokens are known, so that their distribution stays the target's.
    """

    def __init__(self, longest: int, decay: float = 0.95, explore: int = 16):
        self.choices = range(1, longest + 1)
        self._decay = decay
        self._explore = explore
        self._rounds = 0
        self._cond = [0.75] * longest  # until something is seen
        self._seconds: dict[int, float] = {}
        self._seen: dict[int, int] = {}  # the last round of each length

    def choose(self) -> int:
        self._rounds += 1
        unseen = [length for length in self.choices if length not in self._seconds]
        if unseen:
            return unseen[-1]  # the longest first, which tells of every slot
        best = max(self.choices, key=lambda length: self._emitted(length) / self._seconds[length])
        turn, since = divmod(self._rounds, self._explore)
        if since:
            return best
        # Now and then a neighbour of the best length, so that its measured seconds do not grow old.
        neighbour = best + 1 if turn % 2 else best - 1
        return min(max(neighbour, 1), self.longest)

    def _emitted(self, length: int) -> float:
        joint = total = 1.0
        for cond in self._cond[:length]:
            joint *= cond
            total += joint
        return total

    def saw(self, length: int, kept: list[int], seconds: float) -> None:
        for one in kept:
            # The first refused token was seen too; those behind it were not judged.
            for slot in range(min(one + 1, length)):
                self._cond[slot] = self._decay * self._cond[slot] + (1 - self._decay) * (slot < one)
        # The older the last measurement of this length, the less it weighs beside the new one.
        old = self._decay ** (self._rounds - self._seen.get(length, self._rounds))
        self._seconds[length] = old * self._seconds.get(length, seconds) + (1 - old) * seconds
        self._seen[length] = self._rounds
