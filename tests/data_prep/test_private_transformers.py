"""What is used of transformers beyond its promises is there, stands in one file, and does what that file says.

Shapes: B texts, T tokens of each, H query heads, G key/value heads, D head size.
"""

import pytest
import torch

from data_prep.target import transformers_private as private
from tests.support.models import small_target
from tests.support.private_names import uses

IDS_BT = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1))
EVERY = private.PRIVATE | private.PRIVATE_NORMS


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_transformers_still_has_every_name(family):
    model = small_target(family).model
    assert {name: EVERY[name] for name in private.missing(model)} == {}


@pytest.mark.parametrize("name", EVERY)
def test_a_name_that_went_is_noticed(name):
    model = small_target().model
    path, _, last = name.rpartition(".")
    place = model
    for part in path.split(".") if path else []:
        place = place[int(part)] if part.isdecimal() else getattr(place, part)
    if place is model.config:  # its settings are properties of the class
        place = model
        last = "config"
        model_type = model.config.model_type
        model.config = type("Config", (), {"model_type": model_type})()
    else:
        delattr(place, last)
    assert name in private.missing(model)


SETTINGS = ["._attn_implementation", "._experts_implementation"]


@pytest.mark.parametrize("name", [*SETTINGS, ".self_attn", ".rotary_emb", "modeling_llama"])
def test_no_other_file_uses_a_private_name_of_transformers(name):
    others = uses(name) - {"data_prep/target/transformers_private.py"}
    # A language model as a drafter is of any family, and looks whether its body has rotary positions.
    known = {".rotary_emb": {"train/drafter/standalone.py"}}
    assert others == known.get(name, set())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@torch.no_grad()
def test_a_given_attention_is_asked_for_every_layer_and_then_gone(family):
    """It gets what the KV cache holds: rotated keys, values, by layer.
    Afterwards the usual attention is back, whatever happened."""
    target = small_target(family)
    cache = target.new_cache()
    usual = target.model.config._attn_implementation
    target.forward(IDS_BT, cache)
    seen = []

    def attend(layer, q_BTHD, k_BTGD, v_BTGD, reading):
        seen.append(layer)
        if layer == 0:  # later layers read what this attention returned
            torch.testing.assert_close(k_BTGD.transpose(1, 2), cache.layers[0].keys)
            torch.testing.assert_close(v_BTGD.transpose(1, 2), cache.layers[0].values)
        return torch.zeros_like(q_BTHD)

    position_BT = torch.arange(IDS_BT.shape[1]).expand_as(IDS_BT)
    target.forward_through(IDS_BT, position_BT, attend)
    assert seen == [0, 1, 2] and target.model.config._attn_implementation == usual

    def broken(*_):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        target.forward_through(IDS_BT, position_BT, broken)
    assert target.model.config._attn_implementation == usual
