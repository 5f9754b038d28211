"""Everything of `transformers` that this project uses and that `transformers` does not promise to keep.

Its public interface loads a model and runs it. States, weights by layer and another attention need names of its modules and of a
setting. They stand here and nowhere else. After an upgrade `missing` says which of them went, and `PRIVATE` what breaks then.

Shapes: B batch, T positions, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data_prep.decoding.attention import Reading

# Paths from a causal LM of one of our families.
PRIVATE = {
    "config._attn_implementation": "decoding over our own caches: the attention is exchanged for a forward (`attention_given`)",
    "model": "every forward: the stack under the LM head, whose last_hidden_state is after the final norm",
    "model.norm": "exports and draft heads, which begin with the target's final norm",
    "model.layers": "hidden states, compiling layer by layer, draft layers that begin as target layers",
    "model.rotary_emb.inv_freq": "positions: drafters turn the target's keys as the target does",
    "model.rotary_emb.attention_scaling": "YaRN: what cos and sin are multiplied by",
    "model.rotary_emb.rope_type": "the refusal of RoPE that changes with the length",
    "model.layers.0.self_attn.layer_idx": "decoding over our own caches: which layer's keys are written",
    "model.layers.0.self_attn.head_dim": "the shape of captured keys, values and queries",
    "model.layers.0.self_attn.q_proj": "captured queries (where no norm follows), draft layers",
    "model.layers.0.self_attn.k_proj": "captured keys (where no norm follows), draft layers",
    "model.layers.0.self_attn.v_proj": "captured values, draft layers",
    "model.layers.0.self_attn.o_proj": "draft layers; the refusal of an output bias",
    "model.layers.0.input_layernorm": "draft layers, and the norm that is folded into their Q, K and V",
    "model.layers.0.post_attention_layernorm": "draft layers",
    "model.layers.0.mlp.gate_proj": "draft layers",
    "model.layers.0.mlp.up_proj": "draft layers",
    "model.layers.0.mlp.down_proj": "draft layers",
}
# Where the family has norms of queries and keys (Qwen3), these are the source of captured keys and queries.
PRIVATE_NORMS = {
    "model.layers.0.self_attn.q_norm": "captured queries: those after the norm are what attention reads",
    "model.layers.0.self_attn.k_norm": "captured keys: those after the norm are what the KV cache holds, but for RoPE",
}

GIVEN = "understudy_given"  # under this name transformers knows the attention of `attention_given`
_given: ContextVar[Callable] = ContextVar("given")


def missing(model: PreTrainedModel) -> list[str]:
    """The names above that `model` does not have."""
    names = list(PRIVATE) + (list(PRIVATE_NORMS) if model.config.model_type == "qwen3" else [])
    return [name for name in names if not _exists(model, name)]


def _exists(place: object, name: str) -> bool:
    for part in name.split("."):
        try:
            place = place[int(part)] if part.isdecimal() else getattr(place, part)
        except (AttributeError, IndexError):
            return False
    return True


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its LM head."""
    return model.model


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers


def final_norm(model: PreTrainedModel) -> nn.Module:
    return model.model.norm


def head_dim(model: PreTrainedModel) -> int:
    """Configurations need not say it; the modules do."""
    return model.model.layers[0].self_attn.head_dim


def rotary(model: PreTrainedModel) -> tuple[list[float], float]:
    """(RoPE angles per position [D/2], what cos and sin are multiplied by)."""
    return _angles(model.model.rotary_emb)


def rotary_of(config: PretrainedConfig) -> tuple[list[float], float]:
    """The same of a configuration of Llama's kind, without a model."""
    return _angles(LlamaRotaryEmbedding(config))


def _angles(embedding: nn.Module) -> tuple[list[float], float]:
    return embedding.inv_freq.double().tolist(), float(embedding.attention_scaling)


def rope_type(model: PreTrainedModel) -> str:
    return getattr(model.model.rotary_emb, "rope_type", "default")


def weighted_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of one layer that have weights, under the names of `train/drafter/layers.py`."""
    attention = layer.self_attn
    modules = {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "input_norm": layer.input_layernorm,
        "post_norm": layer.post_attention_layernorm,
        "gate": layer.mlp.gate_proj,
        "up": layer.mlp.up_proj,
        "down": layer.mlp.down_proj,
    }
    if hasattr(attention, "k_norm"):
        modules |= {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
    return modules


def state_module(layer: nn.Module, kind: str) -> nn.Module:
    """The module whose output a state is: `kind` is hidden, key, value or query.

    Keys and queries are taken after the projection (and its norm, where there is one), and so before RoPE: to un-rotate bf16 keys
    costs 3e-3 of relative error. A hidden state is the output of the layer itself, because the last of transformers' own
    `hidden_states` is already normed.
    """
    modules = weighted_modules(layer)
    return {
        "hidden": layer,
        "key": modules.get("k_norm", modules["k"]),
        "value": modules["v"],
        "query": modules.get("q_norm", modules["q"]),
    }[kind]


@torch.compiler.disable  # else dynamo traces the call into a compiled layer, and each new function would be compiled anew
def _given_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options):
    """transformers' interface of an attention: [B, H, T, D] in, [B, T, H, D] out. What differs between families comes from their
    own modules: `scaling`, `sliding_window`, `s_aux` (gpt-oss's sinks). Other options say nothing that decoding needs."""
    q_BTHD, k_BTGD, v_BTGD = (t.transpose(1, 2) for t in (query, key, value))
    reading = Reading(options.get("scaling"), options.get("sliding_window"), options.get("s_aux"))
    return _given.get()(module.layer_idx, q_BTHD, k_BTGD, v_BTGD, reading), None


AttentionInterface.register(GIVEN, _given_attention)


@contextmanager
def attention_given(model: PreTrainedModel, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Forwards inside call `attend`(layer, q [B, T, H, D], k, v [B, T, G, D], all rotated, `Reading`) -> [B, T, H, D].

    The setting is written as it stands: `set_attn_implementation`, the public way, checks every submodule each time, and decoding
    would pay for that in every round. The function itself is in a context variable, so that two threads do not share one.
    """
    config = model.config
    usual = config._attn_implementation
    given = _given.set(attend)
    config._attn_implementation = GIVEN
    try:
        yield
    finally:
        config._attn_implementation = usual
        _given.reset(given)


def tensor_parallel() -> dict:
    """What `from_pretrained` takes to spread every layer over all processes. Versions differ in the way to say it."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # transformers 5.17
        return {"tp_plan": "auto"}
