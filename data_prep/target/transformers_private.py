"""Everything of `transformers` that this project uses and that `transformers` does not promise to keep.

Its public interface loads a model and runs it. States, weights by layer and another attention need names of its modules and of a
setting. They stand here and nowhere else. After an upgrade `missing` says which of them went, and `PRIVATE` what breaks then.

Shapes: B batch, T positions, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from common.errors import UserError
from data_prep.decoding.attention import Reading

# Paths from a causal LM of a family whose layers are like a drafter's (llama, mistral, qwen2, qwen3).
PRIVATE = {
    "config._attn_implementation": "decoding over our own caches: the attention is exchanged for a forward (`attention_given`)",
    "config._experts_implementation": "decoding on a GPU: whether a CUDA graph can hold a mixture of experts",
    "model.norm": "exports and draft heads, which begin with the target's final norm",
    "model.rotary_emb.inv_freq": "positions: drafters turn the target's keys as the target does",
    "model.rotary_emb.original_inv_freq": "the same, where a long text has changed the frequencies (dynamic, longrope)",
    "model.rotary_emb.rope_type": "decoding on a GPU: embeddings that look at a text's length are in no CUDA graph",
    "model.rotary_emb.attention_scaling": "YaRN: what cos and sin are multiplied by",
    "model.layers.0.self_attn.layer_idx": "decoding over our own caches: which layer's keys are written",
    "model.layers.0.self_attn.head_dim": "the shape of captured keys, values and queries",
    "model.layers.0.self_attn.q_proj": "captured queries (where no norm follows), draft layers",
    "model.layers.0.self_attn.k_proj": "captured keys (where no norm follows), draft layers",
    "model.layers.0.self_attn.v_proj": "captured values, draft layers",
    "model.layers.0.self_attn.o_proj": "draft layers; a bias of it keeps a draft layer from beginning as a target layer",
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
# What a state of a layer's attention is the output of: the first of these that there is. `qkv_proj` makes all three side by side.
SOURCES = {
    "query": ("q_norm", "q_proj", "qkv_proj"),
    "key": ("k_norm", "k_proj", "qkv_proj"),
    "value": ("v_norm", "v_proj", "qkv_proj"),
}

# Families whose norms of queries and keys come after heads and tokens have changed places.
HEADS_FIRST = ("gemma3_text", "phi")
# Families without `layer_types`, all of whose layers have the window of the configuration, if it has one.
WINDOWED_WHOLE = ("mistral", "phi3", "qwen3_moe")

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


class Source(NamedTuple):
    """A state is the output of `module`, or `part` of its last dimension."""

    module: nn.Module
    part: slice = slice(None)


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Of a model that reads pictures too: what it says of its language part."""
    return model.config.get_text_config(decoder=True)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its LM head; of one that reads pictures too, its language part."""
    return model.get_decoder()


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """Found by structure: the list of as many modules as the configuration has layers. Raises ValueError where there is none."""
    count = text_config(model).num_hidden_layers
    for module in decoder(model).children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"it has no list of {count} layers")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Behind the last layer; families differ in its name. Raises UserError where there is none."""
    # Most call it `norm`. Of other names the last one: some families have another behind the embedding.
    norms = {name: module for name, module in decoder(model).named_children() if "norm" in name or name == "ln_f"}
    if not norms:
        raise UserError(f"a '{model.config.model_type}' has no norm behind its last layer, of which a server's states are made")
    return norms.get("norm", list(norms.values())[-1])


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The part of a layer that makes queries, keys and values for all to see; None: it has none (linear attention, MLA)."""
    return next((m for m in layer.children() if any(hasattr(m, name) for name in ("q_proj", "qkv_proj"))), None)


def source(model: PreTrainedModel, layer: nn.Module, kind: str) -> Source | None:
    """What `kind` of state (hidden, key, value or query) of a layer is the output of; None: the layer has no such state.

    Keys and queries are taken after the projection (and its norm, where there is one), and so before RoPE: to un-rotate bf16 keys
    costs 3e-3 of relative error. A hidden state is the output of the layer itself, because the last of transformers' own
    `hidden_states` is already normed.
    """
    if kind == "hidden":
        return Source(layer)
    attention = attention_of(layer)
    found = (getattr(attention, name, None) for name in SOURCES[kind])
    module = next((m for m in found if m is not None and not isinstance(m, nn.Identity)), None)
    if module is None or module is not getattr(attention, "qkv_proj", None):
        return module and Source(module)
    config = text_config(model)
    queries = config.num_attention_heads * attention.head_dim
    keys = config.num_key_value_heads * attention.head_dim
    parts = {"query": slice(queries), "key": slice(queries, queries + keys), "value": slice(queries + keys, queries + 2 * keys)}
    return Source(module, parts[kind])


def head_dim(model: PreTrainedModel, index: int = 0) -> int:
    """Of a layer with attention. Configurations need not say it; the modules do."""
    return attention_of(layers(model)[index]).head_dim


def head_count(model: PreTrainedModel, index: int, kind: str) -> int:
    """Heads of a layer's queries, or of its keys and values, on all processes together."""
    config = text_config(model)
    if kind == "query":
        return config.num_attention_heads
    return getattr(layer_config(config, index), "num_key_value_heads", None) or config.num_attention_heads


