"""What a model's configuration says of it, before weights are loaded."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from common.errors import UserError, first_line
from data_prep.recipe import TargetRecipe
from data_prep.target.families import check_decoder
from data_prep.target.from_gguf import plain
from data_prep.target.transformers_private import gemma4_rotary, layer_config, rotary_of, window_of

LIKE = ("llama", "mistral", "qwen2", "qwen3")  # families whose layers are built as a drafter's
UNLIMITED = 2**30  # positions, of a model that names no limit
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # kinds whose frequencies do not depend on the length


@dataclass(frozen=True)
class Sizes:
    """What a target's configuration alone says of it: enough to choose layers and to check lengths before weights are loaded."""

    num_layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int


@dataclass(frozen=True)
class Architecture(Sizes):
    """The sizes and the rotary embedding that a drafter shares with its target; plain numbers, ready for JSON."""

    intermediate_size: int
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    inv_freq: list[float]  # RoPE angles per position of the first 2 R dimensions of a head, [R]; the others are not turned
    rope_scale: float  # what cos and sin are multiplied by (YaRN)


@dataclass(frozen=True)
class KVLayer:
    """What the stored keys and values of one of the target's layers are like."""

    kv_heads: int
    head_dim: int
    inv_freq: list[float]  # RoPE angles per position of the first 2 R dimensions of a head, [R]; the others are not turned
    rope_scale: float
    window: int | None = None  # the target's queries read this many positions, their own included; None: all


@dataclass(frozen=True)
class TargetSizes(Sizes):
    """`last_kv`: of a Gemma 4, by kind of layer, the last one that has keys and values of its own, and what these are like. Of
    other families it is empty."""

    last_kv: dict[str, tuple[int, KVLayer]]


class CachedLayer(NamedTuple):
    """What our caches keep of one of the target's layers: the K/V heads that this process has, and the size of a head. `owner`:
    the layer whose keys and values it reads, itself unless layers share them (Gemma 4)."""

    heads: int
    head_dim: int
    owner: int


def target_config(recipe: TargetRecipe) -> PretrainedConfig:
    """Of the target, with no weights loaded. Raises UserError as `read_config` does."""
    return read_config(recipe.path, plain(recipe.location, recipe.revision), recipe.revision, recipe.trust_remote_code)


def read_config(path: str, folder: str, revision: str | None, trust_remote_code: bool) -> PretrainedConfig:
    """Of the model in `folder`, which the user knows as `path`; of one that reads pictures too, of the whole. Raises UserError
    when there is no configuration of a causal LM, or one whose code must not run."""
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except failures(trust_remote_code, OSError, ValueError) as error:
        raise no_causal_lm(path, error) from error
    check_decoder(path, config)
    return config


def target_sizes(recipe: TargetRecipe) -> TargetSizes:
    """Raises UserError when there is no configuration of a causal LM at the target's path."""
    config = target_config(recipe)
    try:
        text = config.get_text_config(decoder=True)
        last = last_layers_with_kv(config) if text.model_type.startswith("gemma4") else {}
        return TargetSizes(
            **asdict(sizes_of(text)), last_kv={kind: (layer, gemma4_kv(text, layer)) for kind, layer in last.items()}
        )
    except AttributeError as error:
        raise no_causal_lm(recipe.path, error) from error


def no_causal_lm(path: str, error: Exception) -> UserError:
    if needs_trust(error):
        return untrusted(path)
    return UserError(f"target.path={path}: no causal LM can be loaded there ({first_line(error)})")


def failures(trust_remote_code: bool, *known: type[Exception]) -> tuple[type[Exception], ...]:
    """What loading may raise; where it runs the code of others: anything."""
    return (Exception,) if trust_remote_code else known


def needs_trust(error: Exception) -> bool:
    """Whether transformers refuses to run code that it found beside a model."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def untrusted(path: str) -> UserError:
    return UserError(
        f"target.path={path} comes with its own Python code, without which transformers cannot load it. That code may do all "
        "that you may: read it, then say target.trust_remote_code=true"
    )


def kind_of(config: PretrainedConfig) -> type:
    """Which class loads a model: of one that reads pictures too and whose language part has no class of its own, the whole."""
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def sizes_of(config: PretrainedConfig) -> Sizes:
    """`config`: of a model's language part."""
    heads = config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or []
    # Where layers differ (Gemma 4), sizes are those of the layers that read all positions.
    one = layer_config(config, kinds.index("full_attention")) if "full_attention" in kinds else config
    return Sizes(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=getattr(one, "num_key_value_heads", None) or heads,
        head_dim=getattr(one, "head_dim", None) or config.hidden_size // heads,
        max_positions=max_positions(config),
        vocab_size=config.vocab_size,
    )


def max_positions(config: PretrainedConfig) -> int:
    """Longest text of a model, as far as its rotary embedding does not depend on the text's length: a drafter has one embedding,
    and a cache is filled by texts of all lengths."""
    longest = getattr(config, "max_position_embeddings", None) or UNLIMITED
    rope = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each kind of layer.
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") == "longrope":
            longest = min(longest, parameters.get("original_max_position_embeddings") or longest)
    return longest


