"""Drafters of queries alone (`reuse.own_kv=false`): what they have, where they start, what they learn, what is measured of them.

That training is the decode loop is in test_alignment.py; attention in test_attention.py; what decoding keeps in tests/eval.

Shapes: R slots that count, H query heads, D head size.
"""

import pytest
import torch

from common import cli
from data_prep.cache.reader import CacheReader
from tests.support.alignment import measure
from tests.support.models import BESIDE_KV, drafter_of, own_sized, random_weights, small_target
from tests.support.packs import REFERENCE, objective_of, packed
from train.attention.visibility import Places
from train.build import check_training, drafter_config
from train.drafter import warm_start as exchange
from train.drafter.build import load_drafter
from train.losses.recipe import LossRecipe
from train.measure import diagnostics, pictures
from train.objectives.align import Watch, query_error
from train.recipe import TrainRecipe

KL = LossRecipe(kl=1)
SAME = 1e-4  # as tests/train/test_alignment.py says
REUSES = ("queries", "queries+constant", "queries+head_concat")


@pytest.fixture(scope="module")
def target():
    return small_target()


@pytest.fixture(scope="module")
def exact():
    return small_target(dtype=torch.float64)


# What they have.


@pytest.mark.parametrize("reuse", REUSES)
def test_a_layer_has_queries_and_no_keys(exact, reuse):
    """The query projection starts as the target's, halved for token and feature."""
    drafter = drafter_of(exact, "ttt", reuse)
    branch = {name for name, _ in drafter.named_parameters() if ".branches." in name}
    assert branch == {f"layers.0.branches.kv.{name}.weight" for name in ("q", "o", "q_norm")}
    sources = drafter.config.layers_of(2)
    weights = [exact.layer_weights(i) for i in sources]
    q = torch.cat([w["q.weight"] * w["input_norm.weight"] for w in weights])
    torch.testing.assert_close(drafter.layers[0].branches["kv"].q.weight, torch.cat([q, q], dim=1) / 2)


def test_where_rows_sit_by_hand(target):
    """Step j of anchor a at a + j - 1, or at a - 1, the last position that the target has processed."""
    advancing, constant = (drafter_of(target, "ttt", reuse).config for reuse in ("queries", "queries+constant"))
    anchor_N = torch.tensor([1, 7])
    assert [advancing.row_position(anchor_N, j - 1).tolist() for j in (1, 2, 3)] == [[1, 7], [2, 8], [3, 9]]
    assert [constant.row_position(anchor_N, j - 1).tolist() for j in (1, 2, 3)] == [[0, 6]] * 3


def test_known_tokens_ask_from_where_their_rows_would_sit(target):
    """What views choose by: the query of a known token is that of its first step, which sits one position earlier where positions
    are constant."""
    advancing, constant = (drafter_of(target, "ttt", reuse) for reuse in ("queries", "queries+constant"))
    pack = packed(target)
    memory = objective_of(target, advancing, KL).remember(pack)
    token_RE = advancing.embed(pack.ids_P, target.frozen_head)

    def asked(drafter, shift):
        places = Places(pack.places.document, pack.places.position + shift)
        with torch.no_grad():
            return drafter.known_queries(token_RE, memory.feature, places, memory, REFERENCE)[0]["kv"]

    torch.testing.assert_close(asked(constant, 1), asked(advancing, 0))
    assert (asked(constant, 0) - asked(advancing, 0)).abs().max() > 1e-2


@pytest.mark.parametrize("reuse", REUSES)
def test_a_drafter_comes_back_from_its_folder(target, tmp_path, reuse):
    drafter = random_weights(drafter_of(target, "ttt", reuse))
    drafter.save_pretrained(tmp_path)
    loaded = load_drafter(tmp_path)
    assert loaded.config == drafter.config and not loaded.config.own_kv
    with torch.no_grad():
        assert torch.equal(*(objective_of(target, one, KL).logits(packed(target)) for one in (drafter, loaded)))


OTHER_KINDS = {
    "own sizes": lambda target: own_sized(target, "ttt", "queries+constant", BESIDE_KV, layers=2),
    "vocabulary and norms": lambda target: drafter_of(
        target, "ttt", "queries+constant", layers=2, draft_vocab=8, own_head=True, fc_norm=True, norm_output=True
    ),
    "scaled positions": lambda target: drafter_of(target, "ttt", "queries", layers=2, rope_factor=3.0),
    "queries without a norm": lambda target: drafter_of(target, "ttt", "queries", layers=2, qk_norm=False),
    "side by side, constant": lambda target: drafter_of(target, "ttt", "queries+head_concat", constant_positions=True),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_training_forward_is_decode_loop_whatever_else_they_have(target, kind):
    found = measure(target, OTHER_KINDS[kind](target), temperature=1.0)
    assert not found.other_vocabulary and found.worst < SAME and found.refused >= 5 and found.kept >= 1


# Where they start.


def test_they_start_from_drafters_with_keys_and_back(exact, tmp_path):
    """All weights of the one have a counterpart in the other; keys and values, and their norm, stay as they were."""
    with_keys = random_weights(drafter_of(exact, "ttt", "hybrid+cross_only"))
    alone = random_weights(drafter_of(exact, "ttt", "queries"), seed=4)
    for name, one in (("keys", with_keys), ("alone", alone)):
        one.save_pretrained(tmp_path / name)
    again = random_weights(drafter_of(exact, "ttt", "queries+constant"), seed=5)
    exchange.check_warm_start(str(tmp_path / "keys"), again.config)
    taken, left = exchange.warm_start(again, str(tmp_path / "keys"), exact.frozen_head)
    assert left == [] and all(torch.equal(again.state_dict()[name], with_keys.state_dict()[name]) for name in taken)
    again = random_weights(drafter_of(exact, "ttt", "hybrid+cross_only"), seed=5)
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    exchange.check_warm_start(str(tmp_path / "alone"), again.config)
    taken, left = exchange.warm_start(again, str(tmp_path / "alone"), exact.frozen_head)
    assert set(left) == {f"layers.0.branches.kv.{name}.weight" for name in ("k", "v", "k_norm")}
    assert set(taken) == set(alone.state_dict())
    assert all(torch.equal(again.state_dict()[name], before[name]) for name in left)


# What is measured of them, and what supervises their queries.


def asking_what_the_target_asks(target, **options):
    """A drafter whose every query is that of the target's first layer, which reads embeddings and nothing else: of a row's token
    and feature its projection reads the token."""
    drafter = drafter_of(target, "ttt", "queries", target_layers=[0], **options)
    with torch.no_grad():
        weight = drafter.layers[0].branches["kv"].q.weight
        size = weight.shape[1] // 2
        weight[:, :size] *= 2
        weight[:, size:] = 0
    return drafter


def test_queries_are_compared_at_the_row_s_position_and_the_oracle_asks_at_the_teacher_s(exact):
    """Cosine one, whether positions advance or not. Advancing, they are where the target asks: equal maps over what both see, and
    the oracle changes nothing. Where they do not, maps differ, and the oracle drafts as the advancing drafter."""
    pack = packed(exact)
    found = {}
    for constant in (False, True):
        drafter = asking_what_the_target_asks(exact, constant_positions=constant)
        found[constant] = diagnostics.diagnose(objective_of(exact, drafter, KL), [pack])
        queries = found[constant]["queries"]
        assert queries["layer0.cosine"] == pytest.approx([1.0] * 4, abs=1e-6)
        assert found[constant]["attention"] == {"layer0.kv.draft_mass": [0.0] * 4}
        assert min(queries["layer0.target_mass_since_anchor"]) > 1e-3  # what they have no keys for
    assert found[False]["queries"]["layer0.map_kl"] == pytest.approx([0.0] * 4, abs=1e-5)
    assert min(found[True]["queries"]["layer0.map_kl"]) > 1e-4
    joint = {(c, n): kinds["sampled"]["joint"] for c, one in found.items() for n, kinds in one["acceptance"].items()}
    assert joint[False, "oracle_queries"] == pytest.approx(joint[False, "trained"], abs=1e-6)
    assert joint[True, "oracle_queries"] == pytest.approx(joint[False, "trained"], abs=1e-6)
    assert joint[True, "trained"] != pytest.approx(joint[False, "trained"], abs=1e-4)
    assert joint[True, "zero_memory"] != pytest.approx(joint[True, "trained"], abs=1e-3)


@pytest.mark.parametrize("constant", [False, True])
def test_query_align_is_zero_at_the_target_s_own_queries_alone(exact, constant):
    """Rotated to where the row sits: with the other kind of positions the same queries are wrong."""
    pack = packed(exact)
    drafter = asking_what_the_target_asks(exact, constant_positions=constant)
    objective = objective_of(exact, drafter, KL)
    with torch.no_grad(), Watch(drafter) as watch:
        outcome = objective(pack)
    assert float(query_error(watch, drafter, pack, outcome.valid)) < 1e-9
    object.__setattr__(drafter.config, "constant_positions", not constant)
    assert float(query_error(watch, drafter, pack, outcome.valid)) > 0.1


@pytest.mark.parametrize("weight", [0.1, 1, 10])
@pytest.mark.parametrize("reuse", ["queries+constant", pytest.param("queries+head_concat", marks=pytest.mark.slow)])
def test_query_align_trains_at_any_weight(exact, reuse, weight):
    """Of a random drafter the loss falls, and of its terms that of the queries, which every weight of the projection feels."""
    pack = packed(exact)
    drafter = random_weights(drafter_of(exact, "ttt", reuse))
    objective = objective_of(exact, drafter, LossRecipe(kl=1, query_align=weight))
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2, weight_decay=0)
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        outcome = objective(pack, objective.weight_sums(pack))
        outcome.share.backward()
        assert all(p.grad.isfinite().all() for p in drafter.parameters())
        assert drafter.layers[0].branches["kv"].q.weight.grad.abs().max() > 0
        optimizer.step()
        seen.append((outcome.share.item(), outcome.terms_T[3].item()))
    assert seen[-1][0] < seen[0][0] and seen[-1][1] < seen[0][1]


