"""Weights laid out for a CPU give PyTorch's own products, and can be put away again.

Shapes: B requests, T rows of each, V vocabulary, E hidden size.
"""

import pytest
import torch
from torch import nn

from common import cli
from common.recipe import ROOT
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.products import Product, as_they_stand, can_be_laid_out, lay_out
from data_prep.recipe import TargetRecipe
from data_prep.target.loading import load_target
from eval.engine.drafting import StaticTrained
from eval.judging.controls import OtherMemory
from eval.judging.judge import contenders
from eval.recipe import EvalRecipe
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig

pytestmark = pytest.mark.skipif(not can_be_laid_out(torch.zeros(1)), reason="this build of PyTorch has no oneDNN")


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_equals_the_linear_layer_and_nearly_so_after_relayout(bias):
    generator = torch.Generator().manual_seed(0)
    weight, offset = torch.randn(48, 40, generator=generator), torch.randn(48, generator=generator)
    product = Product(weight, offset if bias else None)
    for shape in ((40,), (1, 40), (6, 40), (2, 3, 40), (70, 40), (0, 40)):
        x = torch.randn(shape, generator=generator)
        expected = nn.functional.linear(x, weight, offset if bias else None)
        assert torch.equal(product(x), expected)
        laid_out = Product(weight, offset if bias else None)
        laid_out.lay_out()
        assert laid_out.is_laid_out and laid_out(x).shape == expected.shape
        torch.testing.assert_close(laid_out(x), expected, rtol=1e-5, atol=1e-5)


def test_other_dtypes_use_pytorchs_own_product():
    product = Product(torch.ones(2, 3, dtype=torch.float64))
    product.lay_out()
    assert not product.is_laid_out and torch.equal(product(torch.ones(3, dtype=torch.float64)), torch.full((2,), 3.0).double())


def forward(target, rows):
    base_B = torch.tensor([4])
    cache = StaticCache.of(target, 1, 32)
    for base, count in ((0, 4), (4, rows)):
        base_B = torch.tensor([base])
        ids_BT = torch.arange(7, 7 + count)[None]
        position_BT = base_B[:, None] + torch.arange(count)
        states = target.forward_through(ids_BT, position_BT, cache.attention(base_B, count))
    return target.logits(states.last_hidden)


def test_relayout_keeps_a_targets_logits_and_can_be_undone():
    target = load_target(TargetRecipe(path=str(ROOT / "data_prep/targets/tiny"), device="cpu"))
    usual = {rows: forward(target, rows) for rows in (1, 6)}
    before = target.weights_hash()
    target.compile()
    linear = target.layers[0].mlp.down_proj
    assert isinstance(linear.forward, Product) and target.frozen_head.product.is_laid_out
    laid_out = {rows: forward(target, rows) for rows in (1, 6)}
    for rows, logits in usual.items():
        torch.testing.assert_close(laid_out[rows], logits, rtol=1e-4, atol=1e-4)
    with target.as_loaded():
        assert not isinstance(linear.forward, Product)
    assert isinstance(linear.forward, Product) and target.weights_hash() == before
    with torch.no_grad():  # the negative control: it is the layout that is read, not the weight
        linear.weight.zero_()
    assert torch.allclose(forward(target, 1), laid_out[1], atol=1e-5)
    with as_they_stand(target.model):
        assert not torch.allclose(forward(target, 1), laid_out[1], atol=1e-2)


def test_drafters_and_controls_use_relayout_exactly_where_the_target_does():
    """The controls too, so that their seconds compare; and nobody where the target is not."""
    target = load_target(TargetRecipe(path=str(ROOT / "data_prep/targets/tiny"), device="cpu"))
    about = {"id": "tiny", "weights_hash": target.weights_hash(), "tokenizer_hash": "x"}
    config = DrafterConfig("ttt", "kv", [0, 5], [], 4, False, False, 0, "target", 2, target.architecture, about, draft_vocab=64)
    recipe = cli.compose("eval", EvalRecipe, [])
    for laid_out in (False, True):
        if laid_out:
            target.compile()
        drafter = new_drafter(config).start(target, target.frozen_head, torch.arange(len(target.frozen_head.head_VE)))
        everyone = contenders(recipe, target, drafter, OtherMemory(1, 8))
        judged = [one for one in everyone.values() if isinstance(one, StaticTrained)]
        assert len(judged) == 4 and {one._product.is_laid_out for one in judged} == {laid_out}
        linear = [m for one in judged for m in one.drafter.modules() if isinstance(m, nn.Linear)]
        assert {isinstance(m.__dict__.get("forward"), Product) for m in linear} == {laid_out}


def test_without_memory_for_a_copy_a_model_keeps_its_layout(monkeypatch):
    monkeypatch.setattr("data_prep.decoding.products.MOST", 0.0)
    model = nn.Linear(4, 4)
    assert not lay_out(model) and "forward" not in model.__dict__
