"""Matrix products in eight bits: twice the rate of bf16 on the GPUs that have them, for weights and states of one scale a tensor.

Activations and weights are e4m3, gradients, which need range more than digits, e5m2; every tensor is scaled so that its largest
entry is the format's, products add up in float32 and come out as the inputs were. Where a product needs an operand the other way
round, it is cast and turned in one pass.

Shapes: M rows, K inputs, N outputs.
"""

import torch
from torch import Tensor, nn

from train.attention import torch_private

NARROW = torch.float8_e4m3fn  # more digits
WIDE = torch.float8_e5m2  # more range
TILE = 16  # sizes that tensor cores take


def quantised(t_MK: Tensor, dtype: torch.dtype, plain: bool, turned: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(t [M, K], its transpose [K, M] with M filled up by zeros to whole tiles, what their entries are to be multiplied by)."""
    top = torch.linalg.vector_norm(t_MK.detach(), float("inf")).float().clamp(min=1e-12)
    scale = torch.finfo(dtype).max / top
    if t_MK.is_cuda:
        return *_cast_on_gpu(t_MK.contiguous(), scale, dtype, plain, turned), 1 / scale
    cast_MK = (t_MK.float() * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    turned_KM = nn.functional.pad(cast_MK.float(), (0, 0, 0, -len(t_MK) % TILE)).T.to(dtype).contiguous() if turned else None
    return cast_MK if plain else None, turned_KM, 1 / scale


def _cast_on_gpu(t_MK: Tensor, scale: Tensor, dtype: torch.dtype, plain: bool, turned: bool) -> list[Tensor | None]:
    from train.precision.fp8_cast import BLOCK, cast_kernel

    rows, columns = t_MK.shape
    filled = rows + -rows % TILE
    out_MK = torch.empty(rows, columns, dtype=dtype, device=t_MK.device) if plain else None
    out_KM = torch.empty(columns, filled, dtype=dtype, device=t_MK.device) if turned else None
    grid = (-(-filled // BLOCK), -(-columns // BLOCK))
    some = out_MK if plain else out_KM
    cast_kernel[grid](
        t_MK, scale, out_MK if plain else some, out_KM if turned else some, rows, columns, filled, float(torch.finfo(dtype).max),
        PLAIN=plain, TURNED=turned, BLOCK=BLOCK,
    )  # fmt: skip
    return [out_MK, out_KM]


def _product(a_MK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T, [M, N]. PyTorch's own product of this kind takes minutes on a CPU."""
    assert not (a_MK.shape[1] % TILE or b_NK.shape[0] % TILE), f"fp8 products take sizes of whole {TILE}s"
    if not a_MK.is_cuda:
        return ((a_MK.float() @ b_NK.float().T) * (a_scale * b_scale)).to(dtype)
    return torch_private.scaled_product(a_MK, b_NK.T, a_scale, b_scale, dtype)


@torch.library.custom_op("understudy::fp8_linear", mutates_args=())
def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x weight^T, [M, N], and its gradients, all in fp8. One operation to a compiler."""
    x8_MK, _, x_scale = quantised(x_MK, NARROW, plain=True, turned=False)
    w8_NK, _, w_scale = quantised(weight_NK, NARROW, plain=True, turned=False)
    return _product(x8_MK, w8_NK, x_scale, w_scale, x_MK.dtype)


@torch.library.custom_op("understudy::fp8_linear_backward", mutates_args=())
def _linear_backward(grad_MN: Tensor, x_MK: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    g8_MN, g8_NM, g_scale = quantised(grad_MN, WIDE, plain=True, turned=True)
    _, w8_KN, w_scale = quantised(weight_NK, NARROW, plain=False, turned=True)
    _, x8_KM, x_scale = quantised(x_MK, NARROW, plain=False, turned=True)
    return _product(g8_MN, w8_KN, g_scale, w_scale, x_MK.dtype), _product(g8_NM, x8_KM, g_scale, x_scale, x_MK.dtype)


@linear.register_fake
def _(x_MK, weight_NK):
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])


@_linear_backward.register_fake
def _(grad_MN, x_MK, weight_NK):
    return torch.empty_like(x_MK), torch.empty_like(weight_NK)


linear.register_autograd(
    lambda ctx, grad_MN: _linear_backward(grad_MN, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Linear(nn.Linear):
    """A bias-free linear layer whose products are fp8 while it trains: it is judged as it will decode. Its weight, its optimizer
    and its checkpoint are what they were."""

    @staticmethod
    def of(layer: nn.Linear) -> "Linear":
        found = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        found.weight = layer.weight
        return found

    def forward(self, x_MK: Tensor) -> Tensor:
        return linear(x_MK, self.weight) if self.training else super().forward(x_MK)


class Frozen:
    """A frozen weight [N, K], cast once."""

    def __init__(self, weight_NK: Tensor):
        self.weight_NK, self.weight_KN, self.scale = quantised(weight_NK, NARROW, plain=True, turned=True)

    def linear(self, x_MK: Tensor) -> Tensor:
        """x weight^T, [M, N]."""
        x8_MK, _, scale = quantised(x_MK, NARROW, plain=True, turned=False)
        return _product(x8_MK, self.weight_NK, scale, self.scale, x_MK.dtype)

    def backward(self, grad_MN: Tensor) -> Tensor:
        """The gradient of x, [M, K]."""
        g8_MN, _, scale = quantised(grad_MN, WIDE, plain=True, turned=False)
        return _product(g8_MN, self.weight_KN, scale, self.scale, grad_MN.dtype)
