"""Read this file first: the training forward and the decode loop are the same function.

A drafter is trained on finished texts and then used on texts that are still being written. In training, one forward drafts behind
many positions of a text at once. In decoding, each round drafts behind the newest token, from what the target has computed so
far. If the two differ, by one position or by one state too many, then the drafter is trained for something that it will never be
asked. No loss curve shows this. (docs/design.md, section "Alignment", says which token and which state each row reads.)

So each test here does the following, for each objective and each kind of reuse:

1. Decode a text with the target and a random drafter. Each round has an anchor: the newest token when the round began.
2. Give the whole text to the training forward, packed between other documents, with an anchor at every round.
3. Compare. The logits of each round must be the same, and so must the drafted tokens. The number of drafts that were kept must be
   what the training side's own tokens say.

Slots 1 .. n + 1 of a round that kept n drafts can be compared. Behind the first refused draft the two sides read different
tokens. Slots of a block without a sequential head read no drafts, so that all of them can.

A test that cannot fail proves nothing. Hence the last tests put faults in on purpose, such as states that are shifted by one, and
demand that the difference is seen.

What is measured, and how, is in tests/support/alignment.py. The tests below say what must hold.

Shapes: P positions of a pack, N anchors, V views.
"""

import functools
from dataclasses import replace

import pytest
import torch

from data_prep.target.states import States
from tests.support.alignment import VIEWS, Alignment, compared, decoded, measure
from tests.support.models import HIDDEN_LAYERS, drafter_of, small_target
from tests.support.packs import KV_LAYERS
from train.attention.choose import BACKENDS
from train.views.recipe import FULL

# Every objective with every kind of reuse, ...
CELLS = [
    (objective, reuse)
    for objective in ("ttt", "blockwise", "blockwise_shifted", "blockwise_causal")
    for reuse in ("none", "hidden", "kv", "hybrid")
]
# ... and what else changes which rows see what: sources of K/V, fusions, vocabularies, norms, pairs, sequential heads.
VARIANTS = [
    ("ttt", "kv+projected"),
    ("ttt", "kv+projected_rope"),
    ("ttt", "kv+head_concat"),
    ("ttt", "hybrid+cross_only"),
    ("ttt", "queries"),
    ("ttt", "queries+constant"),
    ("ttt", "queries+head_concat"),
    ("ttt", "hybrid+projected_rope"),
    ("ttt", "hidden+vocab"),
    ("ttt", "hidden+norms"),
    ("ttt", "hybrid+norms"),
    ("blockwise", "kv+projected"),
    ("blockwise", "kv+projected_rope"),
    ("blockwise_shifted", "hybrid+head_concat"),
    ("blockwise_pairs", "hidden"),
    ("blockwise_pairs+markov", "hidden+vocab"),
    ("blockwise+markov", "hidden"),
    ("blockwise_shifted+gru", "hybrid+vocab"),
]
EVERY = CELLS + VARIANTS

# Two forwards in float32 that add in another order differ by about 1e-5. The smallest fault below moves logits by more than 1e-3.
SAME = 1e-4
ANOTHER = 1e-3


@pytest.fixture(scope="module")
def target():
    return small_target()


@pytest.fixture(scope="module")
def once(target):
    """The decode loop of each drafter runs once. The tests of one drafter lay different training forwards beside it.

    once(objective, reuse, layers, view's name): (the text's tokens, the rounds).
    """

    @functools.cache
    def decode(objective, reuse, layers=1, view=None):
        target.capture(HIDDEN_LAYERS, KV_LAYERS)
        return decoded(target, drafter_of(target, objective, reuse, layers), temperature=0.0, view=VIEWS.get(view))

    return decode


def assert_same_function(found: Alignment, sampled: bool = False) -> None:
    """The same logits and, unless drafts were drawn at random, the same tokens and the same number of kept drafts."""
    assert not found.other_vocabulary
    assert found.worst < SAME
    if not sampled:
        assert not found.other_tokens
        assert not found.other_lengths


