"""`config.json` of a checkpoint that servers load: the one that vLLM and SGLang read, or the speculators package's."""

from pathlib import Path

from data_prep.target.described import Described
from train.drafter.config import DrafterConfig
from train.drafter.formats.names import method_of

CLASSES = {"eagle3": "Eagle3Speculator", "peagle": "PEagleSpeculator", "dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"}


def plain_config(config: DrafterConfig, target: Described, dtype: str) -> dict:
    """For vLLM (`--speculative-config`) and SGLang (`--speculative-draft-model-path`)."""
    outputs = sorted(config.hidden_layers)
    found = _layers(config, target, dtype) | {"architectures": [_architecture(config)]}
    if method_of(config) == "eagle3":
        # Without a number SGLang takes the target's LM head; a number promises a head in the checkpoint.
        own = config.draft_vocab or (config.architecture.vocab_size if config.own_head else None)
        return found | {
            **_norms(config),
            "draft_vocab_size": own,
            "eagle_aux_hidden_state_layer_ids": [i + 1 for i in outputs],
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs},
        }
    found |= {
        "draft_vocab_size": config.draft_vocab or config.architecture.vocab_size,
        "block_size": config.slots,
        "num_target_layers": config.architecture.num_layers,
        "dflash_config": {"mask_token_id": config.mask_token_id, "target_layer_ids": outputs, "causal": config.causal},
    }
    if method_of(config) == "dspark":
        found["block_size"] = config.draft_length  # here, and not in DFlash, it counts what is drafted
        found |= {"mask_token_id": config.mask_token_id, "target_layer_ids": outputs, **_markov(config)}
        found["dspark_bonus_anchor"] = not config.shifted  # vLLM's word for the other value of sample_from_anchor
    return found


def speculators_config(config: DrafterConfig, target: Described, dtype: str) -> dict:
    """For `vllm serve DRAFTER` and the speculators package."""
    method = method_of(config)
    inputs = [i + 1 for i in sorted(config.hidden_layers)]
    folder = Path(target.folder)
    verifier = {
        # The whole path, because the server may be started from another folder.
        "name_or_path": str(folder.resolve()) if folder.exists() else target.folder,
        "architectures": target.model.config.architectures or [type(target.model).__name__],
    }
    proposal = {"proposal_type": "greedy", "speculative_tokens": config.draft_length}
    found = {
        "architectures": [CLASSES[method]],
        "speculators_model_type": method,
        "speculators_config": {
            "algorithm": method,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
        "transformer_layer_config": _layers(config, target, dtype),
        "draft_vocab_size": config.draft_vocab or config.architecture.vocab_size,
        "dtype": dtype,
    }
    if config.reads_pairs:
        found |= _norms(config) | {"eagle_aux_hidden_state_layer_ids": inputs}
        if method == "peagle":
            found["mask_token_id"] = config.mask_token_id
            found["transformer_layer_config"]["fc_norm"] = config.fc_norm  # where vLLM 0.32 looks for it
        return found
    found |= {
        "block_size": config.slots,
        "aux_hidden_state_layer_ids": inputs,
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": not config.causal,
    }
    return found | (_markov(config) if method == "dspark" else {})


def _architecture(config: DrafterConfig) -> str:
    """vLLM's and SGLang's name of the model's class."""
    method = method_of(config)
    if method == "eagle3":
        return "Eagle3Qwen3ForCausalLM" if config.normed else "LlamaForCausalLMEagle3"
    return {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel"}[method]


def _norms(config: DrafterConfig) -> dict:
    """EAGLE-3's kinds of norms."""
    return {name: getattr(config, name) for name in ("norm_before_residual", "fc_norm", "norm_output")}


def _markov(config: DrafterConfig) -> dict:
    return {
        "sample_from_anchor": config.shifted,
        "markov_rank": config.sequential_size if config.sequential else 1,
        "markov_head_type": "vanilla",
        "enable_confidence_head": False,
        "confidence_head_with_markov": False,
    }


def _layers(config: DrafterConfig, target: Described, dtype: str) -> dict:
    """The draft layers as a transformer of their own."""
    a = config.architecture
    rope = target.rope_config
    if config.rope_factor != 1:
        linear = {"rope_type": "linear", "factor": config.rope_factor}
        rope |= {"rope_scaling": linear, "rope_parameters": rope["rope_parameters"] | linear}
    turned = 2 * len(a.inv_freq) / a.head_dim
    if turned != 1:
        # vLLM 0.32 reads it among rope_parameters; others, and older ones, beside them.
        rope |= {"partial_rotary_factor": turned, "rope_parameters": rope["rope_parameters"] | {"partial_rotary_factor": turned}}
    found = {
        "model_type": "qwen3" if config.normed else "llama",
        "num_hidden_layers": config.depth,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": a.norm_eps,
        "max_position_embeddings": a.max_positions,
        **rope,
        "vocab_size": a.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    if config.reads_pairs:
        found["num_aux_hidden_states"] = len(config.hidden_layers)  # vLLM's Llama class takes three unless told here
    elif config.causal:
        # Servers know causal blocks as sliding attention. This window hides nothing.
        window = int(config.rope_factor * a.max_positions)
        found |= {"use_sliding_window": True, "sliding_window": window, "layer_types": ["sliding_attention"] * config.depth}
    else:
        found["layer_types"] = ["full_attention"] * config.depth
    return found
