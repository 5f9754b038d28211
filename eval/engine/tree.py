"""Tree drafts (EAGLE-2): several guesses at every depth, verified in one forward; for drafters that draft token by token.

Shapes: B requests, W breadth, N nodes, T = N + 1 rows (the anchor's first), C candidates, S depth, V vocabulary, E hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eval.caches.static import static_attention
from train.attention.backend import AttentionBackend
from train.schedules.schedule import Source


class TreeShape(NamedTuple):
    """The `breadth` likeliest continuations of each of the `breadth` likeliest nodes at a depth, `depth` tokens deep."""

    depth: int
    breadth: int

    @property
    def most(self) -> int:
        """How many nodes there are to choose from."""
        return self.breadth + (self.depth - 1) * self.breadth**2

    def nbytes(self, nodes: int, drafted: int, vocabulary: int) -> int:
        """Of one request, at the least: all candidates (20 bytes each, 20 more when joined, 12 when sorted), the logits of a
        depth's rows over the tokens that are `drafted` and of the tree's rows over the target's `vocabulary`, and which rows each
        row sees."""
        rows = nodes + 1
        return 52 * self.most + 8 * self.breadth * drafted + 4 * rows * vocabulary + rows**2


class Tree(NamedTuple):
    """Row 0 is the anchor, row r > 0 a drafted token, `depth_BT` tokens behind it; its parent's row comes before it. A row sees
    the anchor, its ancestors and itself."""

    token_BN: Tensor
    parent_BN: Tensor
    depth_BT: Tensor
    seen_BTT: Tensor


class Candidates(NamedTuple):
    """What one depth adds to the nodes that a tree is chosen from. `score_BC` is the logarithm of the product of the drafter's
    probabilities along the path. `parent_BC` counts among the candidates of all depths; -1: the anchor."""

    token_BC: Tensor
    score_BC: Tensor
    parent_BC: Tensor


class Growing(Source):
    """The tokens of a tree while it grows: the rows of each depth are the `breadth` likeliest candidates of the depth before.

    Args:
        token_B: the anchors' tokens.
        embed: ids -> what the drafter reads of them.
        log_probabilities: outputs [R, E] -> [R, V].
    """

    def __init__(self, shape: TreeShape, token_B: Tensor, embed: Callable, log_probabilities: Callable):
        batch = len(token_B)
        device = token_B.device
        self.length = shape.depth
        self._width = shape.breadth
        self._embed = embed
        self._log_probabilities = log_probabilities
        self._request_B = torch.arange(batch, device=device)
        self._same_BB = torch.eye(batch, dtype=torch.bool, device=device)
        self._token_R = token_B
        self._found: list[Candidates] = []
        # Of the rows that grow next (none before the first depth, where the anchor grows): their places among all candidates,
        # their scores, and the row at every depth that they descend from.
        self._beam_BW: Tensor | None = None
        self._score_BW: Tensor | None = None
        self._chain_BWS: Tensor | None = None
        self._seen = [self._same_BB[:, None]]

    def token(self, slot: int) -> Tensor:
        return self._embed(self._token_R)

    @property
    def attend(self) -> AttentionBackend:
        """Each row sees its ancestors and itself: the rule of slots would show it the other nodes of every depth too."""
        count = len(self._token_R) // len(self._request_B)
        mask_QR = torch.cat([part.expand(-1, count, -1) for part in self._seen], dim=-1).flatten(0, 1)
        return static_attention(seen_QR=mask_QR)

    def drafted(self, output_RE: Tensor) -> Tensor:
        batch = len(self._request_B)
        count = len(output_RE) // batch
        # 1. The likeliest continuations of each row are candidates.
        best_BWK, token_BWK = self._log_probabilities(output_RE).unflatten(0, (batch, count)).topk(self._width, dim=-1)
        if self._beam_BW is None:
            parent_BWK = torch.full_like(token_BWK, -1)
            score_BC = best_BWK.flatten(1)
        else:
            parent_BWK = self._beam_BW[..., None].expand_as(token_BWK)
            score_BC = (self._score_BW[..., None] + best_BWK).flatten(1)
        first = sum(found.token_BC.shape[1] for found in self._found)
        self._found.append(Candidates(token_BWK.flatten(1), score_BC, parent_BWK.flatten(1)))
        # 2. The likeliest of them grow.
        self._score_BW, chosen_BW = score_BC.topk(self._width, dim=-1)
        self._beam_BW = first + chosen_BW
        self._token_R = self._found[-1].token_BC.gather(1, chosen_BW).flatten()
        within_BW = chosen_BW // self._width  # which of this depth's rows each of the next grows from
        self._seen = self._lineage(within_BW)
        return (self._request_B[:, None] * count + within_BW).flatten()

    def _lineage(self, within_BW: Tensor) -> list[Tensor]:
        """Which rows of each depth the next rows see, the anchor's first: one row of every depth, and themselves."""
        batch = len(self._request_B)
        slot_W = torch.arange(self._width, device=within_BW.device)
        own_BWS = slot_W.expand(batch, -1)[..., None]
        older_BWS = own_BWS[..., :0] if self._chain_BWS is None else self._chain_BWS[self._request_B[:, None], within_BW]
        self._chain_BWS = torch.cat([older_BWS, own_BWS], dim=-1)
        seen = [self._same_BB[:, None].expand(-1, self._width, -1)]
        for chain_BW in self._chain_BWS.unbind(-1):
            # Rows of a depth stand request by request, `breadth` of each.
            seen.append((self._same_BB[:, None, :, None] & (chain_BW[:, :, None, None] == slot_W)).flatten(2))
        return seen

    def likeliest(self, nodes: int) -> Tree:
        """The `nodes` likeliest of all candidates. A candidate's ancestors are at least as likely and stand before it, so that
        they are among them."""
        token_BC, score_BC, parent_BC = (torch.cat(kind, dim=1) for kind in zip(*self._found))
        depth_C = torch.cat([torch.full_like(found.token_BC[0], depth) for depth, found in enumerate(self._found, 1)])
        # Stable, so that among equal scores an ancestor stays before its descendants. Sorted by number again, parents come first.
        node_BN = score_BC.sort(dim=1, descending=True, stable=True).indices[:, :nodes].sort(dim=1).values
        parent_BN = parent_BC.gather(1, node_BN)
        parent_BN = torch.where(parent_BN < 0, 0, torch.searchsorted(node_BN, parent_BN.clamp(min=0)) + 1)
        return Tree(token_BC.gather(1, node_BN), parent_BN, *_places(parent_BN, depth_C[node_BN], self.length))


