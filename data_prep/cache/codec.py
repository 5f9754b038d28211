"""How a state becomes bytes: fp32 (tests), bf16, or fp8 with a scale.

fp8 is e4m3 (4 exponent bits, 3 of mantissa): 2^-4 of relative rounding error over a range of 28,000 : 1, so that a scale a
row is enough even where a few channels are a thousand times the others. `name.scale` (float32) lies beside `name`: one
number a token and head for Q, K and V, one a token for hidden states; value = fp8 x scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SCALE = ".scale"
DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
FP8_MAX = 448.0


class Scaled(NamedTuple):
    """A stored fp8 tensor [..., D] and its scale [...]."""

    values: Tensor
    scale: Tensor


def stored(name: str, shape: tuple[int, ...], codec: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, row shape) of the tensors that a state of this row shape becomes."""
    scale = {name + SCALE: (torch.float32, shape[:-1])} if codec == "fp8" else {}
    return {name: (DTYPES[codec], shape), **scale}


def encode(name: str, state: Tensor, codec: str) -> dict[str, Tensor]:
    """The tensors that `state` [..., D] becomes, on its own device."""
    if codec != "fp8":
        return {name: state.to(DTYPES[codec])}
    values = state.float()
    scale = (values.abs().amax(-1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros: 0 / tiny
    return {name: (values / scale[..., None]).to(torch.float8_e4m3fn), name + SCALE: scale}


def decode(stored: Tensor | Scaled) -> Tensor:
    """The state again: fp8 comes back as bf16, anything else as it is."""
    if isinstance(stored, Scaled):
        return (stored.values.float() * stored.scale[..., None]).bfloat16()
    return stored


def paired(tensors: dict[str, Tensor]) -> dict[str, Tensor | Scaled]:
    """Stored tensors by name, each fp8 tensor joined with its scale."""
    return {
        name: Scaled(tensor, tensors[name + SCALE]) if name + SCALE in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }
