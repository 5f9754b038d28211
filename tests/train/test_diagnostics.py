"""The diagnostics, each against a case whose answer is known, or against plain autograd."""

import math

import numpy as np
import pytest
import torch

from tests.support.models import drafter_of, from_layer_zero, small_target
from tests.support.packs import document, objective_of, packed
from train.data.pack import PackDocument, make_pack
from train.losses.recipe import LossRecipe
from train.measure import acceptance, diagnostics, pictures
from train.objectives.align import Watch

KL = LossRecipe(kl=1)


@pytest.fixture(scope="module")
def target():
    return small_target(dtype=torch.float64)


def diagnosed(target, drafter, pack):
    return diagnostics.diagnose(objective_of(target, drafter, KL), [pack])


def test_the_target_s_own_layer_asks_what_the_target_asks(target):
    """A ttt drafter that is the target's first layer: equal queries and equal attention, the prefix from memory and the tokens
    since the anchor from its own rows, whose keys are what the target's will be. Oracle queries change nothing."""
    found = diagnosed(target, from_layer_zero(target, "ttt"), packed(target))
    queries = found["queries"]
    assert queries["layer0.cosine"] == pytest.approx([1.0] * 4, abs=1e-6)
    assert queries["layer0.map_kl"] == pytest.approx([0.0] * 4, abs=1e-5)
    assert queries["layer0.output_error"] == pytest.approx([0.0] * 4, abs=1e-5)
    assert queries["layer0.target_mass_since_anchor"] == pytest.approx(found["attention"]["layer0.kv.draft_mass"], abs=1e-5)
    accepted = found["acceptance"]
    assert accepted["oracle_queries"]["sampled"]["joint"] == pytest.approx(accepted["trained"]["sampled"]["joint"], abs=1e-6)
    assert accepted["zero_memory"]["sampled"]["joint"] != pytest.approx(accepted["trained"]["sampled"]["joint"], abs=1e-3)
    assert accepted["other_memory"]["sampled"]["joint"] != pytest.approx(accepted["trained"]["sampled"]["joint"], abs=1e-3)


@pytest.mark.parametrize("objective", ["ttt", "blockwise", "blockwise_shifted"])
def test_wrong_queries_are_noticed_and_the_oracle_repairs_them(target, objective):
    """Queries turned around: the cosine falls, and with the oracle's the output is that of any other wrong queries: its own no
    longer matter."""
    right, wrong = from_layer_zero(target, objective), from_layer_zero(target, objective)
    branch = wrong.layers[0].branches["kv"]
    with torch.no_grad():
        branch.q.weight.copy_(branch.q.weight.flip(0))
    pack = packed(target)
    one, other = diagnosed(target, right, pack), diagnosed(target, wrong, pack)
    if objective == "ttt":
        assert max(other["queries"]["layer0.cosine"]) < 0.7 and min(other["queries"]["layer0.map_kl"]) > 1e-2
    joint = lambda found, name: found["acceptance"][name]["sampled"]["joint"]
    assert joint(one, "trained") != pytest.approx(joint(other, "trained"), abs=1e-4)
    if objective != "blockwise":  # in a same-slot block slot 0 drafts nothing and keeps its own queries
        assert joint(one, "oracle_queries") == pytest.approx(joint(other, "oracle_queries"), abs=1e-6)


def test_attention_on_draft_keys_by_hand(target):
    """Equal scores everywhere: of an anchor at a (document start at 0) a keys are memory and j are steps."""
    drafter = drafter_of(target, "ttt", "kv")
    with torch.no_grad():
        drafter.layers[0].branches["kv"].q.weight.zero_()
    pack = make_pack([PackDocument("a", document(target, 20, 1), np.array([4, 9]))])
    found = diagnosed(target, drafter, pack)["attention"]["layer0.kv.draft_mass"]
    assert found == pytest.approx([(j / (4 + j) + j / (9 + j)) / 2 for j in (1, 2, 3, 4)], abs=1e-6)


