"""PyTorch's private names that we use stand in one file, are there, and take what we give them."""

import inspect
import re

import pytest
import torch

from common.recipe import ROOT
from train.attention import torch_private

NAME = re.compile(r"torch\._\w+|torch\.ops\.aten\._|_flash_attn_\w+|from torch\._|from torch[.\w]* import _")


@pytest.mark.parametrize("name", torch_private.PRIVATE)
def test_a_private_name_is_still_there(name):
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert callable(found) or isinstance(found, bool)  # a function, or a switch of the compiler


def test_they_are_said_in_one_file_alone():
    for room in ("attention", "losses", "measure", "objectives", "precision", "views"):
        for file in sorted((ROOT / "train" / room).rglob("*.py")):
            if file.name != "torch_private.py":
                assert not NAME.findall(file.read_text()), file
    said = set(re.findall(r"torch(?:\.\w+)*\._\w+(?:\.\w+)*", inspect.getsource(torch_private)))
    assert said == set(torch_private.PRIVATE)


def test_their_arguments_are_those_that_we_give():
    """Names of the GPU's operators cannot run here, but say what they take."""
    aten = torch.ops.aten
    taken = {
        aten._flash_attention_forward: "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
        aten._flash_attention_backward: "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal",
        aten._scaled_dot_product_flash_attention_for_cpu: "query key value dropout_p is_causal",
        aten._scaled_dot_product_flash_attention_for_cpu_backward: "grad_out query key value out logsumexp dropout_p is_causal",
    }
    for operator, names in taken.items():
        arguments = [argument.name for argument in operator.default._schema.arguments]
        assert arguments[: len(names.split())] == names.split()
    # What the forward returns behind output and log-sum-exp, but for the debug mask, is what the backward takes behind these.
    assert len(aten._flash_attention_forward.default._schema.returns) == 5
    assert [a.name for a in aten._flash_attention_backward.default._schema.arguments[12:14]] == ["rng_state", "unused"]
