"""Gemma 4's assistants: the same function as transformers' class, as the decode loop, and as a server's drafts.

Shapes: N anchors, J steps, V vocabulary, T positions.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig

from data_prep.target.target import Target
from tests.support.assistants import assistant_of, read_layers, sharing_modes, transformers_assistant
from tests.support.families import SIZES, miniature
from tests.support.packs import REFERENCE, cached
from train.data.pack import Pack, PackDocument, make_pack
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision

FAMILIES = ("gemma4_text", "gemma4_text_k_eq_v", "gemma4_text_shared")
WINDOW = 8
LENGTH = 30
STEPS = 4


@pytest.fixture(scope="module", params=FAMILIES)
def target(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(sharing_modes), raising=False)
        target = Target(str(miniature(request.param, tmp_path_factory.mktemp("target"))))
        hidden, kv = read_layers(target)
        target.capture(hidden, sorted(set(kv)))
        yield target


def random_text(length: int = LENGTH, seed: int = 2) -> list[int]:
    return torch.randint(3, SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pack_of(target: Target, tokens: list[int]) -> Pack:
    """All anchors of a document, which stands behind another."""
    before = PackDocument("before", cached(target, random_text(11, 3), capture=False), np.arange(0))
    return make_pack([before, PackDocument("text", cached(target, tokens, capture=False), np.arange(1, len(tokens) - STEPS))])


def training_logits(target: Target, drafter, pack: Pack) -> Tensor:
    objective = Objective(drafter, target.frozen_head, REFERENCE, Supervision(LossRecipe(kl=1), torch.ones(STEPS)))
    with torch.no_grad():
        return objective.logits(pack)


@torch.no_grad()
def their_logits(target: Target, assistant, tokens: list[int]) -> Tensor:
    """What transformers' class proposes over the same text [N, J, V], fed as vLLM 0.32 and SGLang 0.5.23 feed theirs: rows at
    a - 1, keys of positions before a, of sliding layers as many as the target's window has."""
    ids_1T = torch.tensor([tokens])
    output = target.model(ids_1T, output_hidden_states=True, return_shared_kv_states=True, use_cache=False)
    token_1TE = target.model.get_input_embeddings()(ids_1T)
    found = []
    for anchor in range(1, len(tokens) - STEPS):
        shown = {}
        for kind, kv in output.shared_kv_states.items():
            first = max(0, anchor - WINDOW) if kind == "sliding_attention" else 0
            shown[kind] = tuple(t[:, :, first:anchor] for t in kv)
        feature_11E = output.hidden_states[-1][:, anchor - 1 : anchor]
        for step in range(STEPS):
            token_11E = token_1TE[:, anchor + step : anchor + step + 1]
            drafted = assistant(
                inputs_embeds=torch.cat([token_11E, feature_11E], dim=-1),
                position_ids=torch.tensor([[anchor - 1]]),
                shared_kv_states=shown,
            )
            feature_11E = drafted.last_hidden_state
            found.append(drafted.logits[0, 0])
    return torch.stack(found).view(-1, STEPS, SIZES["vocab_size"])


def apart(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the size of the numbers."""
    return float((mine - theirs).abs().max() / theirs.abs().max())


def test_the_training_forward_is_transformers_own_class(target):
    drafter = assistant_of(target)
    tokens = random_text()
    mine = training_logits(target, drafter, pack_of(target, tokens))
    theirs = their_logits(target, transformers_assistant(drafter, target), tokens)
    assert mine.shape == theirs.shape and apart(mine, theirs) < 1e-5
