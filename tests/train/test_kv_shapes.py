"""K/V that are not as the drafter's own architecture says: rotary embeddings of a part of a head, heads of other sizes from layer
to layer, and windows.

Targets are miniatures of families that have them. `from_layer_zero` makes of a draft layer the target's own first layer, so that
the target says what it must give.

Shapes: P positions of a pack, N anchors, J steps or slots, B requests, T rows of each, L places of a cache, E hidden size, G
key/value heads, D head size.
"""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.phi import modeling_phi

from common import cli
from common.errors import UserError
from data_prep.decoding import attention
from data_prep.decoding.attention import Reading, over_span
from data_prep.target.architecture import KVLayer, read_layers
from data_prep.target.target import Target
from eval.engine.drafting import StaticTrained
from eval.engine.request import Stops
from eval.oracle.decode import decode
from eval.oracle.drafting import Trained
from tests.support.alignment import measure
from tests.support.engines import engine_of, exact_target, ragged, triples
from tests.support.families import configuration, miniature
from tests.support.models import drafter_of, from_layer_zero, random_weights
from tests.support.packs import REFERENCE, cached, objective_of
from train.attention.choose import BACKENDS
from train.attention.visibility import known_rows
from train.build import attention as attention_of
from train.build import drafter_config
from train.data.pack import PackDocument, make_pack
from train.drafter.build import load_config
from train.drafter.layers import Rope
from train.losses.recipe import LossRecipe
from train.recipe import TrainRecipe

KL = LossRecipe(kl=1)
SAME = 1e-4
ANOTHER = 1e-3
LAYERS = (1, 2)  # whose K/V are captured


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Partial rotary embeddings; heads of two sizes, every second layer with a window; layers without a rotary embedding."""
    folder = tmp_path_factory.mktemp("miniatures")
    return {name: Target(str(miniature(name, folder))) for name in ("glm4", "gemma4_text_k_eq_v", "smollm3")}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A target of layers like the drafters', all of which read three positions, in float64."""
    folder = tmp_path_factory.mktemp("windowed")
    config = configuration("mistral")
    config.sliding_window = 3
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    target = Target(str(folder), dtype=torch.float64)
    assert target.kv_shapes[0].window == 3
    return target


def drafter_over(target, objective, reuse, **options):
    """A random drafter of two layers over the K/V of two layers, as they are."""
    shapes = [target.kv_shapes[layer] for layer in LAYERS]
    return random_weights(drafter_of(target, objective, reuse, layers=2, kv_shapes=shapes, start="random", **options))


# Rotary embeddings.


def test_a_part_of_a_head_is_rotated_as_phi_rotates_it():
    g = torch.Generator().manual_seed(0)
    x_PHD = torch.randn(9, 2, 16, generator=g, dtype=torch.float64).requires_grad_()
    other_PHD = x_PHD.detach().clone().requires_grad_()
    config = configuration("phi")
    config.head_dim = 16
    inv_freq = modeling_phi.PhiRotaryEmbedding(config).inv_freq
    assert len(inv_freq) == 4
    position_P = torch.arange(9) + 5
    found = Rope(position_P, inv_freq, 1.5, torch.float64)(x_PHD)
    angles = (position_P[:, None].float() * inv_freq).repeat(1, 2)
    cos, sin = (1.5 * angles.cos()).double()[None], (1.5 * angles.sin()).double()[None]
    part_1HPD = other_PHD[..., :8].transpose(0, 1)[None]
    turned = modeling_phi.apply_rotary_pos_emb(part_1HPD, part_1HPD, cos, sin)[0][0].transpose(0, 1)
    expected = torch.cat([turned, other_PHD[..., 8:]], dim=-1)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=g, dtype=torch.float64)
    mine, theirs = torch.autograd.grad(found, x_PHD, upstream)[0], torch.autograd.grad(expected, other_PHD, upstream)[0]
    torch.testing.assert_close(mine, theirs)
    assert (found[..., 8:] == x_PHD[..., 8:]).all() and not torch.allclose(found[..., :8], x_PHD[..., :8])