def test_the_control_other_memory_reads_another_document_at_the_same_positions(target):
    pack = packed(target)
    other = diagnostics._others(pack, pack)
    values = pack.states.value[1]
    places = pack.places
    for p in range(len(pack.ids_P)):
        length, begin = (26, 17) if places.document[p] == 0 else (17, 0)
        torch.testing.assert_close(other.value[1][p], values[begin + int(places.position[p]) % length])
    alone = make_pack([PackDocument("a", document(target, 20, 1), np.array([4]))])
    assert diagnostics._others(alone, alone) is None  # nobody else is there: the control is left out
    assert "other_memory" not in diagnosed(target, drafter_of(target, "ttt", "kv"), alone)["acceptance"]
    torch.testing.assert_close(diagnostics._others(alone, pack).value[1], values[:20])


def test_gate_figures_equal_those_of_a_constant_gate(target):
    """A gate of constant openness, and the share of the output that passes it."""
    drafter = drafter_of(target, "blockwise", "hybrid")
    (fuse,) = drafter.fusions
    with torch.no_grad():
        fuse.gate.weight.zero_(), fuse.gate.bias.fill_(math.log(0.2 / 0.8)), fuse.delta.weight.copy_(torch.eye(32))
    kept = []
    handle = fuse.register_forward_hook(lambda module, inputs, output: kept.append(inputs))
    found = diagnosed(target, drafter, packed(target))["gate"]["layer0"]
    handle.remove()
    n, o = kept[0]
    assert found["mean"] == pytest.approx(0.2) and found["quantiles"] == pytest.approx([0.2] * 5)
    assert found["share"] == pytest.approx(float((0.2 * (o - n)).norm(dim=1).div(n.norm(dim=1)).mean()), rel=1e-5)


def test_effective_rank_by_hand():
    """Equal singular values: their number. One: one. (3, 1): exp of the entropy of (.75, .25)."""
    assert diagnostics.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert diagnostics.effective_rank(torch.ones(4, 6)) == pytest.approx(1, abs=1e-4)
    assert diagnostics.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(0.562335), abs=1e-5)
    assert diagnostics.effective_rank(torch.zeros(3, 3)) == 0
    for shape in ((20, 50), (50, 20)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        p = torch.linalg.svdvals(matrix.double())
        p = p / p.sum()
        assert diagnostics.effective_rank(matrix) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-6)


def test_gradients_are_those_of_a_plain_backward(target):
    drafter = drafter_of(target, "ttt", "hybrid")
    outcome = objective_of(target, drafter, KL)(packed(target))
    q, k = (getattr(drafter.layers[0].branches["kv"], n).weight for n in "qk")
    expected = [g.square().mean().sqrt() for g in torch.autograd.grad(outcome.share, (q, k))]
    objective_of(target, drafter, KL)(packed(target)).share.backward()
    found = diagnostics.gradients(drafter, int(outcome.valid.sum()))
    assert found["layer0.kv"]["k_over_q"] == pytest.approx(float(expected[1] / expected[0]), rel=1e-5)
    assert found["layer0.fuse"]["delta_norm"] == pytest.approx(float(drafter.fusions[0].delta.weight.grad.norm()), rel=1e-5)
    assert found["draft_rows"] == int(outcome.valid.sum())


def test_watching_a_drafter_does_not_change_its_results(target):
    for cell in (("ttt", "hybrid"), ("blockwise", "kv")):
        drafter = drafter_of(target, *cell, layers=2)
        pack = packed(target)
        objective = objective_of(target, drafter, KL)
        before = acceptance.counts(objective(pack))
        with Watch(drafter) as watch:
            during = acceptance.counts(objective(pack))
        assert torch.equal(before, during) and watch.calls
        assert torch.equal(before, acceptance.counts(objective(pack)))
        assert not any(branch._forward_pre_hooks for layer in drafter.layers for branch in layer.branches.values())


def test_the_picture_has_a_panel_for_each_diagnosis_found(target, tmp_path):
    drafter = drafter_of(target, "ttt", "hybrid")
    objective = objective_of(target, drafter, KL)
    pack = packed(target)
    found = diagnostics.diagnose(objective, [pack, pack])
    objective(pack).share.backward()
    found["gradients"] = diagnostics.gradients(drafter, 3)
    sizes = []
    for name, shown in (("all", found), ("some", found | {"gate": {}, "queries": {}, "gradients": {}})):
        pictures.draw(shown, tmp_path / f"{name}.png")
        sizes.append((tmp_path / f"{name}.png").stat().st_size)
    assert sizes[0] > sizes[1] > 10_000 and len(list(tmp_path.iterdir())) == 2
