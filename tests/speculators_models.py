"""Our drafters as models of the `speculators` package (0.9.0), made in memory: its classes, our weights.

Shapes: T tokens of a text, R rows of a model, V target vocabulary, D draft vocabulary, E hidden size.
"""

import logging

import pytest
import torch
from torch import Tensor

from data_prep.target import States, Target, load_tokenizer
from tests.conftest import ROOT
from train.drafter.model import Drafter
from train.drafter.names import method_of, served_names

TINY = ROOT / "data_prep/targets/tiny"
LENGTH = 129  # the package's EAGLE-3 repeats its mask of 128 rows, pairs of (token, feature)


def package():
    """The package, told to be quiet. It caps transformers below what is installed: nothing but loading, forwards and backwards is
    used."""
    speculators = pytest.importorskip("speculators", reason="pip install --no-deps speculators (make test does)")
    __import__("loguru").logger.disable("speculators")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return speculators


def real_text(target: Target) -> tuple[Tensor, States]:
    """Tokens of real text [T] and the tiny target's states of them."""
    ids = load_tokenizer(str(TINY))((ROOT / "tests/models.py").read_text())["input_ids"][:LENGTH]
    target.capture(range(6), [])
    return torch.tensor(ids), target.forward(torch.tensor([ids])).map(lambda t: t[0])


def names_of(drafter: Drafter) -> dict[str, str]:
    """Each weight of ours -> its name in speculators' model."""
    held = {name for name, _ in drafter.named_parameters()}
    names = served_names(drafter.config) | {"head.weight": "lm_head.weight", "mask_hidden.weight": "mask_hidden"}
    assert held - names.keys() <= {"mask.weight", "sequential.up.weight", "sequential.down.weight"}  # tables of theirs
    return {mine: theirs for mine, theirs in names.items() if mine in held}


def ascending(fc: Tensor, layers: list[int]) -> Tensor:
    """fc's columns in the order of their layers, as all others stack features."""
    order = sorted(range(len(layers)), key=lambda i: layers[i])
    return torch.cat([fc.chunk(len(layers), dim=1)[i] for i in order], dim=1)


def model_of(drafter: Drafter, target: Target):
    """speculators' Eagle3DraftModel, PEagleDraftModel, DFlashDraftModel or DSparkDraftModel, with the drafter's weights and the
    target's own."""
    from speculators import DFlashDraftModel, Eagle3DraftModel
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dspark.config import DSparkSpeculatorConfig
    from speculators.models.dspark.core import DSparkDraftModel
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.peagle.config import PEagleSpeculatorConfig
    from speculators.models.peagle.core import PEagleDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    config, a = drafter.config, drafter.config.architecture
    kind = method_of(config)
    layer = {
        "model_type": "qwen3" if config.normed else "llama",
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": config.depth,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "rms_norm_eps": a.norm_eps,
        "max_position_embeddings": a.max_positions,
        "attention_bias": False,
        **target.rope_config,
    }
    if config.causal and kind != "peagle":  # there a block is causal where attention is sliding; this window hides nothing
        layer |= {"use_sliding_window": True, "sliding_window": a.max_positions}
        layer |= {"layer_types": ["sliding_attention"] * config.depth}
    said = dict(
        transformer_layer_config=layer,
        draft_vocab_size=config.draft_vocab or a.vocab_size,
        speculators_config=SpeculatorsConfig(
            algorithm=kind,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=config.draft_length)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    inputs = [i + 1 for i in sorted(config.hidden_layers)]  # the package counts a layer's input
    if kind in ("dflash", "dspark"):
        said |= dict(block_size=config.slots, aux_hidden_state_layer_ids=inputs, sample_from_anchor=config.shifted)
    else:
        said |= dict(eagle_aux_hidden_state_layer_ids=inputs, fc_norm=config.fc_norm, norm_output=config.norm_output)
        said |= dict(norm_before_residual=config.norm_before_residual)
    if kind == "dspark":
        said |= dict(markov_rank=config.sequential_size if config.sequential else 0)
        said |= dict(enable_confidence_head=False, confidence_head_with_markov=False)
    if kind != "eagle3":
        said["mask_token_id"] = config.mask_token_id
    config_class, model_class = {
        "eagle3": (Eagle3SpeculatorConfig, Eagle3DraftModel),
        "peagle": (PEagleSpeculatorConfig, PEagleDraftModel),
        "dspark": (DSparkSpeculatorConfig, DSparkDraftModel),
        "dflash": (DFlashSpeculatorConfig, DFlashDraftModel),
    }[kind]
    settings = config_class(**said)
    settings.transformer_layer_config._attn_implementation = "eager"  # whose backward a CPU can run
    model = model_class(settings).to(drafter.dtype)
    head = target.frozen_head
    kept_D = torch.arange(a.vocab_size) if drafter.head.kept_D is None else drafter.head.kept_D
    weights = {theirs: drafter.state_dict()[mine] for mine, theirs in names_of(drafter).items()}
    weights["fc.weight"] = ascending(weights["fc.weight"], config.hidden_layers)
    if config.fc_norm:
        place = config.hidden_layers.index
        norms = [drafter.fc_norm[place(layer)].weight for layer in sorted(config.hidden_layers)]
        weights |= {f"fc_norm.{i}.weight": norm for i, norm in enumerate(norms)}
    weights |= {
        "embed_tokens.weight": head.embedding_VE.clone(),
        "verifier_norm.weight": target.final_norm_weight,
        "verifier_lm_head.weight": head.head_VE[kept_D],
        "lm_head.weight": drafter.head.heads(head).draft_DE,
    }
    if kind == "peagle":
        weights["mask_hidden"] = ascending(weights["mask_hidden"], config.hidden_layers).view(model.mask_hidden.shape)
    if config.sequential:  # its bias W2 W1[x] is what our correction adds to the logits
        weights["markov_head.markov_w1.weight"] = head.embedding_VE @ drafter.sequential.down.weight.T
        weights["markov_head.markov_w2.weight"] = weights["lm_head.weight"] @ drafter.sequential.up.weight
    if kind != "eagle3":  # a learned MASK is a row of the table
        weights["embed_tokens.weight"][config.mask_token_id] = drafter.mask.weight[0].detach()
    if config.draft_vocab:
        t2d = torch.zeros(a.vocab_size, dtype=torch.bool).index_fill_(0, kept_D, True)
        weights |= {"d2t": drafter.head.d2t, "t2d": t2d}
    absent, foreign = model.load_state_dict(weights, strict=False)
    assert not absent and not foreign, (absent, foreign)
    return model.train()