@pytest.mark.parametrize("name", ["glm4", "gemma4_text_k_eq_v", "smollm3"])
def test_keys_move_by_the_rotation_of_their_own_layer(targets, name):
    """Moving keys of a layer to other positions gives the keys that memory has there."""
    target = targets[name]
    drafter = drafter_over(target, "ttt", "kv")
    target.capture((0,), LAYERS)
    states = target.forward(torch.randint(3, 11, (1, 12), generator=torch.Generator().manual_seed(1))).map(lambda t: t[0])
    pack = make_pack([PackDocument("a", cached(target, list(range(3, 11))), np.array([2]))])
    there = replace(pack.places, position=pack.places.position + 100)
    here, moved = (drafter.remember(pack.states, places, None, places, REFERENCE).layers for places in (pack.places, there))
    for layer, (one, other) in enumerate(zip(here, moved)):
        by_PG = torch.full(one["kv"].key.shape[:2], 100)
        close(drafter.rotate(layer, "kv", one["kv"].key, by_PG), other["kv"].key)
    assert states.key[1].shape[1:] == here[0]["kv"].key.shape[1:]  # in place: the target's own heads


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 64}


@pytest.mark.parametrize("where", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_a_checkpoint_may_rotate_a_part_of_its_heads(where):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    fields = LLAMA | where | {"rope_parameters": rope | where.get("rope_parameters", {})}
    _, rotary = read_layers(fields, "x")
    assert rotary.inv_freq == pytest.approx([10000.0 ** (-i / 4) for i in range(4)])
    with pytest.raises(UserError, match="it rotates 24 of 16 dimensions"):
        read_layers(LLAMA | {"partial_rotary_factor": 1.5}, "x")


# Training and decoding are one function.

CELLS = [
    ("glm4", "ttt", "kv"),
    ("glm4", "blockwise", "hybrid"),
    ("gemma4_text_k_eq_v", "ttt", "kv"),
    ("gemma4_text_k_eq_v", "blockwise", "kv"),
    ("gemma4_text_k_eq_v", "ttt", "hybrid"),
    ("gemma4_text_k_eq_v", "blockwise", "kv+projected"),
    ("gemma4_text_k_eq_v", "ttt", "kv+projected_rope"),
    ("smollm3", "ttt", "kv"),
    ("glm4", "ttt", "queries"),
    ("gemma4_text_k_eq_v", "ttt", "queries"),
    ("gemma4_text_k_eq_v", "ttt", "queries+constant"),
]
QUICK = [("glm4", "ttt", "kv"), ("gemma4_text_k_eq_v", "blockwise", "kv"), ("gemma4_text_k_eq_v", "ttt", "queries+constant")]


@pytest.mark.parametrize(
    "name,objective,reuse", [pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.slow) for cell in CELLS]
)
def test_training_forward_is_decode_loop(targets, name, objective, reuse):
    found = measure(targets[name], drafter_over(targets[name], objective, reuse), temperature=1.0)
    assert not found.other_vocabulary and found.worst < SAME
    assert found.kept >= 5 and found.refused >= 5, found


def another_window(pack, drafter, change):
    """The training side's drafter reads one position more or less, or another rotary embedding."""
    object.__setattr__(drafter.config, "kv_shapes", [replace(shape, **change(shape)) for shape in drafter.config.kv_shapes])
    return pack


FAULTS = {
    "wider": lambda shape: {"window": shape.window and shape.window + 1},
    "none": lambda shape: {"window": None},
    "other angles": lambda shape: {"inv_freq": [1.1 * angle for angle in shape.inv_freq]},
}


