"""Which models can be a target, and what a model's configuration says of it."""

from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from common.errors import UserError, first_line
from data_prep.recipe import TargetRecipe
from data_prep.target.from_gguf import plain
from data_prep.target.transformers_private import rotary_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
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


def refuse_family(path: str, config: PretrainedConfig) -> None:
    """Raises UserError for a model whose states this project would read wrongly."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"target {path} is a '{config.model_type}'; Understudy reads the states of {', '.join(FAMILIES)}. "
            "Others differ where it would go unnoticed (norms, scales, rotary layout)"
        )


def target_sizes(recipe: TargetRecipe) -> Sizes:
    """Raises UserError when there is no configuration of a causal LM at the target's path."""
    try:
        config = AutoConfig.from_pretrained(plain(recipe.location, recipe.revision), revision=recipe.revision)
        refuse_family(recipe.path, config)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return Sizes(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=config.max_position_embeddings,
            vocab_size=config.vocab_size,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"target.path={recipe.path}: no causal LM can be loaded there ({first_line(error)})") from error


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
