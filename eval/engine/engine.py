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
from data_prep.target.target import Target
from eval.engine.drafting import StaticDrafting
from eval.engine.lengths import Lengths
from eval.engine.request import Request, Stops
from eval.engine.rounds import Rounds
from eval.engine.verification import Verification
from eval.oracle.decode import Generation, Round, clock

PREFILL_CHUNK = 1024  # tokens of each prompt that one forward reads


class Stopwatch:
    """Seconds by name, of the device's work where there is a GPU; read after a synchronisation."""

    def __init__(self, cuda: bool):
        self._cuda = cuda
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple] = []  # (name, event at the beginning, event at the end), not yet read

    @contextmanager
    def __call__(self, name: str):
        if not self._cuda:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
            return
        # The host runs ahead of the GPU, so that its own clock would say how long launching took.
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self, name: str) -> float:
        for what, begin, end in self._events:
            self._seconds[what] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return self._seconds[name]


def room_for(prompt: int, new_tokens: int, longest: int, interval: int = 0) -> int:
    """Places of a cache that a request needs. It may end with a whole draft kept, and wait for an audit that keeps another one.
    When it is done it still writes a draft in each round of the others. `interval`: most tokens between full rounds."""
    return prompt + new_tokens + 3 * longest + interval + 1


class Engine:
    """Decodes batches of a fixed size, under one way of sampling, with one drafter.

    Args:
        cache: the target's, of B requests and L places; several engines may share it, one at a time.
        lengths: how many tokens are drafted in each round.
        verification: how the target samples and verifies.
        graphs: CUDA graphs (a GPU only, and drafters and targets that leave the host alone).
        prefill_chunk: tokens of each prompt that one forward reads.
    """

    def __init__(
        self,
        target: Target,
        drafting: StaticDrafting,
        cache: StaticCache,
        lengths: Lengths,
        verification: Verification,
        graphs: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        self.lengths = lengths
        self.verification = verification
        self._rounds = Rounds(target, drafting, cache, verification, lengths.longest)
        self.intervals = verification.intervals(self._rounds.deepest)
        self._chunk = prefill_chunk
        self._cuda = target.device.type == "cuda"
        self._graphed = graphs and self._cuda and drafting.graphs and target.graphs
        self._pool = None
        self._graphs: dict[tuple, Graphed] = {}
        self._news: dict[torch.Size, Tensor] = {}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, seeds: list[int], stops: Stops) -> list[Generation]:
        """Continue as many prompts as the engine has places for, or fewer. What a request gets depends on its prompt and its seed
        alone, not on those beside it. Where verification is lossy it depends also on when the batch takes a full round, and above
        temperature 0 on the lengths of its drafts. Each `Generation` bears its share of the batch's seconds."""
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
        rounds = self._rounds
        self._check_room(prompts, max_new_tokens)
        self.reserve(max_new_tokens)

        # 1. Prefill: read the prompts and draw the first tokens.
        rounds.begin(prompts, max_new_tokens, seeds)
        started = clock(rounds.target)
        first = rounds.prefill([len(p) for p in prompts], self._chunk).tolist()
        requests = [Request(len(p), max_new_tokens, stops, rounds.audited, [token]) for p, token in zip(prompts, first)]

        # 2. Rounds, until every request is done.
        watch = Stopwatch(self._cuda)
        intervals = self.intervals
        intervals.begin()
        allowed = []  # by each full round
        full = True
        going = None
        count = 0
        paused = 0.0
        decoding = clock(rounds.target)
        while not all(r.done for r in requests):
            if apart:
                left = clock(rounds.target)
                yield requests
                paused += time.perf_counter() - left
            if going != [not r.done for r in requests]:
                going = [not r.done for r in requests]
                rounds.active_B[: len(going)].copy_(torch.tensor(going))
            count += 1
            length = self.lengths.choose()
            missing = intervals.turn() if full else None
            if full:
                allowed.append(intervals.allowed)
            active = [r for r in requests if not r.done]
            before = [(r.since, r.undone) for r in active]
            begun = time.perf_counter()
            due = rounds.drafting.due([r.anchor for r in requests])
            news = self._round(length, due, missing, watch)[: len(requests)]
            seconds = time.perf_counter() - begun
            kept_of_active = [kept for (_, _, kept, *_), on in zip(news, going) if on]
            self.lengths.saw(length, kept_of_active, seconds)
            for request, one in zip(requests, news):
                _take(request, one, full)
            audits = [(since, r.undone - undone) for r, (since, undone) in zip(active, before)]
            intervals.saw(missing, [kept + 1 for kept in kept_of_active], audits, seconds)
            # One request's full round is the whole batch's, since all are rows of one forward.
            full = any(r.wants_full(rounds.deepest, intervals.allowed) for r in requests)
        ended = clock(rounds.target)

        # 3. What each request has come to, with its share of the batch's seconds and rounds.
        share = len(prompts)
        kv_bytes = rounds.drafting.kv_bytes(int(rounds.length_B.max()))
        return [
            Generation(
                stops.cut(r.output[:max_new_tokens]),
                r.rounds,
                prefill_s=(decoding - started) / share,
                draft_s=watch.seconds("draft") / share,
                verify_s=watch.seconds("verify") / share,
                decode_s=(ended - decoding - paused) / share,
                kv_bytes=kv_bytes,
                undone=r.undone,
                rollbacks=r.rollbacks,
                steps=count / share,
                interval=sum(allowed) / max(1, len(allowed)),
            )
            for r in requests
        ]

    def _check_room(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        longest = max(map(len, prompts))
        needed = room_for(longest, max_new_tokens, self.lengths.longest, self.verification.longest_interval)
        room = self._rounds.cache.room
        if needed > room:
            raise UserError(f"prompts of {longest} tokens need {needed} places of a cache of {room}")

    def _round(self, length: int, due: bool, missing: int | None, watch: Stopwatch) -> list[list[int]]:
        """One round of the whole batch: what is new of each place (`Rounds.verify`)."""
        rounds = self._rounds
        with watch("draft"):
            if due:
                self._graph(rounds.select, 0)()
            proposal = self._graph(rounds.propose, length)()
        with watch("verify"):
            states, news_BU = self._graph(rounds.verify, length, missing)(proposal)
        # The news travels to the host while the drafter observes.
        news, arrived = self._sent(news_BU)
        with watch("draft"):
            self._graph(rounds.observe, length, missing)(states)
        arrived()  # the round's only wait
        return news.tolist()

    @torch.no_grad()
    def reserve(self, max_new_tokens: int) -> None:
        """Make room for outputs of `max_new_tokens` tokens, and record the graphs, which are of one size."""
        if not self._rounds.reserve(max_new_tokens) or not self._graphed:
            return
        # What an old pool's last graph leaves behind cannot be recorded into again.
        self._graphs = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._capture()

    def _capture(self) -> None:
        """Record every graph, with empty requests. No request is active, so that no length moves."""
        rounds = self._rounds
        rounds.begin([], 1, [])
        rounds.prefill([], self._chunk)
        kinds = [*self.intervals.choices, *([None] if self.verification.partial else [])]
        if rounds.drafting.due([1] * rounds.cache.batch):  # nothing is chosen yet: it is, if it ever is
            self._graph(rounds.select, 0)()
        for length in self.lengths.choices:
            proposal = self._graph(rounds.propose, length)()
            for missing in kinds:
                states, _ = self._graph(rounds.verify, length, missing)(proposal)
                self._graph(rounds.observe, length, missing)(states)

    def _graph(self, step: Callable, length: int, missing: int | None = 0) -> Graphed:
        """A step of `Rounds`, recorded for its sizes."""
        key = (step.__name__, length, missing)
        if key not in self._graphs:
            # A whole cache that lives on the host comes in copies that no graph can hold.
            hosted = missing is not None and step.__name__ in ("verify", "observe") and not self._rounds.cache.on_device
            self._graphs[key] = Graphed(lambda *arguments: step(length, missing, *arguments), None if hosted else self._pool)
        return self._graphs[key]

    def _sent(self, news_BU: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """(where a round's news arrives on the host, a wait for it)."""
        if not self._cuda:
            return news_BU, lambda: None
        if news_BU.shape not in self._news:
            # Only a copy into pinned memory lets the host go on meanwhile.
            self._news[news_BU.shape] = torch.empty_like(news_BU, device="cpu", pin_memory=True)
        news = self._news[news_BU.shape]
        event = torch.cuda.Event()
        news.copy_(news_BU, non_blocking=True)
        event.record()
        return news, event.synchronize


def _take(request: Request, news: list[int], full: bool) -> None:
    """Tell a request of its part of a round's news."""
    start, drafted, kept, refused, *emitted = news
    guesses = emitted[:kept]
    if kept < drafted and refused >= 0:
        guesses.append(refused)
    request.take(Round(start, drafted, kept, drafted_tokens=guesses), emitted[: kept + 1], full)
