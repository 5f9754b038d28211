"""Many conversations at once: requests take places of a batch, and a place is taken again as soon as its request has ended.

A step of the device is a function of tensors that stay where they are, so that a GPU replays it as a CUDA graph, and the host
looks only every few steps at who has ended. `eval/engine/engine.py` is the engine with drafters; both use the same caches
and attention.

Shapes: P places, N requests that begin together, T rows, L tokens of a text, U random numbers, V vocabulary, G key/value heads, D
head size.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor, distributed

from common.errors import UserError
from data_prep.decoding.attention import Reading, among_rows
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.dialogues import Answer, Dialogue, Line, Request, prefill_groups
from data_prep.decoding.graphs import Graphed
from data_prep.decoding.places import Places
from data_prep.decoding.sampling import drawn, nucleus
from data_prep.target.target import Target

STEPS_UNSEEN = 8  # on a GPU, between two looks at who has ended
MOST_PLACES = 512  # on a GPU, unless told otherwise
ROOM_STEP = 128  # a cache's positions are a multiple of it
SHARE = 0.8  # of a GPU's free memory; the rest is for reading prompts


class BatchGenerator:
    """Runs dialogues, a batch of requests at a time.

    Where processes share the target's layers (`Target.spread_by_tensors`), all of them run the same dialogues in step. What they
    decide follows from tokens alone, and those are rank 0's.

    Args:
        ends: tokens that end an answer.
        places: requests at a time; None: 16 on a CPU, `MOST_PLACES` on a GPU. Fewer where a GPU's memory does not hold them.
    """

    def __init__(self, target: Target, ends: Iterable[int], places: int | None = None):
        self._target = target
        self._cuda = target.device.type == "cuda"
        self._together = target.spread_by_tensors
        self._most = places or (MOST_PLACES if self._cuda else 16)
        self._count = self._most
        # What is compiled is made for one number of rows: steps over all places. Prompts and the last requests do without.
        self._nucleus = torch.compile(nucleus, dynamic=False) if self._cuda else nucleus
        target.compile()
        self._ends = frozenset(ends)
        self._ends_E = torch.tensor(sorted(self._ends), device=target.device)
        self._cache: StaticCache | None = None
        self._places: Places | None = None
        self._taken: dict[int, Request] = {}
        self._graphs: dict[tuple, Graphed] = {}
        self._pool = None
        # What has been asked for so far: temperatures above 0, and less than a whole distribution.
        self._samples = self._cuts = False
        self._draining = False  # all places have to be free before caches can grow

    @torch.no_grad()
    def run(self, dialogues: Iterator[Dialogue]) -> None:
        """Every dialogue to its end. A dialogue is begun only when there is a place for what it asks.

        Raises:
            UserError: the GPU's memory does not hold one request.
        """
        try:
            self._run(Line(iter(dialogues)))
        finally:
            # After an error no request is left over for the next run.
            self._taken.clear()
            self._draining = False

    def _run(self, line: Line) -> None:
        ended: list[tuple[Request, Answer]] = []
        while True:
            # 1. Free places are filled. A forward over prompts costs a GPU as much as several steps: it waits for some.
            free = self._count - len(self._taken)
            enough = self._count // 8 if self._cuda and self._taken else 1
            if free >= max(1, enough) and not (self._draining and self._taken):
                self._begin(line.take(free), line)
            # 2. All go on by some steps.
            if self._taken:
                if line.empty:
                    self._close_up()
                for _ in range(STEPS_UNSEEN if self._cuda else 1):
                    self._step()
            # 3. While the device works, dialogues make of their answers what they will.
            for request, answer in ended:
                line.answered(request, answer)
            if not self._taken and not ended:
                return
            # 4. Who has ended since?
            ended = self._look()

    def _begin(self, requests: list[Request], line: Line) -> None:
        """Give them places, read their prompts and draw the first token of each answer."""
        if not requests:
            return
        if not self._reserve(max(r.positions for r in requests), max(r.ask.max_tokens for r in requests)):
            line.put_back(requests)
            return
        line.put_back(requests[self._count :])
        requests = requests[: self._count]
        self._samples |= any(r.ask.temperature > 0 for r in requests)
        self._cuts |= any(r.ask.top_p < 1 for r in requests)
        free = (place for place in range(self._count) if place not in self._taken)
        # Prompts of like lengths are read together, so that little is padded.
        requests = sorted(requests, key=lambda r: len(r.ask.tokens))
        for group in prefill_groups(requests):
            places = list(islice(free, len(group)))
            self._prefill(group, places)
            self._taken.update(zip(places, group))

    def _prefill(self, group: list[Request], places: list[int]) -> None:
        device = self._target.device
        state = self._places
        place_N = torch.tensor(places, device=device)
        size_N = torch.tensor([len(r.ask.tokens) for r in group])
        ids_NT = torch.zeros(len(group), int(size_N.max()), dtype=torch.long)
        random_NU = torch.zeros(len(group), state.random_PU.shape[1], dtype=torch.float64)
        for ask, ids_T, random_U in zip((r.ask for r in group), ids_NT, random_NU):
            ids_T[: len(ask.tokens)] = torch.tensor(ask.tokens)
            if ask.temperature > 0:
                # Drawn on the CPU: the same numbers on every device.
                own = torch.Generator().manual_seed(ask.seed)
                random_U[: ask.max_tokens] = torch.rand(ask.max_tokens, generator=own, dtype=torch.float64)
        ids_NT, size_N, random_NU = (t.to(device) for t in (ids_NT, size_N, random_NU))
        position_NT = torch.arange(ids_NT.shape[1], device=device).expand_as(ids_NT)
        cache = self._cache

        def attend(layer: int, q_NTHD: Tensor, k_NTGD: Tensor, v_NTGD: Tensor, reading: Reading) -> Tensor:
            if cache.owns(layer):
                cache.key[layer][place_N, : k_NTGD.shape[1]] = k_NTGD
                cache.value[layer][place_N, : v_NTGD.shape[1]] = v_NTGD
            return among_rows(q_NTHD, k_NTGD, v_NTGD, reading)

        with self._target.uncompiled():
            states = self._target.forward_through(ids_NT, position_NT, attend)
        last_hidden = states.last_hidden[torch.arange(len(group), device=device), size_N - 1]
        numbers = lambda field: torch.tensor([getattr(r.ask, field) for r in group], device=device)
        temperature_N = numbers("temperature").float()
        top_p_N = numbers("top_p").float()
        first_N = self._chosen(self._target.logits(last_hidden), temperature_N, top_p_N, random_NU[:, 0])
        state.text_PL[place_N, : ids_NT.shape[1]] = ids_NT
        state.text_PL[place_N, size_N] = first_N
        state.length_P[place_N] = size_N
        state.size_P[place_N] = size_N
        state.limit_P[place_N] = size_N + numbers("max_tokens")
        state.temperature_P[place_N] = temperature_N
        state.top_p_P[place_N] = top_p_N
        state.random_PU[place_N] = random_NU
        state.going_P[place_N] = ~torch.isin(first_N, self._ends_E) & (numbers("max_tokens") > 1)

    def _step(self) -> None:
        """One more token of every request that is going, on as many places as are in use."""
        width = self._width(max(self._taken) + 1)
        key = (width, self._samples, self._cuts)
        if key not in self._graphs:
            places = self._places.first(width)
            cache = self._cache.first(width)
            # A graph holds the addresses of these tensors: whoever makes new ones (`_reserve`) has to forget the graphs.
            self._graphs[key] = Graphed(lambda: self._advance(places, cache), self._pool)
        with nullcontext() if width == self._count else self._target.uncompiled():
            self._graphs[key]()

    def _advance(self, places: Places, cache: StaticCache) -> None:
        token_P1 = places.text_PL.gather(1, places.length_P[:, None])
        attend = cache.attention(places.length_P, 1)
        states = self._target.forward_through(token_P1, places.length_P[:, None], attend)
        answered_P1 = (places.length_P - places.size_P + 1)[:, None]  # tokens of the answer so far
        u_P = places.random_PU.gather(1, answered_P1.clamp(max=places.random_PU.shape[1] - 1))[:, 0]
        logits_PV = self._target.logits(states.last_hidden[:, 0])
        next_P = self._chosen(logits_PV, places.temperature_P, places.top_p_P, u_P)
        # No branch on who is going: a graph has none.
        # Who is not going keeps its text: the token is written where its last one stands already.
        behind_P1 = (places.length_P + places.going_P)[:, None]
        old_P1 = places.text_PL.gather(1, behind_P1)
        places.text_PL.scatter_(1, behind_P1, torch.where(places.going_P[:, None], next_P[:, None], old_P1))
        places.length_P += places.going_P
        places.going_P &= ~torch.isin(next_P, self._ends_E) & (places.length_P + 1 < places.limit_P)

    def _chosen(self, logits_NV: Tensor, temperature_N: Tensor, top_p_N: Tensor, u_N: Tensor) -> Tensor:
        """The next token of each row."""
        next_N = self._own_choice(logits_NV, temperature_N, top_p_N, u_N)
        if self._together:
            distributed.broadcast(next_N, 0)
        return next_N

    def _own_choice(self, logits_NV: Tensor, temperature_N: Tensor, top_p_N: Tensor, u_N: Tensor) -> Tensor:
        best_N = logits_NV.argmax(-1)
        if not self._samples:
            return best_N
        cold_N = temperature_N == 0
        p_NV = (logits_NV.float() / temperature_N.masked_fill(cold_N, 1)[:, None]).softmax(-1)
        if self._cuts:
            whole = len(p_NV) == self._count
            p_NV = (self._nucleus if whole else nucleus)(p_NV, top_p_N)
        return torch.where(cold_N, best_N, drawn(p_NV, u_N))

    def _look(self) -> list[tuple[Request, Answer]]:
        """Who has ended, and with what. Their places are free again."""
        if not self._taken:
            return []
        # The host waits for the device here, and nowhere else between two looks.
        going = self._places.going_P.tolist()
        places = [place for place in self._taken if not going[place]]
        if not places:
            return []
        place_N = torch.tensor(places, device=self._target.device)
        ends = (self._places.length_P[place_N] + 1).tolist()
        texts = self._places.text_PL[place_N, : max(ends)].tolist()
        found = []
        for place, text, end in zip(places, texts, ends):
            request = self._taken.pop(place)
            tokens = text[len(request.ask.tokens) : end]
            ended = tokens[-1] in self._ends
            found.append((request, Answer(tokens[:-1] if ended else tokens, ended)))
        return found

    def _close_up(self) -> None:
        """No request waits for a place any more. Those that are left move together, so that steps are over fewer places."""
        count = len(self._taken)
        if self._width(count) == self._width(max(self._taken) + 1):
            return
        behind = [place for place in self._taken if place >= count]
        holes = [place for place in range(count) if place not in self._taken]
        source, destination = (torch.tensor(places, device=self._target.device) for places in (behind, holes))
        self._places.move(source, destination)
        self._cache.move(source, destination)
        self._places.going_P[source] = False
        for old, new in zip(behind, holes):
            self._taken[new] = self._taken.pop(old)

    def _width(self, count: int) -> int:
        """Places that a step works on, so that `count` are among them. A CPU takes just those; a GPU records a graph for each
        width, and so has few of them."""
        if not self._cuda:
            return count
        width = self._count
        while width // 2 >= max(count, 8):
            width //= 2
        return width

    def _reserve(self, positions: int, draws: int) -> bool:
        """Make room for requests of `positions` positions and answers of `draws` tokens. False: there is no memory for new caches
        beside those in use. All requests that are going have to end first; after that there may be fewer places."""
        old = self._places
        cache = self._cache
        if old is not None and cache.room >= positions and old.random_PU.shape[1] >= draws:
            return True
        if old is not None:
            # By a quarter at least: to grow is to copy, and to record all graphs anew.
            positions = max(positions, cache.room + cache.room // 4 * (cache.room < positions))
            draws = max(draws, old.random_PU.shape[1])
        room = -(-positions // ROOM_STEP) * ROOM_STEP
        if self._fitting(room) < self._count:
            self._draining = True
            if self._taken:
                return False
            # Everybody has ended. The old caches go before new ones are made: there is no memory for both.
            old = cache = None
            self._cache = None
            self._places = None
            self._graphs.clear()
            self._shrink(room)
        self._draining = False
        self._cache = StaticCache.of(self._target, self._count, room)
        self._places = Places(self._count, room, draws, self._target.device)
        if old is not None:
            self._places.take_over(old)
            self._cache.take_over(cache)
        self._graphs.clear()
        # All graphs work in one pool of memory. They may, because no two of them run at the same time.
        self._pool = torch.cuda.graph_pool_handle() if self._cuda and self._target.graphs else None
        return True

    def _shrink(self, room: int) -> None:
        """As many places as there is memory for. Raises UserError for none."""
        torch.cuda.empty_cache()
        fitting = self._fitting(room)
        if not fitting:
            raise UserError(f"the GPU's memory does not hold a request of {room} positions beside the target")
        if fitting < self._most:
            print(f"of requests of {room:,} positions the GPU's memory holds {fitting:,} at a time", flush=True)
        self._count = min(fitting, self._most)

    def _fitting(self, room: int) -> int:
        """Places of new caches that there is memory for."""
        if not self._cuda:
            return self._count
        layers = self._target.cached_layers
        # What PyTorch holds and does not use is free for new tensors too, though the driver counts it as taken.
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        numbers = sum(heads * size for layer, (heads, size, owner) in enumerate(layers) if owner == layer)
        cached = 2 * numbers * room * self._target.dtype.itemsize
        drawn_from = 32 * self._target.config.vocab_size  # logits, probabilities and their sums, in float32 and float64
        fitting = int(SHARE * (torch.cuda.mem_get_info()[0] + unused) / (cached + drawn_from))
        if self._together:
            # They have as many places as the fullest GPU holds.
            least = torch.tensor(fitting, device=self._target.device)
            distributed.all_reduce(least, distributed.ReduceOp.MIN)
            fitting = int(least)
        return fitting
