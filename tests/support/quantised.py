"""Quantised checkpoints of the tiny target, as other projects' tools write them.

Shapes: N outputs, K inputs, S groups of inputs that share a scale.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.recipe import ROOT
from data_prep.target.quantised import PACKAGES

TINY = ROOT / "data_prep/targets/tiny"
GROUP = 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight columns in one number
# Names in tests -> methods.
METHODS = {
    "fp8": "fp8",
    "fp8_dynamic": "compressed-tensors",
    "fp8_static": "compressed-tensors",
    "w4a16": "compressed-tensors",
    "w8a8": "compressed-tensors",
    "bnb8": "bitsandbytes",
    "bnb4": "bitsandbytes",
    "gptq": "gptq",
    "awq": "awq",
}
PRESETS = {"fp8_dynamic": "FP8_DYNAMIC", "fp8_static": "FP8", "w4a16": "W4A16", "w8a8": "W8A8"}


def quantised(name: str, folder: Path, head: bool = False) -> Path:
    """The tiny target quantised in this way; where it lies. `head`, of presets of compressed-tensors: the LM head is quantised
    too, and not tied to the embedding. Skips the test where what loads it is not installed."""
    missing = [package for package in PACKAGES[METHODS[name]] if find_spec(package) is None]
    if missing:
        pytest.skip(f"{METHODS[name]} needs {', '.join(missing)}, which is optional and not installed here")
    path = folder / name
    path.mkdir(parents=True)
    if name in PRESETS:
        _compressed(PRESETS[name], path, head)
    elif name.startswith("bnb"):
        _bitsandbytes(name, path)
    else:
        _written(name, path)
    for file in TINY.glob("*.json*"):
        if "token" in file.name or "generation" in file.name:
            shutil.copy(file, path)
    shutil.copy(TINY / "chat_template.jinja", path)
    return path


def _compressed(preset: str, path: Path, head: bool) -> None:
    """As LLM Compressor does it, with scales of each weight's largest number."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    if head:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = GROUP
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=[] if head else ["lm_head"]))
    largest = 448.0 if scheme.weights.type == "float" else 2.0 ** (scheme.weights.num_bits - 1) - 1
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            rows = module.weight_scale.shape[0]
            groups = module.weight_scale.numel() // rows
            module.weight_scale.data.copy_(
                (module.weight.data.reshape(rows, groups, -1).abs().amax(-1) / largest).reshape(module.weight_scale.shape)
            )
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.05)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)


def _bitsandbytes(name: str, path: Path) -> None:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    asked = BitsAndBytesConfig(**(four if name == "bnb4" else {"load_in_8bit": True}))
    AutoModelForCausalLM.from_pretrained(TINY, quantization_config=asked, dtype=torch.bfloat16).save_pretrained(path)


def _written(name: str, path: Path) -> None:
    """Written by hand: their tools need a GPU, or data to calibrate with."""
    config = json.loads((TINY / "config.json").read_text())
    config["quantization_config"] = {
        "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    }[name]
    tensors = {}
    for key, tensor in load_file(TINY / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            tensors[key] = tensor
        elif name == "fp8":
            tensors |= _fp8(key, tensor.float())
        else:
            tensors |= _four_bits(name, key.removesuffix(".weight"), tensor.float())
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))


def _fp8(key: str, weight_NK: Tensor) -> dict[str, Tensor]:
    blocks = weight_NK.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).reshape(weight_NK.shape).to(torch.float8_e4m3fn)
    return {key: stored, f"{key}_scale_inv": scale}


def _four_bits(name: str, key: str, weight_NK: Tensor) -> dict[str, Tensor]:
    groups_SGN = weight_NK.T.unflatten(0, (-1, GROUP))
    low_SN = groups_SGN.amin(1).clamp(max=0)
    scale_SN = (groups_SGN.amax(1).clamp(min=0) - low_SN) / 15
    zero_SN = (-low_SN / scale_SN).round().clamp(0, 15)
    stored_KN = (groups_SGN / scale_SN[:, None] + zero_SN[:, None]).round().clamp(0, 15).flatten(0, 1)
    tensors = {f"{key}.scales": scale_SN.half()}
    if name == "awq":
        return tensors | {f"{key}.qweight": _packed(stored_KN, AWQ_ORDER), f"{key}.qzeros": _packed(zero_SN, AWQ_ORDER)}
    # Zeros less one, as the first version of the format has them.
    return tensors | {
        f"{key}.qweight": _packed(stored_KN.T, range(8)).T,
        f"{key}.qzeros": _packed((zero_SN - 1) % 16, range(8)),
        f"{key}.g_idx": (torch.arange(stored_KN.shape[0]) // GROUP).int(),
    }


def _packed(numbers: Tensor, order) -> Tensor:
    """Eight numbers of four bits in each int32, along the last dimension."""
    eights = numbers.long().unflatten(-1, (-1, 8))
    total = sum(eights[..., column] << (4 * place) for place, column in enumerate(order))
    return ((total + 2**31) % 2**32 - 2**31).to(torch.int32)
