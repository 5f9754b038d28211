"""One answer as it comes, with a drafter or without: what `mode=chat` and `mode=demo` show."""

import re
import time
from collections.abc import Generator
from dataclasses import dataclass, field

from rich.text import Text

from data_prep.decoding.cache import StaticCache
from data_prep.decoding.sampling import Sampling
from data_prep.target.loading import load_tokenizer
from data_prep.target.target import Target
from eval.engine.engine import Engine, room_for
from eval.engine.lengths import lengths_of
from eval.engine.request import Request, Stops
from eval.engine.verification import Verification
from eval.judging import measure
from eval.judging.controls import OtherMemory
from eval.judging.judge import contenders
from eval.oracle.decode import Generation
from eval.recipe import EvalRecipe
from eval.reports.page import KINDS
from train.drafter.base import Drafter

LEAST_ROOM = 1024  # places of a cache
UNPRINTABLE = re.compile(r"[^\n\t -~\u00a0-\U0010ffff]")  # what could steer a terminal


@dataclass
class Answer:
    """The answer to one prompt, a round at a time. `so_far` is the part that is known; its seconds are those of its own
    rounds, without the time between them."""

    engine: Engine
    prompt: list[int]
    limit: int  # tokens
    seed: int
    stops: Stops
    so_far: Generation = field(default_factory=lambda: Generation([]))
    done: bool = False
    text: Text = field(default_factory=Text)  # for people: without special tokens, accepted ones coloured

    def __post_init__(self):
        self._rounds: Generator[list[Request], None, list[Generation]] = self.engine.stream(
            [self.prompt], self.limit, [self.seed], self.stops
        )
        self._begun = False

    def step(self) -> Text:
        """The next round, and before the first one the prompt's forward: the text that it brought."""
        shown = len(self.so_far.tokens)
        started = time.perf_counter()
        try:
            (request,) = next(self._rounds)
            # The request is not at its end, so that nothing is to be cut.
            tokens = list(request.output)
            rounds = list(request.rounds)
            # The first step is the prompt's forward, which counts for nothing here.
            seconds = self.so_far.decode_s + (time.perf_counter() - started if self._begun else 0.0)
            self.so_far = Generation(tokens, rounds, decode_s=seconds)
            self._begun = True
        except StopIteration as end:
            (self.so_far,) = end.value
            self.done = True
        return self._read(shown)

    def _read(self, shown: int) -> Text:
        tokenizer = self.stops.tokenizer
        new = Text()
        special = set(tokenizer.all_special_ids) | self.stops.end_tokens
        kept = [piece for piece in measure.pieces(self.prompt, self.so_far, tokenizer, shown) if piece[1] != "rejected"]
        for token, (text, kind) in zip(self.so_far.tokens[shown:], kept):
            if token not in special:
                new.append(UNPRINTABLE.sub("\ufffd", text), KINDS[kind] if kind == "accepted" else None)
        self.text.append_text(new)
        return new

    @property
    def tau(self) -> float:
        return measure.tau([self.so_far])[0]

    @property
    def tokens_per_s(self) -> float:
        """Behind the first token, which the prompt's forward gives."""
        return measure.tokens_per_s([self.so_far], prefill=False)


class Decoders:
    """Who answers: the target alone, or with the drafter. Their caches grow with the prompts.

    Args:
        side_by_side: an answer of each at the same time, round by round; else one answer at a time.
    """

    def __init__(self, recipe: EvalRecipe, target: Target, drafter: Drafter, temperature: float, side_by_side: bool):
        self.recipe = recipe
        self.target = target
        self.drafter = drafter
        self._side_by_side = side_by_side
        self.sampling = Sampling(temperature, recipe.top_p, recipe.top_k)
        self.tokenizer = load_tokenizer(target.path, target.revision, target.trust_remote_code)
        self.stops = Stops(target.end_tokens, tuple(recipe.stop), self.tokenizer)
        if recipe.compile:
            target.compile()
        self._engines: dict[bool, Engine] = {}
        self._room = 0
        self.forget_lengths()

    def forget_lengths(self) -> None:
        """`draft.length=adaptive` begins anew."""
        longest = {False: 0, True: self.recipe.longest(self.drafter.config)}
        self._lengths = {drafted: lengths_of(self.recipe.draft.length, most) for drafted, most in longest.items()}
        for who, engine in self._engines.items():
            engine.lengths = self._lengths[who]

    def answer(self, prompt: list[int], limit: int, seed: int, drafted: bool) -> Answer:
        """To `prompt`, of at most `limit` tokens."""
        needed = room_for(len(prompt), limit, self._lengths[True].longest)
        if needed > self._room:
            # A power of two: a conversation that grows makes new caches, and records new graphs, only each time it has doubled.
            self._make(max(LEAST_ROOM, 2 ** (needed - 1).bit_length()))
        return Answer(self._engines[drafted], prompt, limit, seed, self.stops)

    def _make(self, room: int) -> None:
        target = self.target
        self._engines.clear()  # and their caches, before there are new ones
        alone = self.recipe.model_copy(update={"batch": 1, "controls": False})
        everyone = contenders(alone, target, self.drafter, OtherMemory(1, room))
        cache = None
        for drafted, name in ((False, "baseline"), (True, "trained")):
            # Two answers at the same time need a cache each. One after the other they can share one.
            if cache is None or self._side_by_side:
                cache = StaticCache.of(target, 1, room)
            self._engines[drafted] = Engine(
                target, everyone[name], cache, self._lengths[drafted], Verification(self.sampling), graphs=self.recipe.graphs
            )
        self._room = room
