"""What each family of targets can do: yield hidden states, yield keys and values, be decoded by our engine.

Hidden states come from decoders of transformers with a list of layers, an embedding and a head. The other two are
declared here by `model_type`, and proven for each family by a miniature of it (tests/data_prep/test_families.py). A family that
is not named here yields hidden states alone, or is refused when it is loaded (proof.py).
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from common.errors import UserError

HYBRID = "linear attention keeps one state for all tokens, from which refused drafts cannot be taken back"
UNKNOWN = "nobody has tried it"
SERVER = "vLLM 0.32"  # read in its code: which of its classes declare `SupportsEagle3`
NO_STATES = "its class there hands out no hidden states"
NO_CLASS = "it has no class there"


@dataclass(frozen=True)
class Family:
    """What is declared of a family.

    Attributes:
        kv: why its layers yield no keys and values; None: those with attention do.
        decode: why our engine does not decode it; None: it does.
        served: why SERVER runs no drafter that reads its hidden states (EAGLE-3, DFlash, P-EAGLE, DSpark); None: it does.
    """

    kv: str | None = None
    decode: str | None = None
    served: str | None = None


FAMILIES = {
    "cohere": Family(served=NO_STATES),
    "cohere2": Family(served=NO_STATES),
    "deepseek_v3": Family(
        kv="its attention (MLA) keeps one compressed vector for all heads of a layer, and no keys and values",
        decode="its attention (MLA) keeps no keys and values, which our caches hold",
    ),
    "gemma2": Family(decode="it caps the scores of its attention, which our kernels do not", served=NO_STATES),
    "gemma3": Family(served=NO_STATES),
    "gemma3_text": Family(served=NO_STATES),
    "gemma4": Family(),
    "gemma4_text": Family(),
    "gemma4_unified": Family(),
    "gemma4_unified_text": Family(served=NO_CLASS),
    "glm4": Family(served=NO_STATES),
    "glm4_moe": Family(served=NO_STATES),
    "gpt_oss": Family(),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mistral3": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "phi": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_5": Family(decode=HYBRID),
    "qwen3_5_moe": Family(decode=HYBRID),
    "qwen3_5_moe_text": Family(decode=HYBRID),
    "qwen3_5_text": Family(decode=HYBRID),
    "qwen3_moe": Family(),
    "qwen3_next": Family(decode=HYBRID),
    "smollm3": Family(),
}

OTHER = Family(kv=UNKNOWN, decode=UNKNOWN, served=UNKNOWN)


def family_of(config: PretrainedConfig) -> Family:
    """What is declared of the family of `config`."""
    return FAMILIES.get(config.model_type, OTHER)


def check_decoder(path: str, config: PretrainedConfig) -> None:
    """Raises UserError for a model that is no decoder of text."""
    if config.is_encoder_decoder:
        raise UserError(f"target {path} is a '{config.model_type}', an encoder with a decoder; a target is a decoder alone")


def check_kv(path: str, config: PretrainedConfig) -> None:
    """Raises UserError where no layer yields keys and values."""
    if reason := family_of(config).kv:
        raise UserError(
            f"target {path} is a '{config.model_type}', which yields no keys and values: {reason}. "
            "Hidden states it does: cache.kinds=[hidden], and reuse=hidden in training"
        )


def check_decodable(path: str, config: PretrainedConfig) -> None:
    """Raises UserError where our engine does not decode it."""
    if reason := family_of(config).decode:
        raise UserError(
            f"target {path} is a '{config.model_type}', which is not decoded here: {reason}. A server decodes it: mode=served "
            "judges a drafter there, regenerate.base_url has it answer; mode=score judges a drafter over a cache"
        )
