"""What a GGUF file says: weights (most of them quantised) and sizes, under the names of llama.cpp.

All knowledge of the format lives in this file and in gguf_tokenizer.py. What would be read otherwise than it was meant is refused
by name.

Shapes: R rows, C columns, D head size.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.errors import UserError, first_line

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}  # Mistral's files are called llama, and are
INTERLEAVED = ("llama",)  # whose queries and keys llama.cpp rotates as neighbours
PIECE = 1 << 25  # numbers that are dequantised at once

# Keys of an architecture that are read below. Any other one that says something (is not 0) is refused.
KNOWN = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # says nothing of the computation
    "vocab_size",
}


def read(file: Path):
    """The file's GGUFReader: all of its keys, and its tensors mapped into memory.

    Raises:
        UserError: the package is not installed, or a key or a tensor reaches beyond the file's end.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{file}: reading a GGUF file needs the package gguf: pip install gguf") from error
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{file} is no whole GGUF file: it is cut or damaged ({first_line(error)})") from error
    if reader.byte_order == "S":
        raise UserError(f"{file} was written for machines of the other byte order (gguf-convert-endian turns it)")
    return reader


def key_value(reader, key: str, default=None):
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def config_of(reader, file: Path) -> PreTrainedConfig:
    """The configuration that the file's keys describe.

    transformers' own reading of them passes over what it does not know (the head size of a Qwen3, a scaled RoPE).

    Raises:
        UserError: the architecture is not known, a key is missing, or a key says what would go unnoticed.
    """
    family = key_value(reader, "general.architecture")
    if family not in CONFIGS:
        raise UserError(f"{file} holds a '{family}'; Understudy reads GGUF files of {', '.join(CONFIGS)} (Mistral's are llama)")
    prefix = f"{family}."
    said = {key.removeprefix(prefix): key_value(reader, key) for key in reader.fields if key.startswith(prefix)}
    for key, value in sorted(said.items()):
        if (key not in KNOWN and value) or isinstance(value, list):  # a list: layers that differ
            raise UserError(f"{file}: {prefix}{key}={value} is not supported")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        heads = said["attention.head_count"]
        head_dim = said.get("attention.key_length") or said["embedding_length"] // heads
        config = CONFIGS[family](
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            hidden_size=said["embedding_length"],
            intermediate_size=said["feed_forward_length"],
            num_hidden_layers=said["block_count"],
            num_attention_heads=heads,
            num_key_value_heads=said.get("attention.head_count_kv") or heads,
            head_dim=head_dim,
            max_position_embeddings=said["context_length"],
            rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
            rope_parameters=_rope(said, file),
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=key_value(reader, "tokenizer.ggml.bos_token_id"),
            eos_token_id=key_value(reader, "tokenizer.ggml.eos_token_id"),
            pad_token_id=key_value(reader, "tokenizer.ggml.padding_token_id"),
        )
    except KeyError as error:
        raise UserError(f"{file} lacks {error.args[0]}") from error
    except (StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file}: no {family} has its sizes ({' '.join(str(error).split())})") from error
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, head_dim) != head_dim:
            raise UserError(f"{file}: {prefix}{key}={said[key]} beside a head size of {head_dim} is not supported")
    if "rope_freqs.weight" in tensors:
        _llama3_rope(config, torch.from_numpy(tensors["rope_freqs.weight"].data.copy()), file)
    return config


def _rope(said: dict, file: Path) -> dict:
    theta = {"rope_theta": said.get("rope.freq_base", 10000.0)}
    kind = said.get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", **theta}
    if kind == "linear":
        return {"rope_type": "linear", "factor": said["rope.scaling.factor"], **theta}
    if kind == "yarn":
        original = said["rope.scaling.original_context_length"]
        scaled = {"factor": said["rope.scaling.factor"], "original_max_position_embeddings": original}
        return {"rope_type": "yarn", **scaled, **theta}
    raise UserError(f"{file}: rope scaling '{kind}' is not supported")