def other_kv_sizes(config: PretrainedConfig, sizes: Sizes, layers: Iterable[int]) -> dict[str, dict[str, int]]:
    """Heads of keys and values, and their size, of those of `layers` that differ from `sizes`."""
    config = config.get_text_config(decoder=True)
    found = {}
    for layer in sorted(layers):
        one = layer_config(config, layer)
        own = {name: getattr(one, key, None) for name, key in (("kv_heads", "num_key_value_heads"), ("head_dim", "head_dim"))}
        own = {name: size or getattr(sizes, name) for name, size in own.items()}
        if own != {"kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}:
            found[str(layer)] = own
    return found


def unlike(config: PretrainedConfig) -> str | None:
    """Why draft layers cannot begin as layers of this model (`drafter.start=target`); None: they can."""
    config = config.get_text_config(decoder=True)
    if config.model_type not in LIKE:
        return f"layers of a '{config.model_type}' are built otherwise"
    if config.hidden_act != "silu":
        return f"its MLPs have {config.hidden_act} for SiLU"
    if getattr(config, "mlp_bias", False) or getattr(config, "attention_bias", False):
        return "its projections have biases"
    return None


def kv_owners(config: PretrainedConfig) -> list[int]:
    """Whose keys and values each layer reads: its own. Of a Gemma 4, the last layers read those of the last earlier layer of
    their kind that has some."""
    kinds = _layer_kinds(config)
    own = len(kinds) - (getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None) or 0)
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    return [layer if layer < own else last[kind] for layer, kind in enumerate(kinds)]


def layers_with_kv(config: PretrainedConfig) -> list[int]:
    """Layers that have keys and values of their own, as the configuration says it."""
    kinds = _layer_kinds(config)
    own = (layer for layer, owner in enumerate(kv_owners(config)) if owner == layer)
    return [layer for layer in own if kinds[layer] in ("full_attention", "sliding_attention")]


def _layer_kinds(config: PretrainedConfig) -> list[str]:
    config = config.get_text_config(decoder=True)
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def last_layers_with_kv(config: PretrainedConfig) -> dict[str, int]:
    """Kind of layer (sliding_attention, full_attention) -> the last one of it that has keys and values of its own. These are what
    assistants of Gemma 4 read."""
    kinds = _layer_kinds(config)
    return {kinds[layer]: layer for layer in layers_with_kv(config)}


def gemma4_kv(config: PretrainedConfig, layer: int) -> KVLayer:
    """What keys and values are like that a layer of a Gemma 4, or of its assistant, reads. `config`: of a language part."""
    one = layer_config(config, layer)
    inv_freq, scale = gemma4_rotary(config, config.layer_types[layer])
    return KVLayer(one.num_key_value_heads, one.head_dim, inv_freq, scale, window_of(config, layer))


def shortest_window(config: PretrainedConfig) -> int | None:
    """How many positions a query of a layer with a window reads, where there are such layers."""
    config = config.get_text_config(decoder=True)
    windows = (window_of(config, layer) for layer in range(config.num_hidden_layers))
    return min((window for window in windows if window is not None), default=None)


class Rotary(NamedTuple):
    """A rotary embedding: angles per position of positions that are divided by `factor` first, and what cos and sin are
    multiplied by."""

    inv_freq: list[float]
    scale: float
    factor: float


def read_layers(fields: dict, where: str) -> tuple[PretrainedConfig, Rotary]:
    """What a configuration of Llama's or Qwen3's layers says, with transformers' own defaults; their rotary embedding. Raises
    UserError, which names `where`, for layers of another kind."""
    kind = fields.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise UserError(f"{where} has layers of model_type={kind}; those of llama and qwen3 are read")
    try:
        config = AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if name != "model_type"})
        if not config.head_dim:
            config.head_dim = config.hidden_size // config.num_attention_heads
        factor = 1.0
        rope = config.rope_parameters
        turned = int(config.head_dim * (fields.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1))
        if turned % 2 or not 0 < turned <= config.head_dim:
            raise ValueError(f"it rotates {turned} of {config.head_dim} dimensions of a head")
        if rope["rope_type"] not in STATIC_ROPE:
            raise UserError(f"{where}: rope type '{rope['rope_type']}' changes with the length; read: {', '.join(STATIC_ROPE)}")
        if rope["rope_type"] == "linear":  # as we say it, so that our own exports come back as they were
            factor = float(rope["factor"])
            config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        rotary = deepcopy(config)
        if config.rope_parameters["rope_type"] == "default":
            # Of the kinds that are read this one alone takes the whole head, whatever partial_rotary_factor says.
            rotary.head_dim = turned
        inv_freq, scale = rotary_of(rotary)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{where}: its layers' configuration cannot be read ({first_line(error)})") from error
    return config, Rotary(inv_freq, scale, factor)