@pytest.mark.parametrize("objective,reuse", EVERY)
@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
def test_training_forward_is_decode_loop(target, once, objective, reuse, packing):
    found = compared(target, drafter_of(target, objective, reuse), *once(objective, reuse), packing)
    assert_same_function(found)
    assert found.kept >= 5 and found.refused >= 5, found


@pytest.mark.parametrize("objective,reuse", EVERY)
def test_training_forward_is_decode_loop_with_two_layers_and_sampling(target, objective, reuse):
    found = measure(target, drafter_of(target, objective, reuse, layers=2), temperature=1.0)
    assert_same_function(found, sampled=True)
    assert found.kept >= 3 and found.refused >= 5, found


# Every objective and every kind of reuse once: what rows see comes from the one, what memory holds from the other. A kernel is
# compiled for each.
COMPILED = [
    ("ttt", "none"),
    ("ttt", "hybrid"),
    ("blockwise_shifted", "kv"),
    ("blockwise_causal", "hidden"),
    ("blockwise_pairs", "hidden"),
]


@pytest.mark.parametrize(
    "objective,reuse", [("blockwise", "hybrid"), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in COMPILED)]
)
def test_flex_forward_is_decode_loop(target, once, objective, reuse):
    torch._dynamo.reset()  # else the shapes of other cells use up the limit of compilations, and no kernel is tested
    drafter = drafter_of(target, objective, reuse)
    assert_same_function(compared(target, drafter, *once(objective, reuse), attend=BACKENDS["flex"]))


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("reuse", sorted({reuse for objective, reuse in EVERY if objective == "ttt"}))
def test_flash_forward_is_decode_loop(target, once, reuse, packing):
    drafter = drafter_of(target, "ttt", reuse)
    assert_same_function(compared(target, drafter, *once("ttt", reuse), packing, BACKENDS["flash"]))


# One drafter of each kind of memory. The others are slow only because there are many.
QUICK = [("ttt", "none"), ("ttt", "hybrid"), ("blockwise_pairs", "hidden"), ("blockwise+markov", "kv+projected_rope")]
MORE = [("ttt", "hidden"), ("ttt", "kv"), ("ttt", "kv+head_concat"), ("blockwise", "hidden"), ("blockwise_shifted", "hybrid")]
MORE += [("ttt", reuse) for reuse in ("queries", "queries+constant", "queries+head_concat")]
VIEWED = [(*cell, view) for cell in QUICK for view in VIEWS] + [("ttt", "queries+constant", "mean in cache")]
VIEWED += [pytest.param(*cell, view, marks=pytest.mark.slow) for cell in MORE for view in VIEWS]


@pytest.mark.parametrize("objective,reuse,view", VIEWED)
def test_training_forward_is_decode_loop_under_a_view(target, objective, reuse, view):
    """Two layers, packed, under a budget that the context soon exceeds. Training masks memory (and takes it out where positions
    are in the cache), decoding gathers what is visible."""
    found = measure(target, drafter_of(target, objective, reuse, layers=2), view=VIEWS[view])
    assert_same_function(found)
    assert found.kept >= 3 and found.refused >= 3, found


# The faults. Each function changes the training side's pack and leaves the decode loop as it is.


def shifted_states(pack):
    """Every state is that of the position after it."""
    pack.states = pack.states.map(lambda t: torch.roll(t, -1, 0))
    return pack


def leaking_anchor(pack):
    """Each anchor's own state stands in memory once more, one position before the anchor, where its rows see it."""
    places = pack.places
    anchor_N = pack.anchor_N
    kinds = (pack.states.hidden, pack.states.key, pack.states.value)
    pack.states = States(*({i: torch.cat([t, t[anchor_N]]) for i, t in kind.items()} for kind in kinds))
    pack.ids_P = torch.cat([pack.ids_P, pack.ids_P[anchor_N]])
    # Places are frozen, since nothing but a fault changes them.
    object.__setattr__(places, "document", torch.cat([places.document, places.document[anchor_N]]))
    object.__setattr__(places, "position", torch.cat([places.position, places.position[anchor_N] - 1]))
    return pack


