"""Which drafted tokens the target keeps. Lossless: what is emitted is distributed exactly as the target's own tokens.

Shapes: B requests, J drafted tokens, K = J + 1, V vocabulary.
"""

import torch
from torch import Tensor

from data_prep.decoding.sampling import drawn, sample


def verify(draft: list[int], q_JV: Tensor | None, p_JV: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1).

    Slot j is kept with probability min(1, p / q); the first refused one is replaced by a draw from (p - q)+. At
    temperature 0 both are one-hot and this is the comparison of most likely tokens.

    Args:
        draft: J tokens drawn from `q_JV`.
        q_JV: the drafter's distributions; None for a drafter that is certain (prompt lookup).
        p_JV: the target's at the same slots and one more, [J + 1, V].

    Returns:
        How many drafted tokens are kept, and the token emitted after them (the correction, or the bonus).
    """
    for slot, token in enumerate(draft):
        p = p_JV[slot]
        kept = float(p_JV[slot, token])
        q = 1.0 if q_JV is None else float(q_JV[slot, token])
        if float(torch.rand((), generator=generator, device=p_JV.device, dtype=torch.float64)) * q < kept:
            continue
        rest = p.clone()
        if q_JV is None:
            rest[token] = 0
        else:
            rest = (p - q_JV[slot]).clamp_(min=0)
        # p and q equal up to rounding leave nothing to draw from; then p itself is right.
        return slot, sample(rest if float(rest.sum()) > 0 else p, generator)
    return len(draft), sample(p_JV[len(draft)], generator)


def accept(draft_BJ: Tensor, best_BK: Tensor, count_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy verification of every request: (how many drafted tokens equal the target's most likely ones, the token after them).

    `count_B`: how many of the J tokens were really drafted; None: all.
    """
    same_BJ = draft_BJ == best_BK[:, :-1]
    kept_B = _leading(same_BJ, count_B)
    return kept_B, best_BK.gather(1, kept_B[:, None])[:, 0]


def accept_sampled(
    draft_BJ: Tensor, q_BJV: Tensor | None, p_BKV: Tensor, u_BK: Tensor, count_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`verify` for every request, without the host: `u_BK` are uniform numbers in [0, 1), the last for the token emitted."""
    length = draft_BJ.shape[1]
    p_BJ = p_BKV[:, :length].gather(2, draft_BJ[..., None])[..., 0]
    q_BJ = 1.0 if q_BJV is None else q_BJV.gather(2, draft_BJ[..., None])[..., 0]
    kept_B = _leading(u_BK[:, :length] * q_BJ < p_BJ, count_B)
    row_B = torch.arange(len(kept_B), device=kept_B.device)
    p_BV = p_BKV[row_B, kept_B]
    if length:
        slot_B = kept_B.clamp(max=length - 1)
        if q_BJV is None:
            q_BV = torch.zeros_like(p_BV).scatter_(1, draft_BJ[row_B, slot_B][:, None], torch.inf)
        else:
            q_BV = q_BJV[row_B, slot_B]
        rest_BV = (p_BV - q_BV).clamp(min=0)
        refused_B = kept_B < (length if count_B is None else count_B)
        # p and q equal up to rounding leave nothing to draw from; then p itself is right.
        p_BV = torch.where((refused_B & (rest_BV.sum(1) > 0))[:, None], rest_BV, p_BV)
    return kept_B, drawn(p_BV, u_BK[:, -1])


def _leading(good_BJ: Tensor, count_B: Tensor | None) -> Tensor:
    """How many slots are good before the first that is not."""
    if count_B is not None:
        good_BJ = good_BJ & (torch.arange(good_BJ.shape[1], device=good_BJ.device) < count_B[:, None])
    return good_BJ.long().cumprod(1).sum(1)
