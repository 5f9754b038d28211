"""What the device does in a round: propose, verify, observe, each a function of static tensors that a CUDA graph can hold.

To read plain decoding alone, read `Rounds.verify` and, of what it calls, `draft_rows`, `_forward`, `_accept_chain`, `_emit` and
`_advance`. `rows_since_full` and `_audit` are for partial verification (`eval/caches/partial.py`), `_accept_tree` and
`_straightened` for trees (`eval/engine/tree.py`).

Shapes: B requests, T rows of each, J drafted tokens, K = J + 1, M missing rows, L places of a text, R rounds, U uniform
numbers, V vocabulary.
"""

import torch
from torch import Tensor

from data_prep.decoding.cache import StaticCache
from data_prep.decoding.sampling import distribution, drawn
from data_prep.target.states import States
from data_prep.target.target import Target
from eval.engine.drafting import Proposal, StaticDrafting
from eval.engine.tree import Tree, walk
from eval.engine.verification import Rows, Verdict, Verification, draft_rows, rows_since_full
from eval.oracle.verify import accept, accept_sampled


class Rounds:
    """The state of a batch, and the three steps of a round: propose, verify, observe.

    Args:
        longest: most tokens of a draft.
    """

    def __init__(
        self, target: Target, drafting: StaticDrafting, cache: StaticCache, verification: Verification, longest: int
    ):
        self.target = target
        self.drafting = drafting
        self.cache = cache
        self.sampling = verification.sampling
        self.partial = verification.partial
        self.audited = verification.audited
        self.longest = longest
        batch = cache.batch
        device = target.device
        # A CUDA graph replays the addresses that it was recorded with. So the tensors below are made once and from then on
        # written in place: a new tensor under the same name would be unknown to the graphs.
        self.text_BL = torch.zeros(batch, cache.room + 2, dtype=torch.long, device=device)
        self.length_B = torch.zeros(batch, dtype=torch.long, device=device)  # positions that the target has processed
        self.base_B = torch.zeros(batch, dtype=torch.long, device=device)  # where the rows of the last forward began
        self.exact_B = torch.zeros(batch, dtype=torch.long, device=device)  # positions processed over the whole cache
        self.active_B = torch.zeros(batch, dtype=torch.long, device=device)  # 1: the request goes on
        self.round = torch.zeros(1, dtype=torch.long, device=device)  # a tensor, since graphs count it up
        self.random_RBU = torch.zeros(0, batch, 2 * longest + 1, dtype=torch.float64, device=device)
        self.request_B = torch.arange(batch, device=device)

    @property
    def deepest(self) -> int:
        """Tokens that a round keeps at most."""
        return self.drafting.deepest or self.longest

    # Before the first round.

    def reserve(self, max_new_tokens: int) -> bool:
        """Make room for the random numbers of `max_new_tokens` tokens. Returns whether there was too little: then the numbers
        have moved, and graphs recorded before are void."""
        short = len(self.random_RBU) <= max_new_tokens
        if short:
            self.random_RBU = self.random_RBU.new_zeros(max_new_tokens + 1, *self.random_RBU.shape[1:])
        return short

    def begin(self, prompts: list[list[int]], max_new_tokens: int, seeds: list[int]) -> None:
        """Set the prompts' tokens, and every random number that their requests can need. Each request has numbers of its own, so
        that its output does not depend on those beside it. Places without a request read one token and wait."""
        self.text_BL.zero_()
        draws = (max_new_tokens + 1, self.random_RBU.shape[2])
        for b, (prompt, seed) in enumerate(zip(prompts, seeds)):
            self.text_BL[b, : len(prompt)] = torch.tensor(prompt)
            generator = torch.Generator().manual_seed(seed)
            numbers_RU = torch.rand(draws, generator=generator, dtype=torch.float64)
            self.random_RBU[: draws[0], b] = numbers_RU.to(self.text_BL.device)
        self.active_B.zero_()
        self.round.zero_()
        self.drafting.begin(self.cache)

    def prefill(self, sizes: list[int], chunk: int) -> Tensor:
        """Read the prompts, chunk by chunk, and draw the first token of each, [B]."""
        sizes = sizes + [1] * (len(self.request_B) - len(sizes))
        size_B = torch.tensor(sizes, device=self.target.device)

        # 1. The target and the drafter read the prompts.
        last = self._read_prompts(size_B, max(sizes), chunk)

        # 2. All of them is processed now.
        self.length_B.copy_(size_B)
        self.exact_B.copy_(size_B)
        if self.partial:
            self.partial.begin(size_B)

        # 3. The first token of each output.
        logits_BV = self.target.logits(last.last_hidden[:, 0])
        if self.sampling.temperature == 0:
            first_B = logits_BV.argmax(-1)
        else:
            first_B = drawn(distribution(logits_BV, *self.sampling), self.random_RBU[0, :, -1])
        self.text_BL[self.request_B, size_B] = first_B

        # 4. The drafter reads the last position once more: a pair (x_{i+1}, f_i) needs the token that is only now known.
        row_B = torch.zeros(len(size_B), dtype=torch.long, device=size_B.device)
        self.drafting.observe(last, size_B - 1, self.text_BL, row_B)
        self.round.fill_(1)
        return first_B

    def _read_prompts(self, size_B: Tensor, longest: int, chunk: int) -> States:
        """The target's states at the last position of each prompt, [B, 1, ...]. Shorter prompts are padded on the right: nothing
        reads the padding, and what comes next is written over it."""
        found = None
        for start in range(0, longest, chunk):
            rows = min(chunk, longest - start)
            base_B = torch.full_like(size_B, start)
            ids_BT = self.text_BL[:, start : start + rows]
            position_BT = base_B[:, None] + torch.arange(rows, device=base_B.device)
            # Prompts have any length, and a compiled forward would be compiled again for each.
            with torch.compiler.set_stance("force_eager"):
                states = self.target.forward_through(ids_BT, position_BT, self.cache.attention(base_B, rows))
            last_B = size_B - 1 - start  # the prompt's last row, counted from this chunk's first
            here_B = (last_B >= 0) & (last_B < rows)
            self.drafting.observe(states, base_B, self.text_BL, (last_B - 1).clamp(-1, rows - 1))
            row_B = last_B.clamp(0, rows - 1)
            ends = states.map(lambda t: t[self.request_B, row_B][:, None])
            found = ends if found is None else _chosen(here_B, ends, found)
        return found

    # The three steps of a round, and one that comes before them where a drafter under a budget chooses anew. `length` and
    # `missing` name the graph that a step is recorded in: sizes within one are fixed. `missing`: rows before the anchor's that a
    # full round has room for; None: the round is partial.

    def select(self, length: int, missing: int | None) -> None:
        self.drafting.select(self.text_BL, self.length_B)

    def propose(self, length: int, missing: int | None) -> Proposal:
        u_BJ = self.random_RBU[self.round][0, :, :length]
        return self.drafting.propose(self.text_BL, self.length_B, length, self.sampling, u_BJ)

    def verify(self, length: int, missing: int | None, proposal: Proposal) -> tuple[States, Tensor]:
        """One forward of the target, and what it keeps.

        Returns:
            states of the rows in the text's order, and for each request [position of the token behind which the new ones stand,
            how many tokens deep the draft was, how many of them were kept, the first refused one (-1: a tree), the new tokens].
        """
        # 1. The rows of the forward: the anchor's and the draft's, and in a full round after partial ones some before the anchor.
        full = missing is not None
        if self.partial and full:
            rows = rows_since_full(proposal, self.text_BL, self.length_B, self.exact_B, missing)
        else:
            rows = draft_rows(proposal, self.text_BL, self.length_B)

        # 2. The target's forward, with its logits at the anchor and at each drafted token.
        states, logits_BKV = self._forward(rows, full)
        last_hidden = states.last_hidden

        # 3. Accept: which drafted tokens are kept, and which token comes after them.
        if proposal.tree is None:
            tokens_BJ = proposal.tokens_BJ
            kept_B, next_B = self._accept_chain(proposal, logits_BKV)
        else:
            kept_B, next_B, path_BJ = self._accept_tree(proposal.tree, logits_BKV)
            tokens_BJ = proposal.tree.token_BN.gather(1, (path_BJ - 1).clamp(min=0))
            states = self._straightened(states, path_BJ, rows)
        verdict = Verdict(rows.anchor_B, tokens_BJ, kept_B, next_B)

        # 4. Audit what was verified partially.
        if self.audited and rows.missing:
            verdict = self._audit(verdict, last_hidden[:, : rows.missing], rows)

        # 5. Emit: write the new tokens into the text and tell the host of them.
        news_BU = self._emit(verdict, proposal)
        self._advance(rows.base_B, verdict.start_B + verdict.kept_B + 1, full)
        return states, news_BU

    def observe(self, length: int, missing: int | None, states: States) -> None:
        self.drafting.observe(states, self.base_B, self.text_BL, self.length_B - 1 - self.base_B)

    # 2. The forward.

    def _forward(self, rows: Rows, full: bool) -> tuple[States, Tensor]:
        """(states of all rows, the target's logits at the anchor's row and the draft's, [B, K, V])."""
        states = self.target.forward_through(rows.ids_BT, rows.base_B[:, None] + rows.depth_BT, self._attention(rows, full))
        if not rows.missing:
            return states, self.target.logits(states.last_hidden)
        # The anchor's row is another one in each request, since requests keep different numbers of tokens.
        count = rows.ids_BT.shape[1] - rows.missing
        drafts_BK = (rows.anchor_B - rows.base_B)[:, None] + torch.arange(count, device=rows.base_B.device)
        logits_BKV = self.target.logits(states.last_hidden[self.request_B[:, None], drafts_BK])
        self.partial.settle(rows.anchor_B)
        return states, logits_BKV

    def _attention(self, rows: Rows, full: bool):
        """The target's attention: over the whole cache, or over a part of it."""
        count = rows.ids_BT.shape[1]
        if self.partial is None:
            return self.cache.attention(rows.base_B, count, rows.seen_BTT)
        if full:
            return self.partial.fully(rows.base_B, rows.anchor_B, count, rows.missing, rows.seen_BTT)
        return self.partial.partially(rows.anchor_B, count, rows.seen_BTT)

    # 3. Accept.

    def _accept_chain(self, proposal: Proposal, logits_BKV: Tensor) -> tuple[Tensor, Tensor]:
        """(how many drafted tokens are kept, the token after them), by greedy comparison or by speculative sampling."""
        if self.sampling.temperature == 0:
            return accept(proposal.tokens_BJ, logits_BKV.argmax(-1), proposal.count_B)
        p_BKV = distribution(logits_BKV, *self.sampling)
        u_BK = self.random(p_BKV.shape[1])
        return accept_sampled(proposal.tokens_BJ, proposal.q_BJV, p_BKV, u_BK, proposal.count_B)

    def _accept_tree(self, tree: Tree, logits_BTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(how many drafted tokens are kept, the token after them, the rows of the path), by following the target's own token
        from row to row."""
        if self.sampling.temperature == 0:
            target_BT = logits_BTV.argmax(-1)
        else:
            # Of the rows at one depth a walk meets one: they may share a number.
            u_BT = self.random(self.deepest + 1).gather(1, tree.depth_BT)
            p_QV = distribution(logits_BTV, *self.sampling).flatten(0, 1)
            target_BT = drawn(p_QV, u_BT.flatten()).view_as(u_BT)
        kept_B, path_BJ, next_B = walk(tree, target_BT, self.deepest)
        return kept_B, next_B, path_BJ

    def _straightened(self, states: States, path_BJ: Tensor, rows: Rows) -> States:
        """The states of the kept path, one behind the other. Its keys take the places behind the anchor in the caches too."""
        row_BK = torch.cat([torch.zeros_like(path_BJ[:, :1]), path_BJ], dim=1)
        self.cache.keep(rows.anchor_B, row_BK)
        if self.partial:
            self.partial.part.keep(self.partial.filled_B, row_BK)
        if rows.missing:  # rows before the anchor's stay where they are
            before_B1 = (rows.anchor_B - rows.base_B)[:, None]
            row_T = torch.arange(rows.missing + row_BK.shape[1], device=rows.base_B.device)
            path_BT = before_B1 + row_BK.gather(1, (row_T - before_B1).clamp(0, row_BK.shape[1] - 1))
            row_BK = torch.where(row_T > before_B1, path_BT, row_T)
        return states.map(lambda t: t[self.request_B[:, None], row_BK])

    # 4. Audit.

    def _audit(self, verdict: Verdict, last_hidden: Tensor, rows: Rows) -> Verdict:
        """Whether the tokens before the anchor are the target's own. Where one is not, it and everything behind it is taken back:
        nothing of the draft is kept, and the target's token stands in its place."""
        best_BM = self.target.logits(last_hidden).argmax(-1)
        place_BM = rows.base_B[:, None] + 1 + torch.arange(best_BM.shape[1], device=rows.base_B.device)
        wrong_BM = (self.text_BL.gather(1, place_BM) != best_BM) & (place_BM <= rows.anchor_B[:, None])
        fault_B = wrong_BM.any(1)
        first_B = wrong_BM.byte().argmax(1)
        right_B = best_BM.gather(1, first_B[:, None])[:, 0]
        return Verdict(
            torch.where(fault_B, rows.base_B + first_B, verdict.start_B),
            verdict.tokens_BJ,
            torch.where(fault_B, torch.zeros_like(verdict.kept_B), verdict.kept_B),
            torch.where(fault_B, right_B, verdict.next_B),
        )

    # 5. Emit.

    def _emit(self, verdict: Verdict, proposal: Proposal) -> Tensor:
        """Write the new tokens into the text, and say what is new. One tensor holds all of it, so that the host waits once.

        Tokens behind the kept ones are written too: sizes are fixed. They lie beyond `length_B`, and the next round writes over
        them.
        """
        start_B, tokens_BJ, kept_B, next_B = verdict
        deep = tokens_BJ.shape[1]
        emitted_BK = torch.cat([tokens_BJ, next_B[:, None]], dim=1)
        # The first refused token has to be read before the target's own token takes its place.
        if proposal.tree is None:
            refused_B1 = emitted_BK.gather(1, kept_B[:, None])
        else:
            refused_B1 = torch.full_like(kept_B, -1)[:, None]
        emitted_BK = emitted_BK.scatter(1, kept_B[:, None], next_B[:, None])
        place_BK = start_B[:, None] + 1 + torch.arange(deep + 1, device=start_B.device)
        self.text_BL.scatter_(1, place_BK, emitted_BK)
        drafted_B = torch.full_like(kept_B, deep) if proposal.count_B is None else proposal.count_B
        return torch.cat([torch.stack([start_B, drafted_B, kept_B], 1), refused_B1, emitted_BK], 1)

    def _advance(self, base_B: Tensor, length_B: Tensor, full: bool) -> None:
        """The text is processed up to `length_B` now. A refused draft is rolled back by not raising it: what lies beyond in the
        caches does not count and is written over. Requests that are done stay as they are."""
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

    def random(self, count: int) -> Tensor:
        """This round's uniform numbers for verification, [B, count]; the last one is the same whatever the count."""
        u_BU = self.random_RBU[self.round][0, :, self.longest :]
        return torch.cat([u_BU[:, : count - 1], u_BU[:, -1:]], dim=1)


def _chosen(here_B: Tensor, one: States, other: States) -> States:
    """`one` for the requests of `here_B`, `other` for the rest."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(here_B.view(-1, *[1] * (a.dim() - 1)), a, b)

    def pairs(kind: str) -> dict[int, Tensor]:
        others = getattr(other, kind)
        return {layer: pick(tensor, others[layer]) for layer, tensor in getattr(one, kind).items()}

    return States(pairs("hidden"), pairs("key"), pairs("value"), pick(one.last_hidden, other.last_hidden), pairs("query"))
