"""What mode=diagnose counts as compute."""

import pytest
import torch

from eval.judging.score import product_counter


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_a_kernel_of_attention_over_grouped_heads_counts_nothing_beside_other_products(kernel):
    """The GPU's kernels, on tensors without content. PyTorch 2.11 cannot count them, 2.13 would."""
    q, k = torch.empty(1, 8, 5, 16, device="meta"), torch.empty(1, 2, 7, 16, device="meta")
    attend = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    more = {"efficient_attention": (None, False), "cudnn_attention": (None, False)}.get(kernel, ())
    with product_counter() as counter:
        attend(q, k, k, *more)
        q[0, 0] @ k[0, 0].T
    assert counter.get_total_flops() == 2 * 5 * 7 * 16
