"""Every combination that training refuses has a case that meets it, on the command line where one can."""

from dataclasses import replace

import pytest

from common import cli
from common.errors import UserError
from common.rules import first_broken
from data_prep.cache.reader import CacheReader
from data_prep.target.architecture import Architecture, KVLayer
from tests.support.rules import by_name, pattern
from train import machine_rules, rules
from train.build import check_training
from train.drafter.config import DrafterConfig
from train.recipe import TrainRecipe
from train.unread import UNREAD, unread

RULES = by_name((*rules.TABLES, *machine_rules.TABLES))
SPARSE = "objective=budgetdraft"
QUERIES_ALONE = ["objective=ttt", "reuse=hybrid", "reuse.fusion=cross_only", "reuse.own_kv=false"]
ASSISTANT = "experiment=gemma4_assistant"
LINES = {
    "keys of blocks under ttt": ["objective=ttt", "+objective.causal=true"],
    "smallest above largest": [SPARSE, "objective.smallest=300", "objective.largest=299"],
    "block of one slot": ["objective.slots=1"],
    "K/V keys without K/V": ["reuse=none", "+reuse.source=projected"],
    "kv_layers of native K/V": ["reuse=kv", "reuse.kv_layers=[0]"],
    "hidden_layers without hidden states": ["reuse=kv", "+reuse.hidden_layers=[0]"],
    "pairs without hidden states": ["reuse=kv", "+reuse.pairs=true"],
    "fusion of one memory": ["reuse=kv", "+reuse.fusion=cross_only"],
    "queries alone without a stream": ["objective=ttt", "reuse.own_kv=false"],
    "queries alone over projected keys": [*QUERIES_ALONE, "reuse.source=projected_rope"],
    "gate that does not exist": ["reuse=kv", "+reuse.gate.floor=0.1"],
    "keys of layers beside lm": ["objective=ttt", "reuse=none", "drafter.lm=x", "drafter.own_head=true"],
    "loss without a term": ["loss.kl=0"],
    "refresh below one token": [SPARSE, "view.refresh=0"],
    "budget of the full view": ["view.budget=256"],
    "sinks in parts of chunks": [SPARSE, "view.sink=4"],
    "no recent positions": [SPARSE, "view.recent=null"],
    "recent of sink_recent": [SPARSE, "view=sink_recent", "+view.recent=9"],
    "snapkv without a window": [SPARSE, "view=snapkv", "view.pool=4"],
    "chunks of single positions": [SPARSE, "view=snapkv", "+view.chunk=4"],
    "budget below the least": [SPARSE, "view.budget=79"],
    "queries alone in blocks": [*QUERIES_ALONE, "objective=blockwise"],
    "constant positions of rows with keys": ["objective=ttt", "objective.positions=constant"],
    "cross_only in blocks": ["reuse.fusion=cross_only"],
    "sequential head under ttt": ["objective=ttt", "drafter.sequential=gru"],
    "norm_before_residual without a feature": ["drafter.norm_before_residual=true"],
    "align losses without K/V": ["reuse=hidden", "loss.kv_align=1"],
    "kv_align of queries alone": [*QUERIES_ALONE, "loss.kv_align=1"],
    "query_align of projected keys": ["reuse.source=projected", "loss.query_align=1"],
    "own sizes of layers that start as the target's": ["drafter.hidden_size=32"],
    "heads of an odd size": ["drafter.start=random", "reuse=hidden", "drafter.head_dim=7"],
    "query_align of another number of heads": ["drafter.start=random", "drafter.heads=8", "loss.query_align=1"],
    "heads in place that are not the target's": ["drafter.start=random", "drafter.head_dim=8"],
    "query heads that share no key head": ["drafter.start=random", "reuse=hidden", "drafter.heads=3"],
    "pairs under ttt": ["objective=ttt", "reuse=hidden", "reuse.pairs=true"],
    "pairs in a block that looks ahead": ["reuse=hidden", "reuse.pairs=true"],
    "prefix of pairs": ["experiment=peagle", "objective.prefix=0.9"],
    "fc_norm without pairs": ["reuse=hidden", "drafter.fc_norm=true"],
    "norm_output without a stream": ["objective=ttt", "reuse=none", "drafter.norm_output=true"],
    "language model that reads the target": ["objective=ttt", "drafter.lm=x"],
    "view=auto": ["view=auto"],
    "budgetdraft under the full view": [SPARSE, "view=full"],
    "view without budgetdraft": ["view=topk_chunk"],
    "budget of everything": [SPARSE, "view.budget=0"],
    "judged budget below the least": [SPARSE, "objective.smallest=79"],
    "align losses under views": [SPARSE, "loss.kv_align=1"],
    "in_cache positions of mixed keys": [SPARSE, "reuse.source=projected", "view.positions=in_cache"],
    "recompute of a language model": ["objective=ttt", "reuse=none", "drafter.lm=x", "train.recompute=true"],
    "fp8 without what it needs": ["train.fp8=true", "train.precision=bf16", "deepspeed=zero3"],
    "kind that the cache lacks": ["loss.query_align=1"],
    "more draft layers than captured ones": ["drafter.layers=9"],
    "target_layers of another number": ["drafter.target_layers=[0,5]"],
    "layer that the target lacks": ["drafter.target_layers=[77]"],
    "layer that the cache lacks": ["drafter.target_layers=[3]"],
    "keys that are normed differently": ["drafter.qk_norm=false"],
    "vocabulary that is not reduced": ["drafter.vocabulary=8192"],
    "mask outside the vocabulary": ["target.mask_token_id=8192"],
    "assistant of another form": [ASSISTANT, "reuse.own_kv=true"],
    "keys beside an assistant": [ASSISTANT, "drafter.qk_norm=true"],
    "assistant of another family": [ASSISTANT],
}


