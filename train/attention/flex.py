"""The same rule compiled by FlexAttention into a block-sparse kernel."""

from functools import cache

import torch
from torch import Tensor

from train.attention.visibility import Visibility

# Below 128 queries PyTorch would take its decoding kernel, which has no choice for symbolic sizes and refuses to compile.
OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


@cache
def _compiled(dynamic: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=dynamic)


def flex(q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, visibility: Visibility) -> Tensor:
    """Softmax attention of the visible keys, [Q, H, D]."""
    q, k, v = (t.transpose(0, 1)[None].contiguous() for t in (q_QHD, k_KGD, v_KGD))
    # PyTorch 2.13's C++ template does not compile for symbolic sizes, so a CPU compiles every shape anew.
    mask = visibility.block_mask(q.shape[1] // k.shape[1])
    return _compiled(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=OPTIONS)[0].transpose(0, 1)
