"""Dense boolean mask and SDPA: slow, obvious, the oracle of every other backend."""

import torch.nn.functional as F
from torch import Tensor

from train.attention.backend import backend
from train.attention.visibility import Visibility


@backend(takes_parts=False)
def reference(q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, visibility: Visibility) -> Tensor:
    """Softmax attention of the visible keys, [Q, H, D]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q_QHD, k_KGD, v_KGD))
    mask = visibility.dense
    if mask.dim() == 3:  # a mask for each KV head
        mask = mask.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    out_HQD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0]
    # What a row gets that sees no key depends on PyTorch's kernel. On a GPU it was the mean of all values.
    return out_HQD.masked_fill(~mask.any(-1, keepdim=True), 0).transpose(0, 1)
