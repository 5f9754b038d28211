"""Which drafted tokens the target keeps. Lossless: what is emitted is distributed exactly as the target's own tokens.

Shapes: J drafted tokens, V vocabulary.
"""

import torch
from torch import Tensor


def distribution(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature); at temperature 0 all mass on the most likely token."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return (logits / temperature).softmax(-1)


def sample(probabilities: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))


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
        p, kept = p_JV[slot], float(p_JV[slot, token])
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