def layer_config(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """What a configuration says of one layer, where layers differ (Gemma 4); versions differ in whether it can be asked."""
    return config.per_layer_config[index] if hasattr(config, "per_layer_config") else config


def norms_heads_first(config: PretrainedConfig) -> bool:
    """Whether the norms of queries and keys make [B, heads, T, D] of them, and not [B, T, heads, D]."""
    return config.model_type in HEADS_FIRST


def window_of(config: PretrainedConfig, index: int) -> int | None:
    """How many positions, its own included, a query of this layer reads; None: all. `config`: of a language part."""
    kinds = getattr(config, "layer_types", None)
    # Configurations of other families may keep the key of one that they were made from, and their layers do not read it.
    sliding = kinds[index] == "sliding_attention" if kinds else config.model_type in WINDOWED_WHOLE
    return getattr(config, "sliding_window", None) if sliding else None


def rotary(model: PreTrainedModel, index: int | None = None) -> tuple[list[float], float] | None:
    """(RoPE angles per position, what cos and sin are multiplied by) of a layer; None: its keys are not turned. Without `index`:
    of the layers that read all positions, where they differ."""
    embedding = getattr(decoder(model), "rotary_emb", None)
    if embedding is None:
        return None
    kinds = getattr(text_config(model), "layer_types", None)
    kind = kinds[index] if kinds and index is not None else "full_attention"
    prefix = f"{kind}_" if hasattr(embedding, f"{kind}_inv_freq") else ""
    # A text longer than usual changes `inv_freq` (dynamic, longrope); the original stays.
    inv_freq = getattr(embedding, f"{prefix}original_inv_freq", None)
    inv_freq = getattr(embedding, f"{prefix}inv_freq", None) if inv_freq is None else inv_freq
    if inv_freq is None:
        return None
    return inv_freq.double().tolist(), float(getattr(embedding, f"{prefix}attention_scaling", 1.0))


def looks_at_length(model: PreTrainedModel) -> bool:
    """Whether the rotary embedding depends on the longest position of a forward (dynamic, longrope)."""
    kinds = getattr(getattr(decoder(model), "rotary_emb", None), "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def rotary_of(config: PretrainedConfig) -> tuple[list[float], float]:
    """The same of a configuration of Llama's kind, without a model."""
    embedding = LlamaRotaryEmbedding(config)
    return embedding.inv_freq.double().tolist(), float(embedding.attention_scaling)


def gemma4_rotary(config: PretrainedConfig, kind: str) -> tuple[list[float], float]:
    """The same of a configuration of Gemma 4, of the layers of this kind."""
    # Not at the top: it is large, and few commands need it.
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    embedding = Gemma4TextRotaryEmbedding(config)
    return getattr(embedding, f"{kind}_inv_freq").double().tolist(), float(getattr(embedding, f"{kind}_attention_scaling"))


def norm_eps(config: PretrainedConfig) -> float:
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), 1e-6)


