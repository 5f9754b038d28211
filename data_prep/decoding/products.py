"""Products with a weight on a CPU, which is laid out for them once.

PyTorch's `linear` in float32 hands a weight to a BLAS as it stands. That library lays it out anew in each call, so that six rows
take about twice as long as one. oneDNN reads a weight that was laid out beforehand at the memory's speed, for one row as for six.

Shapes: N outputs, K inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

from data_prep.decoding import torch_private

ROWS = 4  # that a layout is chosen for; it serves any number
MOST = 0.5  # the share of the free memory that layouts take at most


class Product:
    """x W' + b, [..., K] -> [..., N]: PyTorch's own, or oneDNN's once `lay_out` was called."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None):
        self.weight_NK = weight_NK
        self.bias_N = bias_N
        self._laid_out: Tensor | None = None

    @property
    def is_laid_out(self) -> bool:
        return self._laid_out is not None

    def lay_out(self) -> None:
        if self._laid_out is None and can_be_laid_out(self.weight_NK):
            self._laid_out = torch_private.lay_out(self.weight_NK, ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self._laid_out is None:
            return nn.functional.linear(x, self.weight_NK, self.bias_N)
        return torch_private.laid_out_product(x, self._laid_out, self.bias_N)


def can_be_laid_out(weight: Tensor) -> bool:
    return torch_private.has_layouts() and weight.device.type == "cpu" and weight.dtype == torch.float32


def lay_out(model: nn.Module, more: int = 0) -> bool:
    """Lay out the weights of all linear layers, beside the weights themselves; whether there was memory for it and for `more`
    bytes. For decoding alone: what changes a weight afterwards (training, loading, another dtype) does not reach its layout."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and can_be_laid_out(layer.weight)]
    layers = [layer for layer in layers if "forward" not in layer.__dict__]  # else it was done
    # A layout is a second copy of the weight, because the weight itself stays for everything else that reads it.
    if more + sum(layer.weight.nbytes for layer in layers) > MOST * psutil.virtual_memory().available:
        return False
    for layer in layers:
        product = Product(layer.weight, layer.bias)
        product.lay_out()
        # An instance's own `forward` goes before its class's; `as_they_stand` takes it away again.
        layer.forward = product
    return True


@contextmanager
def as_they_stand(model: nn.Module) -> Iterator[None]:
    """Linear layers without what `lay_out` did."""
    laid_out = [layer for layer in model.modules() if isinstance(layer.__dict__.get("forward"), Product)]
    products = {layer: layer.__dict__.pop("forward") for layer in laid_out}
    try:
        yield
    finally:
        for layer, product in products.items():
            layer.forward = product
