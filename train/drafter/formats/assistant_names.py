"""What `Gemma4AssistantForCausalLM` calls the weights of an assistant. vLLM, SGLang and llama.cpp read the same names.

The LM head is `lm_head.weight` there, tied to `model.embed_tokens.weight`, under which files hold it. The weight of the target's
final norm is not among them: servers get the state behind it.
"""

from train.drafter.config import DrafterConfig

HEAD = "model.embed_tokens.weight"
ENDS = {
    "pre_projection.weight": "pre_projection.weight",
    "post_projection.weight": "post_projection.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": HEAD,
}
LAYER = {
    "input_norm.weight": "input_layernorm.weight",
    "branches.kv.q.weight": "self_attn.q_proj.weight",
    "branches.kv.q_norm.weight": "self_attn.q_norm.weight",
    "branches.kv.o.weight": "self_attn.o_proj.weight",
    "attended_norm.weight": "post_attention_layernorm.weight",
    "post_norm.weight": "pre_feedforward_layernorm.weight",
    "gate.weight": "mlp.gate_proj.weight",
    "up.weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
    "fed_norm.weight": "post_feedforward_layernorm.weight",
    "scalar": "layer_scalar",
}
CLUSTERS = {
    "head.clusters.centroids.weight": "masked_embedding.centroids.weight",
    "head.clusters.ordering": "masked_embedding.token_ordering",
}


def assistant_names(config: DrafterConfig) -> dict[str, str]:
    """Our name of each weight -> the format's."""
    layers = {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for i in range(config.depth) for ours, theirs in LAYER.items()}
    return ENDS | layers | (CLUSTERS if config.centroids else {})
