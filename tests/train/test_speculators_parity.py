"""One training step of ours against the `speculators` package's own: the same loss and the same gradient of every weight.

The package's model classes (0.9.0) and losses run as they are. What differs by definition, and how the tests bridge it:

- It divides each step of EAGLE-3 by that step's own count and adds the steps up with `decay ** step`; ours divides the weighted
  sum over all steps by the sum of the weights. Of a block it divides the weighted sum by the *unweighted* count. Both are
  weights of slots, which `Objective` is given here.
- A row of its EAGLE-3 counts where the token that it *reads* last is supervised, and a slot of a block where its own token is,
  whatever the slots before it are. Ours counts a slot where the token that it *proposes* is supervised and all slots of its
  anchor before it count. On a text that is supervised to its end the rows are the same but for the last of each step, which
  proposes a token behind the end: its loss mask leaves them out here.
- Its `ce` is the cross entropy with the target's most likely token: our `ce_greedy`. Our `ce` has the text's own.
- Its teachers are renormalised over a reduced vocabulary in every loss, ours in KL alone: tv and nla agree on whole ones.
- Its `nla` knows no overlap below 1e-5, our `lk_alpha` has no bound: the drafter here overlaps by more.
- Its `lk_hybrid` follows each row's own overlap, our `lk_lambda` the slot's mean of the step before: not compared.
- It feeds the text's tokens to every step, as we do. What it calls `prev_correct` is for its metrics: no loss reads it.
"""

import numpy as np
import pytest
import torch

from data_prep.target.target import Target
from tests.support.models import small_target
from tests.support.packs import objective_of
from tests.support.served_drafters import HIDDEN, aux, drafter_for
from tests.support.speculators_models import LENGTH, TINY, ascending, model_of, names_of, package, real_text
from train.data.pack import PackDocument, make_pack
from train.losses.recipe import LossRecipe

STEPS = 4
DECAY = 0.8
GAMMA = 3.0
LOSSES = {"kl": "kl_div", "reverse_kl": "rkl", "ce_greedy": "ce", "tv": "tv", "lk_alpha": "nla"}


@pytest.fixture(scope="module")
def speculators():
    return package()


@pytest.fixture(scope="module")
def target():
    return Target(str(TINY))


@pytest.fixture(scope="module")
def text(target):
    return real_text(target)


def milder(drafter):
    """The same with flatter logits: far from its teacher every overlap would be nothing, and few rows would have a gradient."""
    with torch.no_grad():
        drafter.norm.weight *= 0.3
    return drafter


def pack_of(text, anchors):
    ids, states = text
    document = {
        "input_ids": ids,
        "loss_mask": (torch.arange(len(ids)) > 0).to(torch.uint8),
        "last_hidden": states.last_hidden[:-1],
        **{f"hidden.{i}": t for i, t in states.hidden.items()},
    }
    return make_pack([PackDocument("text", document, np.array(anchors))])


def step_of_ours(target, drafter, text, anchors, loss, weight_J, divisor):
    """(loss, the gradient of every weight under speculators' names) of sum_j weight_j loss_j / divisor."""
    objective = objective_of(target, drafter, LossRecipe(**{loss: 1}), weight_J)
    drafter.zero_grad()
    outcome = objective(pack_of(text, anchors), torch.full((4,), float(divisor)))
    outcome.share.backward()
    gradients = {theirs: drafter.get_parameter(mine).grad for mine, theirs in names_of(drafter).items()}
    layers = drafter.config.hidden_layers
    gradients["fc.weight"] = ascending(gradients["fc.weight"], layers)
    if drafter.config.fc_norm:
        norms = [gradients[f"fc_norm.{i}.weight"] for i in range(len(layers))]
        gradients |= {f"fc_norm.{i}.weight": norms[layers.index(layer)] for i, layer in enumerate(sorted(layers))}
    return float(outcome.share.detach()), gradients, outcome.valid


def step_of_theirs(model, loss_sum, own_head):
    """(loss, gradients): `loss_sum` is what the model's forward returned."""
    loss_sum.backward()
    learned = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "markov" not in name}
    assert ("lm_head.weight" in learned) == own_head
    return float(loss_sum.detach()), learned


