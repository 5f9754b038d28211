"""What we use of PyTorch and of flash-attn that these libraries do not promise to keep: each name, and what breaks without it.

Attention, losses and fp8 say these names here alone, so that a release that moves one is mended in one place.
`tests/train/test_private_torch.py` fails when one goes, or takes other arguments.

Shapes: P memory positions, N x 1 documents of L positions, H query heads, G key/value heads, D head size, M rows, K inputs.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# Name -> what breaks without it.
PRIVATE = {
    "torch.ops.aten._flash_attention_forward": "attention=flash on a GPU without flash-attn: its log-sum-exp has no public name",
    "torch.ops.aten._flash_attention_backward": "the same: a backward that takes an output and a log-sum-exp of ours",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "attention=flash on a CPU",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "training with attention=flash on a CPU",
    "torch._dynamo.maybe_mark_dynamic": "attention=flex compiles a program for every new number of tiles until PyTorch learns it",
    "torch._scaled_mm": "train.fp8: products of fp8 matrices on a GPU",
    "torch._functorch.config.ban_recompute_materialized_backward": "train.compile: block-wise steps take a sixth more memory",
    "torch._functorch.config.ban_recompute_reductions": "the same",
    "torch._inductor.config.triton.mix_order_reduction_non_strict_mode": "train.compile: later steps compile anew for seconds",
}


@cache
def has_flash_attn() -> bool:
    """Whether flash-attn is there with the private functions that are called below; without them PyTorch's own kernel runs."""
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward  # noqa: F401
    except ImportError:  # not there, or built for another PyTorch
        return False
    return True


def package_forward(q_PHD: Tensor, k_PGD: Tensor, v_PGD: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """flash-attn's causal attention within documents: (output [P, H, D], log-sum-exp [H, P])."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    lengths = (len(q_PHD), len(k_PGD))  # at most, of a document
    scale = q_PHD.shape[-1] ** -0.5
    out_PHD, lse_HP, *_ = _flash_attn_varlen_forward(q_PHD, k_PGD, v_PGD, bounds, bounds, *lengths, 0.0, scale, causal=True)
    return out_PHD, lse_HP


def package_backward(
    grad_PHD: Tensor, q_PHD: Tensor, out_PHD: Tensor, k_PGD: Tensor, v_PGD: Tensor, lse_HP: Tensor, bounds: Tensor
) -> list[Tensor]:
    """Gradients of q, k and v."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    lengths = (len(q_PHD), len(k_PGD))
    found = [torch.empty_like(t) for t in (q_PHD, k_PGD, v_PGD)]
    _flash_attn_varlen_backward(
        grad_PHD, q_PHD, k_PGD, v_PGD, out_PHD, lse_HP, *found, bounds, bounds, *lengths, 0.0,
        q_PHD.shape[-1] ** -0.5, True, -1, -1, 0.0, None, False,
    )  # fmt: skip
    return found


def own_forward(q_PHD: Tensor, k_PGD: Tensor, v_PGD: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """PyTorch's copy of the same on a GPU: (output, log-sum-exp, what its backward wants besides)."""
    lengths = (len(q_PHD), len(k_PGD))
    out_PHD, lse_HP, *extra, _ = torch.ops.aten._flash_attention_forward(
        q_PHD, k_PGD, v_PGD, bounds, bounds, *lengths, 0.0, True, False
    )
    return out_PHD, lse_HP, extra


def own_backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_HP, bounds, extra) -> Sequence[Tensor]:
    """Gradients of q, k and v."""
    lengths = (len(q_PHD), len(k_PGD))
    return torch.ops.aten._flash_attention_backward(
        grad_PHD, q_PHD, k_PGD, v_PGD, out_PHD, lse_HP, bounds, bounds, *lengths, 0.0, True, *extra
    )


def cpu_forward(q_1HLD: Tensor, k_1HLD: Tensor, v_1HLD: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of one document on a CPU: (output, log-sum-exp [1, H, L])."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_1HLD, k_1HLD, v_1HLD, 0.0, True)


def cpu_backward(grad, q_1HLD, k_1HLD, v_1HLD, out_1HLD, lse_1HL) -> Sequence[Tensor]:
    """Gradients of q, k and v."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q_1HLD, k_1HLD, v_1HLD, out_1HLD, lse_1HL, 0.0, True)


def may_change(t: Tensor, dim: int) -> None:
    """Tells the compiler that this size changes from call to call."""
    torch._dynamo.maybe_mark_dynamic(t, dim)


def remake_cheap_activations() -> None:
    """Programs that are compiled from now on make norms and gates again in the backward, whose bytes would cost more than their
    arithmetic."""
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._functorch.config.ban_recompute_reductions = False


def fuse_at_any_size() -> None:
    """Programs that are compiled from now on fuse the two sums of a norm's backward for any number of rows. Otherwise the
    compiler asks whether there are enough rows, and makes another program for a pack with another answer: seconds in which
    all ranks wait."""
    torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True


def scaled_product(a_MK: Tensor, b_KN: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two fp8 matrices times their scales, [M, N], on a GPU."""
    return torch._scaled_mm(a_MK, b_KN, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)
