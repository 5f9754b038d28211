"""The same rule compiled by FlexAttention into a block-sparse kernel."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from train.attention import torch_private
from train.attention.backend import backend
from train.attention.visibility import TILE, Visibility

# Below 128 queries PyTorch would take its decoding kernel, which has no choice for symbolic sizes and refuses to compile.
OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


@cache
def _compiled(dynamic: bool):
    from torch.nn.attention.flex_attention import flex_attention

    def attention(q_XTHD: Tensor, k_YTGD: Tensor, v_YTGD: Tensor, mask) -> Tensor:
        # Whole tiles, and known to be: kernels for any other number check the end of every tile.
        q, k, v = (t.flatten(0, 1).transpose(0, 1)[None] for t in (q_XTHD, k_YTGD, v_YTGD))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=OPTIONS)[0].transpose(0, 1)

    return torch.compile(attention, dynamic=dynamic)


@backend(takes_parts=False)
def flex(q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, visibility: Visibility) -> Tensor:
    """Softmax attention of the visible keys, [Q, H, D]."""
    mask = visibility.block_mask(q_QHD.shape[1] // k_KGD.shape[1])
    # Else every new number of tiles is a new program until PyTorch has understood that they change.
    for listed in (t for t in vars(mask).values() if isinstance(t, Tensor)):
        for dim in range(2, listed.dim()):
            torch_private.may_change(listed, dim)
    whole = lambda t: F.pad(t, (0, 0, 0, 0, 0, -len(t) % TILE)) if len(t) % TILE else t  # padding by nothing would copy
    tiles = (whole(t).unflatten(0, (-1, TILE)) for t in (q_QHD, k_KGD, v_KGD))
    # PyTorch 2.13's C++ template does not compile for symbolic sizes, so a CPU compiles every shape anew.
    return _compiled(q_QHD.is_cuda)(*tiles, mask)[: len(q_QHD)]
