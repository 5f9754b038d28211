"""Tree drafts (EAGLE-2): several guesses at every depth, verified in one forward; for drafters that draft token by token.

Shapes: B requests, W breadth, N nodes, T = N + 1 rows (the anchor's first), C candidates, S depth, V vocabulary, E hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eval.caches.static import StaticMemory, static_attention
from train.attention.visibility import DraftRows
from train.drafter.model import Drafter


class TreeShape(NamedTuple):
    """The `breadth` likeliest continuations of each of the `breadth` likeliest nodes at a depth, `depth` tokens deep."""

    depth: int
    breadth: int

    @property
    def most(self) -> int:
        """How many nodes there are to choose from."""
        return self.breadth + (self.depth - 1) * self.breadth**2


class Tree(NamedTuple):
    """Row 0 is the anchor, row r > 0 a drafted token, `depth_BT` tokens behind it; its parent's row comes before it. A row sees
    the anchor, its ancestors and itself."""

    token_BN: Tensor
    parent_BN: Tensor
    depth_BT: Tensor
    seen_BTT: Tensor


def grow(
    drafter: Drafter,
    memory: StaticMemory,
    feature_BE: Tensor,
    token_B: Tensor,
    anchor_B: Tensor,
    shape: TreeShape,
    nodes: int,
    embed: Callable,
    log_probabilities: Callable,
) -> Tree:
    """The `nodes` likeliest of all candidates, by the product of the drafter's probabilities along their paths. A candidate's
    ancestors are at least as likely and stand before it, so that they are among them."""
    batch, width, device = len(token_B), shape.breadth, token_B.device
    request_B, same_BB = torch.arange(batch, device=device), torch.eye(batch, dtype=torch.bool, device=device)
    beam_BW = score_BW = chain_BWS = earlier = past = None
    feature, token, seen = feature_BE, token_B, [same_BB[:, None]]
    found: list[tuple[Tensor, Tensor, Tensor]] = []  # of each depth's candidates: tokens, scores, parents among all candidates
    for depth in range(1, shape.depth + 1):
        count = len(token) // batch
        document = request_B.repeat_interleave(count)
        anchor = anchor_B.repeat_interleave(count)
        rows = DraftRows(document, anchor, document, torch.full_like(document, depth), anchor + depth - 1)
        mask_QR = torch.cat([part.expand(-1, count, -1) for part in seen], dim=-1).flatten(0, 1)
        attend = static_attention(seen_QR=mask_QR)
        output, feature, past = drafter.step(embed(token), feature, rows, earlier, memory, past, attend)
        earlier = rows if earlier is None else earlier + rows
        logp_BWV = log_probabilities(output).unflatten(0, (batch, count))
        best_BWK, token_BWK = logp_BWV.topk(width, dim=-1)
        parent_BWK = torch.full_like(token_BWK, -1) if beam_BW is None else beam_BW[..., None].expand_as(token_BWK)
        scores_BC = (best_BWK if score_BW is None else score_BW[..., None] + best_BWK).flatten(1)
        first = sum(tokens.shape[1] for tokens, _, _ in found)
        found.append((token_BWK.flatten(1), scores_BC, parent_BWK.flatten(1)))
        score_BW, chosen_BW = scores_BC.topk(width, dim=-1)
        beam_BW, token = first + chosen_BW, found[-1][0].gather(1, chosen_BW).flatten()
        within_BW = chosen_BW // width  # which of this depth's rows each of the next grows from
        if feature is not None:
            feature = feature.unflatten(0, (batch, count))[request_B[:, None], within_BW].flatten(0, 1)
        # Rows of the next depth see the anchor's row, one row of every depth between, and themselves.
        own_BWS = torch.arange(width, device=device).expand(batch, -1)[..., None]
        older = own_BWS[..., :0] if depth == 1 else chain_BWS[request_B[:, None], within_BW]
        chain_BWS = torch.cat([older, own_BWS], dim=-1)
        slot_W = torch.arange(width, device=device)
        at = lambda chain_BW: (same_BB[:, None, :, None] & (chain_BW[:, :, None, None] == slot_W)).flatten(2)
        seen = [same_BB[:, None].expand(-1, width, -1), *(at(chain_BWS[..., s]) for s in range(depth))]
    token_BC, score_BC, parent_BC = (torch.cat(kind, dim=1) for kind in zip(*found))
    depth_C = torch.cat([torch.full_like(tokens[0], depth) for depth, (tokens, _, _) in enumerate(found, 1)])
    node_BN = score_BC.sort(dim=1, descending=True, stable=True).indices[:, :nodes].sort(dim=1).values
    parent_BN = parent_BC.gather(1, node_BN)
    parent_BN = torch.where(parent_BN < 0, 0, torch.searchsorted(node_BN, parent_BN.clamp(min=0)) + 1)
    return Tree(token_BC.gather(1, node_BN), parent_BN, *_places(parent_BN, depth_C[node_BN], shape.depth))


def _places(parent_BN: Tensor, depth_BN: Tensor, deepest: int) -> tuple[Tensor, Tensor]:
    """(depth of each row, which rows each sees)."""
    root = torch.zeros_like(parent_BN[:, :1])
    up_BT, depth_BT = torch.cat([root, parent_BN], dim=1), torch.cat([root, depth_BN], dim=1)
    row_T = torch.arange(up_BT.shape[1], device=up_BT.device)
    at_BT = row_T.expand_as(up_BT)
    seen_BTT = at_BT[..., None] == row_T
    for _ in range(deepest):
        at_BT = up_BT.gather(1, at_BT)
        seen_BTT = seen_BTT | (at_BT[..., None] == row_T)
    return depth_BT, seen_BTT


def walk(tree: Tree, target_BT: Tensor, deepest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's own token from the anchor as long as it was drafted. Where each is drawn from the target's distribution
    at its row, what is emitted is exactly the target's sample, whatever was drafted.

    Returns:
        how many drafted tokens are kept [B], their rows [B, deepest] (behind the kept ones: anything), the token after them [B].
    """
    at_B = torch.zeros_like(target_BT[:, 0])
    going_B, kept_B, path = torch.ones_like(at_B, dtype=torch.bool), torch.zeros_like(at_B), []
    for _ in range(deepest):
        wanted_B = target_BT.gather(1, at_B[:, None])
        child_BN = (tree.parent_BN == at_B[:, None]) & (tree.token_BN == wanted_B)
        going_B = going_B & child_BN.any(1)
        at_B = torch.where(going_B, child_BN.byte().argmax(1) + 1, at_B)
        kept_B = kept_B + going_B
        path.append(at_B)
    return kept_B, torch.stack(path, dim=1), target_BT.gather(1, at_B[:, None])[:, 0]
