"""Small random models for tests: everything real, nothing trained."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data_prep.target.target import Target
from train.drafter.base import Drafter
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig

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


def drafter_of(target: Target, objective: str, reuse: str, layers: int = 1, slots: int = 4, seed: int = 1, **options) -> Drafter:
    """A drafter of the target's last layers. `objective`: ttt, blockwise, blockwise_shifted, blockwise_causal or blockwise_pairs
    (P-EAGLE: both of them, over pairs), and then +markov or +gru; `reuse`: none, hidden, kv or hybrid, and then a source of K/V,
    +cross_only, +vocab (a reduced one) or +norms (EAGLE-3.1's)."""
    objective, _, sequential = objective.partition("+")
    kind, _, variant = objective.partition("_")
    reuse, *words = reuse.split("+")
    sources = [w for w in words if w in ("projected", "projected_rope", "head_concat")]
    if sources:
        options |= {"source": sources[0], "source_layers": [1, 2]}
    if "cross_only" in words:
        options["fusion"] = "cross_only"
    if "vocab" in words:
        options |= {"draft_vocab": 8, "own_head": True}
    if "norms" in words:
        options |= {"fc_norm": True, "norm_output": True}
    config = DrafterConfig(
        objective=kind,
        reuse=reuse,
        target_layers=list(range(3 - layers, 3)),
        hidden_layers=list(HIDDEN_LAYERS) if reuse in ("hidden", "hybrid") else [],
        slots=slots,
        shifted=variant in ("shifted", "pairs"),
        causal=variant in ("causal", "pairs"),
        pairs=variant == "pairs",
        seed=seed,
        start="target",
        mask_token_id=4,
        architecture=target.architecture,
        target={},
        sequential=sequential or None,
        sequential_size=16,
        **options,
    )
    counts_V = torch.arange(target.architecture.vocab_size)  # a reduced vocabulary lacks the first tokens
    drafter = new_drafter(config).to(target.dtype).start(target, target.frozen_head, counts_V)
    if sequential:
        torch.nn.init.normal_(drafter.sequential.up.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return drafter