def leaking_neighbour(pack):
    """All documents are taken for one."""
    object.__setattr__(pack.places, "document", torch.zeros_like(pack.places.document))
    return pack


def shifted_text(pack):
    """Every token is the one after it: what a drafter reads of its own prefix, its anchor and the token before a slot."""
    pack.ids_P = torch.roll(pack.ids_P, -1)
    return pack


FAULTS = [shifted_states, leaking_anchor, leaking_neighbour, shifted_text]


@pytest.mark.parametrize("objective,reuse", EVERY)
@pytest.mark.parametrize("tamper", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_put_in_on_purpose_is_noticed(target, once, objective, reuse, tamper):
    found = compared(target, drafter_of(target, objective, reuse), *once(objective, reuse), tamper=tamper)
    assert not found.other_vocabulary
    if (reuse, tamper) == ("none", shifted_states):
        assert found.worst < SAME  # it reads no state
    else:
        assert found.worst > ANOTHER


# Faults of rows that have queries alone: where they sit, and which of the target's keys they see. Each changes the drafter of the
# training side.


def at_other_positions(drafter):
    """Steps advance on one side and stay where they are on the other."""
    object.__setattr__(drafter.config, "constant_positions", not drafter.config.constant_positions)


def at_the_next_position(drafter):
    """Every row sits one position further on."""
    placed = drafter.config.row_position
    object.__setattr__(drafter.config, "row_position", lambda anchor, slot: placed(anchor, slot) + 1)


def before_another(more):
    def change(drafter):
        visibility = drafter.visibility
        drafter.visibility = lambda rows, *rest: visibility(replace(rows, anchor=rows.anchor + more(rows.slot)), *rest)

    return change


QUERY_FAULTS = {
    "other positions": at_other_positions,
    "the next position": at_the_next_position,
    "sees its own anchor's key": before_another(lambda slot: 1),
    "sees the keys of the steps before it": before_another(lambda slot: slot - 1),
    "does not see the last key": before_another(lambda slot: -1),
}


@pytest.mark.parametrize("reuse", ["queries", "queries+constant", pytest.param("queries+head_concat", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", QUERY_FAULTS)
def test_a_fault_of_queries_alone_is_noticed(target, once, reuse, fault):
    drafter = drafter_of(target, "ttt", reuse)

    def tamper(pack):
        QUERY_FAULTS[fault](drafter)
        return pack

    found = compared(target, drafter, *once("ttt", reuse), tamper=tamper)
    assert found.kept >= 5 and found.worst > ANOTHER


def another_budget(pack):
    """One chunk less is visible."""
    pack.budget_VN = pack.budget_VN - 4
    return pack


def older_selection(pack):
    """Chunks were ranked for another token."""
    pack.age_N = torch.minimum(pack.age_N + 3, pack.places.position[pack.anchor_N] - 1)
    return pack


def no_view(pack):
    """Everything is visible."""
    pack.budget_VN = torch.full_like(pack.budget_VN, FULL)
    return pack


@pytest.mark.parametrize("objective,reuse", [("ttt", "none"), ("ttt", "hybrid"), ("blockwise", "kv")])
@pytest.mark.parametrize("view", ["mean", "mean in cache"])
@pytest.mark.parametrize("tamper", [another_budget, older_selection, no_view], ids=lambda f: f.__name__)
def test_a_fault_in_a_view_is_noticed(target, once, objective, reuse, view, tamper):
    rounds = once(objective, reuse, layers=2, view=view)
    found = compared(target, drafter_of(target, objective, reuse, layers=2), *rounds, tamper=tamper, view=VIEWS[view])
    assert not found.other_vocabulary
    assert found.worst > ANOTHER