def _places(parent_BN: Tensor, depth_BN: Tensor, deepest: int) -> tuple[Tensor, Tensor]:
    """(depth of each row, which rows each sees)."""
    root = torch.zeros_like(parent_BN[:, :1])
    up_BT = torch.cat([root, parent_BN], dim=1)
    depth_BT = torch.cat([root, depth_BN], dim=1)
    row_T = torch.arange(up_BT.shape[1], device=up_BT.device)
    at_BT = row_T.expand_as(up_BT)
    seen_BTT = at_BT[..., None] == row_T
    # All rows climb one node at a time, the anchor being its own parent. A fixed number of times, however deep the tree is: the
    # host does not look.
    for _ in range(deepest):
        at_BT = up_BT.gather(1, at_BT)
        seen_BTT = seen_BTT | (at_BT[..., None] == row_T)
    return depth_BT, seen_BTT


def walk(tree: Tree, target_BT: Tensor, deepest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's own token from the anchor as long as it was drafted. Where each is drawn from the target's distribution
    at its row, the output is exactly a sample of the target. The draft decides only how long it is.

    Returns:
        how many drafted tokens are kept [B], their rows [B, deepest] (behind the kept ones: anything), the token after them [B].
    """
    at_B = torch.zeros_like(target_BT[:, 0])
    going_B = torch.ones_like(at_B, dtype=torch.bool)
    kept_B = torch.zeros_like(at_B)
    path: list[Tensor] = []
    for _ in range(deepest):
        wanted_B = target_BT.gather(1, at_B[:, None])
        child_BN = (tree.parent_BN == at_B[:, None]) & (tree.token_BN == wanted_B)
        going_B = going_B & child_BN.any(1)
        # A drafted node's row is its index + 1, as row 0 is the anchor. (`argmax` takes no booleans.)
        at_B = torch.where(going_B, child_BN.byte().argmax(1) + 1, at_B)
        kept_B = kept_B + going_B
        path.append(at_B)
    return kept_B, torch.stack(path, dim=1), target_BT.gather(1, at_B[:, None])[:, 0]
