"""What the device does in a round: every step is a function of static tensors, so that a CUDA graph can hold it.

Shapes: B requests, T rows of each, J drafted tokens, K = J + 1, M missing rows, L places of a text, U uniform numbers, V
vocabulary.
"""

import torch
from torch import Tensor

from data_prep.decoding.cache import StaticCache
from data_prep.decoding.sampling import Sampling, distribution, drawn
from data_prep.target.states import States
from data_prep.target.target import Target
from eval.caches.partial import PartialCache
from eval.engine.drafting import Proposal, StaticDrafting
from eval.engine.tree import Tree, walk
from eval.oracle.verify import accept, accept_sampled


class Rounds:
    """The state of a batch, and the three steps of a round: propose, verify, observe.

    Args:
        longest: most tokens of a draft.
        partial, audited: see `Engine`.
    """

    def __init__(
        self,
        target: Target,
        drafting: StaticDrafting,
        cache: StaticCache,
        sampling: Sampling,
        longest: int,
        partial: PartialCache | None,
        audited: bool,
    ):
        self.target, self.drafting, self.cache, self.sampling, self.longest = target, drafting, cache, sampling, longest
        self.partial, self.audited = partial, audited
        batch, device = cache.key.shape[1], target.device
        self.text_BL = torch.zeros(batch, cache.room + 2, dtype=torch.long, device=device)
        # Processed by the target; where the last step's rows began; processed with the whole cache; whether the request goes on.
        self.length_B, self.base_B, self.exact_B, self.active_B = torch.zeros(4, batch, dtype=torch.long, device=device)
        self.round = torch.zeros(1, dtype=torch.long, device=device)
        self.random_RBU = torch.zeros(0, batch, 2 * longest + 1, dtype=torch.float64, device=device)
        self.request_B = torch.arange(batch, device=device)

    def reserve(self, max_new_tokens: int) -> bool:
        """Make room for the random numbers of so many tokens; whether there was too little."""
        short = len(self.random_RBU) <= max_new_tokens
        if short:
            self.random_RBU = self.random_RBU.new_zeros(max_new_tokens + 1, *self.random_RBU.shape[1:])
        return short

    def begin(self, prompts: list[list[int]], max_new_tokens: int, seeds: list[int]) -> None:
        """The prompts' tokens, and every random number that their requests can need: each request's own. Places without a request
        read one token and wait."""
        self.text_BL.zero_()
        for b, (prompt, seed) in enumerate(zip(prompts, seeds)):
            self.text_BL[b, : len(prompt)] = torch.tensor(prompt)
            draws = (max_new_tokens + 1, self.random_RBU.shape[2])
            self.random_RBU[: draws[0], b] = torch.rand(
                draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            ).to(self.text_BL.device)
        self.active_B.zero_()
        self.round.zero_()
        self.drafting.begin(self.cache)

    @property
    def deepest(self) -> int:
        """Tokens that a round keeps at most."""
        return self.drafting.deepest or self.longest

    def prefill(self, sizes: list[int], chunk: int) -> Tensor:
        """Read the prompts, chunk by chunk, and draw the first token of each, [B]. Shorter prompts are padded on the right:
        nothing reads the padding, and what comes next is written over it."""
        batch, kept = len(self.request_B), None
        sizes = sizes + [1] * (batch - len(sizes))
        size_B = torch.tensor(sizes, device=self.target.device)
        for start in range(0, max(sizes), chunk):
            rows = min(chunk, max(sizes) - start)
            base_B = torch.full_like(size_B, start)
            ids_BT = self.text_BL[:, start : start + rows]
            position_BT = base_B[:, None] + torch.arange(rows, device=base_B.device)
            with torch.compiler.set_stance("force_eager"):  # prompts have any length
                states = self.target.forward_through(ids_BT, position_BT, self.cache.attention(base_B, rows))
            last_B = size_B - 1 - start
            here_B = (last_B >= 0) & (last_B < rows)
            self.drafting.observe(states, base_B, self.text_BL, (last_B - 1).clamp(-1, rows - 1))
            ends = states.map(lambda t: t[self.request_B, last_B.clamp(0, rows - 1)][:, None])
            kept = ends if kept is None else _chosen(here_B, ends, kept)
        self.length_B.copy_(size_B)
        self.exact_B.copy_(size_B)
        if self.partial:
            self.partial.begin(size_B)
        logits_BV = self.target.logits(kept.last_hidden[:, 0])
        if self.sampling.temperature == 0:
            first_B = logits_BV.argmax(-1)
        else:
            first_B = drawn(distribution(logits_BV, *self.sampling), self.random_RBU[0, :, -1])
        self.text_BL[self.request_B, size_B] = first_B
        # Once more for the last position, whose next token is only now known.
        self.drafting.observe(kept, size_B - 1, self.text_BL, torch.zeros(batch, dtype=torch.long, device=size_B.device))
        self.round.fill_(1)
        return first_B

    def propose(self, length: int, full: bool) -> Proposal:
        u_BJ = self.random_RBU[self.round][0, :, :length]
        return self.drafting.propose(self.text_BL, self.length_B, length, self.sampling, u_BJ)

    def verify(self, length: int, full: bool, proposal: Proposal) -> tuple[States, Tensor]:
        """One forward of the target, and what it keeps. A full step begins where the last one ended, so that it processes again
        what was verified partially since.

        Returns:
            states of the rows in the text's order, and for each request [position of the token behind which the new ones stand,
            how many tokens deep the draft was, how many of them were kept, the first refused one (-1: a tree), the new tokens].
        """
        anchor_B, tree = self.length_B.clone(), proposal.tree
        missing = self.partial.recipe.partial_tokens if self.partial and full else 0
        base_B = self.exact_B.clone() if missing else anchor_B
        ids_BT, depth_BT, seen_BTT = self._rows(proposal, base_B, anchor_B, missing)
        attend = self._attention(full, base_B, anchor_B, ids_BT.shape[1], seen_BTT)
        states = self.target.forward_through(ids_BT, base_B[:, None] + depth_BT, attend)
        drafts_BK = (anchor_B - base_B)[:, None] + torch.arange(proposal.tokens_BJ.shape[1] + 1, device=anchor_B.device)
        last_hidden = states.last_hidden
        logits_BKV = self.target.logits(last_hidden[self.request_B[:, None], drafts_BK] if missing else last_hidden)
        if self.partial and full:
            self.partial.settle(anchor_B)
        if tree is None:
            tokens_BJ, (kept_B, next_B) = proposal.tokens_BJ, self._accepted(proposal, logits_BKV)
        else:
            kept_B, next_B, path_BJ = self._walked(tree, logits_BKV)
            tokens_BJ = tree.token_BN.gather(1, (path_BJ - 1).clamp(min=0))
            states = self._straightened(states, path_BJ, base_B, anchor_B, missing)
        start_B, deep = anchor_B, tokens_BJ.shape[1]
        if self.audited and missing:
            start_B, kept_B, next_B = self._audit(last_hidden[:, :missing], base_B, anchor_B, kept_B, next_B)
        emitted_BK = torch.cat([tokens_BJ, next_B[:, None]], dim=1)
        refused_B1 = emitted_BK.gather(1, kept_B[:, None]) if tree is None else torch.full_like(kept_B, -1)[:, None]
        emitted_BK = emitted_BK.scatter(1, kept_B[:, None], next_B[:, None])
        self.text_BL.scatter_(1, start_B[:, None] + 1 + torch.arange(deep + 1, device=anchor_B.device), emitted_BK)
        self._advance(base_B, start_B + kept_B + 1, full)
        drafted_B = torch.full_like(kept_B, deep) if proposal.count_B is None else proposal.count_B
        return states, torch.cat([torch.stack([start_B, drafted_B, kept_B], 1), refused_B1, emitted_BK], 1)

    def _rows(self, proposal: Proposal, base_B: Tensor, anchor_B: Tensor, missing: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(tokens, how far behind the first row each stands, which rows each sees; None: the earlier ones), [B, T]: tokens known
        but not yet processed with the whole cache (at most `missing` before the anchor), the draft, and padding."""
        tree, length = proposal.tree, proposal.tokens_BJ.shape[1]
        draft_BK = torch.cat([self.text_BL.gather(1, anchor_B[:, None]), proposal.tokens_BJ], dim=1)
        if not missing:
            chain = (torch.arange(length + 1, device=base_B.device), None)
            return draft_BK, *(chain if tree is None else (tree.depth_BT, tree.seen_BTT))
        row_T = torch.arange(missing + 1 + length, device=base_B.device)
        before_B1 = (anchor_B - base_B)[:, None]
        node_BT = (row_T - before_B1).clamp(0, length)  # rows of the draft, the anchor's being 0
        drafted_BT = row_T > before_B1
        known_BT = self.text_BL.gather(1, base_B[:, None] + torch.minimum(row_T, before_B1))
        ids_BT = torch.where(drafted_BT, draft_BK.gather(1, node_BT), known_BT)
        if tree is None:
            return ids_BT, row_T, None
        depth_BT = torch.where(drafted_BT, before_B1 + tree.depth_BT.gather(1, node_BT), row_T)
        among_BTT = tree.seen_BTT[self.request_B[:, None, None], node_BT[..., None], node_BT[:, None]]
        among_BTT = among_BTT & (row_T <= before_B1 + length)[:, None]  # padding repeats the last node, which must not see it
        earlier_TT = row_T <= row_T[:, None]
        return ids_BT, depth_BT, torch.where(drafted_BT[..., None] & drafted_BT[:, None], among_BTT, earlier_TT)

    def _attention(self, full: bool, base_B: Tensor, anchor_B: Tensor, rows: int, seen_BTT: Tensor | None):
        if self.partial is None:
            return self.cache.attention(base_B, rows, seen_BTT)
        if full:
            return self.partial.fully(base_B, anchor_B, rows, seen_BTT)
        return self.partial.partially(anchor_B, rows, seen_BTT)

    def _straightened(self, states: States, path_BJ: Tensor, base_B: Tensor, anchor_B: Tensor, missing: int) -> States:
        """The kept path of a tree takes the places behind the anchor, in the caches and among the states."""
        row_BK = torch.cat([torch.zeros_like(path_BJ[:, :1]), path_BJ], dim=1)
        self.cache.keep(anchor_B, row_BK)
        if self.partial:
            self.partial.part.keep(self.partial.filled_B, row_BK)
        if missing:
            before_B1, row_T = (anchor_B - base_B)[:, None], torch.arange(missing + row_BK.shape[1], device=base_B.device)
            path_BT = before_B1 + row_BK.gather(1, (row_T - before_B1).clamp(0, row_BK.shape[1] - 1))
            row_BK = torch.where(row_T > before_B1, path_BT, row_T)
        return states.map(lambda t: t[self.request_B[:, None], row_BK])

    def _audit(self, last_hidden: Tensor, base_B: Tensor, anchor_B: Tensor, kept_B: Tensor, next_B: Tensor):
        """Whether the tokens before the anchor are the target's own; where one is not, everything from it on is taken back.

        Returns:
            start_B, kept_B and next_B as they are then.
        """
        best_BM = self.target.logits(last_hidden).argmax(-1)
        place_BM = base_B[:, None] + 1 + torch.arange(best_BM.shape[1], device=base_B.device)
        wrong_BM = (self.text_BL.gather(1, place_BM) != best_BM) & (place_BM <= anchor_B[:, None])
        fault_B, first_B = wrong_BM.any(1), wrong_BM.byte().argmax(1)
        right_B = best_BM.gather(1, first_B[:, None])[:, 0]
        pick = lambda mended, usual: torch.where(fault_B, mended, usual)
        return pick(base_B + first_B, anchor_B), pick(torch.zeros_like(kept_B), kept_B), pick(right_B, next_B)

    def _advance(self, base_B: Tensor, length_B: Tensor, full: bool) -> None:
        going_B = self.active_B.bool()
        if self.partial and not full:
            self.partial.filled_B += torch.where(going_B, length_B - self.length_B, 0)
        self.base_B.copy_(base_B)
        self.length_B.copy_(torch.where(going_B, length_B, self.length_B))
        if full:
            self.exact_B.copy_(torch.where(going_B, length_B, self.exact_B))
            if self.partial:
                self.partial.settle(self.length_B)
        # Greedy decoding, which draws nothing, may take more rounds than there are numbers: an audit may take tokens back.
        self.round.copy_((self.round + 1) % len(self.random_RBU))

    def _accepted(self, proposal: Proposal, logits_BKV: Tensor) -> tuple[Tensor, Tensor]:
        if self.sampling.temperature == 0:
            return accept(proposal.tokens_BJ, logits_BKV.argmax(-1), proposal.count_B)
        p_BKV = distribution(logits_BKV, *self.sampling)
        return accept_sampled(proposal.tokens_BJ, proposal.q_BJV, p_BKV, self.random(p_BKV.shape[1]), proposal.count_B)

    def _walked(self, tree: Tree, logits_BTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.sampling.temperature == 0:
            target_BT = logits_BTV.argmax(-1)
        else:  # of the rows at one depth a walk meets one: they may share a number
            u_BT = self.random(self.deepest + 1).gather(1, tree.depth_BT)
            target_BT = drawn(distribution(logits_BTV, *self.sampling).flatten(0, 1), u_BT.flatten()).view_as(u_BT)
        kept_B, path_BJ, next_B = walk(tree, target_BT, self.deepest)
        return kept_B, next_B, path_BJ

    def random(self, count: int) -> Tensor:
        """This round's uniform numbers for verification, [B, count]; the last one is the same whatever the count."""
        u_BU = self.random_RBU[self.round][0, :, self.longest :]
        return torch.cat([u_BU[:, : count - 1], u_BU[:, -1:]], dim=1)

    def observe(self, length: int, full: bool, states: States) -> None:
        self.drafting.observe(states, self.base_B, self.text_BL, self.length_B - 1 - self.base_B)


def _chosen(here_B: Tensor, one: States, other: States) -> States:
    """`one` where it is said, `other` elsewhere."""
    pick = lambda a, b: torch.where(here_B.view(-1, *[1] * (a.dim() - 1)), a, b)
    pairs = lambda kind: {layer: pick(t, getattr(other, kind)[layer]) for layer, t in getattr(one, kind).items()}
    return States(pairs("hidden"), pairs("key"), pairs("value"), pick(one.last_hidden, other.last_hidden), pairs("query"))
