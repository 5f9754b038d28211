"""How a state becomes bytes: fp32 (tests), bf16, or fp8 with a scale.

fp8 is e4m3 (4 exponent bits, 3 of mantissa): 2^-4 of relative rounding error over a range of 28,000 : 1, so that a scale a
row is enough even where a few channels are a thousand times the others. `name.scale` (float32) lies beside `name`: one
number a token and head for Q, K and V, one a token for hidden states; value = fp8 x scale.

A new codec is an entry of `CODECS` (docs/extend/codec.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCALE = ".scale"
FP8_MAX = 448.0  # the largest finite number of e4m3


class Scaled(NamedTuple):
    """A stored tensor [..., D] and its scale [...]."""

    values: Tensor
    scale: Tensor


class Codec(NamedTuple):
    """`dtype`: of the stored values. `scaled`: None where they are the state itself, cast; else a function of a state [..., D] in
    float32 that returns the values and their scale in float32, [...], so that state = values x scale."""

    dtype: torch.dtype
    scaled: Callable[[Tensor], Scaled] | None = None


def _fp8(state: Tensor) -> Scaled:
    # A row has its own scale: a scale for a whole tensor would push rows of small numbers below what e4m3 can tell from zero.
    largest = state.abs().amax(-1)
    # A row of zeros has no largest value: 0 / tiny is 0, and 0 / 0 would not be.
    scale = (largest / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return Scaled((state / scale[..., None]).to(torch.float8_e4m3fn), scale)


# By the value of `cache.codec`, which `CacheRecipe` lists as well.
CODECS = {
    "fp8": Codec(torch.float8_e4m3fn, _fp8),
    "bf16": Codec(torch.bfloat16),
    "fp32": Codec(torch.float32),
}


def stored(name: str, shape: tuple[int, ...], codec: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, row shape) of the tensors that a state of this row shape becomes."""
    kind = CODECS[codec]
    rows = {name: (kind.dtype, shape)}
    return rows | {name + SCALE: (torch.float32, shape[:-1])} if kind.scaled else rows


def encode(name: str, state: Tensor, codec: str) -> dict[str, Tensor]:
    """The tensors that `state` [..., D] becomes, on its own device."""
    kind = CODECS[codec]
    if kind.scaled is None:
        return {name: state.to(kind.dtype)}
    # In float32, because a quotient in bf16 would be rounded once more before the codec rounds it.
    found = kind.scaled(state.float())
    return {name: found.values, name + SCALE: found.scale}


def decode(stored: Tensor | Scaled) -> Tensor:
    """The state again: what has a scale comes back as bf16, anything else in its stored dtype."""
    if isinstance(stored, Scaled):
        # bf16 rounds by 2^-9 of a number, which is lost beside the 2^-4 of e4m3.
        return (stored.values.float() * stored.scale[..., None]).bfloat16()
    return stored


def paired(tensors: dict[str, Tensor]) -> dict[str, Tensor | Scaled]:
    """Stored tensors by name, each that has a scale joined with it."""
    return {
        name: Scaled(tensor, tensors[name + SCALE]) if name + SCALE in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }


def finite(tensor: Tensor) -> bool:
    """Whether all of its numbers are."""
    if tensor.dtype in (torch.int32, torch.uint8) or not tensor.numel():
        return True
    # The smallest and the largest number are NaN if any is. It takes a thirtieth of the time of `isfinite`.
    return bool(torch.stack(torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)).isfinite().all())
