"""What reading and decoding use of PyTorch beyond its promises is there, stands in one file, and does what that file says."""

import pytest
import torch
from torch import nn

from data_prep.decoding import torch_private
from tests.support.private_names import uses


def test_pytorch_still_has_every_name():
    assert {name: torch_private.PRIVATE[name] for name in torch_private.missing()} == {}


@pytest.mark.parametrize("name", torch_private.PRIVATE)
def test_a_name_that_went_is_noticed(name):
    assert torch_private.missing([name + "_gone"]) == [name + "_gone"]


@pytest.mark.parametrize("name", ["_compiled_call_impl", "torch.ops.mkldnn._", "torch._dynamo.config"])
def test_no_other_file_uses_a_private_name(name):
    assert uses(name) == {"data_prep/decoding/torch_private.py"}


def test_the_kernel_hands_out_the_log_sum_exp():
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    out, lse = torch_private.attention_with_lse(q, k, v)
    scores = q @ k.mT / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


def test_layers_are_uncompiled_for_a_while():
    layer = nn.Linear(2, 2)
    calls = []
    layer._compiled_call_impl = lambda x: calls.append(x)
    x = torch.ones(1, 2)
    with torch_private.uncompiled([layer]):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) and not calls
    layer(x)
    assert len(calls) == 1
