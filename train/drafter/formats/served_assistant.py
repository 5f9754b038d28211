"""`format=gemma4_assistant`: an assistant as transformers' `Gemma4AssistantForCausalLM`, which vLLM and SGLang load too."""

import json
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from data_prep.target.architecture import last_layers_with_kv
from data_prep.target.described import Described
from train.drafter.assistant import Assistant
from train.drafter.config import DrafterConfig
from train.drafter.formats.assistant_names import assistant_names
from train.drafter.formats.served import begun, finished

STEPS_FILE = "generation_config.json"  # where transformers' assisted generation looks for how many tokens to draft


def unfit_for_assistants(config: DrafterConfig) -> dict[str, bool]:
    """{why servers would run another function: whether that holds}."""
    return {
        "servers hold all rows at the last processed position (train with objective.positions=constant)": (
            not config.constant_positions
        ),
        "the format's last layer reads a layer without a window, and this drafter's does not": (
            config.kv_shape(config.target_layers[-1]).window is not None
        ),
    }


def save_assistant(drafter: Assistant, target: Described, folder: Path) -> list[str]:
    """`config.json`, `model.safetensors`, and how many tokens to draft.

    Returns:
        what a server, or transformers, will do otherwise, a sentence each.

    Raises:
        UserError: it reads other layers than servers would give it.
    """
    config = drafter.config
    _check_layers(config, target)
    fields = assistant_fields(config, target, str(drafter.dtype).removeprefix("torch."))
    ours = drafter.state_dict()
    tensors = {theirs: ours[name] for name, theirs in assistant_names(config).items()}

    begun(folder)
    write_text(folder / STEPS_FILE, json.dumps({"num_assistant_tokens": config.draft_length}, indent=1))
    finished(folder, tensors, fields)
    notes = {
        "transformers 5.23.0 cannot build a Gemma 4 assistant (its kv_sharing_modes refuses layers that all read the target's "
        "K/V); 5.19, which vLLM 0.32 has, can": True,
        "vLLM 0.32 runs a centroid head (use_ordered_embeddings) on GPUs only": bool(config.centroids),
    }
    return [note for note, holds in notes.items() if holds]


def _check_layers(config: DrafterConfig, target: Described) -> None:
    kinds = target.config.layer_types
    last = last_layers_with_kv(target.model.config)
    for layer in config.target_layers:
        if layer != last[kinds[layer]]:
            raise UserError(
                f"format=gemma4_assistant reads the target's last layer of a kind that has K/V of its own, of {kinds[layer]} "
                f"layer {last[kinds[layer]]}; this drafter reads layer {layer}"
            )


def assistant_fields(config: DrafterConfig, target: Described, dtype: str) -> dict:
    """The configuration. What layers share with the target's (heads, window, rotary embedding) is said in the target's words."""
    a = config.architecture
    theirs = target.config
    family = theirs.model_type.removesuffix("_text")
    kinds = [theirs.layer_types[layer] for layer in config.target_layers]
    shapes = dict(zip(kinds, map(config.kv_shape, config.target_layers)))
    full = shapes["full_attention"]
    sliding = shapes.get("sliding_attention", full)
    text = {
        "model_type": theirs.model_type,
        "num_hidden_layers": config.depth,
        "num_kv_shared_layers": config.depth,
        "layer_types": kinds,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_attention_heads": a.heads,
        "num_key_value_heads": sliding.kv_heads,
        "head_dim": sliding.head_dim,
        "num_global_key_value_heads": full.kv_heads,
        "global_head_dim": full.head_dim,
        # Without it transformers passes over num_global_key_value_heads. It says nothing else of layers without K and V.
        "attention_k_eq_v": full.kv_heads != sliding.kv_heads,
        "sliding_window": theirs.sliding_window,
        "rope_parameters": theirs.rope_parameters,
        "rms_norm_eps": a.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "max_position_embeddings": theirs.max_position_embeddings,
        "vocab_size": a.vocab_size,
        "tie_word_embeddings": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        # vLLM caps an assistant's logits by it, transformers does not, and training has not.
        "final_logit_softcapping": None,
        **{name: getattr(theirs, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        "dtype": dtype,
    }
    clusters = {"use_ordered_embeddings": bool(config.centroids)}
    if config.centroids:
        clusters |= {"num_centroids": config.centroids, "centroid_intermediate_top_k": config.centroid_top_k}
    return {
        "architectures": [{"gemma4": "Gemma4", "gemma4_unified": "Gemma4Unified"}[family] + "AssistantForCausalLM"],
        "model_type": f"{family}_assistant",
        "backbone_hidden_size": config.state_size,
        "text_config": text,
        "tie_word_embeddings": True,
        "dtype": dtype,
        **clusters,
    }
