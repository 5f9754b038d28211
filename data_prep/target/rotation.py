"""Rotary embeddings of captured keys: which dimensions turn together, and by which angles.

The cache holds keys and queries before RoPE, in the layout of halves: of the first 2 R dimensions of a head, dimension i turns
with dimension i + R. Some families turn neighbours, 2 i with 2 i + 1: their dimensions are put into the other order when they are
captured, queries like keys, so that all their products stay as they are.

Shapes: T positions, G heads, D head size, R angles.
"""

import torch
from torch import Tensor


def halves_of_neighbours(x_TGD: Tensor, angles: int) -> Tensor:
    """Dimensions 0, 2, 4, ..., 1, 3, 5, ... of the first 2 R, then the others."""
    turned = x_TGD[..., : 2 * angles]
    return torch.cat([turned[..., 0::2], turned[..., 1::2], x_TGD[..., 2 * angles :]], dim=-1)


def turned(x_TGD: Tensor, inv_freq: list[float], scale: float) -> Tensor:
    """Heads [..., T, G, D] in the layout of halves as they stand at positions 0 .. T - 1. The plain definition, to check by."""
    count = len(inv_freq)
    position = torch.arange(x_TGD.shape[-3], device=x_TGD.device, dtype=torch.float32)
    angle_TR = position[:, None] * torch.tensor(inv_freq, device=x_TGD.device, dtype=torch.float32)
    cos = (angle_TR.cos() * scale).to(x_TGD.dtype)[:, None]
    sin = (angle_TR.sin() * scale).to(x_TGD.dtype)[:, None]
    left = x_TGD[..., :count]
    right = x_TGD[..., count : 2 * count]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, x_TGD[..., 2 * count :]], dim=-1)
