"""Per-slot losses, one short function each.

q is the drafter's distribution over its own vocabulary. p is the target's over *its* vocabulary, at the drafter's tokens only:
where the draft vocabulary is reduced it sums to less than one, because what the drafter cannot say it cannot get accepted.

`train/losses/terms.py` lists which of them a configuration can give a weight.

Shapes: R rows, D draft vocabulary. Every per-slot loss maps (log_q [R, D], log_p [R, D], label [R], mix [R]) to [R], in nats
(tv: a probability). A label of -1 is a token that the drafter cannot say. `mix` is lk_lambda's lambda, which no other loss reads.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(log_q: Tensor, log_p: Tensor, label: Tensor, mix: Tensor | None = None) -> Tensor:
    """Forward KL(p || q) = sum_v p (log p - log q). The only term in which p is renormalised over the draft vocabulary (LK
    losses, section 3): otherwise the drafter would be asked for probabilities that sum to less than one."""
    return F.kl_div(log_q, log_p.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor, label: Tensor, mix: Tensor | None = None) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p)."""
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def ce(log_q: Tensor, log_p: Tensor, label: Tensor, mix: Tensor | None = None) -> Tensor:
    """-log q(label): cross entropy with the text's own token (DFlash). A label outside the draft vocabulary teaches nothing."""
    return F.nll_loss(log_q, label, reduction="none", ignore_index=-1)


def ce_greedy(log_q: Tensor, log_p: Tensor, label: Tensor, mix: Tensor | None = None) -> Tensor:
    """-log q(argmax p): cross entropy with the target's own most likely token, among those that the drafter can say
    (BudgetDraft's hard label)."""
    return F.nll_loss(log_q, log_p.argmax(-1), reduction="none")


def overlap(log_q: Tensor, log_p: Tensor) -> Tensor:
    """alpha = sum_v min(p, q): the chance that a token drawn from q is accepted at temperature 1."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def tv(log_q: Tensor, log_p: Tensor, label: Tensor, mix: Tensor | None = None) -> Tensor:
    """1 - alpha; over a full vocabulary the total variation, half of the L1 distance."""
    return 1 - overlap(log_q, log_p)


def lk_alpha(log_q: Tensor, log_p: Tensor, label: Tensor, mix: Tensor | None = None) -> Tensor:
    """-log alpha (LK losses, equation 6), by log-sum-exp: alpha itself underflows for distributions that hardly meet."""
    return -torch.minimum(log_p, log_q).logsumexp(-1)


def lk_lambda(log_q: Tensor, log_p: Tensor, label: Tensor, mix: Tensor) -> Tensor:
    """mix KL + (1 - mix) TV (LK losses): KL while little is accepted, total variation once much is."""
    return mix * kl(log_q, log_p, label) + (1 - mix) * tv(log_q, log_p, label)


def expected_accepted(overlap_NJ: Tensor, valid_NJ: Tensor) -> Tensor:
    """E = sum_k prod_{i<=k} alpha_i over the slots that count, [N]: differentiable through the product. A slot that does not
    count before those that do was given to the drafter, and cannot be refused."""
    return (torch.where(valid_NJ, overlap_NJ, 1.0).cumprod(1) * valid_NJ).sum(1)


def relative_error(draft_RHD: Tensor, target_RHD: Tensor) -> Tensor:
    """|x' - x|^2 / |x|^2 of each head, averaged over the heads, [R] in float32. Nothing flows into the target's side."""
    target = target_RHD.detach().float()
    error = (draft_RHD.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp(min=1e-6)).mean(-1)
