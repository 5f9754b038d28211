"""Who drafts behind a prompt, with an engine of its own, and what becomes of the drafter's memory where the target's cache has
the beginning of the prompt already.

Shapes: B requests (one), L places of a text, T rows of it, P positions, G key/value heads, D head size, J drafted tokens.
"""

from statistics import median

import torch
from torch import Tensor

from data_prep.decoding.cache import StaticCache
from data_prep.decoding.graphs import Graphed
from data_prep.decoding.sampling import Sampling
from data_prep.target.states import States
from data_prep.target.target import Target
from eval.caches.static import Part
from eval.engine.drafting import StaticNobody, StaticTrained
from eval.engine.engine import Engine
from eval.engine.lengths import Lengths
from eval.engine.request import Stops
from eval.engine.verification import Verification
from eval.oracle.decode import Generation
from tests.benchmarks import timed
from train.drafter.base import Drafter
from train.drafter.layers import Rope


class Contender:
    """Who drafts, with an engine over `cache`: a drafter, or (None) nobody."""

    def __init__(self, target: Target, drafter: Drafter | None, cache: StaticCache, o):
        self.target = target
        self.drafter = drafter
        self.drafting = StaticNobody() if drafter is None else StaticTrained(drafter, target.frozen_head)
        self.length = 0 if drafter is None else drafter.config.draft_length
        self._cache = cache
        self._chunk = o.chunk
        self._stops = Stops(target.end_tokens if o.target else frozenset())
        self._graphs = o.graphs
        verification = Verification(Sampling(0.0))
        self._engine = Engine(target, self.drafting, cache, Lengths(self.length), verification, o.graphs, o.chunk)
        self.hand_out()
        self._engine.reserve(o.new)

    def hand_out(self) -> None:
        """The target's forward hands out what this drafter reads, and no more."""
        config = self.drafter and self.drafter.config
        self.target.capture(config.hidden_layers if config else [], config.kv_layers if config else [])

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.drafter.parameters()) if self.drafter else 0

    @property
    def kept(self) -> int:
        """Bytes of a position in the drafter's own memory, from its tensors."""
        return sum(part.read_bytes(1) for part in self._own())

    def _own(self) -> list[Part]:
        """The drafter's own memory, which there is once a prompt was read: not what it borrows of the target's cache."""
        if self.drafter is None:
            return []
        memory = self.drafting.memory
        every = [(i, branch, part) for i, kinds in enumerate(memory.layers) for branch, part in kinds.items()]
        return [part for i, branch, part in every if memory.keeps(i, branch)]

    def generate(self, prompt: list[int], new: int) -> Generation:
        self.hand_out()
        return self._engine.generate([prompt], new, [0], self._stops)[0]

    @torch.no_grad()
    def read(self, text_BL: Tensor, start: int) -> None:
        """The prompt from `start` on, as `Rounds.prefill` reads it from 0. `text_BL` is the prompt and its first new token. That
        one is drawn again, as a request pays for it, but not put there: rows that are read in other pieces round otherwise."""
        size = text_BL.shape[1] - 1
        none_B = text_BL.new_zeros(1)
        for at in range(min(start, size - 1), size, self._chunk):
            rows = min(self._chunk, size - at)
            position_BT = torch.arange(at, at + rows, device=text_BL.device)[None]
            attend = self._cache.attention(none_B + at, rows)
            with torch.compiler.set_stance("force_eager"):
                states = self.target.forward_through(text_BL[:, at : at + rows], position_BT, attend)
            self.drafting.observe(states, none_B + at, text_BL, none_B + rows - 1)
        last = states.map(lambda t: t[:, -1:])
        self.target.logits(last.last_hidden[:, 0]).argmax(-1)
        self.drafting.observe(last, none_B + size - 1, text_BL, none_B)

    def forget(self, count: int) -> None:
        """Nothing is known of the first `count` places of the drafter's own memory."""
        for part in self._own():
            part.key[:, :count] = 0
            part.value[:, :count] = 0

    @property
    def can_remake(self) -> bool:
        """Whether the target's keys and values are all that its memory is made of."""
        return bool(self._own()) and self.drafter.config.reuse == "kv"

    @torch.no_grad()
    def remake(self, text_BL: Tensor, count: int) -> None:
        """The memory of the first `count` positions, from the target's cache. Its keys are rotated: they are turned back."""
        keys = {}
        values = {}
        for layer in self.drafter.config.kv_layers:
            shape = self.drafter.config.kv_shape(layer)
            key_BLGD, value_BLGD = self._cache.layer(layer)
            inv_freq = torch.tensor(shape.inv_freq, device=text_BL.device)
            back = Rope(-torch.arange(count, device=text_BL.device), inv_freq, 1 / shape.rope_scale, torch.float32)
            keys[layer] = back(key_BLGD[0, :count].float()).to(key_BLGD.dtype)[None]
            values[layer] = value_BLGD[:, :count]
        states = States(key=keys, value=values, last_hidden=value_BLGD.new_zeros(1, count, 0))
        self.drafting.observe(states, text_BL.new_zeros(1), text_BL, text_BL.new_full((1,), -1))

    def after_hit(self, prompt: list[int], new: int, start: int, state: str) -> Generation:
        """What follows a prompt whose first `start` positions only the target's cache knows. `state`: of the drafter's memory of
        these, whole | missing | remade."""
        self.hand_out()
        rounds = self._engine.stream([prompt], new, [0], self._stops)
        try:
            requests = next(rounds)  # the prompt is read, no round has begun
            text_BL = torch.tensor([prompt + requests[0].output], device=self.target.device)
            if state != "whole":
                self.forget(start)
            if state == "remade":
                self.remake(text_BL, start)
            self.read(text_BL, start)
            while True:
                next(rounds)
        except StopIteration as end:
            return end.value[0]

    @torch.no_grad()
    def propose_ms(self, text_BL: Tensor, repeats: int) -> float:
        """Of one draft behind `text_BL`."""
        anchor_B = text_BL.new_full((1,), text_BL.shape[1] - 1)
        u_BJ = torch.zeros(1, self.length, dtype=torch.float64, device=text_BL.device)
        pool = torch.cuda.graph_pool_handle() if self._graphs and text_BL.is_cuda else None
        step = Graphed(lambda: self.drafting.propose(text_BL, anchor_B, self.length, Sampling(0.0), u_BJ), pool)
        return median([timed(step, text_BL.device) for _ in range(repeats + 3)][3:])