@pytest.mark.parametrize(
    "objective,reuse",
    [("blockwise", "kv"), ("ttt", "queries+constant"), pytest.param("ttt", "queries", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_put_in_on_purpose_is_noticed(targets, fault, objective, reuse):
    target = targets["gemma4_text_k_eq_v"]
    drafter = drafter_over(target, objective, reuse)
    found = measure(target, drafter, tamper=lambda pack: another_window(pack, drafter, FAULTS[fault]), temperature=1.0)
    assert found.worst > ANOTHER


# Windows.


def text(target, length=20, capture=(0,)):
    target.capture((0, 1, 2), capture)
    tokens = torch.randint(3, 11, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    return make_pack([PackDocument("a", cached(target, tokens, capture=False), np.arange(1, length - 5))])


@pytest.mark.parametrize("window", [3, 2, 4, None])
def test_a_window_is_the_target_s_own(windowed, window):
    """Under ttt, over a text, a draft layer that is the target's first layer gives what that layer gives, at every anchor and
    step: over memory, and over rows that are more steps than the window holds. With a window of one more or less it does not."""
    shape = replace(windowed.kv_shapes[0], window=window)
    drafter = from_layer_zero(windowed, "ttt", kv_shapes=[shape])
    pack = text(windowed)
    with torch.no_grad():
        objective = objective_of(windowed, drafter, KL)
        found_NJE = objective.draft(pack, objective.remember(pack))
        place_NJ = pack.anchor_N[:, None] + torch.arange(found_NJE.shape[1])
        expected_NJE = drafter.norm(pack.states.hidden[0][place_NJ])
    wrong_NJ = (found_NJE - expected_NJE).abs().amax(-1) > 1e-6
    assert not wrong_NJ.any() if window == 3 else wrong_NJ.float().mean() > 0.9


def test_layers_of_one_window_share_what_a_backend_makes_of_it(targets):
    target = targets["gemma4_text_k_eq_v"]
    shapes = [target.kv_shapes[layer] for layer in (0, 1, 2)]
    assert [shape.window for shape in shapes] == [8, None, 8]
    drafter = drafter_of(target, "ttt", "hybrid", layers=3, kv_shapes=shapes, start="random")
    pack = text(target, capture=(0, 1, 2))
    memory = objective_of(target, drafter, KL).remember(pack)
    rows = known_rows(pack.places)
    first, second, third = drafter.visibility(rows, memory, rows)
    assert first["kv"] is third["kv"] and first["kv"] is not second["kv"]
    assert first["hidden"] is second["hidden"] is third["hidden"]
    assert second["kv"].window is None and first["hidden"].window is None


def test_rows_that_read_through_a_window_equal_their_definition():
    """Ragged requests, rows of a chain and of a block; a piece at a time."""
    g = torch.Generator().manual_seed(0)
    q, key, value = (torch.randn(3, n, h, 8, generator=g, dtype=torch.float64) for n, h in ((5, 4), (40, 2), (40, 2)))
    count_B = torch.tensor([30, 0, 4])
    for growing in (True, False):
        for window in (1, 3, 100):
            count_BT = count_B[:, None] + growing * torch.arange(5)
            first_BT = count_B[:, None] + torch.arange(5) + 1 - window
            hidden_BTL = (torch.arange(40) >= count_BT[..., None]) | (torch.arange(40) < first_BT[..., None])
            expected = attention._attend(q, key, value, hidden_BTL, 0.7)
            for piece in (256, 2):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(attention, "PIECE", piece)
                    for mine, theirs in zip(over_span(q, key, value, first_BT, count_BT, Reading(0.7, window)), expected):
                        torch.testing.assert_close(mine, theirs)


ENGINE = [
    ("ttt", "hybrid", 2),
    ("blockwise", "kv", 2),
    pytest.param("ttt", "queries", 2, marks=pytest.mark.slow),  # whose third and fourth step see nothing
    pytest.param("ttt", "queries+constant", 2, marks=pytest.mark.slow),
    pytest.param("ttt", "queries+head_concat", 1, marks=pytest.mark.slow),
    pytest.param("ttt", "kv", 2, marks=pytest.mark.slow),
    pytest.param("blockwise_causal", "kv+head_concat", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("objective,reuse,layers", ENGINE)
def test_the_engine_s_rounds_are_the_plain_loop_s(objective, reuse, layers):
    """The window is of the drafter alone: fewer positions than a draft has rows, so that these hide each other too."""
    target = exact_target()
    shapes = [replace(target.kv_shapes[layer], window=3) for layer in LAYERS[-layers if "concat" not in reuse else 0 :]]
    drafter = drafter_of(target, objective, reuse, layers=layers, kv_shapes=shapes)
    length = drafter.config.draft_length
    found = engine_of(target, StaticTrained(drafter, target.frozen_head), length, prefill_chunk=7).generate(
        ragged(), 24, [0, 1, 2, 3], Stops()
    )
    plain = Trained(drafter, target.frozen_head, REFERENCE)
    expected = [decode(target, plain, prompt, 24, 0.0, 0) for prompt in ragged()]
    assert [triples(one) for one in found] == [triples(one) for one in expected]
    kept, drafted = (sum(getattr(r, name) for g in found for r in g.rounds) for name in ("kept", "drafted"))
    assert 0 < kept < drafted


BORROWED = [(name, reuse) for name in ("gemma3_text", "glm4") for reuse in ("kv", "queries")] + [("mistral", "queries+constant")]


@pytest.mark.parametrize("name,reuse", [("mistral", "kv"), *(pytest.param(*c, marks=pytest.mark.slow) for c in BORROWED)])
def test_keys_of_a_target_with_windows_are_read_in_its_own_cache(tmp_path, name, reuse):
    """Where the cache holds them as drafters read them; the engine's rounds are the plain loop's in any case."""
    target = Target(str(miniature(name, tmp_path)), dtype=torch.float64)
    target.capture((0, 1, 2), LAYERS)
    drafter = drafter_over(target, "ttt", reuse)
    drafting = StaticTrained(drafter, target.frozen_head)
    engine = engine_of(target, drafting, drafter.config.draft_length, prefill_chunk=7)
    found = engine.generate(ragged(), 24, [0, 1, 2, 3], Stops())
    lent = name != "glm4"  # its neighbours turn together
    assert len(drafting.memory.borrowed) == 2 * lent and all((one.kv_bytes["kept"] == 0) == lent for one in found)
    plain = Trained(drafter, target.frozen_head, REFERENCE)
    for prompt, one in zip(ragged(), found):
        expected = decode(target, plain, prompt, 24, 0.0, 0)
        assert triples(one) == triples(expected) and one.tokens == expected.tokens
    assert sum(r.kept for g in found for r in g.rounds) > 0
    # A row reads no more of a layer than its window.
    windows = [target.kv_shapes[layer].window or 100 for layer in LAYERS]
    sizes = [2 * target.kv_shapes[layer].kv_heads * target.kv_shapes[layer].head_dim * 8 for layer in LAYERS]
    assert drafting.kv_bytes(40)["read"] == sum(size * min(40, window) for size, window in zip(sizes, windows))


# What a recipe and a cache make of it.


def manifest(shapes: dict[int, KVLayer], captured=(0, 1, 2)):
    """As far as a drafter's configuration asks: a target of three layers, of which `shapes` are not as its architecture says."""
    target = {
        "id": "x",
        "weights_hash": "0",
        "architecture": asdict(exact_target().architecture),
        "kv_shapes": {str(layer): asdict(shape) for layer, shape in shapes.items()},
    }
    layers = list(captured)
    return SimpleNamespace(
        target=target, hidden_layers=layers, kv_layers=layers, query_layers=[], tokenizer_hash="0", max_length=99
    )


def recipe(*words):
    return cli.compose("train", TrainRecipe, ["cache.dir=x", "target.device=cpu", *words])


@pytest.fixture(scope="module")
def usual():
    return exact_target().kv_shapes[1]


NATIVE = ["objective=ttt", "reuse=kv", "drafter.layers=2", "drafter.target_layers=[1,2]"]


def test_shapes_come_from_the_manifest_and_go_through_a_drafter_s_file(usual, tmp_path):
    narrow = replace(usual, window=5, head_dim=4)
    config = drafter_config(recipe(*NATIVE, "drafter.start=random"), manifest({2: narrow, 0: replace(usual, window=7)}))
    assert config.kv_shapes == [usual, narrow] and config.windowed
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path) == config
    # Of layers that are as the architecture says, nothing is written down.
    config = drafter_config(recipe(*NATIVE), manifest({0: replace(usual, window=7)}))
    assert config.kv_shapes is None and not config.windowed


QUERIES_ALONE = [*NATIVE, "reuse=hybrid", "reuse.fusion=cross_only", "reuse.own_kv=false"]


@pytest.mark.parametrize("source", [["reuse.source=native"], ["reuse.source=head_concat", "reuse.kv_layers=[1,2]"]])
def test_a_step_that_stands_beyond_a_window_is_refused(usual, source):
    """Step j sits at a + j - 1 and sees the last window - j of the keys before a: of five, four steps see some."""
    here = manifest(dict.fromkeys((1, 2), replace(usual, window=5)))
    words = [*QUERIES_ALONE, *source]
    with pytest.raises(UserError, match="step 5 would stand beyond the window of 5 positions of a layer that it reads; say obj"):
        drafter_config(recipe(*words, "objective.slots=5"), here)
    assert drafter_config(recipe(*words, "objective.slots=4"), here).windowed
    assert drafter_config(recipe(*words, "objective.slots=5", "objective.positions=constant"), here).constant_positions
    assert drafter_config(recipe(*words, "objective.slots=5", "reuse.own_kv=true"), here).windowed


def test_attention_is_chosen_by_what_the_draft_layers_read(usual):
    cpu = torch.device("cpu")
    words = [*NATIVE, "drafter.attention=flash"]
    assert attention_of(recipe(*words), cpu, drafter_config(recipe(*words), manifest({}))) is BACKENDS["flash"]
    with pytest.raises(UserError, match="attention=flash is for .* layers without a window"):
        attention_of(recipe(*words), cpu, drafter_config(recipe(*words), manifest({2: replace(usual, window=5)})))


def test_a_projection_reads_layers_of_other_sizes_each_rotated_as_it_is(targets):
    """The keys of memory, made by hand; a projection begins as the choice of the layer that is like the drafter."""
    target = targets["gemma4_text_k_eq_v"]
    sizes = [(target.kv_shapes[layer].kv_heads, target.kv_shapes[layer].head_dim) for layer in LAYERS]
    assert sizes == [(1, 32), (2, 16)] and target.architecture.head_dim == 32
    drafter = drafter_of(target, "ttt", "kv+projected", kv_shapes=[target.kv_shapes[i] for i in LAYERS], start="random")
    pack = text(target, capture=LAYERS)
    found = objective_of(target, drafter, KL).remember(pack).layers[0]["kv"]
    turned = [
        Rope(pack.places.position, torch.tensor(shape.inv_freq), shape.rope_scale, torch.float32)(pack.states.key[layer])
        for layer, shape in ((i, target.kv_shapes[i]) for i in LAYERS)
    ]
    close(found.key.flatten(1), torch.cat([key.flatten(1) for key in turned], dim=1) @ drafter.target_kv[0].k.weight.T)
    drafter.target_kv[0].k.weight.data.zero_()
    drafter.target_kv[0].start(2)
    assert torch.equal(drafter.target_kv[0].k.weight, torch.eye(32, 64))  # of the first layer, though the second is nearer
