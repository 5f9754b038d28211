"""Products in fp8: exact where numbers have few digits, off by those that they lose elsewhere, and never by a wrong transpose."""

import pytest
import torch
from torch.nn import functional as F

from train.precision import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gradients(product, x, weight, upstream):
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    out = product(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def small_integers(*shape, most: int, seed: int):
    """-7 .. 7 and one entry of the format's largest number, so that nothing is rescaled or rounded."""
    t = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)
    t[0, 0] = most
    return t


@pytest.mark.parametrize("rows", [5, 32])
def test_values_that_fp8_can_represent_give_exact_products(rows):
    """Forward and both gradients, with rows that do and do not fill whole tiles; a gradient of -3 .. 3 fits e5m2."""
    x, weight = small_integers(rows, 48, most=448, seed=0), small_integers(80, 48, most=448, seed=1)
    upstream = small_integers(rows, 80, most=57344, seed=2)
    for mine, exact in zip(
        gradients(fp8.linear, x, weight, upstream), gradients(F.linear, x.double(), weight.double(), upstream.double())
    ):
        torch.testing.assert_close(mine, exact.to(torch.bfloat16))
    frozen = fp8.Frozen(weight)
    torch.testing.assert_close(frozen.linear(x), F.linear(x.double(), weight.double()).bfloat16())
    torch.testing.assert_close(frozen.backward(upstream), (upstream.double() @ weight.double()).bfloat16())


def test_random_values_have_the_rounding_error_of_fp8():
    """e4m3 rounds by up to 2^-4 (2.6% in the mean square), e5m2 by up to 2^-3; a sum of independent errors is no larger."""
    g = torch.Generator().manual_seed(0)
    x, weight, upstream = (torch.randn(*s, generator=g).to(DEVICE, torch.bfloat16) for s in ((100, 256), (512, 256), (100, 512)))
    exact = gradients(F.linear, x.double(), weight.double(), upstream.double())
    for mine, wide, bound in zip(gradients(fp8.linear, x, weight, upstream), exact, (0.045, 0.08, 0.08)):
        error = (mine.double() - wide).norm() / wide.norm()
        assert 0.01 < error < bound  # bf16 would be below 0.01: these are really eight bits


def test_a_transposed_copy_is_padded_with_zeros():
    t = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    plain, turned, scale = fp8.quantised(t, fp8.NARROW, plain=True, turned=True)
    assert turned.shape == (48, 16) and torch.equal(turned.float()[:, :5], plain.float().T)
    assert not turned.float()[:, 5:].any()
    torch.testing.assert_close(plain.float() * scale, t.float(), rtol=2**-4, atol=1e-2)
    assert fp8.quantised(t, fp8.NARROW, plain=True, turned=False)[1] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel that casts needs a GPU with fp8")
@pytest.mark.parametrize("dtype", [fp8.NARROW, fp8.WIDE])
def test_the_cast_kernel_equals_its_definition(dtype):
    t = (3 * torch.randn(130, 272, generator=torch.Generator().manual_seed(0))).bfloat16()
    for mine, expected in zip(fp8.quantised(t.cuda(), dtype, True, True), fp8.quantised(t, dtype, True, True)):
        torch.testing.assert_close(mine.float().cpu(), expected.float(), rtol=0, atol=0)


def test_a_layer_keeps_its_weight_and_its_name():
    layer = torch.nn.Linear(32, 16, bias=False)
    narrow = fp8.Linear.of(layer)
    assert narrow.weight is layer.weight and list(narrow.state_dict()) == ["weight"]
