"""Draft layers of sizes of their own (drafter.hidden_size, heads, kv_heads, head_dim, intermediate_size) beside a wider target.

Shapes: B requests, V vocabulary, E hidden size.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from common import cli
from common.errors import UserError
from data_prep.cache.reader import CacheReader
from data_prep.target.transformers_private import rotary_of
from eval.engine.drafting import StaticTrained
from eval.engine.request import Stops
from eval.engine.tree import TreeShape
from eval.oracle.decode import decode
from eval.oracle.drafting import Trained
from tests.support.alignment import measure
from tests.support.commands import SMALL, TRAIN, command
from tests.support.engines import REFERENCE, engine_of, exact_target, ragged, triples
from tests.support.models import BESIDE_KV, OWN_SIZES, drafter_of, own_sized, small_target
from tests.support.packs import objective_of, packed
from train.build import drafter_config
from train.drafter import warm_start as exchange
from train.drafter.build import load_drafter
from train.drafter.own_sizes import draft_architecture, plain_rope
from train.losses.recipe import LossRecipe
from train.recipe import TrainRecipe

KL = LossRecipe(kl=1)
SAME = 1e-4  # as tests/train/test_alignment.py says
# (objective, reuse, sizes)
CELLS = [
    ("ttt", "hidden", OWN_SIZES),
    ("ttt", "hidden+norms", OWN_SIZES),
    ("ttt", "none", OWN_SIZES),
    ("ttt", "hybrid+projected_rope", OWN_SIZES),
    ("ttt", "kv+head_concat", BESIDE_KV),
    ("blockwise", "hidden", OWN_SIZES),
    ("blockwise", "kv+projected_rope", OWN_SIZES),
    ("blockwise", "hybrid", BESIDE_KV),
    ("blockwise_pairs+markov", "hidden+vocab", OWN_SIZES),
    ("blockwise_shifted+gru", "hidden", OWN_SIZES),
]


@pytest.fixture(scope="module")
def target():
    return small_target()


@pytest.fixture(scope="module")
def exact():
    return exact_target()


@pytest.mark.parametrize("objective,reuse,sizes", CELLS, ids=lambda value: value if isinstance(value, str) else "")
def test_training_forward_is_decode_loop(target, objective, reuse, sizes):
    """Packed, greedily with one layer and at random with two."""
    greedy = measure(target, own_sized(target, objective, reuse, sizes))
    drawn = measure(target, own_sized(target, objective, reuse, sizes, layers=2), temperature=1.0)
    for found in (greedy, drawn):
        assert not found.other_vocabulary and found.worst < SAME and found.refused >= 5
    assert not greedy.other_tokens and not greedy.other_lengths
    assert drawn.kept >= 1


@pytest.mark.parametrize("objective,reuse", [("ttt", "hidden"), ("blockwise", "kv+projected_rope")])
def test_states_that_are_shifted_are_noticed(target, objective, reuse):
    """Negative control of the test above."""

    def shifted(pack):
        pack.states = pack.states.map(lambda t: torch.roll(t, -1, 0))
        return pack

    assert measure(target, own_sized(target, objective, reuse), tamper=shifted).worst > 10 * SAME


@pytest.mark.parametrize("objective,reuse,layers,tree", [
    ("ttt", "hidden+norms", 2, None),
    ("ttt", "hidden", 1, TreeShape(breadth=2, depth=3)),
    ("blockwise_shifted+gru", "hidden+vocab", 1, None),
])  # fmt: skip
def test_the_engine_does_what_the_plain_loop_does(exact, objective, reuse, layers, tree):
    drafter = own_sized(exact, objective, reuse, layers=layers)
    prompts = ragged()
    engine = engine_of(exact, StaticTrained(drafter, exact.frozen_head, tree=tree), 6 if tree else drafter.config.draft_length)
    found = engine.generate(prompts, 24, [0, 1, 2, 3], Stops())
    for prompt, one in zip(prompts, found):
        plain = decode(exact, Trained(drafter, exact.frozen_head, REFERENCE), prompt, 24, 0.0, 0)
        assert one.tokens == plain.tokens
        assert tree or triples(one) == triples(plain)
    assert any(r.kept for one in found for r in one.rounds)


SAVED = [("ttt", "hidden"), ("blockwise", "kv+projected_rope"), ("blockwise+markov", "hidden")]
LEARNED = [("ttt", "hidden"), ("ttt", "none"), ("blockwise", "hidden"), ("blockwise_pairs", "hidden")]


@pytest.mark.parametrize("objective,reuse", SAVED)
def test_a_drafter_comes_back_from_its_folder(target, tmp_path, objective, reuse):
    drafter = own_sized(target, objective, reuse)
    drafter.save_pretrained(tmp_path)
    loaded = load_drafter(tmp_path)
    assert loaded.config == drafter.config
    with torch.no_grad():
        mine, theirs = (objective_of(target, one, KL).logits(packed(target)) for one in (drafter, loaded))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("objective,reuse", LEARNED)
def test_the_projections_learn(target, objective, reuse):
    drafter = own_sized(target, objective, reuse)
    objective_of(target, drafter, KL)(packed(target)).share.backward()
    for name in ("from_target.weight", "to_target.weight"):
        assert drafter.get_parameter(name).grad.abs().max() > 0, name


def test_what_is_trained_has_the_sizes_that_are_named(target):
    drafter = own_sized(target, "blockwise_pairs+markov", "hidden+norms")
    shapes = {name: tuple(p.shape) for name, p in drafter.named_parameters()}
    expected = {
        "from_target.weight": (24, 32),
        "to_target.weight": (32, 24),
        "fc.weight": (24, 3 * 32),
        "fc_norm.0.weight": (32,),
        "mask.weight": (1, 24),
        "mask_hidden.weight": (1, 3 * 32),
        "layers.0.branches.hidden.q.weight": (6 * 4, 2 * 24),
        "layers.0.branches.hidden.k.weight": (3 * 4, 2 * 24),
        "layers.0.down.weight": (24, 40),
        "sequential.down.weight": (16, 24),
        "sequential.up.weight": (32, 16),
    }
    assert {name: shapes[name] for name in expected} == expected


def test_a_drafter_without_sizes_of_its_own_has_no_projection(target):
    names = {name for name, _ in drafter_of(target, "ttt", "hidden").named_parameters()}
    assert not any("target" in name for name in names)


# Rotary embeddings


def frequencies(head_dim: int, **rope) -> tuple[list[float], float]:
    """transformers' own."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        head_dim=head_dim,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0} | rope,
    )
    return rotary_of(config)


YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(32)], "long_factor": [4.0] * 32}
LONG |= {"factor": 8.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize("rope,theirs", [
    ({}, {}),
    ({"rope_type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (YARN, {}),
    (LLAMA3, {}),
])  # fmt: skip
def test_heads_of_another_size_have_the_target_s_theta(target, rope, theirs):
    """Linear scaling is kept; others, which depend on the size of a head, are not."""
    inv_freq, scale = frequencies(64, **rope)
    wide = replace(target.architecture, head_dim=64, inv_freq=inv_freq, rope_scale=scale)
    assert draft_architecture({"hidden_size": 24}, wide).inv_freq == inv_freq
    own = draft_architecture({"head_dim": 16}, wide)
    expected, _ = frequencies(16, **theirs)
    torch.testing.assert_close(torch.tensor(own.inv_freq), torch.tensor(expected), rtol=1e-6, atol=0)
    assert own.rope_scale == 1


@pytest.mark.parametrize("inv_freq", [frequencies(64, **LONG)[0], [1.0], [1.0, 0.5, 0.4, 0.1]])
def test_frequencies_of_no_theta_are_told_apart(inv_freq):
    assert plain_rope(inv_freq) is None


# Configurations and commands

RANDOM = "drafter.start=random"
WORDS = [RANDOM, "drafter.hidden_size=48", "drafter.heads=6", "drafter.kv_heads=2", "drafter.head_dim=8", "drafter.qk_norm=false"]


def config_of(cache, *words):
    recipe = cli.compose("train", TrainRecipe, [f"cache.dir={cache}", *words])
    return drafter_config(recipe, CacheReader(cache).manifest)


def test_the_recipe_makes_the_configuration(cache):
    manifest = CacheReader(cache).manifest
    theirs = manifest.target["architecture"]
    config = config_of(cache, "objective=ttt", "reuse=kv", "reuse.source=projected_rope", *WORDS)
    assert (config.architecture.hidden_size, config.target_hidden) == (48, theirs["hidden_size"])
    assert config.kv_shapes[0].head_dim == theirs["head_dim"] != config.architecture.head_dim == 8
    assert config.architecture.num_layers == theirs["num_layers"] and not config.architecture.qkv_bias
    assert "heads" in config.own_sizes and "vocab_size" not in config.own_sizes
    in_place = config_of(cache, "reuse=kv", RANDOM, "drafter.hidden_size=48", "drafter.heads=8")
    assert in_place.kv_shapes is None and in_place.query_layers == [] and in_place.uses_kv
    plain = config_of(cache, "reuse=kv")
    assert plain.target_hidden is None and plain.own_sizes == [] and plain.kv_shapes is None and plain.query_layers


@pytest.mark.parametrize("key", ["hidden_size", "heads", "kv_heads", "head_dim", "intermediate_size"])
def test_a_language_model_brings_its_sizes(key):
    words = ["objective=ttt", "reuse=none", "drafter.lm=x", f"drafter.{key}=4"]
    with pytest.raises(UserError, match=f"leave out drafter.{key}"):
        cli.compose("train", TrainRecipe, words)


def test_a_warm_start_from_layers_of_other_sizes_is_refused(target, tmp_path):
    drafter_of(target, "ttt", "hidden").save_pretrained(tmp_path)
    config = own_sized(target, "ttt", "hidden", {"hidden_size": 24}).config
    with pytest.raises(UserError, match="has draft layers of hidden_size 32, and this drafter's have 24"):
        exchange.check_warm_start(str(tmp_path), config)


def test_a_warm_start_from_layers_of_the_same_sizes_takes_all(target, tmp_path):
    source = own_sized(target, "ttt", "hidden")
    source.save_pretrained(tmp_path)
    drafter = own_sized(target, "ttt", "hidden", seed=5).start(target, target.frozen_head)
    exchange.check_warm_start(str(tmp_path), drafter.config)
    taken, left = exchange.warm_start(drafter, str(tmp_path), target.frozen_head)
    assert not left and {"from_target.weight", "to_target.weight"} <= set(taken)


@pytest.mark.slow
def test_a_training_of_a_few_steps(cache, tmp_path):
    run = tmp_path / "run"
    words = [*WORDS, *SMALL, "objective=ttt", "reuse=hidden", "train.max_steps=12", "train.save_every=12", "train.batch=1"]
    words += ["train.diagnose=false"]
    done = command(TRAIN, f"cache.dir={cache}", f"run.dir={run}", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    drafter = load_drafter(run / "checkpoints/best")
    assert drafter.config.architecture.hidden_size == 48
    wide = CacheReader(cache).manifest.target["architecture"]["hidden_size"]
    assert drafter.from_target.weight.shape == (48, wide) and drafter.config.positions == 128