def last_layer(target, text):
    """What the target's final norm reads, [1, T, E]: the package norms it itself."""
    return text[1].hidden[target.architecture.num_layers - 1][None]


def eagle3_step(target, drafter, text, loss, features=None):
    """One step of the package's: rows t = (x_{t+1}, f_t), step 1 of anchor t + 1."""
    from speculators.losses import resolve_loss_config

    model = model_of(drafter, target)
    model.lm_head.weight.requires_grad_(drafter.config.own_head)
    ids = text[0]
    features = aux(text, sorted(drafter.config.hidden_layers))[:, :-1] if features is None else features
    counted = torch.arange(1, len(ids)) + 1  # the token that a row proposes in its first step
    _, loss_sum, _ = model(
        features,
        ids[None, 1:],
        torch.zeros(1, len(ids) - 1, dtype=torch.long),
        loss_mask=(counted < len(ids)).float()[None],
        verifier_last_hidden_states=last_layer(target, text)[:, 1:],
        ttt_steps=STEPS,
        ttt_step_loss_decay=DECAY,
        loss_config=resolve_loss_config(LOSSES[loss], "eager"),
    )
    return step_of_theirs(model, loss_sum, drafter.config.own_head)


def our_eagle3_step(target, drafter, text, loss):
    """Every anchor; each step divided by its own count, as the package does."""
    anchors = list(range(1, len(text[0]) - 1))
    count_J = pack_of(text, anchors).valid(STEPS).sum(0)
    assert count_J.tolist() == [len(anchors) - j for j in range(STEPS)]
    weight_J = DECAY ** torch.arange(STEPS) / count_J
    return step_of_ours(target, drafter, text, anchors, loss, weight_J, divisor=1)[:2]


def dflash_step(target, drafter, text, loss, features=None):
    """One step of the package's, with every anchor that it can draw: a supervised token with a whole block behind it."""
    from speculators.losses import eager, resolve_loss_config

    model = model_of(drafter, target)
    model.lm_head.weight.requires_grad_(drafter.config.own_head)
    ids = text[0]
    slots = drafter.config.slots
    metrics = {"tv_loss_fn": eager.tv_loss} if hasattr(model, "markov_head") else {}  # the other needs a GPU
    _, loss_sum, _ = model(
        aux(text, sorted(drafter.config.hidden_layers)) if features is None else features,
        ids[None],
        (torch.arange(len(ids)) > 0).long()[None],
        last_layer(target, text),
        torch.zeros(1, len(ids), dtype=torch.long),
        loss_config=resolve_loss_config(LOSSES[loss], "eager"),
        gamma=GAMMA,
        max_anchors=len(ids) - slots - 1,
        **metrics,
    )
    return step_of_theirs(model, loss_sum, drafter.config.own_head)


def our_dflash_step(target, drafter, text, loss):
    anchors = list(range(1, len(text[0]) - drafter.config.slots))
    weight_J = torch.exp(-torch.arange(drafter.config.draft_length) / GAMMA)
    count = len(anchors) * drafter.config.draft_length
    *found, valid = step_of_ours(target, drafter, text, anchors, loss, weight_J, divisor=count)
    assert valid.all()
    return found


def errors(theirs, mine):
    """The relative error of the loss and of the gradient of every weight. MASK is a row of the package's table, which it
    does not train, and its Markov head is two tables: ours (docs/design.md) is in the loss and in the others' gradients."""
    (their_loss, their_gradients), (my_loss, my_gradients) = theirs, mine
    assert their_gradients.keys() == my_gradients.keys() and len(my_gradients) > 10
    assert all(gradient.norm() > 0 for gradient in my_gradients.values())
    found = {name: float((g - their_gradients[name]).norm() / g.norm()) for name, g in my_gradients.items()}
    return found | {"loss": abs(their_loss / my_loss - 1)}


def assert_same_step(theirs, mine):
    found = errors(theirs, mine)
    assert max(found.values()) < 1e-4, found


