"""Small random models for tests: everything real, nothing trained."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data_prep.target.architecture import KVLayer
from data_prep.target.target import Target
from train.drafter.base import Drafter
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.drafter.own_sizes import draft_architecture, own_sizes

HIDDEN_LAYERS = (0, 1, 2)


def small_target(family: str = "qwen3", dtype: torch.dtype = torch.float32, vocab: int = 11, seed: int = 0) -> Target:
    """A three-layer target whose predictions depend on its context."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    with tempfile.TemporaryDirectory() as folder:
        model(config(**sizes, tie_word_embeddings=family == "qwen3")).to(dtype).save_pretrained(folder)
        return Target(folder, dtype=dtype)


# Objectives by name, as fields of DrafterConfig.
OBJECTIVE_FIELDS = {
    "ttt": {"objective": "ttt"},
    "blockwise": {"objective": "blockwise"},
    "blockwise_shifted": {"objective": "blockwise", "shifted": True},
    "blockwise_causal": {"objective": "blockwise", "causal": True},
    "blockwise_pairs": {"objective": "blockwise", "shifted": True, "causal": True, "pairs": True},  # P-EAGLE
    "blockwise+markov": {"objective": "blockwise", "sequential": "markov"},
    "blockwise+gru": {"objective": "blockwise", "sequential": "gru"},
    "blockwise_shifted+gru": {"objective": "blockwise", "shifted": True, "sequential": "gru"},
    "blockwise_pairs+markov": {
        "objective": "blockwise", "shifted": True, "causal": True, "pairs": True, "sequential": "markov",
    },
}  # fmt: skip
PROJECTED = {"source": "projected", "source_layers": [1, 2]}
PROJECTED_ROPE = {"source": "projected_rope", "source_layers": [1, 2]}
HEAD_CONCAT = {"source": "head_concat", "source_layers": [1, 2]}
QUERIES_ALONE = {"fusion": "cross_only", "own_kv": False}
REDUCED_VOCABULARY = {"draft_vocab": 8, "own_head": True}
EAGLE31_NORMS = {"fc_norm": True, "norm_output": True}
# Kinds of reuse by name, with what a drafter of this kind has besides: the same.
REUSE_FIELDS = {
    "none": {"reuse": "none"},
    "hidden": {"reuse": "hidden"},
    "hidden+vocab": {"reuse": "hidden", **REDUCED_VOCABULARY},
    "hidden+norms": {"reuse": "hidden", **EAGLE31_NORMS},
    "kv": {"reuse": "kv"},
    "kv+native": {"reuse": "kv", "source": "native"},
    "kv+projected": {"reuse": "kv", **PROJECTED},
    "kv+projected_rope": {"reuse": "kv", **PROJECTED_ROPE},
    "kv+head_concat": {"reuse": "kv", **HEAD_CONCAT},
    "kv+vocab": {"reuse": "kv", **REDUCED_VOCABULARY},
    "hybrid": {"reuse": "hybrid"},
    "hybrid+projected_rope": {"reuse": "hybrid", **PROJECTED_ROPE},
    "hybrid+head_concat": {"reuse": "hybrid", **HEAD_CONCAT},
    "hybrid+cross_only": {"reuse": "hybrid", "fusion": "cross_only"},
    "queries": {"reuse": "hybrid", **QUERIES_ALONE},
    "queries+constant": {"reuse": "hybrid", **QUERIES_ALONE, "constant_positions": True},
    "queries+head_concat": {"reuse": "hybrid", **QUERIES_ALONE, **HEAD_CONCAT},
    "hybrid+vocab": {"reuse": "hybrid", **REDUCED_VOCABULARY},
    "hybrid+norms": {"reuse": "hybrid", **EAGLE31_NORMS},
}


def drafter_of(target: Target, objective: str, reuse: str, layers: int = 1, slots: int = 4, seed: int = 1, **options) -> Drafter:
    """A drafter that starts as the target's last `layers` layers. `objective` and `reuse` are names of the tables above;
    `options` are other fields of DrafterConfig."""
    fields = {
        "shifted": False,
        "causal": False,
        "start": "target",
        "mask_token_id": 4,
        "sequential_size": 16,
        "target_layers": list(range(3 - layers, 3)),
        "architecture": target.architecture,
        "target": {"id": "small", "weights_hash": "w", "tokenizer_hash": "t"},
        **OBJECTIVE_FIELDS[objective],
        **REUSE_FIELDS[reuse],
        **options,
    }
    config = DrafterConfig(
        hidden_layers=list(HIDDEN_LAYERS) if fields["reuse"] in ("hidden", "hybrid") else [],
        slots=slots,
        seed=seed,
        **fields,
    )
    counts_V = torch.arange(target.architecture.vocab_size)  # a reduced vocabulary lacks the first tokens
    drafter = new_drafter(config).to(target.dtype).start(target, target.frozen_head, counts_V)
    if config.sequential:
        # It starts at zero, where it would change nothing that a test sees.
        torch.nn.init.normal_(drafter.sequential.up.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return drafter


# Sizes of draft layers of their own, all of them other than those of `small_target`, and those that leave its K/V in place.
OWN_SIZES = {"hidden_size": 24, "heads": 6, "kv_heads": 3, "head_dim": 4, "intermediate_size": 40}
BESIDE_KV = {"hidden_size": 24, "heads": 6, "intermediate_size": 40}


def sized_fields(target: Target, sizes: dict) -> dict:
    """Fields of DrafterConfig for a drafter whose layers have these sizes of their own."""
    theirs = target.architecture
    own = draft_architecture(sizes, theirs)
    fields = {"architecture": own, "own_sizes": own_sizes(own, theirs), "start": "random"}
    if own.hidden_size != theirs.hidden_size:
        fields["target_hidden"] = theirs.hidden_size
    return fields


def own_sized(target: Target, objective: str, reuse: str, sizes: dict | None = None, **options) -> Drafter:
    """A drafter whose layers have sizes of their own, every weight of it random."""
    theirs = target.architecture
    fields = sized_fields(target, OWN_SIZES if sizes is None else sizes)
    sources = REUSE_FIELDS[reuse].get("source_layers", [])
    if fields["architecture"].head_dim != theirs.head_dim and sources:
        fields["kv_shapes"] = [KVLayer(theirs.kv_heads, theirs.head_dim, theirs.inv_freq, theirs.rope_scale) for _ in sources]
    return random_weights(drafter_of(target, objective, reuse, **fields, **options), seed=8)


def from_layer_zero(target, objective, reuse="kv", **options):
    """A drafter that starts as the target's first layer, which reads embeddings and nothing else."""
    return drafter_of(target, objective, reuse, target_layers=[0], **options)


def random_weights(drafter, seed=3):
    """No weight at a special value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in drafter.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3 + (p.dim() == 1))
    return drafter
