"""The draft-verify loop for a batch of requests: preallocated caches, CUDA graphs, one wait for the GPU a round.

A round with anchor a: the drafter proposes x_{a+1} .. x_{a+J}; the target processes x_a and the proposals in one forward;
n of them are kept, one more token is emitted, and the next anchor is a + n + 1. Requests keep different numbers of tokens; a
number for each says how much of its caches counts. `eval/oracle/decode.py`, the oracle, is the same loop for one request.

Shapes: B requests, L places of a cache, U numbers of a round's news.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from common.errors import UserError
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.graphs import Graphed
from data_prep.decoding.sampling import Sampling
from data_prep.target.target import Target
from eval.caches.partial import PartialCache
from eval.engine.drafting import StaticDrafting
from eval.engine.lengths import Lengths
from eval.engine.request import Request, Stops
from eval.engine.rounds import Rounds
from eval.oracle.decode import Generation, Round, clock

PREFILL_CHUNK = 1024  # tokens of each prompt that one forward reads


class Stopwatch:
    """Seconds by name, of the device's work where there is a GPU; read after a synchronisation."""

    def __init__(self, cuda: bool):
        self._cuda, self._seconds, self._events = cuda, defaultdict(float), []

    @contextmanager
    def __call__(self, name: str):
        if not self._cuda:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
            return
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        yield
        pair[1].record()
        self._events.append((name, *pair))

    def seconds(self, name: str) -> float:
        for what, begin, end in self._events:
            self._seconds[what] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return self._seconds[name]


def room_for(prompt: int, new_tokens: int, longest: int, partial_tokens: int = 0) -> int:
    """Places that a request needs. It may end with a whole draft kept, wait for an audit that keeps another one, and then writes
    another beside those that go on."""
    return prompt + new_tokens + 3 * longest + partial_tokens + 1


