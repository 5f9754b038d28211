"""The central promise (DESIGN §4): the training forward and the decode loop are the same function.

Decode with the target; then feed the decoded text through the training-time forward, packed among other documents, with
an anchor at every round. Slots 1 .. n+1 of a round with n kept tokens (for a block all slots) must have the same logits
and the same most likely token, and the kept lengths must follow from the training side's tokens.
"""

import numpy as np
import pytest
import torch

from data_prep.target.states import States
from eval.oracle.decode import decode
from eval.oracle.drafting import Trained
from tests.support.models import HIDDEN_LAYERS, drafter_of, small_target
from train.attention.choose import BACKENDS
from train.data.pack import PackDocument, make_pack
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision
from train.views.recipe import FULL, View

CELLS = [
    (objective, reuse)
    for objective in ("ttt", "blockwise", "blockwise_shifted", "blockwise_causal")
    for reuse in ("none", "hidden", "kv", "hybrid")
]
VARIANTS = [
    ("ttt", "kv+projected"),
    ("ttt", "kv+projected_rope"),
    ("ttt", "kv+head_concat"),
    ("ttt", "hybrid+cross_only"),
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
KV_LAYERS = (1, 2)


@pytest.fixture(scope="module")
def target():
    return small_target()


def cached(target, tokens, capture=True):
    """One document as the cache would hand it out, in the target's own precision."""
    if capture:
        target.capture(HIDDEN_LAYERS, KV_LAYERS)
    states = target.forward(torch.tensor([tokens])).map(lambda t: t[0])
    mask = torch.ones(len(tokens), dtype=torch.uint8)
    mask[0] = 0
    return {
        "input_ids": torch.tensor(tokens),
        "loss_mask": mask,
        "last_hidden": states.last_hidden[:-1],
        **{f"hidden.{i}": t for i, t in states.hidden.items()},
        **{f"key.{i}": t for i, t in states.key.items()},
        **{f"value.{i}": t for i, t in states.value.items()},
    }


def decoded(target, drafter, temperature=0.0, rounds=60, view=None):
    target.capture(HIDDEN_LAYERS, KV_LAYERS)
    prompt = torch.randint(0, 11, (23,), generator=torch.Generator().manual_seed(5)).tolist()
    trained = Trained(drafter, target.frozen_head, BACKENDS["reference"], view)
    generation = decode(target, trained, prompt, 120, temperature, seed=3)
    return prompt, generation, generation.rounds[:rounds]


def ages(anchors, refresh):
    """How old the selection was that served each round."""
    chosen, found = anchors[0], []
    for anchor in anchors:
        if refresh == "verify" or (refresh != "never" and anchor - chosen >= refresh):
            chosen = anchor
        found.append(anchor - chosen)
    return torch.tensor(found)


def training_side(target, drafter, tokens, anchors, packing, attend, tamper=None, view=None):
    """Logits [N, J, V] of the training forward at `anchors` of document `tokens`. A view's rows stand between those of another
    budget and those that see everything."""
    generator = torch.Generator().manual_seed(9)
    others = [torch.randint(0, 11, (n,), generator=generator).tolist() for n in (17, 31)] if packing else []
    documents = [cached(target, t) for t in ([others[0], tokens, others[1]] if packing else [tokens])]
    marks = [np.zeros(0, dtype=np.int64)] * len(documents)
    marks[len(documents) // 2] = np.asarray(anchors)
    pack = make_pack([PackDocument(str(i), *one) for i, one in enumerate(zip(documents, marks))])
    if view:
        budgets = [FULL, view.budget + 7, view.budget]
        pack.budget_VN, pack.age_N = torch.tensor(budgets)[:, None].expand(-1, len(anchors)), ages(anchors, view.refresh)
    if tamper:
        pack = tamper(pack)
    weight_J = torch.ones(drafter.config.draft_length)
    objective = Objective(drafter, target.frozen_head, attend, Supervision(LossRecipe(kl=1), weight_J, 64, view))
    with torch.no_grad():
        return objective.logits(pack)[-1] if view else objective.logits(pack)


def largest_difference(target, drafter, packing=True, attend=BACKENDS["reference"], tamper=None, temperature=0.0, view=None):
    """(largest difference of logits, slots compared that were kept, that were refused); asserts on tokens and lengths
    unless tampered with."""
    prompt, generation, rounds = decoded(target, drafter, temperature, view=view)
    # The text is everything that was emitted, not only what was asked for.
    tokens = prompt + generation.tokens
    rounds = [r for r in rounds if r.anchor + r.drafted < len(tokens)]
    logits = training_side(target, drafter, tokens, [r.anchor for r in rounds], packing, attend, tamper, view)
    worst, kept, refused = 0.0, 0, 0
    for one, trained in zip(rounds, logits):
        parallel = drafter.config.objective == "blockwise" and not drafter.config.sequential  # else a slot reads the one before
        compared = one.drafted if parallel else min(one.kept + 1, one.drafted)
        mine, decoded_too = trained[:compared], one.draft.logits_JV[:compared]
        said = mine.isfinite()  # a reduced vocabulary cannot say the rest
        assert torch.equal(said, decoded_too.isfinite())
        worst = max(worst, (mine - decoded_too)[said].abs().max().item())
        kept, refused = kept + min(one.kept, compared), refused + compared - min(one.kept, compared)
        if tamper is None and temperature == 0:
            assert trained[:compared].argmax(-1).tolist() == one.draft.tokens[:compared]
            text = tokens[one.anchor + 1 : one.anchor + 1 + one.drafted]
            matches = [int(a == b) for a, b in zip(trained.argmax(-1).tolist(), text)]
            assert int(np.cumprod(matches).sum()) == one.kept
    return worst, kept, refused


@pytest.mark.parametrize("objective,reuse", EVERY)
@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
def test_training_forward_is_decode_loop(target, objective, reuse, packing):
    worst, kept, refused = largest_difference(target, drafter_of(target, objective, reuse), packing)
    assert worst < 1e-4
    assert kept >= 5 and refused >= 5, (kept, refused)


@pytest.mark.parametrize("objective,reuse", EVERY)
def test_two_layers_and_sampling(target, objective, reuse):
    worst, kept, refused = largest_difference(target, drafter_of(target, objective, reuse, layers=2), temperature=1.0)
    assert worst < 1e-4
    assert kept >= 3 and refused >= 5, (kept, refused)


@pytest.mark.parametrize(
    "objective,reuse",
    [
        ("blockwise", "hybrid"),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS if cell != ("blockwise", "hybrid")),
        pytest.param("blockwise_pairs", "hidden", marks=pytest.mark.slow),
    ],
)
def test_flex_forward_is_decode_loop(target, objective, reuse):
    torch._dynamo.reset()  # else the shapes of other cells use up the limit of compilations, and no kernel is tested
    worst, *_ = largest_difference(target, drafter_of(target, objective, reuse), attend=BACKENDS["flex"])
    assert worst < 1e-4


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("reuse", sorted({reuse for objective, reuse in EVERY if objective == "ttt"}))
def test_flash_forward_is_decode_loop(target, reuse, packing):
    worst, *_ = largest_difference(target, drafter_of(target, "ttt", reuse), packing, BACKENDS["flash"])
    assert worst < 1e-4


VIEWS = {
    "sink_recent": View(kind="sink_recent", budget=16, sink=2),
    "sink_recent in cache": View(kind="sink_recent", budget=16, sink=2, positions="in_cache"),
    "mean": View(kind="topk_chunk", budget=20, sink=4, recent=4, chunk=4),
    "mean in cache": View(kind="topk_chunk", budget=20, sink=4, recent=4, chunk=4, positions="in_cache"),
    "quest, every 9 tokens": View(kind="topk_chunk", budget=24, recent=3, chunk=3, scorer="quest", refresh=9),
    "minmax in cache, never": View(
        kind="topk_chunk", budget=30, sink=2, recent=2, chunk=2, scorer="minmax", positions="in_cache", refresh="never"
    ),
    "lastkey, every 40 tokens": View(kind="topk_chunk", budget=24, sink=4, recent=0, chunk=4, scorer="lastkey", refresh=40),
    "h2o": View(kind="h2o", budget=16),
    "h2o in cache, every 7 tokens": View(kind="h2o", budget=24, sink=1, positions="in_cache", refresh=7),
    "snapkv": View(kind="snapkv", budget=16, recent=5, pool=3),
    "snapkv in cache, never": View(kind="snapkv", budget=30, recent=4, pool=3, positions="in_cache", refresh="never"),
}


# One drafter of each kind of memory; the others are slow only because they are many.
QUICK = [("ttt", "none"), ("ttt", "hybrid"), ("blockwise_pairs", "hidden"), ("blockwise+markov", "kv+projected_rope")]
MORE = [("ttt", "hidden"), ("ttt", "kv"), ("ttt", "kv+head_concat"), ("blockwise", "hidden"), ("blockwise_shifted", "hybrid")]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("objective,reuse", [*QUICK, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE)])
def test_training_forward_is_decode_loop_under_a_view(target, objective, reuse, view):
    """Two layers, packed, under a budget that the context soon exceeds: memory masked in training (taken out where positions are
    in the cache), really gathered in decoding."""
    drafter = drafter_of(target, objective, reuse, layers=2)
    worst, kept, refused = largest_difference(target, drafter, view=VIEWS[view])
    assert worst < 1e-4
    assert kept >= 3 and refused >= 3, (kept, refused)


