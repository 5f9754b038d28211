"""Which implementation computes the loss of a chunk: the fused kernel on a GPU, if it has every term, else the reference."""

import torch

from train.losses.reference import reference_loss
from train.losses.terms import without_kernel
from train.losses.types import LossKernel


def loss_kernel(loss: dict[str, float], device: torch.device, dtype: torch.dtype) -> LossKernel:
    """What computes these per-slot terms for outputs of this dtype on this device."""
    # The kernel adds up in float32, which float64 (tests) would be robbed by.
    if device.type != "cuda" or dtype == torch.float64 or without_kernel(loss):
        return reference_loss
    from train.losses.fused import fused  # Triton is there where PyTorch has CUDA, and nowhere else for certain

    return fused


def slower_on_a_gpu(loss: dict[str, float]) -> str | None:
    """What to say before a training on a GPU whose loss the fused kernel cannot compute; None: it can."""
    if missing := without_kernel(loss):
        names = ", ".join(f"loss.{name}" for name in missing)
        return (
            f"{names}: no part of the fused kernel, so that the whole loss is computed by plain PyTorch, slower and in more "
            "memory (train.chunk_rows bounds it); docs/extend/loss.md says how to add a term to the kernel"
        )
    return None