@pytest.mark.parametrize("reuse", REUSES)
def test_gradients_are_of_queries_alone(exact, tmp_path, reuse):
    """And the picture of them, which has no bars of keys and values."""
    drafter = drafter_of(exact, "ttt", reuse)
    objective = objective_of(exact, drafter, KL)
    found = diagnostics.diagnose(objective, [packed(exact)] * 2)
    objective(packed(exact)).share.backward()
    assert all(p.grad.abs().max() > 0 for p in drafter.parameters())
    found["gradients"] = diagnostics.gradients(drafter, 3)
    assert found["gradients"].keys() == {"draft_rows", "layer0.kv"}
    assert found["gradients"]["layer0.kv"].keys() == {"rank_q"} and found["gradients"]["layer0.kv"]["rank_q"] > 1
    assert list(pictures._bars(found)) == ["Effective rank of the gradients"]
    pictures.draw(found, tmp_path / "picture.png")


# What a recipe makes of them.


def test_the_experiment_is_what_it_says(cache):
    compose = lambda *words: cli.compose("train", TrainRecipe, ["experiment=query_only", f"cache.dir={cache}", *words])
    manifest = CacheReader(cache).manifest
    check_training(compose())
    config = drafter_config(compose(), manifest)
    assert (config.objective, config.branches, config.source, config.own_kv) == ("ttt", ["kv"], "native", False)
    assert config.reads_in_place and not config.constant_positions
    assert drafter_config(compose("objective.positions=constant"), manifest).constant_positions
    assert drafter_config(compose("drafter.qk_norm=false"), manifest).qk_norm is False  # no keys are normed otherwise
    check_training(compose("reuse.own_kv=true"))
    assert drafter_config(compose("reuse.own_kv=true"), manifest).own_kv
    assert not drafter_config(compose("reuse.own_kv=true", "reuse.source=head_concat"), manifest).reads_in_place
