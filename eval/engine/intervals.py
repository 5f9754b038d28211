"""How many tokens to verify over a part of the cache before a full round: a number, or what faults and times make fastest.

A cycle is a few partial rounds and the full round that audits them. Its interval N bounds the tokens of its partial rounds.
"""

from collections.abc import Sequence

HALVINGS = 4  # intervals to choose from, beside 0: the longest, and what halving it gives


class Intervals:
    """Always `interval`; 0: every round is full.

    Attributes:
        choices: rows before the anchor's that full rounds may have room for, in rising order.
        allowed: tokens that may be verified partially in this cycle.
    """

    def __init__(self, interval: int):
        self.choices: Sequence[int] = [interval]
        self.allowed = interval

    def begin(self) -> None:
        """New requests. The ones before may have been left in the middle of a cycle."""

    def turn(self) -> int:
        """A full round comes. Says what follows it (`allowed`), and returns the rows that it has room for before the anchor's.
        0: nothing is missing, and no part has to be taken."""
        return self.choices[-1]

    def saw(self, missing: int | None, emitted: list[int], audits: list[tuple[int, int]], seconds: float) -> None:
        """A round took `seconds`.

        Args:
            missing: rows that the full round had room for (`turn`); None: it was partial.
            emitted: its tokens, of each request.
            audits: of each request, tokens that it had verified partially, and how many of them were taken back.
        """


def intervals_of(partial_tokens: int | str, longest: int, deepest: int) -> Intervals:
    """What `verify.partial_tokens` says, of at most `longest` tokens where a round keeps up to `deepest`."""
    return AdaptiveIntervals(longest, deepest) if partial_tokens == "adaptive" else Intervals(longest)


class AdaptiveIntervals(Intervals):
    """The interval whose cycles leave most tokens per second, by what was seen lately.

    Let n tokens of a request be verified partially in a cycle, and each be wrong with probability h where those before it are
    right. The audit keeps those before the first wrong one and puts the target's own there; where none is wrong, the full round
    emits t tokens like any other. So (1 - (1 - h)^n) / h + (1 - h)^n t tokens are left of a cycle, which takes the seconds of
    its partial rounds and of a full round of its interval. h, t and the seconds are running means; how many partial rounds an
    interval holds follows from the pace of a batch's fastest request. h is taken to be the same everywhere in a cycle.

    A full round of each interval is timed at once, before anything is verified partially. Every `explore`-th cycle tries the next
    longer or shorter interval, by turns, so that measurements do not grow old. An interval is chosen before its tokens are known.
    """

    def __init__(self, longest: int, deepest: int, decay: float = 0.95, explore: int = 16):
        halves = {longest >> n for n in range(HALVINGS)}
        self.choices = [0, *sorted(one for one in halves if one > deepest)]
        self.allowed = 0
        self._deepest = deepest
        self._decay = decay
        self._explore = explore
        self._cycles = 0
        self._full: dict[int, float] = {}  # seconds of a full round, by the rows that it has room for
        self._timed: dict[int, int] = {}  # the last cycle that measured it
        self._partial: float | None = None  # seconds of a partial round
        self._faults, self._judged = 1.0, 64.0  # of audited tokens, until something is seen
        self._tokens: float | None = None  # that a round emits of a request
        self._pace: float | None = None  # the same of a cycle's fastest request
        self.begin()

    def begin(self) -> None:
        self._rounds = 0  # partial ones of this cycle

    def turn(self) -> int:
        self._cycles += 1
        untimed = [interval for interval in self.choices if interval not in self._full]
        if untimed:
            return untimed[-1]
        missing = self.allowed
        self.allowed = self._next()
        # The part is taken by a full round of any interval but 0.
        return missing or (self.choices[1] if self.allowed else 0)

    def _next(self) -> int:
        if self._pace is None:
            return self.choices[1]
        best = max(self.choices, key=self._rate)
        turn, since = divmod(self._cycles, self._explore)
        neighbour = self.choices.index(best) + (0 if since else 1 if turn % 2 else -1)
        return self.choices[min(max(neighbour, 0), len(self.choices) - 1)]

    def _rate(self, interval: int) -> float:
        """Tokens of a request that are left of a cycle, per second."""
        # The last partial round begins where a whole draft still fits.
        rounds = 1 + int((interval - self._deepest - 1) / self._pace) if interval else 0
        hazard = max(self._faults / self._judged, 1e-6)
        right = (1 - hazard) ** (rounds * self._tokens)
        left = (1 - right) / hazard + right * self._tokens
        return left / (self._full[interval] + rounds * self._partial)

    def saw(self, missing: int | None, emitted: list[int], audits: list[tuple[int, int]], seconds: float) -> None:
        mean = lambda old, new: new if old is None else self._decay * old + (1 - self._decay) * new
        kept = [count for count, (_, lost) in zip(emitted, audits) if not lost]
        if kept:
            self._tokens = mean(self._tokens, sum(kept) / len(kept))
        if missing is None:
            self._partial = mean(self._partial, seconds)
            self._rounds += 1
            return
        # The older the last measurement of these rows, the less it weighs beside the new one.
        old = self._decay ** (self._cycles - self._timed.get(missing, self._cycles))
        self._full[missing] = old * self._full.get(missing, seconds) + (1 - old) * seconds
        self._timed[missing] = self._cycles
        if self._rounds:
            self._pace = mean(self._pace, max(since for since, _ in audits) / self._rounds)
            self._faults = self._decay * self._faults + sum(lost > 0 for _, lost in audits)
            # Behind a fault nothing was judged.
            self._judged = self._decay * self._judged + sum(since - max(lost - 1, 0) for since, lost in audits)
        self._rounds = 0
