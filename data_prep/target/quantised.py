"""Quantised targets before they are loaded: what configuration and files say, and what of it would be read wrongly.

What a loaded model computes with is in quantised_model.py.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import cached_file, is_kernels_available

from common.errors import UserError, first_line
from data_prep.target.from_gguf import tensor_types

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What transformers needs to load weights of a method, as modules; a module's package has its name, but for underscores.
PACKAGES = {
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": ("accelerate",),
    "gptq": ("gptqmodel", "optimum"),
    "hqq": ("hqq",),
    "mxfp4": ("accelerate",),
    "mxfp8": ("accelerate",),
    "torchao": ("torchao",),
}
# Methods whose kernels are on a GPU alone; elsewhere transformers multiplies their weights out. The least compute capability.
GPU_ALONE = {"fp8": (8, 9), "mxfp8": (8, 9), "mxfp4": (7, 5)}
# Names that only quantised weights have.
SCALES = re.compile(
    r"\.(weight_scale(_inv|_2)?|weight_packed|weight_zero_point|input_scale|qweight|qzeros|SCB)$|\.weight\.(absmax|quant_map)$"
)


def fields_of(config: PretrainedConfig) -> dict | None:
    """`quantization_config` of a configuration, or of its language part; None: the weights are as they were trained."""
    for part in (config, config.get_text_config(decoder=True)):
        if fields := getattr(part, "quantization_config", None):
            return fields if isinstance(fields, dict) else fields.to_dict()
    return None


def method_of(fields: dict) -> str:
    """Its name in transformers. Older files of bitsandbytes do not say it."""
    named = fields.get("quant_method")
    if named is None and (fields.get("load_in_8bit") or fields.get("load_in_4bit")):
        named = "bitsandbytes"
    return str(getattr(named, "value", named))


def quantisation_of(path: str, revision: str | None, config: PretrainedConfig) -> dict | None:
    """What the manifest says of a target's quantisation; None: there is none. `config`: of the folder that is loaded."""
    if str(path).endswith(".gguf"):
        types = tensor_types(path, revision)
        return {"method": "gguf", **({"tensors": types} if types else {})}
    return described(fields_of(config))


def dequantised(quantisation: dict) -> dict:
    """The same of a loaded model that computes with its weights multiplied out, and rounds no activations."""
    return quantisation if quantisation["method"] == "gguf" else quantisation | {"computed": "dequantised"}


def unrounded(quantisation: dict | None) -> bool:
    """Whether a loaded model leaves activations as they are where a server would round them."""
    return bool(quantisation and quantisation.get("computed") and quantisation.get("activations"))


def stored(quantisation: dict) -> dict:
    """What it says of the files alone."""
    return {name: value for name, value in quantisation.items() if name != "computed"}


def described(fields: dict | None) -> dict | None:
    """`quantization_config` in a few words that all methods share: bits, the size of a group that shares a scale, and how
    activations are rounded (where they are)."""
    if fields is None:
        return None
    method = method_of(fields)
    said = {"method": method}
    if method == "compressed-tensors":
        parts = [part for _, part in sorted(fields.get("config_groups", {}).items())]
        weights = [_rounding(part.get("weights")) for part in parts]
        activations = [_rounding(part.get("input_activations")) for part in parts]
        said |= {"weights": "; ".join(filter(None, weights)), "activations": "; ".join(filter(None, activations))}
    elif method == "bitsandbytes":
        four = bool(fields.get("load_in_4bit"))
        said |= {"bits": 4 if four else 8, "kind": fields.get("bnb_4bit_quant_type", "fp4") if four else "int8"}
    else:
        bits = fields.get("bits") or {"fp8": 8, "mxfp8": 8, "mxfp4": 4}.get(method)
        group = fields.get("group_size") or fields.get("weight_block_size")
        said |= {"bits": bits, "group": group, "activations": fields.get("activation_scheme")}
    return {name: value for name, value in said.items() if value}


def _rounding(scheme: dict | None) -> str:
    if not scheme:
        return ""
    group = scheme.get("group_size")
    said = [f"{scheme.get('type')}{scheme.get('num_bits')}", scheme.get("strategy"), group, scheme.get("dynamic") and "dynamic"]
    return " ".join(str(word) for word in said if word)


def in_words(quantisation: dict | None) -> str:
    """A quantisation as messages name it."""
    if not quantisation:
        return "not quantised"
    rest = [f"{name}={value}" for name, value in quantisation.items() if name != "method"]
    return f"quantised by {', '.join([quantisation['method'], *rest])}"


def apart(one: dict | None, other: dict | None) -> str:
    """How two quantisations differ, to be put behind a message; empty where they do not."""
    one, other = (quantisation and stored(quantisation) for quantisation in (one, other))
    return "" if one == other else f" (the one is {in_words(one)}, the other {in_words(other)})"


def to_load(config: PretrainedConfig, device: torch.device) -> PretrainedConfig:
    """`config`, told to multiply quantised weights out while they are loaded where `device` has no kernels for them."""
    fields = fields_of(config)
    if not fields or not multiplied_out(method_of(fields), device):
        return config
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None):
            part.quantization_config = fields | {"dequantize": True}
    return config


def placing(config: PretrainedConfig, device: torch.device) -> dict:
    """What `from_pretrained` takes so that weights are loaded onto `device`, where a method would choose one itself."""
    fields = fields_of(config)
    return {"device_map": {"": str(device)}} if fields and method_of(fields) == "bitsandbytes" else {}


def multiplied_out(method: str, device: torch.device) -> bool:
    """Whether weights of `method` are multiplied out when they are loaded onto `device`."""
    if method not in GPU_ALONE:
        return False
    if device.type != "cuda" or not is_kernels_available():
        return True
    return torch.cuda.get_device_capability(device) < GPU_ALONE[method]


def tensor_files(folder: str, revision: str | None = None) -> dict[str, str]:
    """Name of each tensor -> the safetensors file that has it; empty: there is no such file."""
    index = found_at(folder, INDEX, revision)
    try:
        if index is not None:
            return json.loads(index.read_text())["weight_map"]
        single = found_at(folder, SINGLE, revision)
        if single is None:
            return {}
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: its safetensors cannot be read ({first_line(error)})") from error


@lru_cache(maxsize=4)
def files_hash(folder: str, revision: str | None, quantisation: str) -> str:
    """xxh3 of all tensors of a quantised checkpoint in name order, as they are stored, and of how they are to be read.

    What a loaded model holds instead depends on the machine: kernels lay their weights out anew, some at the first forward.
    """
    digest = xxhash.xxh3_128(quantisation.encode())
    for name, file in sorted(tensor_files(folder, revision).items()):
        with safe_open(found_at(folder, file, revision), "pt") as opened:
            tensor = opened.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def found_at(folder: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or of a hub id; None: it has none of this name."""
    if Path(folder).is_dir():
        file = Path(folder) / name
        return file if file.exists() else None
    try:
        return Path(cached_file(folder, name, revision=revision))
    except OSError:
        return None