def logit_scale(config: PretrainedConfig) -> float:
    """What the model multiplies its logits by."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def active_weights(model: PreTrainedModel) -> float:
    """Weights that a token meets, embeddings aside: of experts, which stand side by side in one tensor, those that are chosen."""
    config = text_config(model)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 1)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    count = sum(p.numel() * (share if p.dim() == 3 else 1) for p in model.parameters())
    return count - model.get_input_embeddings().weight.numel()


def experts(model: PreTrainedModel) -> Tensor | None:
    """A weight of a mixture of experts, which stand side by side in one tensor; None: there are none."""
    return next((p for p in decoder(model).parameters() if p.dim() > 2), None)


def experts_ask_host(model: PreTrainedModel) -> bool:
    """Whether a mixture of experts makes the host wait for the device, so that no CUDA graph can hold a forward.

    transformers' `grouped_mm` sorts tokens by expert and leaves the rest to PyTorch's kernel of that name. In bf16 on compute
    capability 9 or 10 that kernel reads on the device how many tokens each expert has; elsewhere it asks the host, as does the
    loop over experts ("eager"). `batched_mm` asks nobody, but copies for every token the weights of its experts: of 64 rows of
    Qwen3-30B-A3B 5 GB a layer.
    """
    weight = experts(model)
    if weight is None:
        return False
    grouped = text_config(model)._experts_implementation == "grouped_mm" and weight.dtype == torch.bfloat16
    return not (grouped and weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] in (9, 10))


def loop_over_experts(model: PreTrainedModel) -> None:
    """Experts one after the other, in any dtype: PyTorch's kernel for all of them at once has no float64."""
    if experts(model) is not None:
        model.set_experts_implementation("eager")


def embed_scale(model: PreTrainedModel) -> float:
    """What the model multiplies its tokens' embeddings by before the first layer."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    scale = getattr(text_config(model), "embedding_multiplier", 1.0) if scale is None else scale
    return float(scale)


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


def own_outputs(model: PreTrainedModel, ids_BT: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """(hidden states, the embedding before and the normed one last; logits) as the model itself hands them out."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    output = model(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
    # transformers leaves the hooks that it took them with, and they would be compiled with the layers.
    for module, hooks in before.items():
        for key in module._forward_hooks.keys() - hooks:
            del module._forward_hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return output.hidden_states, output.logits


@contextmanager
def report_in_errors() -> Iterator[None]:
    """Errors of `from_pretrained` that send to "the above report" have its entries instead: the report goes to a log that our
    commands do not show."""
    usual = modeling_utils.log_state_dict_report

    def told(*arguments, loading_info, **options) -> None:
        try:
            usual(*arguments, loading_info=loading_info, **options)
        except RuntimeError as error:
            said = [f"{name} is {list(theirs)} in the files and {list(own)} in the model"
                    for name, theirs, own in sorted(loading_info.mismatched_keys)]  # fmt: skip
            # Of a conversion: a traceback, whose last line but one says what was wrong.
            for name, trace in sorted(loading_info.conversion_errors.items()):
                lines = [line for line in trace.splitlines() if line.strip() and not line.startswith("Error:")]
                said.append(f"{name}: {lines[-1].strip()}")
            if not said:
                raise
            more = f" and {len(said) - 2} more" if len(said) > 2 else ""
            raise RuntimeError("; ".join(said[:2]) + more) from error

    modeling_utils.log_state_dict_report = told
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = usual


def quantisation_methods() -> set[str]:
    """Names of quantisations that transformers loads. It reads weights of any other as if they were not quantised."""
    return {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}


def kept_in_float32(model: PreTrainedModel) -> set[str]:
    """Parts of names of parameters that the model keeps in float32 whichever dtype is asked for."""
    return set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def tensor_parallel() -> dict:
    """What `from_pretrained` takes to spread every layer over all processes. Versions differ in the way to say it."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # transformers 5.17
        return {"tp_plan": "auto"}
