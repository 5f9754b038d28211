"""Drafters over hidden states, as servers run them: random ones, their logits in our code and in the `speculators` package's,
and checkpoints of them read back.

Shapes: N anchors, J slots or steps, B slots of a block, D draft vocabulary, V target vocabulary, E hidden size.
"""

import numpy as np
import pytest
import torch

from common.errors import UserError
from tests.support.models import sized_fields
from tests.support.packs import objective_of
from tests.support.speculators_models import LENGTH
from train.data.pack import PackDocument, make_pack
from train.drafter.base import Drafter
from train.drafter.build import load_drafter, new_drafter
from train.drafter.config import DrafterConfig
from train.drafter.formats.imported_weights import bind
from train.losses.recipe import LossRecipe

KL = LossRecipe(kl=1)
HIDDEN = [3, 0, 2]  # not in ascending order, in which servers read them
ANCHORS = [1, 2, 17, 60, 110]


def drafter_for(target, objective, sizes=None, **changes):
    """A drafter of the embedded target over hidden states, of which every weight has been moved from its start. `changes`: other
    fields of DrafterConfig; `sizes`: draft layers' own."""
    options = dict(
        objective=objective,
        reuse="hidden",
        target_layers=[1] if objective == "ttt" else [1, 4],
        hidden_layers=HIDDEN,
        slots=4,
        shifted=False,
        causal=False,
        seed=1,
        start="target",
        mask_token_id=2,
        architecture=target.architecture,
        target={"id": "small", "weights_hash": "w", "tokenizer_hash": "t"},
        qk_norm=objective == "blockwise",
    )
    if sizes:
        options |= sized_fields(target, sizes)
    config = DrafterConfig(**options | changes)
    counts_V = torch.randint(0, 99, (config.architecture.vocab_size,), generator=torch.Generator().manual_seed(0))
    drafter = new_drafter(config).start(target, target.frozen_head, counts_V)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in drafter.named_parameters():
            if name != "mask.weight":
                spread = 0.3 if name == "sequential.up.weight" else 0.02 if p.dim() > 1 else 0.2
                p += torch.randn(p.shape, generator=g) * spread
    return drafter


@torch.no_grad()
def logits_of(target, drafter, text, anchors):
    """Logits of what a draft can say, [N, J, D]."""
    ids, states = text
    document = {
        "input_ids": ids,
        "loss_mask": (torch.arange(len(ids)) > 0).to(torch.uint8),
        "last_hidden": states.last_hidden[:-1],
        **{f"hidden.{i}": t for i, t in states.hidden.items()},
    }
    pack = make_pack([PackDocument("text", document, np.array(anchors))])
    logits = objective_of(target, drafter, KL).logits(pack)
    kept_D = drafter.head.kept_D
    return logits if kept_D is None else logits[..., kept_D]


def four_slots(target, drafter, text):
    """Logits of the slots that all have: an EAGLE-3 checkpoint that names no number of steps takes seven."""
    return logits_of(target, drafter, text, ANCHORS)[:, :4]


def aux(text, layers):
    """What the package calls auxiliary hidden states: those of `layers`, one behind the other, [1, T, layers x E]."""
    return torch.cat([text[1].hidden[i] for i in layers], dim=-1)[None]


@torch.no_grad()
def eagle3_logits(model, text, anchors, steps, layers=None):
    """[N, J, D] of speculators' EAGLE-3 model."""
    ids = text[0]
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    # Row t is the pair (x_{t+1}, f_t): step 1 of anchor t + 1. The layers are inputs, one more than the outputs that they name.
    features = aux(text, [i - 1 for i in model.target_layer_ids] if layers is None else layers)[:, :-1]
    rows = len(ids) - 1
    model(features, ids[None, 1:], torch.zeros(1, rows, dtype=torch.long), ttt_steps=steps)
    return torch.stack(seen, dim=1)[torch.tensor(anchors) - 1]


@torch.no_grad()
def block_logits(model, text, anchors, layers=None):
    """[N, J, D] of speculators' DFlash or DSpark model: whole blocks behind these anchors, after the text's own tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    model._create_mask_fn = create_block_mask  # it would compile this
    ids = text[0]
    supervised = torch.zeros(1, LENGTH, dtype=torch.long)
    supervised[:, anchors] = 1  # where it puts its anchors
    features = aux(text, [i - 1 for i in model.target_layer_ids] if layers is None else layers)
    nothing = torch.zeros(1, LENGTH, dtype=torch.long)
    last = text[1].last_hidden[None]
    hidden, logits, _, _, token_index = model._backbone_forward(
        features, ids[None], supervised, last, nothing, max_anchors=len(anchors)
    )
    logits_NBD = logits[0].unflatten(0, (len(anchors), -1))
    if getattr(model, "markov_head", None) is None:
        return logits_NBD[:, 1:]
    drafts_anchor = model.config.sample_from_anchor
    tokens_NB = ids[token_index].view(len(anchors), -1)
    previous_NB = tokens_NB if drafts_anchor else torch.cat([tokens_NB[:, :1], tokens_NB[:, :-1]], dim=1)
    hidden_NBE = hidden.view(len(anchors), model.block_size, -1)
    bias_NBD = model.markov_head.block_bias(prev_token_ids=previous_NB, hidden_states=hidden_NBE)
    return (logits_NBD + bias_NBD)[:, 0 if drafts_anchor else 1 :]


def assert_same(theirs, mine):
    """The same logits up to rounding, and logits that are not all alike, so that this says something."""
    assert theirs.shape == mine.shape and mine.std() > 0.5
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)


def differ(theirs, mine):
    """For negative controls: far beyond rounding."""
    return (theirs - mine).abs().max() > 0.1


def imported(folder, target) -> Drafter:
    """The drafter of a served checkpoint, bound to the target beside which it was read."""
    drafter = load_drafter(folder, lambda: target.architecture)
    assert not drafter.config.is_bound
    bind(drafter, folder, "named", target)
    assert drafter.config.is_bound and drafter.config.target["weights_hash"] == target.weights_hash()
    assert all(tensor.isfinite().all() for tensor in drafter.state_dict().values())
    return drafter


def refused(folder, target, message):
    """The checkpoint is refused, with this message in one line."""
    with pytest.raises(UserError, match=message) as caught:
        bind(load_drafter(folder, lambda: target.architecture), folder, "named", target)
    assert "\n" not in str(caught.value)
