"""How a token is drawn from the target's logits.

Shapes: V vocabulary, R rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper


class Sampling(NamedTuple):
    """How tokens are drawn, in `generate`'s order: temperature (0: the likeliest token), top-k (0: all), top-p (1: all)."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


def distribution(logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """softmax(logits / temperature), cut to the likeliest tokens; at temperature 0 all mass on the most likely token."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    scores = (logits / temperature).reshape(-1, logits.shape[-1])
    # transformers' own warpers, so that ties are cut as `generate` cuts them. They take the text so far and do not look at it.
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.view_as(logits).softmax(-1)


def nucleus(p_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """float32 `p_RV` without what lies outside of each row's likeliest tokens that together reach `top_p_R`; not renormalised.

    A token stays if it is at least as likely as a threshold, the greatest one that leaves enough. Floats that are not negative
    are ordered as their bits are, so that 31 halvings find the threshold exactly, and nothing is sorted.
    """
    bits_RV = p_RV.view(torch.int32)
    low_R1 = torch.zeros_like(bits_RV[:, :1])
    high_R1 = bits_RV.amax(-1, keepdim=True)  # the likeliest token stays, whatever rounding says of the sum
    for _ in range(31):
        middle_R1 = low_R1 + (high_R1 - low_R1 + 1) // 2
        enough_R1 = torch.where(bits_RV >= middle_R1, p_RV, 0).sum(-1, keepdim=True) >= top_p_R[:, None]
        low_R1 = torch.where(enough_R1, middle_R1, low_R1)
        high_R1 = torch.where(enough_R1, high_R1, torch.maximum(middle_R1 - 1, low_R1))
    return torch.where(bits_RV >= low_R1, p_RV, 0)


def drawn(p_RV: Tensor, u_R: Tensor) -> Tensor:
    """The token of each row that a uniform number in [0, 1) names, [R]: the inverse of the cumulative distribution. `p_RV` need
    not sum to one."""
    # In float64: the error of a float32 sum over a vocabulary would exceed the probabilities of its rare tokens.
    below_RV = p_RV.double().cumsum(-1)
    # right=True: a token of probability zero is as wide as nothing and is never drawn. The clamp is for a product that rounds up
    # to the whole sum.
    return torch.searchsorted(below_RV, (u_R * below_RV[:, -1])[:, None], right=True)[:, 0].clamp(max=p_RV.shape[-1] - 1)


def sample(probabilities: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))
