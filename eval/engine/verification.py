"""How the target verifies a draft: what a user chose, the rows that one forward processes, and what verification keeps.

Shapes: B requests, T rows of each, J drafted tokens, K = J + 1, L places of a text.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.decoding.sampling import Sampling
from eval.caches.partial import PartialCache
from eval.engine.drafting import Proposal
from eval.engine.intervals import Intervals, intervals_of


@dataclass(frozen=True)
class Verification:
    """How the target verifies.

    Args:
        sampling: how its tokens are drawn.
        partial: verify over a part of the cache (lossy), with full rounds in between; None: every round is full.
        audited: full rounds also check what was verified partially since the last one, and go back to the first mistake (greedy
            decoding only, which is lossless again).
    """

    sampling: Sampling
    partial: PartialCache | None = None
    audited: bool = False

    @property
    def longest_interval(self) -> int:
        """Tokens that may be verified partially before a full round has to come, at most; 0: every round is full."""
        return self.partial.recipe.longest_interval if self.partial else 0

    def intervals(self, deepest: int) -> Intervals:
        """How many may be, from one full round to the next. `deepest`: tokens that a round keeps at most."""
        return intervals_of(self.partial.recipe.partial_tokens if self.partial else 0, self.longest_interval, deepest)


class Rows(NamedTuple):
    """The rows of one forward of the target.

    Row t of request b is the token `ids_BT[b, t]` at position `base_B[b] + depth_BT[b, t]` (`depth_BT` may be [T]: the same for
    all). `seen_BTT` says which rows each row sees; None: itself and the rows before it. Up to `missing` rows come before the
    anchor's.
    """

    anchor_B: Tensor
    base_B: Tensor
    missing: int
    ids_BT: Tensor
    depth_BT: Tensor
    seen_BTT: Tensor | None


class Verdict(NamedTuple):
    """What verification keeps: behind position `start_B` stand the first `kept_B` of `tokens_BJ`, then `next_B`."""

    start_B: Tensor
    tokens_BJ: Tensor
    kept_B: Tensor
    next_B: Tensor


def draft_rows(proposal: Proposal, text_BL: Tensor, length_B: Tensor) -> Rows:
    """The anchor's row and the draft's. `length_B`: the anchors."""
    # A copy: the caller raises `length_B` in place within this very round.
    anchor_B = length_B.clone()
    draft_BK = torch.cat([text_BL.gather(1, anchor_B[:, None]), proposal.tokens_BJ], dim=1)
    if proposal.tree is not None:
        return Rows(anchor_B, anchor_B, 0, draft_BK, proposal.tree.depth_BT, proposal.tree.seen_BTT)
    depth_T = torch.arange(draft_BK.shape[1], device=anchor_B.device)
    return Rows(anchor_B, anchor_B, 0, draft_BK, depth_T, None)


def rows_since_full(proposal: Proposal, text_BL: Tensor, length_B: Tensor, exact_B: Tensor, missing: int) -> Rows:
    """A full round begins where the last full one ended (`exact_B`), so that it processes again what was verified partially
    since. These are at most `missing` rows; then come the anchor's and the draft's, then padding up to a fixed number of
    rows."""
    anchor_B = length_B.clone()
    base_B = exact_B.clone()
    tree = proposal.tree
    length = proposal.tokens_BJ.shape[1]
    draft_BK = torch.cat([text_BL.gather(1, anchor_B[:, None]), proposal.tokens_BJ], dim=1)
    row_T = torch.arange(missing + 1 + length, device=base_B.device)
    before_B1 = (anchor_B - base_B)[:, None]  # rows before the anchor's
    node_BT = (row_T - before_B1).clamp(0, length)  # rows of the draft, the anchor's being 0
    drafted_BT = row_T > before_B1
    known_BT = text_BL.gather(1, base_B[:, None] + torch.minimum(row_T, before_B1))
    ids_BT = torch.where(drafted_BT, draft_BK.gather(1, node_BT), known_BT)
    if tree is None:
        return Rows(anchor_B, base_B, missing, ids_BT, row_T, None)
    depth_BT = torch.where(drafted_BT, before_B1 + tree.depth_BT.gather(1, node_BT), row_T)
    request_B11 = torch.arange(len(anchor_B), device=base_B.device)[:, None, None]
    among_BTT = tree.seen_BTT[request_B11, node_BT[..., None], node_BT[:, None]]
    # Padding repeats the last node, which must not see it.
    among_BTT = among_BTT & (row_T <= before_B1 + length)[:, None]
    earlier_TT = row_T <= row_T[:, None]
    # Among drafted rows the tree says who sees whom; elsewhere a row sees those before it.
    seen_BTT = torch.where(drafted_BT[..., None] & drafted_BT[:, None], among_BTT, earlier_TT)
    return Rows(anchor_B, base_B, missing, ids_BT, depth_BT, seen_BTT)
