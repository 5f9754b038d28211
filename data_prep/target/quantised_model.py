"""Quantised targets once they are loaded: which of their modules compute with plain numbers, and what others compute with.

Shapes: N outputs, K inputs.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from data_prep.target.transformers_private import kept_in_float32

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS = 1024  # inputs of a layer that are asked for at once


@torch.no_grad()
def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring a quantised model to the state that it stays in: all that is not quantised in `dtype`, and whatever a method leaves
    for the first forward done."""
    kept = kept_in_float32(model)
    for name, module in model.named_modules():
        if not all(_is_plain(t) for t in module.parameters(recurse=False)) or hasattr(module, "qweight"):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            # Checkpoints keep what they did not quantise in a dtype of their own, and transformers leaves it so.
            if not any(part in f"{name}.{own}" for part in kept):
                parameter.data = parameter.data.to(dtype)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device), use_cache=False)


def rounds(module: nn.Module) -> bool:
    """Whether a module does not compute with its own weights as plain numbers."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and _is_plain(module.weight):  # compressed-tensors has multiplied the weight out
        return (scheme.input_activations or scheme.output_activations) is not None
    return hasattr(module, "qweight") or not all(_is_plain(t) for t in module.parameters(recurse=False))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in PLAIN and type(tensor.data) is Tensor


def plain_weight(path: str, what: str, module: nn.Module) -> Tensor:
    """The weight of a target's embedding or LM head, which drafters share. Raises UserError where it is quantised."""
    if rounds(module):
        raise UserError(
            f"target.path={path}: its {what} is quantised, and drafters compute with it; a checkpoint that leaves lm_head and "
            "embeddings as they were can be a target"
        )
    return module.weight


@torch.no_grad()
def dense(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight [N, K] in plain numbers: what its outputs say of it, where it holds another form."""
    weight = getattr(module, "weight", None)
    if weight is not None and _is_plain(weight):
        return weight
    if hasattr(module, "weight_scale_inv"):  # fp8: a scale for each block
        return _scaled(weight.to(dtype), module.weight_scale_inv.to(dtype), module.block_size)
    device = next(t.device for t in (*module.parameters(), *module.buffers()))
    eye_KK = torch.eye(module.in_features, dtype=dtype, device=device)
    zero = module(torch.zeros_like(eye_KK[:1]))  # the bias
    return torch.cat([module(rows) - zero for rows in eye_KK.split(ROWS)]).T.contiguous()


def _scaled(weight_NK: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    if block is not None:
        outputs, inputs = weight_NK.shape
        scale = scale.repeat_interleave(block[0], 0)[:outputs].repeat_interleave(block[1], 1)[:, :inputs]
    return weight_NK * scale
