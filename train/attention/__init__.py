"""Executors of one visibility rule. An executor maps (q_QHD, k_KGD, v_KGD, Visibility) to [Q, H, D]."""

import torch

from data_prep.errors import UserError
from train.attention.flex import flex
from train.attention.reference import reference

EXECUTORS = {"reference": reference, "flex": flex}


def executor(name: str, device: torch.device, training: bool = True):
    """`auto`: flex on a GPU, the reference on a CPU, where PyTorch has FlexAttention's forward only.

    Raises:
        UserError: flex training on a CPU.
    """
    if name == "auto":
        name = "flex" if device.type == "cuda" else "reference"
    if name == "flex" and device.type == "cpu" and training:
        raise UserError(
            "attention=flex cannot train on a CPU: PyTorch has no backward of FlexAttention there; "
            "use attention=auto or attention=reference"
        )
    return EXECUTORS[name]
