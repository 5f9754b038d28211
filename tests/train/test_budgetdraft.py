"""BudgetDraft: full and sparse views in one loss, budgets that are functions of seed, step and document, one teacher asked once.

Shapes: V views, N anchors, J steps or slots; target_TV: T rows of a teacher, V vocabulary.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from data_prep.cache.reader import CacheReader
from tests.support.models import drafter_of, small_target
from tests.support.packs import document, packed_with_budgets
from train.attention.choose import BACKENDS
from train.data.pack import PackDocument, make_pack
from train.data.stream import PackStream, StreamSettings, ViewDraws, sample_ages
from train.losses import choose
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision
from train.views.budgets import PAPER, ViewSampler
from train.views.recipe import FULL, View

VIEW = View(kind="topk_chunk", sink=2, recent=2, chunk=2)
IN_CACHE = View(kind="topk_chunk", sink=2, recent=2, chunk=2, positions="in_cache")
CELLS = [("ttt", "none"), ("ttt", "hybrid"), ("blockwise", "kv"), ("blockwise_shifted", "hidden+vocab")]
CELLS.append(("blockwise_pairs", "hidden"))
CELLS.append(pytest.param(("ttt", "queries+constant"), marks=pytest.mark.slow))
LOSSES = {
    "kl": LossRecipe(kl=1),
    "ce_greedy": LossRecipe(ce_greedy=1),
    "lk_lambda": LossRecipe(lk_lambda=1),
    "expected_length": LossRecipe(kl=0.1, expected_length=1),
}


@pytest.fixture(scope="module")
def target():
    return small_target(dtype=torch.float64)


def objective(target, drafter, loss, view=VIEW, view_weights=(1.0,), detach=False, dpace=False):
    weight_J = None if dpace else 0.8 ** torch.arange(drafter.config.draft_length)
    supervision = Supervision(loss, weight_J, 7, view, view_weights, detach)
    return Objective(drafter, target.frozen_head, BACKENDS["reference"], supervision)


def gradients(value, drafter):
    found = torch.autograd.grad(value, list(drafter.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, drafter.parameters())]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("view,dpace", [(VIEW, False), (IN_CACHE, False), (VIEW, True)], ids=["absolute", "in cache", "dpace"])
def test_the_loss_is_the_weighted_sum_of_its_views(target, cell, loss, view, dpace):
    """One forward over three views against three forwards of one view each, value and gradient, in float64."""
    drafter = drafter_of(target, *cell, layers=2)
    weights = [1.0, 0.25, 0.7]
    budgets = [FULL, 10, 7]
    together = objective(target, drafter, LOSSES[loss], view, weights, dpace=dpace)
    alpha_VJ = torch.linspace(0.1, 0.9, 3 * together.slots, dtype=torch.float64).view(3, -1)
    together.alpha_VJ = alpha_VJ
    pack = packed_with_budgets(target, budgets)
    outcome = together(pack, together.weight_sums(pack))
    found = gradients(outcome.share, drafter)
    parts = []
    for v, budget in enumerate(budgets):
        alone = objective(target, drafter, LOSSES[loss], view, dpace=dpace)
        alone.alpha_VJ = alpha_VJ[v : v + 1]
        one = packed_with_budgets(target, [budget])
        parts.append(alone(one, alone.weight_sums(one)))
        for mine, theirs in zip((outcome.loss, outcome.overlap, outcome.match), parts[-1][2:5]):
            torch.testing.assert_close(mine[v], theirs[0])
    expected = sum(w * part.share for w, part in zip(weights, parts))
    torch.testing.assert_close(outcome.share, expected, rtol=1e-6, atol=1e-8)  # a share passes through float32 on its way
    for mine, theirs in zip(found, gradients(expected, drafter)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    assert (outcome.loss[0] - outcome.loss[2]).abs().max() > 1e-3  # the views differ


FULL_CELLS = [*CELLS, *(("ttt", reuse) for reuse in ("hidden", "kv+projected_rope", "kv+head_concat", "queries"))]


@pytest.mark.parametrize("cell", FULL_CELLS)
@pytest.mark.parametrize("kind", ["sink_recent", "topk_chunk", "h2o", "snapkv"])
def test_a_budget_at_or_above_the_context_is_the_full_view(target, cell, kind):
    drafter = drafter_of(target, *cell, layers=2)
    keys = {"topk_chunk": {"sink": 2, "recent": 2, "chunk": 2}, "snapkv": {"recent": 3}}.get(kind, {})
    plain = packed_with_budgets(target, [FULL])
    plain.budget_VN = None
    with torch.no_grad():
        expected = objective(target, drafter, LossRecipe(kl=1), view=None).logits(plain)
        for positions in ("absolute", "in_cache"):
            view = View(kind=kind, positions=positions, **keys)
            pack = packed_with_budgets(target, [[17, FULL, 8], [26, FULL, 8]])
            found = objective(target, drafter, LossRecipe(kl=1), view).logits(pack)
            for enough in found[:2]:
                torch.testing.assert_close(enough, expected, rtol=1e-6, atol=1e-6)
            assert (found[2] - expected).abs().nan_to_num().max() > 1e-3  # a small one is not


def test_the_teacher_is_asked_once_for_all_views(target, monkeypatch):
    """And for the slots of all anchors that it serves; twice only where a chunk ends between its rows."""
    drafter = drafter_of(target, "ttt", "kv")
    asked = []
    monkeypatch.setattr(
        choose,
        "reference_loss",
        lambda loss, chunk, learns, of=choose.reference_loss: asked.append(len(chunk.target_TV)) or of(loss, chunk, learns),
    )
    for budgets, weights in (([FULL], [1.0]), ([FULL, 8, 9, 10], [1.0, 0.1, 0.1, 0.1])):
        asked.clear()
        pack = packed_with_budgets(target, budgets)
        objective(target, drafter, LossRecipe(kl=1), view_weights=weights)(pack)
        anchor, slot = pack.valid(4).nonzero(as_tuple=True)
        teachers = len((pack.anchor_N[anchor] + slot).unique())
        assert teachers <= sum(asked) < teachers + len(asked)


@pytest.mark.parametrize("cell,names", [(("ttt", "none"), "qkv"), (("blockwise", "kv+projected_rope"), "")])
def test_detached_memory_teaches_nothing(target, cell, names):
    """As published: projections learn from draft rows alone. A projection of the target's K/V, which makes memory only, learns
    nothing at all."""
    drafter = drafter_of(target, *cell)
    pack = packed_with_budgets(target, [FULL, 8])
    found = []
    for detach in (False, True):
        one = objective(target, drafter, LossRecipe(kl=1), view_weights=[1.0, 0.5], detach=detach)
        found.append(dict(zip((n for n, _ in drafter.named_parameters()), gradients(one(pack).share, drafter))))
    differs = {name for name in found[0] if (found[0][name] - found[1][name]).abs().max() > 1e-9}
    if names:
        assert {f"layers.0.branches.tokens.{n}.weight" for n in "kv"} <= differs
        assert "layers.0.branches.tokens.q.weight" not in differs  # a layer alone: queries make no memory
        assert found[1]["layers.0.branches.tokens.k.weight"].abs().max() > 1e-6  # the draft rows' own keys still do
    else:
        assert found[0]["target_kv.0.k.weight"].abs().max() > 1e-6 and found[1]["target_kv.0.k.weight"].abs().max() == 0


# Which budgets


def sampler_of(sampler, **more):
    return ViewSampler(
        **{"full": 1.0, "sparse": 0.5, "sampler": sampler, "smallest": 256, "largest": 2048, "draws": 2, "seed": 0} | more
    )


def test_paper_draws_one_budget_a_step_with_the_published_chances():
    drawn = [sampler_of("paper").budgets(step, "a") for step in range(4000)]
    assert all(one[0] == FULL and len(one) == 2 for one in drawn)
    found = Counter(one[1] for one in drawn)
    for budget, chance in PAPER.items():
        assert found[budget] / 4000 == pytest.approx(chance, abs=0.03)
    assert [sampler_of("paper").budgets(step, "b") for step in range(50)] == drawn[:50]  # one for all documents of a step
    assert sampler_of("paper").weights == [1.0, 0.5] and sampler_of("paper").judged == [FULL, 256, 512, 1024, 2048]


def test_sandwich_draws_the_smallest_and_log_uniform_ones():
    drawn = [sampler_of("sandwich").budgets(step, id) for step in range(500) for id in "abc"]
    assert all(one[:2] == [FULL, 256] and len(one) == 4 for one in drawn)
    logs = np.log2(np.array([one[2:] for one in drawn]).flatten() / 256)
    assert logs.min() >= -0.01 and logs.max() <= 3.01
    np.testing.assert_allclose(np.histogram(logs, bins=3, range=(0, 3))[0] / len(logs), 1 / 3, atol=0.03)
    other = sampler_of("sandwich", seed=1)
    assert len({tuple(b.budgets(s, i)) for b in (sampler_of("sandwich"), other) for s in (1, 2) for i in "ab"}) == 8
    assert sampler_of("sandwich").budgets(7, "a") == sampler_of("sandwich").budgets(7, "a")
    assert sampler_of("sandwich").weights == pytest.approx([1.0, 0.5 / 3, 0.5 / 3, 0.5 / 3])
    assert sampler_of("fixed", full=0.0).budgets(3, "a") == [256] and sampler_of("fixed", full=0.0).weights == [0.5]


def test_packs_carry_the_budgets_of_their_step(cache):
    """Whoever reads a pack, and whenever: a rank of two, one process, a resumed run."""
    reader = CacheReader(cache)
    sandwich = sampler_of("sandwich", smallest=20, largest=90)
    views = ViewDraws(sandwich.budgets, lambda id, anchors, number: sample_ages(id, anchors, 5, 3, number))
    settings = StreamSettings(256, 4, 3, views=views, batch=3)
    stream = lambda: PackStream(reader, np.arange(len(reader)), ["input_ids", "loss_mask", "last_hidden"], settings)
    packs = [stream()[number] for number in range(9)]
    for number, pack in enumerate(packs):
        document_N = pack.places.document[pack.anchor_N].tolist()
        expected = [sandwich.budgets(number // 3, pack.names[d]) for d in document_N]
        assert pack.budget_VN.T.tolist() == expected and len(pack.age_N) == len(pack.anchor_N)
        again = stream()[number]
        assert torch.equal(again.budget_VN, pack.budget_VN) and torch.equal(again.age_N, pack.age_N)
        assert (pack.age_N < 5).all() and (pack.places.position[pack.anchor_N] - pack.age_N >= 1).all()
    assert len({tuple(p.budget_VN[-1].tolist()) for p in packs}) == 9
    ages = sample_ages("a", np.full(9000, 1000), 256, 0, 0)
    assert ages.min() == 0 and ages.max() == 255 and abs(ages.mean() - 127.5) < 5


def test_a_pack_without_anchors_has_as_many_views_as_others(target):
    """So that every rank runs the same forwards."""
    none = np.array([], dtype=np.int64)
    first = PackDocument("a", document(target, 17, 1), none, budgets=[FULL, 8], ages=none)
    second = PackDocument("b", document(target, 26, 2), none, budgets=[FULL, 9], ages=none)
    pack = make_pack([first, second])
    assert pack.budget_VN.tolist() == [[FULL], [8]] and pack.age_N.tolist() == [0]
    for view in (VIEW, IN_CACHE):
        outcome = objective(target, drafter_of(target, "ttt", "kv"), LossRecipe(kl=1), view, [1.0, 0.5])(pack)
        assert outcome.share.item() == 0 and outcome.loss.shape[0] == 2
