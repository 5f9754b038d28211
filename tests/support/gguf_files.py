"""Miniature GGUF files of random models, written as llama.cpp's converter writes them. Its rules are said here once more, in
other words than data_prep/target/gguf_contents.py and gguf_tokenizer.py say them."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common.recipe import ROOT

TINY = ROOT / "data_prep/targets/tiny"
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def small_model(family: str, tied: bool, head_dim: int = 32, vocab: int = 8192, seed: int = 0, **options) -> PreTrainedModel:
    """Two random layers; norms and biases are not what they are initialised to, so that a lost one shows."""
    torch.manual_seed(seed)
    config, model = MODELS[family]
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    made = model(config(**sizes | options))
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return made.eval()


def place_of(name: str) -> str:
    """A tensor's name in the file."""
    module, kind = name.rsplit(".", 1)
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, layer, leaf = module.split(".", 3)
    return f"blk.{layer}.{LEAVES[leaf]}.{kind}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half, then row i of its second half, and so on."""
    out = []
    for head in np.split(rows, heads):
        first, second = np.split(head, 2)
        for a, b in zip(first, second):
            out += [a, b]
    return np.stack(out)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kinds: dict[str, Kind] | None = None,
    tokenizer: dict | None = None,
    keys: dict | None = None,
    extra: dict[str, np.ndarray] | None = None,
    leave_out: tuple[str, ...] = (),
    architecture: str | None = None,
    **options,
) -> Path:
    """`kinds`: how tensors are stored, by a part of their name in the file (others: F32). `keys`: hyperparameters beside the
    usual ones. `extra`: tensors beside the model's. `leave_out`: keys and tensors that are not written."""
    config = model.config
    family = architecture or config.model_type
    writer = gguf.GGUFWriter(path, family, **options)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if config.model_type == "llama":
        sizes["rope.dimension_count"] = config.head_dim
    named = {f"{family}.{name}": value for name, value in sizes.items()}
    named |= {f"tokenizer.{name}": value for name, value in (tokenizer or tiny_tokenizer()).items()}
    named |= keys or {}
    for name, value in named.items():
        if name not in leave_out:
            _add(writer, name, value)
    for name, tensor in model.state_dict().items():
        place = place_of(name)
        if place in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        rows = tensor.float().numpy()
        if config.model_type == "llama" and ".attn_q." in place:
            rows = interleaved(rows, config.num_attention_heads)
        if config.model_type == "llama" and ".attn_k." in place:
            rows = interleaved(rows, config.num_key_value_heads)
        kind = next((k for part, k in (kinds or {}).items() if part in place and rows.ndim > 1), Kind.F32)
        writer.add_tensor(place, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case list():
            writer.add_array(name, value)


def tiny_tokenizer() -> dict:
    """The embedded target's, as a file keeps it: without the "tokenizer." of its keys."""
    rules = json.loads((TINY / "tokenizer.json").read_text())
    special = {token["content"] for token in rules["added_tokens"]}
    vocab = {token["content"]: token["id"] for token in rules["added_tokens"]} | rules["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in special else 1 for token in tokens],
        "ggml.merges": [" ".join(pair) for pair in rules["model"]["merges"]],
        "ggml.eos_token_id": vocab["<|endoftext|>"],
        "ggml.padding_token_id": vocab["<|pad|>"],
        "ggml.add_bos_token": False,
        "chat_template": (TINY / "chat_template.jinja").read_text(),
    }
