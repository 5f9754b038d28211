"""Who drafts for a batch: the drafters of `eval/oracle/drafting.py` without the host. Every size is fixed.

Shapes: B requests, T rows of each, J drafted tokens, V target vocabulary, D draft vocabulary, E hidden size, L places of a text,
W tokens that a view observes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.decoding.cache import StaticCache
from data_prep.decoding.sampling import Sampling, distribution, drawn
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.states import States
from eval.caches.budgeted import BudgetedMemory
from eval.caches.static import StaticMemory, static_attention
from eval.engine.tree import Growing, Tree, TreeShape
from train.attention.visibility import Places
from train.drafter.base import Drafter
from train.drafter.heads import over_targets
from train.drafter.layers import KV
from train.schedules.schedule import Source, Start
from train.views.recipe import View


class Proposal(NamedTuple):
    """`q_BJV` is what the tokens were drawn from (None: certain guesses), `count_B` how many of the J count (None: all). With a
    tree, the tokens are its nodes."""

    tokens_BJ: Tensor
    q_BJV: Tensor | None = None
    count_B: Tensor | None = None
    tree: Tree | None = None


class StaticDrafting(Protocol):
    graphs: bool  # whether a CUDA graph can hold what it does
    deepest: int | None  # tokens that a round keeps at most, of a tree; None: all that are drafted

    def begin(self, cache: StaticCache) -> None:
        """New requests, in these places."""

    def observe(self, states: States, base_B: Tensor, text_BL: Tensor, last_B: Tensor) -> None:
        """The target has processed T more positions, from `base_B` on, of which those up to row `last_B` count (before any, -1):
        the anchor is the token behind that row."""

    def due(self, anchors: list[int]) -> bool:
        """Whether `select` is to be called before the next proposal, which is behind these anchors. The host asks once in every
        round, so that rounds in which nothing is chosen do not pay for it."""

    def select(self, text_BL: Tensor, anchor_B: Tensor) -> None:
        """Choose anew what the proposals read, for those requests that are due."""

    def propose(self, text_BL: Tensor, anchor_B: Tensor, length: int, sampling: Sampling, u_BJ: Tensor) -> Proposal:
        """Guess `length` tokens behind the anchor."""

    def kv_bytes(self, longest: int) -> dict[str, int]:
        """Bytes of keys and values of one request of `longest` tokens, by what became of them (`eval/caches/sparse.py`)."""


class StaticNobody:
    """Plain decoding."""

    graphs = True
    deepest = None

    def begin(self, cache: StaticCache) -> None:
        pass

    def observe(self, states: States, base_B: Tensor, text_BL: Tensor, last_B: Tensor) -> None:
        pass

    def due(self, anchors: list[int]) -> bool:
        return False

    def select(self, text_BL: Tensor, anchor_B: Tensor) -> None:
        pass

    def propose(self, text_BL: Tensor, anchor_B: Tensor, length: int, sampling: Sampling, u_BJ: Tensor) -> Proposal:
        return Proposal(text_BL.new_empty(len(text_BL), 0))

    def kv_bytes(self, longest: int) -> dict[str, int]:
        return {}


class StaticLookup(StaticNobody):
    """`PromptLookup` by comparing all places of the text at once."""

    def __init__(self, longest: int = 3):
        self._longest = longest

    def propose(self, text_BL: Tensor, anchor_B: Tensor, length: int, sampling: Sampling, u_BJ: Tensor) -> Proposal:
        place_L = torch.arange(text_BL.shape[1], device=text_BL.device)
        follows_B = torch.zeros_like(anchor_B)
        run_BL = torch.ones_like(text_BL, dtype=torch.bool)  # the n tokens that end at this place are the text's last n
        # A longer run replaces what a shorter one found. All lengths are tried, always: a CUDA graph holds no `break`.
        for n in range(1, self._longest + 1):
            known_B1 = text_BL.gather(1, (anchor_B - n + 1).clamp(min=0)[:, None])
            shifted_BL = F.pad(text_BL, (n - 1, 0), value=-1)[:, : text_BL.shape[1]]
            run_BL = run_BL & (shifted_BL == known_B1) & (anchor_B >= n)[:, None]
            last_B = torch.where(run_BL & (place_L < anchor_B[:, None]), place_L + 1, 0).amax(1)
            follows_B = torch.where(last_B > 0, last_B, follows_B)
        index_BJ = follows_B[:, None] + torch.arange(length, device=text_BL.device)
        count_B = torch.where(follows_B > 0, (anchor_B + 1 - follows_B).clamp(max=length), 0)
        return Proposal(text_BL.gather(1, index_BJ.clamp(max=text_BL.shape[1] - 1)), None, count_B)


class StaticTrained:
    """A drafter over `StaticMemory`. With native K/V its memory is the target's own cache, and it keeps nothing of its own.

    Args:
        change: what it is shown instead of the target's states (the controls); gets states [B, T, ...] and positions [B, T].
        tree: drafts are trees of this shape (ttt only).
        view: what of the memory it may read (of `budgeted.KINDS`); None: all of it.
    """

    graphs = True

    def __init__(
        self,
        drafter: Drafter,
        head: FrozenHead,
        change: Callable | None = None,
        tree: TreeShape | None = None,
        view: View | None = None,
    ):
        self.drafter = drafter.eval()
        self._head = head
        self._change = change
        self._tree = tree
        self._view = view
        self.deepest = tree.depth if tree else None
        self._cache: StaticCache | None = None
        self._product = drafter.head.product(head)  # once: rows of a reduced vocabulary are copies
        self._kept_D = drafter.head.kept_D

    def begin(self, cache: StaticCache) -> None:
        config = self.drafter.config
        # The target's cache serves as memory where it holds exactly what the drafter would make: the same positions, precision
        # and states, on the device.
        borrowed = {}
        alike = config.rope_factor == 1 and self.drafter.dtype == cache.dtype and self._change is None
        if config.reads_in_place and alike and cache.lends:
            for layer, at in enumerate(config.target_layers):
                keys, values = zip(*map(cache.layer, config.layers_of(at)))
                borrowed[layer, "kv"] = KV(keys[0], values[0]) if len(keys) == 1 else KV(keys, values)
        # Tensors are made anew only with a new cache: CUDA graphs hold the addresses of these.
        if self._cache is not cache:
            self._cache = cache
            self.memory = StaticMemory(config, cache.batch, cache.room + 1, self._head.head_VE.device, borrowed)
            # A budget as large as the cache hides nothing.
            hides = self._view is not None and self._view.budget < cache.room
            self._budgeted = BudgetedMemory(self.drafter, self._view, self.memory) if hides else None
            # The features before the last tokens, the anchor's own being the last: as many as a view observes.
            window = self._view.window if hides else 0
            shape = (cache.batch, max(1, window), config.feature_size)
            self.feature_BWE = torch.zeros(shape, dtype=self.drafter.dtype, device=self._head.head_VE.device)
        if self._budgeted:
            self._budgeted.begin()
        self._fresh = True

    def observe(self, states: States, base_B: Tensor, text_BL: Tensor, last_B: Tensor) -> None:
        batch, rows = states.last_hidden.shape[:2]
        position_BT = base_B[:, None] + torch.arange(rows, device=base_B.device)
        if self._change is not None:
            states = self._change(states, position_BT)
        # A drafter that makes memory of tokens is given, for each processed position, the token behind it. Behind no position is
        # the first token of a text, which gets a call of its own.
        if self._fresh and self.drafter.config.own_memory and not self.drafter.config.reads_pairs:
            self._remember(None, position_BT[:, :1] - 1, text_BL)
        self._fresh = False
        feature_QE = self._remember(states.map(lambda t: t.flatten(0, 1)), position_BT, text_BL)
        if feature_QE is not None:
            # Copied into a tensor that stays where it is, for the graph of the next proposal. Behind the old ones stand those of
            # the new rows; the last W up to row `last_B` stay.
            every_BTE = torch.cat([self.feature_BWE, feature_QE.unflatten(0, (batch, rows))], dim=1)
            last_BW = last_B[:, None] + 1 + torch.arange(self.feature_BWE.shape[1], device=base_B.device)
            self.feature_BWE.copy_(every_BTE[self.memory.row_B1, last_BW])

    def _remember(self, states: States | None, position_BT: Tensor, text_BL: Tensor) -> Tensor | None:
        document = torch.arange(len(position_BT), device=position_BT.device).repeat_interleave(position_BT.shape[1])
        token_RE = self.embed(text_BL.gather(1, position_BT + 1).flatten())
        places = Places(document, position_BT.flatten())
        known = Places(document, (position_BT + 1).flatten())
        attend = static_attention(making_memory=True)
        feature_QE = self.drafter.remember(states, places, token_RE, known, attend, self.memory).feature
        if self._budgeted:
            self._budgeted.changed()
        return feature_QE

    def due(self, anchors: list[int]) -> bool:
        return self._budgeted is not None and self._budgeted.due(anchors)

    def select(self, text_BL: Tensor, anchor_B: Tensor) -> None:
        self._budgeted.select(anchor_B, partial(self._queries, text_BL))

    def propose(self, text_BL: Tensor, anchor_B: Tensor, length: int, sampling: Sampling, u_BJ: Tensor) -> Proposal:
        token_B = text_BL.gather(1, anchor_B[:, None])[:, 0]
        request_B = torch.arange(len(anchor_B), device=anchor_B.device)
        memory = self.memory
        position_B = anchor_B
        if self._budgeted:
            memory, position_B = self._budgeted.taken(anchor_B)
        start = Start(memory, request_B, position_B, self.feature_BWE[:, -1])
        schedule = self.drafter.config.schedule
        if self._tree:
            nodes = Growing(self._tree, token_B, self.embed, self._log_probabilities)
            schedule.draft(self.drafter, start, nodes)
            tree = nodes.likeliest(length)
            return Proposal(tree.token_BN, tree=tree)
        drawn = _Drawn(self, token_B, length, sampling, u_BJ)
        schedule.draft(self.drafter, start, drawn)
        return drawn.proposal()

    def _queries(self, text_BL: Tensor, position_BW: Tensor) -> list[dict[str, Tensor]]:
        """What known tokens ask of all memory before them."""
        document = torch.arange(len(position_BW), device=position_BW.device).repeat_interleave(position_BW.shape[1])
        token_RE = self.embed(text_BL.gather(1, position_BW).flatten())
        rows = Places(document, position_BW.flatten())
        attend = static_attention(making_memory=True)
        return self.drafter.known_queries(token_RE, self.feature_BWE.flatten(0, 1), rows, self.memory, attend)

    def kv_bytes(self, longest: int) -> dict[str, int]:
        """Preallocated places that a request does not fill count for its `peak` alone."""
        read = 0
        for layer, kinds in enumerate(self.memory.layers):
            for branch, part in kinds.items():
                window = self.drafter.config.shape(layer, branch).window or longest
                read += part.read_bytes(min(longest, window))
        peak = self.memory.nbytes() // self.memory.batch
        found = {"read": read, "searched": 0, "kept": peak // self.memory.room * longest, "peak": peak}
        if self._budgeted:
            more = self._budgeted.kv_bytes(longest)
            found |= more | {what: found[what] + more[what] for what in ("kept", "peak")}
        return found

    def draw(self, logits_BJD: Tensor, sampling: Sampling, u_BJ: Tensor) -> Proposal:
        kept_D = self._kept_D
        if sampling.temperature == 0:
            token_BJ = logits_BJD.argmax(-1)
            return Proposal(token_BJ if kept_D is None else kept_D[token_BJ])
        q_BJV = over_targets(distribution(logits_BJD, *sampling), self._kept_D, len(self._head.head_VE), 0.0)
        return Proposal(drawn(q_BJV.flatten(0, 1), u_BJ.flatten()).view_as(u_BJ), q_BJV)

    def _log_probabilities(self, output_RE: Tensor) -> Tensor:
        """Over the target's vocabulary, [R, V]."""
        return over_targets(self.logits(output_RE).log_softmax(-1), self._kept_D, len(self._head.head_VE), -torch.inf)

    def embed(self, token: Tensor) -> Tensor:
        return self.drafter.embed(token, self._head)

    def logits(self, output: Tensor) -> Tensor:
        logits = self._product(output)
        return logits if logits.dtype == torch.float64 else logits.float()


