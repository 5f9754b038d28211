"""What servers call a drafter and its weights. `export` reads these maps from left to right, the importer from right to left."""

from train.drafter.config import DrafterConfig

PROJECTIONS = {f"branches.hidden.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
HEAD_NORMS = {f"branches.hidden.{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")}
MLP = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
FEED = {"post_norm": "post_attention_layernorm", **MLP}
PAIR_NORMS = {"token_norm": "input_layernorm", "input_norm": "hidden_norm"}  # of the layer that reads [token; feature]
STREAM_NORM = {"input_norm": "input_layernorm"}  # of all others
MASK_FILE = "mask_embedding.pt"  # where vLLM looks for a learned MASK of DFlash


def method_of(config: DrafterConfig) -> str:
    """The servers' word for a drafter over hidden states: eagle3 | peagle | dflash | dspark; or gemma4_assistant."""
    if config.is_assistant:
        return "gemma4_assistant"
    if config.reads_pairs:
        return "eagle3" if config.schedule.token_by_token else "peagle"
    return "dspark" if config.sequential or config.shifted else "dflash"


def served_names(config: DrafterConfig, first_layer: str = "layers.0") -> dict[str, str]:
    """Our name of a weight -> the servers'. What formats hold in ways of their own (head, MASK, Markov head) is not among them.

    Args:
        first_layer: what the format calls it; EAGLE-3's first one is also known as `midlayer`.
    """
    names = {"fc.weight": "fc.weight", "norm.weight": "norm.weight"}
    if not config.reads_pairs:
        names["hidden_norm.weight"] = "hidden_norm.weight"
    if config.fc_norm:
        names |= {f"fc_norm.{i}.weight": f"fc_norm.{i}.weight" for i in range(len(config.hidden_layers))}
    for index in range(config.depth):
        theirs = f"layers.{index}" if index else first_layer
        parts = PROJECTIONS | FEED
        parts |= PAIR_NORMS if config.reads_pairs and index == 0 else STREAM_NORM
        parts |= HEAD_NORMS if config.normed else {}
        names |= {f"layers.{index}.{ours}.weight": f"{theirs}.{part}.weight" for ours, part in parts.items()}
        if config.architecture.qkv_bias:
            biased = [ours for ours in PROJECTIONS if not ours.endswith(".o")]
            names |= {f"layers.{index}.{ours}.bias": f"{theirs}.{PROJECTIONS[ours]}.bias" for ours in biased}
    return names
