"""Which attention backend (`train/attention/backend.py`) runs where."""

import torch

from common.errors import UserError
from train.attention.backend import AttentionBackend
from train.attention.flash import flash
from train.attention.flex import flex
from train.attention.reference import reference

BACKENDS: dict[str, AttentionBackend] = {"reference": reference, "flex": flex, "flash": flash}


def attention_backend(
    name: str, device: torch.device, training: bool = True, flash: bool = False, dense: bool = False
) -> AttentionBackend:
    """`auto`: the reference on a CPU, where PyTorch has FlexAttention's forward only; on a GPU flash where it can and pays, else
    flex.

    Args:
        flash: whether FlashAttention can say the rule: rows of ttt, no view and no window, and bf16 where there is a GPU.
        dense: whether most positions have an anchor; FlashAttention computes them all.

    Raises:
        UserError: flex training on a CPU, or flash where it cannot.
    """
    on_gpu = device.type == "cuda"
    if name == "auto":
        name = "reference" if not on_gpu else "flash" if flash and dense else "flex"
    if name == "flex" and training and not on_gpu:
        raise UserError(
            "attention=flex cannot train on a CPU: PyTorch has no backward of FlexAttention there; "
            "use attention=auto or attention=reference"
        )
    if name == "flash" and not flash:
        raise UserError(
            "attention=flash is for objective=ttt without views, over layers without a window; on a GPU in bf16, of compute "
            "capability 8.0 or more and with heads of at most 256 in whole 8s; use attention=auto or attention=flex"
        )
    return BACKENDS[name]
