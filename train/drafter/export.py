"""Drafters as checkpoints that servers load, `mode=export format=eagle3|dflash`, or as we release them, `format=drafter`: our own
format in bf16, for any drafter.

The servers' formats hold a drafter over hidden states alone; embedding and LM head are the target's unless the drafter has its
own.

    eagle3   ttt: one layer under `midlayer`, queries, keys and values over [token; feature], no norms on queries and keys
    dflash   block-wise, same-slot: layers as Qwen3's, whose keys and values also project fc's normed output

The features' layers are written in ascending order, as servers concatenate them. Each key of a configuration counts its own way:

    eagle_aux_hidden_state_layer_ids                 vLLM: a layer's *input*, one more than the layer whose output is read
    eagle_config.eagle_aux_hidden_state_layer_ids    SGLang: the layer's output
    dflash_config.target_layer_ids                   both: the layer's output

What vLLM and SGLang do was read in their sources (vLLM's main and SGLang's, autumn 2026) and not run. The tests load exports with
speculators 0.9.0 and compare logits.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.cache.manifest import publish, write_text
from data_prep.errors import UserError
from data_prep.target import Architecture, Target
from train.drafter.config import DrafterConfig
from train.drafter.model import Drafter

EAGLE3 = {
    "fc.weight": "fc.weight",
    "norm.weight": "norm.weight",
    "head.weight": "lm_head.weight",
    "head.d2t": "d2t",
    "layers.0.token_norm.weight": "midlayer.input_layernorm.weight",
    "layers.0.input_norm.weight": "midlayer.hidden_norm.weight",
    "layers.0.post_norm.weight": "midlayer.post_attention_layernorm.weight",
    **{f"layers.0.branches.hidden.{n}.weight": f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"layers.0.{n}.weight": f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}
DFLASH_LAYER = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    **{f"branches.hidden.{n}": f"self_attn.{n}_proj" for n in "qkvo"},
    **{f"branches.hidden.{n}": f"self_attn.{n}" for n in ("q_norm", "k_norm")},
    **{n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}
MASK_FILE = "mask_embedding.pt"  # the name that vLLM looks for


def check_export(config: DrafterConfig, format: str) -> None:
    """Raises UserError when no server could load the drafter as a checkpoint of this format."""
    if format == "drafter":
        return
    a, suited = config.architecture, {"ttt": "eagle3", "blockwise": "dflash"}[config.objective]
    kinds = {"eagle3": "ttt drafters", "dflash": "block-wise drafters"}
    reasons = {
        "it is a language model of its own (drafter.lm), and the format holds a head over the target's states": bool(config.lm),
        "reuse=none reads no hidden states, of which the format is made": config.reuse == "none",
        f"reuse={config.reuse} reads state that no server hands out": config.uses_kv,
        f"it is for {kinds[format]}, and this is {config.objective}: format={suited}": suited != format,
        "its projections have biases": a.qkv_bias,
        f"drafter.rope_factor={config.rope_factor:g} on top of the target's own scaling has no name in a configuration": (
            config.rope_factor != 1 and not _plain(a)
        ),
    }
    if format == "eagle3":
        reasons |= {
            f"it has {len(config.target_layers)} layers, EAGLE-3 has one": len(config.target_layers) != 1,
            "its queries and keys are normed (train with drafter.qk_norm=false)": config.normed,
            "EAGLE-3.1's norms (drafter.fc_norm, drafter.norm_output) have no place in it": config.fc_norm or config.norm_output,
        }
    else:
        reasons |= {
            f"no DFlash server runs a sequential head (drafter.sequential={config.sequential})": bool(config.sequential),
            "it is an EAGLE-3 drafter that fills a block (reuse.pairs), not one of DFlash's": config.pairs,
            "DFlash drafts from the slot behind the anchor's on (train with objective.shifted=false)": config.shifted,
            "DFlash norms queries and keys (train with drafter.qk_norm=true)": not config.normed,
            "servers embed MASK as a token, and target.mask_token_id was null": config.mask_token_id is None,
        }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(f"the drafter cannot be exported as format={format}: {reason}")


@torch.no_grad()
def save_export(drafter: Drafter, target: Target, folder: Path, format: str) -> list[str]:
    """`config.json` and `model.safetensors` as vLLM reads them (and a learned MASK beside them).

    Returns:
        what a server will do otherwise, a sentence each. Drafts then differ; what is verified, and so the output, does not.

    Raises:
        UserError: no server could load it.
    """
    check_export(drafter.config, format)
    if format == "drafter":
        drafter.to(torch.bfloat16).save_pretrained(folder)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    tensors, config = (_eagle3 if format == "eagle3" else _dflash)(drafter, target)
    notes = _limits(drafter, target, format)
    (folder / "config.json").unlink(missing_ok=True)  # a folder without it is no checkpoint
    (folder / MASK_FILE).unlink(missing_ok=True)
    if format == "dflash" and not _mask_is_a_token(drafter, target):
        mask = {"mask_token_id": drafter.config.mask_token_id, "embedding": drafter.mask.weight[0].detach().cpu().clone()}
        torch.save(mask, folder / f"{MASK_FILE}.tmp")
        publish(folder / f"{MASK_FILE}.tmp", folder / MASK_FILE)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    publish(folder / "model.safetensors.tmp", folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps(config, indent=1))
    return notes


def _eagle3(drafter: Drafter, target: Target) -> tuple[dict[str, Tensor], dict]:
    weights, outputs = _weights(drafter)
    weights |= {f"head.{name}": tensor for name, tensor in _vocabulary(drafter, target).items()}
    tensors = {name: weights[mine] for mine, name in EAGLE3.items()} | {"t2d": weights["head.t2d"]}
    return tensors, {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **_sizes(drafter, target),
        "draft_vocab_size": len(weights["head.d2t"]),
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in outputs],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs},
    }


def _dflash(drafter: Drafter, target: Target) -> tuple[dict[str, Tensor], dict]:
    config = drafter.config
    weights, outputs = _weights(drafter)
    tensors = {f"{name}.weight": weights[f"{name}.weight"] for name in ("fc", "hidden_norm", "norm")}
    for i in range(config.depth):
        tensors |= {f"layers.{i}.{name}.weight": weights[f"layers.{i}.{mine}.weight"] for mine, name in DFLASH_LAYER.items()}
    vocabulary = _vocabulary(drafter, target)
    if config.own_head or config.draft_vocab:  # otherwise the target's own, which need not be stored
        tensors["lm_head.weight"] = vocabulary["weight"]
    if config.draft_vocab:
        tensors |= {name: vocabulary[name] for name in ("d2t", "t2d")}
    # Servers know causal blocks as sliding attention. This window hides nothing.
    attention = "sliding_attention" if config.causal else "full_attention"
    window = {"use_sliding_window": True, "sliding_window": int(config.rope_factor * config.architecture.max_positions)}
    return tensors, {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": config.depth,
        **_sizes(drafter, target),
        "draft_vocab_size": len(vocabulary["d2t"]),
        "block_size": config.slots,
        "num_target_layers": config.architecture.num_layers,
        "layer_types": [attention] * config.depth,
        **(window if config.causal else {}),
        "dflash_config": {"mask_token_id": config.mask_token_id, "target_layer_ids": outputs, "causal": config.causal},
    }


def _weights(drafter: Drafter) -> tuple[dict[str, Tensor], list[int]]:
    """The drafter's weights under its own names, fc's columns by ascending layer; these layers."""
    weights, layers = {name: tensor.cpu() for name, tensor in drafter.state_dict().items()}, drafter.config.hidden_layers
    order = sorted(range(len(layers)), key=lambda i: layers[i])
    weights["fc.weight"] = torch.cat([weights["fc.weight"].chunk(len(layers), dim=1)[i] for i in order], dim=1)
    return weights, sorted(layers)


def _vocabulary(drafter: Drafter, target: Target) -> dict[str, Tensor]:
    """The LM head (`weight`, [D, E]), `d2t` [D]: draft token i is target token i + d2t[i], and `t2d` [V]: what can be said."""
    vocabulary, kept_D = drafter.config.architecture.vocab_size, drafter.head.kept_D
    kept_D = torch.arange(vocabulary) if kept_D is None else kept_D.cpu()
    return {
        "weight": drafter.head.heads(target.frozen_head).draft_DE.detach().cpu(),
        "d2t": kept_D - torch.arange(len(kept_D)),
        "t2d": torch.zeros(vocabulary, dtype=torch.bool).index_fill_(0, kept_D, True),
    }


def _sizes(drafter: Drafter, target: Target) -> dict:
    config, a, rope = drafter.config, drafter.config.architecture, target.rope_config
    if config.rope_factor != 1:
        linear = {"rope_type": "linear", "factor": config.rope_factor}
        rope |= {"rope_scaling": linear, "rope_parameters": rope["rope_parameters"] | linear}
    return {
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
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
    }


def _limits(drafter: Drafter, target: Target, format: str) -> list[str]:
    config = drafter.config
    limits = {
        f"SGLang hands out no hidden state of the target's last layer, {config.architecture.num_layers - 1}, which is read": (
            max(config.hidden_layers) == config.architecture.num_layers - 1
        )
    }
    if format == "dflash":
        limits |= {
            f"the learned MASK is in {MASK_FILE}: vLLM reads it, SGLang embeds token {config.mask_token_id} in its place": (
                not _mask_is_a_token(drafter, target)
            ),
            "SGLang drafts with the target's LM head instead of the drafter's own": bool(config.own_head or config.draft_vocab),
        }
    return [limit for limit, holds in limits.items() if holds]


def _mask_is_a_token(drafter: Drafter, target: Target) -> bool:
    """Whether MASK is what servers make of it: the target's embedding of `mask_token_id`."""
    return torch.equal(drafter.mask.weight[0], target.frozen_head.embedding_VE[drafter.config.mask_token_id])


def _plain(a: Architecture) -> bool:
    """Whether the target's RoPE is unscaled: a geometric series from 1 on."""
    inv_freq = torch.tensor(a.inv_freq, dtype=torch.float64)
    ratio = inv_freq[-1] ** (1 / max(1, len(inv_freq) - 1))
    return a.rope_scale == 1 and torch.allclose(inv_freq, ratio ** torch.arange(len(inv_freq)), rtol=1e-4)