def contexts(manifest) -> dict:
    """(words of the line, context) of rules about machines, caches and models that are not here."""
    target = Architecture(**manifest.target["architecture"])
    small = replace(target, hidden_size=100)
    unlike = replace(target, inv_freq=[1.0, 0.5, 0.4])
    small_heads = ["drafter.start=random", "reuse=hidden", "drafter.head_dim=8"]
    lm = {"path": "x", "positions": 2048}
    own = KVLayer(small.kv_heads, small.head_dim, small.inv_freq, small.rope_scale)
    about = ("blockwise", "kv", [0, 1], [], 4, False, False, 0, "target", None, small, {})
    windows = DrafterConfig(*about, kv_shapes=[replace(own, window=n) for n in (8, 9)])
    joined = replace(windows, source="head_concat", source_layers=[0, 1])
    gemma = machine_rules.Gemma("gemma4", {"sliding_attention": 2, "full_attention": 3}, 64, 3, {"hidden": [3], "kv": [2, 3]})
    many_heads = replace(windows, kind="gemma4_assistant", kv_shapes=[replace(own, kv_heads=n) for n in (1, 8)])
    return {
        "batch that ranks cannot share": (["train.batch=8"], 3),
        "fp8 on an older GPU": (["train.fp8=true"], machine_rules.Machine(bf16=True, capability=(8, 0), name="an older GPU")),
        "fp8 of sizes that are no whole tiles": (["train.fp8=true"], machine_rules.Shapes(small, target, tile=16)),
        "heads without a rotary embedding": (
            small_heads,
            machine_rules.Shapes(replace(unlike, head_dim=8), unlike, tile=16),
        ),
        "start from layers of another kind": ([], "layers of a 'gpt_oss' are built otherwise"),
        "heads side by side that differ": (["reuse=kv", "reuse.source=head_concat"], joined),
        "step that sees no memory": (QUERIES_ALONE, replace(windows, own_kv=False, slots=8)),
        "assistant over layers of one kind": ([ASSISTANT], gemma._replace(last={"full_attention": 3})),
        "last layers that the cache lacks": ([ASSISTANT], gemma._replace(held={"hidden": [1, 3], "kv": [1, 3]})),
        "assistant wider than its target": ([ASSISTANT], gemma),
        "assistant that does not fit": ([ASSISTANT], many_heads),
        "view of a window": ([SPARSE, "reuse=kv"], windows),
        "documents beyond a language model": (
            ["objective=ttt", "reuse=none", "drafter.lm=x"],
            machine_rules.Documents(longest=4096, lm=lm),
        ),
        "cache of another tokenizer": ([], machine_rules.Tokens(manifest, "another")),
    }


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_meets_the_rule_is_refused_with_its_words(cache, name):
    with pytest.raises(UserError, match=pattern(RULES[name])):
        check_training(cli.compose("train", TrainRecipe, [f"cache.dir={cache}", *LINES[name]]))


def test_rules_about_other_caches_and_devices_refuse_in_a_made_up_context(cache):
    for name, (words, context) in contexts(CacheReader(cache).manifest).items():
        recipe = cli.compose("train", TrainRecipe, [f"cache.dir={cache}", *words])
        assert first_broken([RULES[name]], recipe, context), name


def test_every_rule_has_a_case(cache):
    assert {*LINES, *contexts(CacheReader(cache).manifest)} == set(RULES)


ONE_BUDGET = [SPARSE, "view.budget=256"]
PAPER = [SPARSE, "objective.budgets=paper"]
# What a line names, and the keys of it that do nothing.
IGNORED = [
    (["objective.detach=true", "objective.draws=2"], ["objective.detach", "objective.draws"]),
    (["objective.full=0.5", "objective.smallest=80"], ["objective.full", "objective.smallest"]),
    (["objective.largest=999", "objective.budgets=paper"], ["objective.largest", "objective.budgets"]),
    ([SPARSE, "objective.detach=true", "objective.draws=2", "objective.smallest=80", "objective.full=0.5"], []),
    ([*ONE_BUDGET, "objective.draws=2", "objective.detach=true"], ["objective.draws"]),
    ([*ONE_BUDGET, "objective.budgets=paper"], ["objective.budgets"]),
    (PAPER, []),
    ([*PAPER, "objective.smallest=80", "objective.draws=2"], ["objective.smallest", "objective.draws"]),
    (["objective.decay=4"], []),
    (["objective.weights=dpace", "objective.decay=4"], ["objective.decay"]),
    (["drafter.sequential_size=8"], ["drafter.sequential_size"]),
    (["drafter.sequential=gru", "drafter.sequential_size=8"], []),
]


@pytest.mark.parametrize("words,expected", IGNORED)
def test_a_named_key_that_does_nothing_is_a_line(words, expected):
    # Files list some of the keys and leave others out; ++ sets either.
    recipe = cli.compose("train", TrainRecipe, [f"++{word}" if "." in word else word for word in words])
    said = [line.split(": ")[1] for line in unread(recipe)]
    assert sorted(said) == sorted(f"training does not read {key}" for key in expected)


def test_every_key_that_may_do_nothing_has_a_case():
    assert {key for _, keys in IGNORED for key in keys} == {key for one in UNREAD for key in one.keys}


def test_the_check_says_it(cache, capsys):
    check_training(cli.compose("train", TrainRecipe, [f"cache.dir={cache}", "++drafter.sequential_size=8"]))
    assert capsys.readouterr().out == "warning: training does not read drafter.sequential_size: it is for drafter.sequential\n"