class Engine:
    """Decodes batches of a fixed size, under one way of sampling, with one drafter.

    Args:
        cache: the target's, of B requests and L places; several engines may share it, one at a time.
        lengths: how many tokens are drafted in each round.
        partial: verify over a part of the cache (lossy), with full steps in between; None: every step is full.
        audited: full steps also check what was verified partially since the last one, and go back to the first mistake (greedy
            decoding only, which is lossless again).
        graphs: CUDA graphs (a GPU only, and drafters that leave the host alone).
    """

    def __init__(
        self,
        target: Target,
        drafting: StaticDrafting,
        cache: StaticCache,
        sampling: Sampling,
        lengths: Lengths,
        partial: PartialCache | None = None,
        audited: bool = False,
        graphs: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        self.lengths, self.partial, self._chunk = lengths, partial, prefill_chunk
        self._rounds = Rounds(target, drafting, cache, sampling, lengths.longest, partial, audited)
        self._cuda = target.device.type == "cuda"
        self._graphed, self._pool = graphs and self._cuda and drafting.graphs, None
        self._graphs: dict[tuple, Graphed] = {}
        self._news: dict[torch.Size, Tensor] = {}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, seeds: list[int], stops: Stops) -> list[Generation]:
        """Continue as many prompts as the engine has places for, or fewer. What a request gets depends on its prompt and its seed
        alone, not on those beside it; where verification is lossy also on when the batch takes a full step, and above temperature
        0 on the lengths of its drafts. Each `Generation` bears its share of the batch's seconds."""
        try:
            next(self.stream(prompts, max_new_tokens, seeds, stops, apart=False))
        except StopIteration as end:
            return end.value

    @torch.no_grad()
    def stream(
        self, prompts: list[list[int]], max_new_tokens: int, seeds: list[int], stops: Stops, apart: bool = True
    ) -> Generator[list[Request], None, list[Generation]]:
        """`generate` for who wants to see texts as they come: before each round, what is known of the requests. What is done
        meanwhile does not count, and for that each round waits until the device is done. Left at any time, it leaves an engine
        that can be used again. Not `apart`: all rounds at a stretch."""
        paused = 0.0
        rounds, watch, count = self._rounds, Stopwatch(self._cuda), len(prompts)
        partial_tokens = self.partial.recipe.partial_tokens if self.partial else 0
        needed = room_for(max(map(len, prompts)), max_new_tokens, self.lengths.longest, partial_tokens)
        if needed > rounds.cache.room:
            raise UserError(f"prompts of {max(map(len, prompts))} tokens need {needed} places of a cache of {rounds.cache.room}")
        self.reserve(max_new_tokens)
        rounds.begin(prompts, max_new_tokens, seeds)
        started = clock(rounds.target)
        first = rounds.prefill([len(p) for p in prompts], self._chunk)
        requests = [Request(len(p), max_new_tokens, stops, rounds.audited, [token]) for p, token in zip(prompts, first.tolist())]
        full, going, steps, decoding = True, None, 0, clock(rounds.target)
        while not all(r.done for r in requests):
            if apart:
                left = clock(rounds.target)
                yield requests
                paused += time.perf_counter() - left
            if going != [not r.done for r in requests]:
                going = [not r.done for r in requests]
                rounds.active_B[:count].copy_(torch.tensor(going))
            steps += 1
            length, begun = self.lengths.choose(), time.perf_counter()
            with watch("draft"):
                proposal = self._graph(rounds.propose, length)()
            with watch("verify"):
                states, news_BU = self._graph(rounds.verify, length, full)(proposal)
            news, arrived = self._sent(news_BU)
            with watch("draft"):
                self._graph(rounds.observe, length, full)(states)
            arrived()  # the round's only wait
            news = news[:count].tolist()
            self.lengths.saw(length, [kept for (_, _, kept, *_), on in zip(news, going) if on], time.perf_counter() - begun)
            for request, (start, drafted, kept, refused, *emitted) in zip(requests, news):
                guesses = [*emitted[:kept], *[refused] * (kept < drafted and refused >= 0)]
                request.take(Round(start, drafted, kept, drafted_tokens=guesses), emitted[: kept + 1], full)
            full = self.partial is None or any(r.wants_full(rounds.deepest, partial_tokens) for r in requests)
        ended = clock(rounds.target)
        timings = (decoding - started, watch.seconds("draft"), watch.seconds("verify"), ended - decoding - paused)
        longest = int(rounds.length_B.max())
        return [
            Generation(
                stops.cut(r.output[:max_new_tokens]),
                r.rounds,
                *(seconds / count for seconds in timings),
                rounds.drafting.kv_bytes(longest),
                r.undone,
                r.rollbacks,
                steps / count,
            )
            for r in requests
        ]

    @torch.no_grad()
    def reserve(self, max_new_tokens: int) -> None:
        """Make room for outputs of so many tokens, and record the graphs, which are of one size."""
        if not self._rounds.reserve(max_new_tokens) or not self._graphed:
            return
        # What an old pool's last graph leaves behind cannot be recorded into again.
        self._graphs, self._pool = {}, torch.cuda.graph_pool_handle()
        self._capture()

    def _capture(self) -> None:
        """Every graph, behind a prompt of nothing. No request is active, so that no length moves."""
        rounds = self._rounds
        rounds.begin([], 1, [])
        rounds.prefill([], self._chunk)
        for length in self.lengths.choices:
            proposal = self._graph(rounds.propose, length)()
            for full in [True] + [False] * (self.partial is not None):
                states, _ = self._graph(rounds.verify, length, full)(proposal)
                self._graph(rounds.observe, length, full)(states)

    def _graph(self, step: Callable, length: int, full: bool = True) -> Graphed:
        key = (step.__name__, length, full)
        if key not in self._graphs:
            # A whole cache that lives on the host comes in copies that no graph can hold.
            hosted = full and step.__name__ != "propose" and not self._rounds.cache.on_device
            self._graphs[key] = Graphed(lambda *arguments: step(length, full, *arguments), None if hosted else self._pool)
        return self._graphs[key]

    def _sent(self, news_BU: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """(where a round's news arrives on the host, a wait for it)."""
        if not self._cuda:
            return news_BU, lambda: None
        if news_BU.shape not in self._news:
            self._news[news_BU.shape] = torch.empty_like(news_BU, device="cpu", pin_memory=True)
        event, news = torch.cuda.Event(), self._news[news_BU.shape]
        news.copy_(news_BU, non_blocking=True)
        event.record()
        return news, event.synchronize
