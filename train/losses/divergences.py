"""Per-slot losses, one short function each. q is the drafter's distribution, p the target's, both over the vocabulary.

Shapes: R rows, V vocabulary. Every function maps (log_q [R, V], log_p [R, V], label [R]) to a loss [R] in nats.
"""

from torch import Tensor
from torch.nn import functional as F


def kl(log_q: Tensor, log_p: Tensor, label: Tensor) -> Tensor:
    """Forward KL(p || q) = sum_v p (log p - log q)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def ce(log_q: Tensor, log_p: Tensor, label: Tensor) -> Tensor:
    """-log q(label): cross entropy with the text's own token (DFlash)."""
    return F.nll_loss(log_q, label, reduction="none")


LOSSES = {"kl": kl, "ce": ce}
