"""Our drafters as models of the `speculators` package (0.9.0), made in memory: its classes, our weights.

Shapes: T tokens of a text, R rows of a model, V target vocabulary, D draft vocabulary, E hidden size.
"""

import logging

import pytest
import torch
from torch import Tensor

from data_prep.target.loading import load_tokenizer
from data_prep.target.states import States
from data_prep.target.target import Target
from tests.support.commands import ROOT
from train.drafter.base import Drafter
from train.drafter.formats.names import method_of, served_names
from train.drafter.formats.served import exported_weights
from train.drafter.formats.served_config import speculators_config

TINY = ROOT / "data_prep/targets/tiny"
LENGTH = 129  # the package's EAGLE-3 repeats its mask of 128 rows, pairs of (token, feature)


def package():
    """The package, told to be quiet. It caps transformers below what is installed: nothing but loading, forwards and backwards is
    used."""
    speculators = pytest.importorskip("speculators", reason="pip install --no-deps speculators (make test does)")
    __import__("loguru").logger.disable("speculators")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return speculators


def real_ids() -> list[int]:
    """The tokens of a piece of code, as many as the package's mask needs."""
    ids = load_tokenizer(str(TINY))((ROOT / "tests/support/real_text.txt").read_text())["input_ids"]
    assert len(ids) == LENGTH
    return ids


def real_text(target: Target) -> tuple[Tensor, States]:
    """Tokens of real text [T] and the tiny target's states of them."""
    ids = real_ids()
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
    """speculators' Eagle3DraftModel, PEagleDraftModel, DFlashDraftModel or DSparkDraftModel, with the configuration and the
    weights that an export holds, and the target's own."""
    from speculators import DFlashDraftModel, Eagle3DraftModel
    from speculators.models.dspark.core import DSparkDraftModel
    from speculators.models.peagle.core import PEagleDraftModel

    classes = {"eagle3": Eagle3DraftModel, "peagle": PEagleDraftModel, "dspark": DSparkDraftModel, "dflash": DFlashDraftModel}
    config, head = drafter.config, target.frozen_head
    model_class = classes[method_of(config)]
    settings = model_class.config_class(**speculators_config(config, target, "float32"))
    settings.transformer_layer_config._attn_implementation = "eager"  # whose backward a CPU can run
    model = model_class(settings).to(drafter.dtype)
    draft_DE = drafter.head.heads(head).draft_DE
    weights = {
        "embed_tokens.weight": head.embedding_VE.clone(),
        "lm_head.weight": draft_DE,
        "verifier_norm.weight": target.final_norm_weight,
        "verifier_lm_head.weight": draft_DE if drafter.head.weight is None else head.head_VE[kept(drafter)],
    }
    if config.objective == "blockwise":  # a learned MASK is a row of the table
        weights["embed_tokens.weight"][config.mask_token_id] = drafter.mask.weight[0].detach()
    absent, foreign = model.load_state_dict(weights | exported_weights(drafter, target, "speculators"), strict=False)
    assert not absent and not foreign, (absent, foreign)
    return model.train()


def kept(drafter: Drafter) -> Tensor:
    """Target ids of the draft vocabulary, [D]."""
    every = torch.arange(drafter.config.architecture.vocab_size)
    return every if drafter.head.kept_D is None else drafter.head.kept_D
