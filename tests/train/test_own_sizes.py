"""Draft layers of sizes of their own (drafter.hidden_size, heads, kv_heads, head_dim, intermediate_size) beside a wider target.

Shapes: B requests, V vocabulary, E hidden size.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from common import cli
from common.errors import UserError
from data_prep.cache.reader import CacheReader
from data_prep.target.frozen_head import FrozenHead
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
from train.drafter.formats.export import save_export
from train.drafter.formats.names import MASK_FILE
from train.drafter.own_sizes import draft_architecture, plain_rope, rope_config
from train.losses.recipe import LossRecipe
from train.recipe import TrainRecipe

KL = LossRecipe(kl=1)
SAME = 1e-4  # as tests/train/test_alignment.py says
# (objective, reuse, sizes)
CELLS = [
    ("ttt", "hidden", OWN_SIZES),
    ("ttt", "hybrid+projected_rope", OWN_SIZES),
    ("blockwise", "hybrid", BESIDE_KV),
    ("blockwise_pairs+markov", "hidden+vocab", OWN_SIZES),
]
MORE = [
    ("ttt", "queries", BESIDE_KV),
    ("ttt", "queries+head_concat", BESIDE_KV),
    ("ttt", "hidden+norms", OWN_SIZES),
    ("ttt", "none", OWN_SIZES),
    ("ttt", "kv+head_concat", BESIDE_KV),
    ("ttt", "kv+projected", OWN_SIZES),
    ("blockwise", "hidden", OWN_SIZES),
    ("blockwise", "kv+projected_rope", OWN_SIZES),
    ("blockwise_shifted+gru", "hidden", OWN_SIZES),
]
CELLS += [pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE]


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


# Exports


def served(tmp_path, target, objective, format, sizes=OWN_SIZES, reuse="hidden", **options):
    """(the drafter, what its checkpoint holds, its config.json, what the command says of it)."""
    options = {"qk_norm": objective != "ttt"} | options
    drafter = own_sized(target, objective, reuse, sizes, **options)
    notes = save_export(drafter, target, tmp_path, format)
    return drafter, load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text()), notes


@torch.no_grad()
def assert_multiplied_out(drafter, target, tensors):
    """Embedding and head do what the projections do around the target's own."""
    head = target.frozen_head
    table_VE = tensors["embed_tokens.weight"].clone()
    if not drafter.config.schedule.token_by_token:
        mask = drafter.config.mask_token_id
        assert torch.equal(table_VE[mask], drafter.mask.weight[0])
        table_VE[mask] = drafter.embed(torch.tensor(mask), head)
    torch.testing.assert_close(table_VE, drafter.embed(torch.arange(len(table_VE)), head))
    normed_RE = torch.randn(5, drafter.config.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    logits_RV = drafter.head.logits(drafter.to_target(normed_RE), head)
    kept = slice(None) if drafter.head.kept_D is None else drafter.head.kept_D
    torch.testing.assert_close(normed_RE @ tensors["lm_head.weight"].T, logits_RV[:, kept])


@pytest.mark.parametrize("objective,format,reuse", [
    ("ttt", "eagle3", "hidden"),
    ("ttt", "speculators", "hidden+norms"),
    ("ttt", "eagle3", "hidden+vocab"),
    ("blockwise_pairs", "speculators", "hidden"),
    ("blockwise", "dflash", "hidden"),
    ("blockwise+markov", "dspark", "hidden+vocab"),
])  # fmt: skip
def test_an_export_has_the_projections_multiplied_out(target, tmp_path, objective, format, reuse):
    drafter, tensors, config, notes = served(tmp_path, target, objective, format, reuse=reuse)
    assert_multiplied_out(drafter, target, tensors)
    assert not any("_target" in name for name in tensors) and not (tmp_path / MASK_FILE).exists()
    assert config["target_hidden_size"] == 32 and tensors["fc.weight"].shape == (24, 3 * 32)
    layer = config.get("transformer_layer_config", config)
    named = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [layer[name] for name in named] == list(OWN_SIZES.values())
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0} and layer["rope_scaling"] is None
    assert config["draft_vocab_size"] == (8 if reuse == "hidden+vocab" else 11)
    assert any("it holds an embedding and an LM head" in note for note in notes)
    assert any("has no blocks of another hidden size" in n for n in notes) == (format in ("dflash", "dspark"))
    assert any("the speculators package 0.9.0" in n for n in notes) == (format == "speculators")


@torch.no_grad()
def test_a_markov_head_s_tables_add_what_the_head_adds(target, tmp_path):
    drafter, tensors, _, _ = served(tmp_path, target, "blockwise+markov", "dspark")
    head = target.frozen_head
    output_VE = torch.zeros(11, 32)
    added_VE, _ = drafter.sequential.step(output_VE, drafter.embed(torch.arange(11), head), None)
    tables = tensors["markov_head.markov_w1.weight"] @ tensors["markov_head.markov_w2.weight"].T
    torch.testing.assert_close(tables, drafter.head.logits(added_VE, head), rtol=1e-4, atol=1e-4)


def test_sizes_that_leave_the_hidden_size_need_no_table(target, tmp_path):
    _, tensors, config, _ = served(tmp_path, target, "ttt", "eagle3", {"heads": 8, "intermediate_size": 40})
    assert not {"embed_tokens.weight", "lm_head.weight"} & tensors.keys()
    assert "target_hidden_size" not in config and config["draft_vocab_size"] is None
    assert (config["num_attention_heads"], config["intermediate_size"]) == (8, 40)
    assert config["rope_parameters"]["rope_theta"] == target.rope_config["rope_theta"]


def test_a_scale_of_the_target_s_embeddings_is_in_the_table(target, tmp_path, monkeypatch):
    head = target.frozen_head
    monkeypatch.setattr(target, "frozen_head", FrozenHead(head.embedding_VE, head.head_VE, embed_scale=4.0))
    save_export(drafter_of(target, "ttt", "hidden", qk_norm=False), target, tmp_path, "eagle3")
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], 4 * head.embedding_VE) and "lm_head.weight" not in tensors


def test_a_checkpoint_of_another_hidden_size_is_not_read_back(target, tmp_path):
    served(tmp_path, target, "ttt", "eagle3")
    with pytest.raises(UserError, match="has layers of hidden size 24 beside states of 32 .target_hidden_size., and an"):
        load_drafter(tmp_path, lambda: target.architecture)


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
    assert rope_config(own)["rope_parameters"] == {"rope_type": "default", "rope_theta": 150000.0} | theirs
    assert (rope_config(wide) is None) == (rope in (YARN, LLAMA3))


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
