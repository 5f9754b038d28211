"""Losses and attention in the most obvious words, which share no code with what they judge.

Shapes: R rows of losses, D draft vocabulary; Q query rows, H query heads, K keys, G KV heads, D head size.
"""

import torch


def definition(name, q, p, label, mix):
    """Each loss from plain probabilities. q [R, D] sums to one; p [R, D] is the target's, over the drafter's vocabulary; `label`
    indexes that vocabulary, -1 outside it."""
    renormalised = p / p.sum(-1, keepdim=True)
    alpha = torch.minimum(p, q).sum(-1)
    kl = (renormalised * (renormalised / q).log()).sum(-1)
    return {
        "kl": lambda: kl,
        "reverse_kl": lambda: (q * (q / p).log()).sum(-1),
        "ce": lambda: torch.where(label < 0, 0.0, -q[torch.arange(len(q)), label.clamp(min=0)].log()),
        "ce_greedy": lambda: -q[torch.arange(len(q)), p.argmax(-1)].log(),
        "tv": lambda: 1 - alpha,
        "lk_alpha": lambda: -alpha.log(),
        "lk_lambda": lambda: mix * kl + (1 - mix) * (1 - alpha),
    }[name]()


def softmax_by_hand(q_QHD, k_KGD, v_KGD, dense):
    """Attention row by row and head by head, in float64."""
    out = torch.zeros_like(q_QHD, dtype=torch.float64)
    group = q_QHD.shape[1] // k_KGD.shape[1]
    for i in range(len(q_QHD)):
        seen = dense[i].nonzero().squeeze(1)
        for h in range(q_QHD.shape[1]):
            keys = k_KGD[seen, h // group].double()
            values = v_KGD[seen, h // group].double()
            out[i, h] = ((keys @ q_QHD[i, h].double()) / q_QHD.shape[2] ** 0.5).softmax(0) @ values
    return out
