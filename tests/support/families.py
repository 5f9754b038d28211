"""A random-weight miniature of each family of targets, made from its configuration class in transformers.

A name is the family's `model_type`, or begins with the family's name where it comes in several kinds.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIZES = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    # The defaults of some families lie outside of the vocabulary.
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEADS_OF_16 = {"head_dim": 16}  # so that heads together are wider than the residual stream
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "layer_types": HYBRID,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GEMMA = {**HEADS_OF_16, "num_hidden_layers": 4, "layer_types": WINDOWED, "sliding_window": 8}
GEMMA4 = {**GEMMA, "global_head_dim": 32, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0}
PER_LAYER_INPUT = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": SIZES["vocab_size"]}
HALF = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}


def _rope(kind: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# Fields of a configuration besides SIZES; `model_type` where the name is not it.
MINIATURES: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama_partial": {"model_type": "llama", "rope_parameters": HALF},
    "llama_linear": {"model_type": "llama", **_rope("linear", factor=4.0)},
    "llama_llama3": {
        "model_type": "llama",
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    },
    "llama_yarn": {"model_type": "llama", **_rope("yarn", factor=8.0, original_max_position_embeddings=64)},
    "llama_dynamic": {"model_type": "llama", **_rope("dynamic", factor=4.0)},
    "llama_longrope": {
        "model_type": "llama",
        **_rope(
            "longrope",
            factor=8.0,
            original_max_position_embeddings=64,
            short_factor=[1.0, 1.1, 1.3, 1.6],
            long_factor=[1.5, 2.0, 3.0, 5.0],
        ),
    },
    "mistral": {"sliding_window": 8, **HEADS_OF_16},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True, **HEADS_OF_16},
    "qwen3_windowed": {
        "model_type": "qwen3",
        **HEADS_OF_16,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3_moe": {**HEADS_OF_16, **EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_next": {**HEADS_OF_16, **LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": {**HEADS_OF_16, **LINEAR_ATTENTION},
    "qwen3_5_moe_text": {**HEADS_OF_16, **LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 24},
    "gpt_oss": {
        **HEADS_OF_16,
        **_rope("yarn", factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=64),
        "num_hidden_layers": 4,
        "layer_types": WINDOWED,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 24},
    "gemma4_text": {**GEMMA4, **PER_LAYER_INPUT},
    "gemma4_text_k_eq_v": {"model_type": "gemma4_text", **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_text_shared": {"model_type": "gemma4_text", **GEMMA4, **PER_LAYER_INPUT, "num_kv_shared_layers": 2},
    "gemma4_text_moe": {
        "model_type": "gemma4_text",
        **GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    # transformers shares keys and values without inputs of each layer in this class alone.
    "gemma4_unified_text": {
        **GEMMA,
        "global_head_dim": 32,
        "final_logit_softcapping": 5.0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 2,
    },
    "glm4": {"head_dim": 16, "rope_parameters": HALF},
    "glm4_moe": {**ROUTED, "attention_bias": True, "rope_parameters": HALF, "head_dim": 16, "use_qk_norm": True},
    "deepseek_v3": {
        **ROUTED,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
    },
    "phi": {"rope_parameters": HALF, "resid_pdrop": 0.0},
    "phi3": {
        "original_max_position_embeddings": 64,
        **_rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.5, 2.0, 3.0, 5.0]),
    },
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "layer_types": WINDOWED, "sliding_window": 8},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"num_hidden_layers": 4, "layer_types": WINDOWED, "sliding_window": 8, "logit_scale": 0.25, "head_dim": 16},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "gpt2": {"n_positions": 512},
}


def _vision(model_type: str, depth: str = "num_hidden_layers", heads: str = "num_attention_heads") -> dict:
    return {"model_type": model_type, "hidden_size": 16, "intermediate_size": 24, depth: 1, heads: 2, "patch_size": 4}


# Of text and images: a configuration of each part. The parts' other fields are those of the miniature of the language part.
MULTIMODAL: dict[str, dict] = {
    "gemma3": {
        "text_config": "gemma3_text",
        "vision_config": {**_vision("siglip_vision_model"), "image_size": 16},
        "mm_tokens_per_image": 4,
        "image_token_index": 28,
        "boi_token_index": 27,
        "eoi_token_index": 26,
    },
    "gemma4": {"text_config": "gemma4_text", "vision_config": None, "audio_config": None},
    "gemma4_unified": {"text_config": "gemma4_unified_text", "vision_config": None, "audio_config": None},
    "qwen3_5": {
        "text_config": "qwen3_5_text",
        "vision_config": {**_vision("qwen3_5_vision", "depth", "num_heads"), "out_hidden_size": SIZES["hidden_size"]},
        "image_token_id": 28,
        "video_token_id": 27,
        "vision_start_token_id": 26,
        "vision_end_token_id": 25,
    },
    "qwen3_5_moe": {
        "text_config": "qwen3_5_moe_text",
        "vision_config": {**_vision("qwen3_5_moe_vision", "depth", "num_heads"), "out_hidden_size": SIZES["hidden_size"]},
    },
    "mistral3": {
        "text_config": "mistral",
        "vision_config": {**_vision("pixtral"), "image_size": 16},
        "image_token_index": 28,
        "tie_word_embeddings": False,
    },
}


def configuration(name: str, **changed) -> PretrainedConfig:
    """`changed`: other fields, of a miniature of MINIATURES."""
    if name in MULTIMODAL:
        fields = dict(MULTIMODAL[name])
        text = configuration(fields.pop("text_config"))
        return AutoConfig.for_model(name, text_config=text.to_dict() | {"pad_token_id": 0}, **fields)
    fields = dict(MINIATURES[name])
    return AutoConfig.for_model(fields.pop("model_type", name), **(SIZES | fields | changed))


def miniature_model(name: str, seed: int = 0, **changed) -> PreTrainedModel:
    """In float32, with no weight at a special value: norms near their start, biases and sinks not zero."""
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    model = kind.from_config(configuration(name, **changed), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("sinks"):
            tensor.copy_(noise)
        elif tensor.dim() == 1 or "bias" in key or "norm" in key:
            tensor.add_(0.2 * noise)
    return model


def add_tokenizer(path: Path) -> Path:
    """One word for each token; `path` itself."""
    words = {f"w{index}": index for index in range(SIZES["vocab_size"])}
    rules = Tokenizer(WordLevel(words, unk_token="w0"))
    rules.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="w0", eos_token="w1").save_pretrained(path)
    return path


def miniature(name: str, folder: Path | str, seed: int = 0, **changed) -> Path:
    """Saves a miniature of MINIATURES or MULTIMODAL under `folder`; where it lies."""
    path = Path(folder) / name
    miniature_model(name, seed, **changed).save_pretrained(path)
    return path