REDUCED = {"draft_vocab": 500, "own_head": True}
EAGLE3_CASES = {
    "kl": ("kl", {}),
    "kl, reduced with a head of its own": ("kl", REDUCED),
    "kl, two layers with query norms": ("kl", {"qk_norm": True, "target_layers": [1, 4]}),
    "kl, the residual after the norm": ("kl", {"norm_before_residual": True}),
    "kl, EAGLE-3.1's norms": ("kl", {"fc_norm": True, "norm_output": True}),
    "reverse_kl": ("reverse_kl", {}),
    "ce, reduced, the target's rows": ("ce_greedy", {"draft_vocab": 500}),
    "tv": ("tv", {}),
    "nla": ("lk_alpha", {}),
}


@pytest.mark.parametrize("loss,changes", EAGLE3_CASES.values(), ids=EAGLE3_CASES)
def test_a_training_step_of_eagle3_equals_that_of_speculators(speculators, target, text, loss, changes):
    drafter = milder(drafter_for(target, "ttt", **changes))
    assert_same_step(eagle3_step(target, drafter, text, loss), our_eagle3_step(target, drafter, text, loss))


DFLASH_CASES = {
    "ce": ("ce_greedy", {}),
    "ce, reduced with a head of its own": ("ce_greedy", REDUCED),
    "kl": ("kl", {}),
    "kl, causal": ("kl", {"causal": True}),
    "kl, reduced, the target's rows": ("kl", {"draft_vocab": 500}),
    "kl, from the anchor on": ("kl", {"shifted": True}),
    "kl, a Markov head (DSpark)": ("kl", {"shifted": True, "sequential": "markov", "sequential_size": 8}),
    "kl, a Markov head behind the anchor": ("kl", {"sequential": "markov", "sequential_size": 8}),
}


@pytest.mark.parametrize("loss,changes", DFLASH_CASES.values(), ids=DFLASH_CASES)
def test_a_training_step_of_dflash_equals_that_of_speculators(speculators, target, text, loss, changes):
    drafter = milder(drafter_for(target, "blockwise", **changes))
    assert_same_step(dflash_step(target, drafter, text, loss), our_dflash_step(target, drafter, text, loss))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_training_step_over_another_target_equals_that_of_speculators(speculators, family):
    """Grouped heads, and a head that is not (llama) or is (qwen3) the embedding."""
    small = small_target(family)
    small.capture(range(3), [])
    ids = torch.randint(0, 11, (LENGTH,), generator=torch.Generator().manual_seed(3))
    words = ids, small.forward(ids[None]).map(lambda t: t[0])
    layers = {"hidden_layers": [2, 0, 1]}
    ttt = drafter_for(small, "ttt", target_layers=[1], **layers)
    assert_same_step(eagle3_step(small, ttt, words, "kl"), our_eagle3_step(small, ttt, words, "kl"))
    block = drafter_for(small, "blockwise", target_layers=[0, 2], **layers)
    assert_same_step(dflash_step(small, block, words, "kl"), our_dflash_step(small, block, words, "kl"))


def smallest(found):
    """The smallest error of a gradient: a loss is one number, and can come close by chance."""
    return min(error for name, error in found.items() if name != "loss")


def test_faults_in_features_or_divisors_change_a_training_step(speculators, target, text):
    """Negative controls: features of another position, two layers exchanged, steps that are not divided by their own counts."""
    ttt, block = (milder(drafter_for(target, kind)) for kind in ("ttt", "blockwise"))
    first, second, third = sorted(HIDDEN)
    in_order = aux(text, [first, second, third])
    exchanged = aux(text, [second, first, third])  # which is fc with two layers' columns exchanged
    mine = our_eagle3_step(target, ttt, text, "kl")
    for features in (in_order[:, 1:], exchanged[:, :-1]):
        assert smallest(errors(eagle3_step(target, ttt, text, "kl", features), mine)) > 1e-2
    anchors = list(range(1, len(text[0]) - 1))
    weight_J = DECAY ** torch.arange(STEPS)
    together = step_of_ours(target, ttt, text, anchors, "kl", weight_J, divisor=len(anchors))[:2]
    assert max(errors(eagle3_step(target, ttt, text, "kl"), together).values()) > 1e-3
    mine = our_dflash_step(target, block, text, "kl")
    for features in (in_order.roll(1, 1), exchanged):
        assert smallest(errors(dflash_step(target, block, text, "kl", features), mine)) > 1e-2
