"""Gemma 4 assistants over miniatures, and the same weights in transformers' own class.

Shapes: T positions.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

from data_prep.target.architecture import last_layers_with_kv
from data_prep.target.target import Target
from tests.support.families import add_tokenizer, miniature_model
from tests.support.models import random_weights, sized_fields
from tests.support.packs import cached, objective_of
from train.data.pack import PackDocument, make_pack
from train.drafter.assistant import Assistant
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.drafter.formats.assistant_names import assistant_names
from train.losses.recipe import LossRecipe

SIZES = {"hidden_size": 24, "heads": 4, "intermediate_size": 40}
KINDS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

# Heads of sizes that vLLM has on a CPU; two layers of each kind with K/V of their own, so that there is a wrong one to read.
SERVED_TARGET = {
    "hidden_size": 64,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "max_position_embeddings": 1024,
}
SERVED_SIZES = {"hidden_size": 48, "heads": 4, "intermediate_size": 96}


def sharing_modes(config: Gemma4TextConfig) -> list[str | None]:
    """What transformers 5.19 makes of a Gemma 4: which layers read the K/V of others, and which store theirs for others.

    In 5.23 `kv_sharing_modes` raises for a model all of whose layers read others' K/V, as every assistant's do. Where none of a
    target's layers does, it stores nothing for an assistant.
    """
    own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    last = {kind: index for index, kind in enumerate(own)}
    stored = ["store" if last[kind] == index else None for index, kind in enumerate(own)]
    return [*stored, *["reuse"] * config.num_kv_shared_layers]


def read_layers(target: Target) -> tuple[list[int], list[int]]:
    """(layers whose hidden states an assistant reads, those whose K/V it reads) of this target."""
    last = last_layers_with_kv(target.model.config)
    return [target.architecture.num_layers - 1], [last[kind] for kind in KINDS]


def assistant_config(target: Target, slots: int = 4, sizes: dict = SIZES, **options) -> DrafterConfig:
    hidden, layers = read_layers(target)
    fields = {
        "objective": "ttt",
        "reuse": "hybrid",
        "fusion": "cross_only",
        "own_kv": False,
        "constant_positions": True,
        "own_head": True,
        "shifted": False,
        "causal": False,
        "mask_token_id": None,
        "seed": 1,
        "target": {"id": "small", "weights_hash": "w", "tokenizer_hash": "t"},
        "kv_shapes": [target.kv_shapes[layer] for layer in layers],
        **sized_fields(target, sizes),
        **options,
    }
    return DrafterConfig(kind="gemma4_assistant", target_layers=layers, hidden_layers=hidden, slots=slots, **fields)


def assistant_of(target: Target, random: bool = True, **options) -> Assistant:
    """`random`: no weight at a special value, layer scalars among them."""
    drafter = new_drafter(assistant_config(target, **options)).to(target.dtype).start(target, target.frozen_head)
    if random:
        random_weights(drafter)
        for index, layer in enumerate(drafter.layers):
            layer.scalar.fill_(0.6 + 0.1 * index)
            # Scores of plain products are large, and a softmax of large scores makes much of the last digit.
            layer.branches["kv"].q_norm.weight.data.mul_(0.3)
    return drafter


def served_target(folder: Path) -> Target:
    """A miniature that vLLM runs on a CPU. Two of its layers read others' K/V. Its norm is far from its start, or a head that is
    its embedding would say the last token again."""
    model = miniature_model("gemma4_text_shared", seed=1, **SERVED_TARGET)
    with torch.no_grad():
        model.model.norm.weight.copy_(1.5 * torch.randn(SERVED_TARGET["hidden_size"], generator=torch.Generator().manual_seed(7)))
    model.save_pretrained(folder)
    return Target(str(add_tokenizer(folder)))


def transformers_assistant(drafter: Assistant, target: Target) -> Gemma4AssistantForCausalLM:
    """transformers' class with the drafter's weights."""
    theirs = target.config
    own = drafter.config.architecture
    text = Gemma4TextConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=len(KINDS),
        layer_types=KINDS,
        num_attention_heads=own.heads,
        num_key_value_heads=drafter.config.kv_shapes[0].kv_heads,
        head_dim=drafter.config.kv_shapes[0].head_dim,
        num_global_key_value_heads=drafter.config.kv_shapes[-1].kv_heads,
        global_head_dim=drafter.config.kv_shapes[-1].head_dim,
        attention_k_eq_v=True,
        num_kv_shared_layers=len(KINDS),
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        **{name: getattr(theirs, name) for name in ("rope_parameters", "sliding_window", "rms_norm_eps", "pad_token_id")},
    )
    clusters = {}
    if drafter.config.centroids:
        clusters = {"use_ordered_embeddings": True, "num_centroids": drafter.config.centroids}
        clusters["centroid_intermediate_top_k"] = drafter.config.centroid_top_k
    config = Gemma4AssistantConfig(text_config=text, backbone_hidden_size=drafter.config.state_size, **clusters)
    model = Gemma4AssistantForCausalLM(config)
    names = assistant_names(drafter.config)
    weights = drafter.weights()
    absent, foreign = model.load_state_dict({theirs: weights[ours] for ours, theirs in names.items()}, strict=False)
    assert set(absent) <= {"lm_head.weight"} and not foreign and set(weights) == {*names, "target_norm"}
    model.tie_weights()
    return model.to(target.dtype).eval()


def taught(drafter: Assistant, target: Target, tokens: list[int], steps: int = 60) -> list[float]:
    """Trains on one text at all of its anchors; the loss of every step."""
    anchors = np.arange(1, len(tokens) - drafter.config.slots)
    pack = make_pack([PackDocument("text", cached(target, tokens, capture=False), anchors)])
    objective = objective_of(target, drafter, LossRecipe(kl=1))
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        outcome = objective(pack, objective.weight_sums(pack))
        optimizer.zero_grad()
        outcome.share.backward()
        optimizer.step()
        found.append(float(outcome.share.detach()))
    return found