def shifted_states(pack):
    """Every state is that of the position after it."""
    pack.states = pack.states.map(lambda t: torch.roll(t, -1, 0))
    return pack


def leaking_anchor(pack):
    """Memory positions count one less, so that the anchor's own state becomes visible."""
    object.__setattr__(pack.places, "position", pack.places.position.clone())
    middle = pack.places.document == pack.places.document[pack.anchor_N[0]]
    anchors = pack.places.position[pack.anchor_N].clone()
    pack.states = States(
        *(
            {i: torch.cat([t, t[pack.anchor_N]]) for i, t in kind.items()}
            for kind in (pack.states.hidden, pack.states.key, pack.states.value)
        )
    )
    assert middle.any() and len(anchors)
    object.__setattr__(pack.places, "document", torch.cat([pack.places.document, pack.places.document[pack.anchor_N]]))
    object.__setattr__(pack.places, "position", torch.cat([pack.places.position, anchors - 1]))
    pack.ids_P = torch.cat([pack.ids_P, pack.ids_P[pack.anchor_N]])
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
def test_negative_controls_are_noticed(target, objective, reuse, tamper):
    worst, *_ = largest_difference(target, drafter_of(target, objective, reuse), tamper=tamper)
    if (reuse, tamper) == ("none", shifted_states):
        assert worst < 1e-4  # it reads no state
    else:
        assert worst > 1e-3


def another_budget(pack):
    """One chunk less is shown."""
    pack.budget_VN = pack.budget_VN - 4
    return pack


def older_selection(pack):
    """Chunks were ranked for another token."""
    pack.age_N = torch.minimum(pack.age_N + 3, pack.places.position[pack.anchor_N] - 1)
    return pack


def no_view(pack):
    """Everything is shown."""
    pack.budget_VN = torch.full_like(pack.budget_VN, FULL)
    return pack


@pytest.mark.parametrize("objective,reuse", [("ttt", "none"), ("ttt", "hybrid"), ("blockwise", "kv")])
@pytest.mark.parametrize("view", ["mean", "mean in cache"])
@pytest.mark.parametrize("tamper", [another_budget, older_selection, no_view], ids=lambda f: f.__name__)
def test_negative_controls_of_a_view_are_noticed(target, objective, reuse, view, tamper):
    worst, *_ = largest_difference(target, drafter_of(target, objective, reuse, layers=2), tamper=tamper, view=VIEWS[view])
    assert worst > 1e-3
