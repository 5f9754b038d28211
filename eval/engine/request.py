"""What the host knows of a request: its output so far, and where that ends, as in plain decoding."""

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from eval.oracle.decode import Round


@dataclass(frozen=True)
class Stops:
    """An output ends at an end token, or with the token that completes a stop string. `strings` need the `tokenizer` that says
    what tokens read like."""

    end_tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def found(self, output: list[int], new: int) -> bool:
        """Whether one of the last `new` tokens ends the output."""
        if not self.end_tokens.isdisjoint(output[len(output) - new :]):
            return True
        # A token is a byte at least, so that a stop string of n bytes begins n tokens back at most.
        reach = max((len(s.encode()) for s in self.strings), default=0)
        return bool(reach) and self._says(output[max(0, len(output) - new - reach) :])

    def cut(self, output: list[int]) -> list[int]:
        """The output up to the token that ends it; all of it when none does."""
        for end in range(1, len(output) + 1):
            if self.found(output[:end], 1):
                return output[:end]
        return output

    def _says(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(string in text for string in self.strings)


class Request:
    """What the host knows of one request. When verification is audited, tokens are sure once a full round has seen them."""

    def __init__(self, prompt: int, limit: int, stops: Stops, audited: bool, output: list[int]):
        self._prompt = prompt  # tokens
        self._limit = limit
        self._stops = stops
        self._audited = audited
        self.output = output
        self.rounds: list[Round] = []
        self.undone = 0  # tokens that audits took back, in `rollbacks` rounds
        self.rollbacks = 0
        self._sure = 1  # tokens of the output that no audit can take back
        self.since = 0  # tokens verified partially since the last full round
        self._ended = self._ends(1)  # as far as is known; an audit may find otherwise
        self.done = self._ended

    @property
    def anchor(self) -> int:
        """Position of the newest token."""
        return self._prompt + len(self.output) - 1

    def take(self, round: Round, emitted: list[int], full: bool) -> None:
        """One round's news: the tokens behind the position `round.anchor`."""
        if self.done:
            return
        kept = round.anchor + 1 - self._prompt
        if kept < len(self.output):
            round = self._rolled_back(round, len(self.output) - kept)
        self.output[kept:] = emitted
        self.rounds.append(round)
        self.since = 0 if full else self.since + len(emitted)
        # An audit may have replaced any token that was not sure, so that all of those are looked at.
        new = len(self.output) - self._sure if self._audited else len(emitted)
        self._ended = self._ends(new)
        self.done = self._ended and (full or not self._audited)
        if full:
            self._sure = len(self.output)

    def _rolled_back(self, round: Round, count: int) -> Round:
        """Take tokens from the rounds that emitted them. This round's draft stood behind them, and was not judged."""
        self.undone += count
        self.rollbacks += 1
        for back in range(len(self.rounds) - 1, -1, -1):
            emitted = self.rounds[back].kept + 1
            lost = min(count, emitted)
            self.rounds[back] = replace(self.rounds[back], kept=self.rounds[back].kept - lost)
            count -= lost
        return replace(round, drafted=0, drafted_tokens=None)

    def wants_full(self, deepest: int, allowed: int) -> bool:
        """Whether the next round has to be a full one: it may verify more than the tokens that are `allowed` before one, or the
        end is still to be made sure of."""
        return not self.done and (self._ended or self.since + deepest + 1 > allowed)

    def _ends(self, new: int) -> bool:
        return len(self.output) >= self._limit or self._stops.found(self.output, new)
