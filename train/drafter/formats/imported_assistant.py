"""Assistants of Gemma 4 that others trained: `Gemma4AssistantForCausalLM` -> our configuration.

The weights are read in imported_weights.py, under the names of assistant_names.py. Final caps of the logits
(`final_logit_softcapping`) are left out, as transformers' class leaves them out: the likeliest token is the same.
"""

import json
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from common.errors import UserError, first_line
from data_prep.target.architecture import Architecture, KVLayer, Sizes, TargetSizes, gemma4_kv
from train.drafter.config import DrafterConfig
from train.drafter.formats.imported_weights import refuse

FORMAT = "a Gemma 4 assistant"
STEPS = 4  # of a checkpoint that names none, as experiment=gemma4_assistant trains
TEXT = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}  # of the language part
# What would make another function of the same weights: {key: the value that is read}.
PLAIN = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0,
}


def assistant_config(folder: Path, fields: dict, beside: Callable[[], Sizes] | None) -> DrafterConfig:
    """Raises UserError for one that no drafter of ours can be, or that does not fit the target of these sizes."""
    if beside is None:
        raise UserError(f"{folder} is {FORMAT}: it is read beside a target")
    sizes = beside()
    text = _text_config(folder, fields)
    _check_sizes(folder, fields, text, sizes)
    last_kv = sizes.last_kv if isinstance(sizes, TargetSizes) else {}
    _check_kv(folder, text, last_kv)
    target_layers = [last_kv[kind][0] for kind in text.layer_types]
    own = {"heads": text.num_attention_heads, "hidden_size": text.hidden_size}
    full = last_kv["full_attention"][1]
    architecture = Architecture(
        **own,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        num_layers=sizes.num_layers,
        # Those of the target's layers that read all positions, as of a drafter that is trained here.
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        norm_eps=text.rms_norm_eps,
        qk_norm=False,
        qkv_bias=False,
        inv_freq=full.inv_freq,
        rope_scale=full.rope_scale,
        max_positions=sizes.max_positions,
    )
    knows = text.max_position_embeddings
    clustered = fields.get("use_ordered_embeddings")
    return DrafterConfig(
        kind="gemma4_assistant",
        objective="ttt",
        reuse="hybrid",
        fusion="cross_only",
        own_kv=False,
        constant_positions=True,
        target_layers=target_layers,
        hidden_layers=[sizes.num_layers - 1],
        slots=_steps(folder),
        shifted=False,
        causal=False,
        seed=0,
        start="random",
        mask_token_id=None,
        architecture=architecture,
        target={"id": "unknown", "weights_hash": None, "tokenizer_hash": None},
        own_head=True,
        positions=knows if knows < sizes.max_positions else None,
        target_hidden=sizes.hidden_size if text.hidden_size != sizes.hidden_size else None,
        own_sizes=[name for name, size in own.items() if size != getattr(sizes, name)] + ["intermediate_size"],
        kv_shapes=[last_kv[kind][1] for kind in text.layer_types],
        centroids=fields.get("num_centroids", 2048) if clustered else None,
        centroid_top_k=fields.get("centroid_intermediate_top_k", 32),
        imported=FORMAT,
    )


def _text_config(folder: Path, fields: dict) -> PretrainedConfig:
    """What the configuration says of the layers, with transformers' own defaults."""
    said = fields.get("text_config") or {}
    kind = TEXT.get(fields.get("model_type"), "gemma4_text")
    try:
        text = AutoConfig.for_model(kind, **{name: value for name, value in said.items() if name != "model_type"})
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{folder}: its text_config cannot be read ({first_line(error)})") from error
    wrong = next((key for key, value in PLAIN.items() if getattr(text, key, value) != value), None)
    shared = said.get("num_kv_shared_layers") or text.num_hidden_layers
    refuse(
        folder,
        {
            f"has {wrong}={getattr(text, wrong or '', None)}, which no assistant here has": wrong is not None,
            f"has {text.num_hidden_layers - shared} layers with keys and values of their own": shared != text.num_hidden_layers,
        },
    )
    return text


def _check_sizes(folder: Path, fields: dict, text: PretrainedConfig, sizes: Sizes) -> None:
    states = fields.get("backbone_hidden_size", 1536)
    clusters = fields.get("num_centroids", 2048)
    chosen = fields.get("centroid_intermediate_top_k", 32)
    refuse(
        folder,
        {
            f"is for targets of hidden size {states} (backbone_hidden_size); this target has {sizes.hidden_size}": (
                states != sizes.hidden_size
            ),
            f"is for targets of {text.vocab_size} tokens; this target has {sizes.vocab_size}": (
                text.vocab_size != sizes.vocab_size
            ),
            f"has {clusters} clusters for {text.vocab_size} tokens, of which it says {chosen}": (
                bool(fields.get("use_ordered_embeddings"))
                and not (
                    type(clusters) is type(chosen) is int and 0 < chosen <= clusters and text.vocab_size % clusters == 0
                )
            ),
        },
    )


def _check_kv(folder: Path, text: PretrainedConfig, last_kv: dict[str, tuple[int, KVLayer]]) -> None:
    """Raises UserError where a layer could not read what it is to read."""
    refuse(folder, {f"is {FORMAT}, and the target is no Gemma 4": not last_kv})
    for index, kind in enumerate(text.layer_types):
        refuse(folder, {f"reads a layer of {kind}, and the target has none with K/V of its own": kind not in last_kv})
        layer, theirs = last_kv[kind]
        mine = gemma4_kv(text, index)
        reads = f"reads K/V of its target's last layer of {kind}, with"
        angles = (mine.inv_freq, mine.rope_scale) != (theirs.inv_freq, theirs.rope_scale)
        refuse(
            folder,
            {
                f"{reads} heads of {mine.head_dim}; layer {layer} of this target has heads of {theirs.head_dim}": (
                    mine.head_dim != theirs.head_dim
                ),
                f"{reads} {mine.kv_heads} heads; layer {layer} of this target has {theirs.kv_heads}": (
                    mine.kv_heads != theirs.kv_heads
                ),
                f"{reads} a window of {mine.window} positions; layer {layer} of this target has one of {theirs.window}": (
                    mine.window != theirs.window
                ),
                f"{reads} another rotary embedding (rope_parameters) than layer {layer} of this target has": angles,
                f"has {text.num_attention_heads} query heads, which cannot share {mine.kv_heads} key/value heads": (
                    text.num_attention_heads % mine.kv_heads != 0
                ),
            },
        )


def _steps(folder: Path) -> int:
    """How many tokens it drafts, where transformers' assisted generation reads it."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return STEPS
    try:
        said = json.loads(path.read_text()).get("num_assistant_tokens")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not readable as an object of JSON: {error}") from error
    if said is None:
        return STEPS
    if type(said) is not int or said < 1:
        raise UserError(f"{path}: num_assistant_tokens={said} is no number of tokens to draft")
    return said