class _Drawn(Source):
    """Each drafted token is drawn from what the drafter proposes, and read in the next pass."""

    def __init__(self, trained: StaticTrained, token_B: Tensor, length: int, sampling: Sampling, u_BJ: Tensor):
        self.length = length
        self.attend = static_attention()
        self._trained = trained
        self._sampling = sampling
        self._u_BJ = u_BJ
        self._token_B = token_B
        self._proposals: list[Proposal] = []

    def token(self, slot: int) -> Tensor:
        return self._trained.embed(self._token_B)

    def drafted(self, output_BE: Tensor) -> None:
        slot = len(self._proposals)
        proposal = self._trained.draw(self._trained.logits(output_BE)[:, None], self._sampling, self._u_BJ[:, slot : slot + 1])
        self._proposals.append(proposal)
        self._token_B = proposal.tokens_BJ[:, 0]

    def drafted_at_once(self, output_BJE: Tensor) -> None:
        self._proposals.append(self._trained.draw(self._trained.logits(output_BJE), self._sampling, self._u_BJ))

    def proposal(self) -> Proposal:
        if len(self._proposals) == 1:
            return self._proposals[0]
        tokens_BJ = torch.cat([p.tokens_BJ for p in self._proposals], dim=1)
        if self._sampling.temperature == 0:
            return Proposal(tokens_BJ)
        return Proposal(tokens_BJ, torch.cat([p.q_BJV for p in self._proposals], dim=1))