def _llama3_rope(config: PreTrainedConfig, factor_D: Tensor, file: Path) -> None:
    """Give `config` the rule of which Llama 3.1 and later keep the outcome: by what each frequency is divided, [D/2].

    Raises UserError where the published constants do not give these very numbers.
    """
    theta = config.rope_parameters["rope_theta"]
    scaled = {"factor": float(factor_D.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "original_max_position_embeddings": 8192,
        **scaled,
    }
    plain_D = theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    by_rule_D = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    if factor_D.shape != by_rule_D.shape or not torch.allclose(plain_D / factor_D, by_rule_D, rtol=1e-4, atol=0):
        raise UserError(f"{file}: rope_freqs.weight is not what Llama 3.1's rule gives; other scalings are not supported")


def generation_of(reader) -> GenerationConfig:
    """Its end tokens are those that the file names: of a text, of a turn, of a message."""
    named = [key_value(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = [i for i in dict.fromkeys(named) if i is not None]
    start = key_value(reader, "tokenizer.ggml.bos_token_id")
    pad = key_value(reader, "tokenizer.ggml.padding_token_id")
    return GenerationConfig(bos_token_id=start, eos_token_id=ends or None, pad_token_id=pad)


def tensors_of(reader, config: PreTrainedConfig, file: Path) -> dict:
    """The model's names -> the file's tensors: every parameter has one of its shape, and every tensor is one's.

    Raises UserError otherwise, and for a kind of quantisation that the package does not read.
    """
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    theirs = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    left = {tensor.name: tensor for tensor in reader.tensors}
    left.pop("rope_freqs.weight", None)
    found = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, kind = name.rsplit(".", 1)
        place = f"{theirs.get_name(module)}.{kind}"
        if place not in left:
            raise UserError(f"{file} lacks the tensor {place}")
        found[name] = left.pop(place)
        shape = tuple(map(int, reversed(found[name].shape)))
        if shape != parameter.shape:
            raise UserError(f"{file}: {place} is {shape}; by the sizes that the file states it is {tuple(parameter.shape)}")
    if left:
        raise UserError(f"{file}: a {config.model_type} has no place for the tensor {min(left)}")
    for tensor in {tensor.tensor_type: tensor for tensor in found.values()}.values():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{file}: tensors of kind {tensor.tensor_type.name} cannot be dequantised") from error
    return found


def dtype_of(tensor) -> torch.dtype:
    """Numbers stay what they are in the file; blocks become float32, in which dequantising is exact."""
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.tensor_type.name, torch.float32)


def pieces(tensor, turned: dict[str, int]) -> Iterator[Tensor]:
    """The numbers of one tensor of the file in transformers' order, some rows at a time. `turned`: heads of those whose rows
    llama.cpp reordered."""
    heads = turned.get(tensor.name.split(".")[-2])
    rows = len(tensor.data)
    step = rows if heads else max(1, PIECE // (tensor.n_elements // rows))
    for first in range(0, rows, step):
        numbers_RC = _numbers(tensor, slice(first, first + step))
        yield rotary_halves(numbers_RC, heads) if heads else numbers_RC


def _numbers(tensor, rows: slice) -> Tensor:
    from gguf import dequantize

    kind = tensor.tensor_type.name
    data = tensor.data[rows]
    if kind in ("F32", "F16"):
        return torch.from_numpy(data.copy())
    if kind == "BF16":  # the file's bytes
        return torch.from_numpy(data.copy()).view(torch.bfloat16)
    return torch.from_numpy(dequantize(data, tensor.tensor_type))


def rotary_halves(rows_RC: Tensor, heads: int) -> Tensor:
    """Rows in transformers' order: it rotates row i of a head with row i + D/2, llama.cpp row 2i with row 2i + 1."""
    return rows_RC.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
