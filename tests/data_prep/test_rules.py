"""Every combination that data_prep refuses by a table has a case that meets it."""

import re
from importlib.util import find_spec

import pytest

from common import cli
from common.rules import first_broken
from data_prep import rules
from data_prep.recipe import DataPrepRecipe
from tests.support.rules import by_name, pattern

RULES = by_name(rules.TABLES)
ONE, THREE = rules.Spread(1, 2, 32768), rules.Spread(3, 2, 32768)
CASES = {
    "flash_attention_2 without flash-attn": (["capture.attention=flash_attention_2"], ()),
    "device_map without accelerate": (["capture.spread=device_map"], ()),
    "documents beyond the target": (["data.max_length=40000"], (ONE,)),
    "keys and values of a server": (["target.server=vllm", "cache.kinds=[hidden,kv]"], ()),
    "a forward of this process at a server": (["target.server=vllm", "cache.kinds=[hidden]", "capture.spread=device_map"], ()),
    "flags for no server": (["target.server_args=[--tensor-parallel-size,2]"], ()),
    "documents that fill a server's positions": (["target.server=http://h:1/v1", "data.max_length=32768"], (ONE,)),
    "tp over processes that do not fit": (["capture.spread=tp"], (THREE,)),
    "device_map under a launcher": (["capture.spread=device_map"], (THREE,)),
    "live of a target for several processes": (["cache.on_missing=live", "capture.spread=tp"], ()),
    "live from a server": (["cache.on_missing=live", "target.server=vllm"], ()),
    "conversations of a server that captures": (["mode=regenerate", "target.server=vllm"], ()),
    "estimate of several processes": (["mode=estimate", "capture.spread=tp"], ()),
    "merge of one cache": (["mode=merge", "merge.sources=[A]"], ()),
}
PACKAGES = {"flash_attention_2 without flash-attn": "flash_attn", "device_map without accelerate": "accelerate"}


@pytest.mark.parametrize("name", CASES)
def test_a_line_that_meets_the_rule_is_refused_with_its_words(name, monkeypatch):
    if name in PACKAGES:  # installed here or not
        monkeypatch.setattr(rules, "find_spec", lambda package: None if package == PACKAGES[name] else find_spec(package))
    words, context = CASES[name]
    table = next(table for table in rules.TABLES if RULES[name] in table)
    said = first_broken(table, cli.compose("data_prep", DataPrepRecipe, words), *context)
    assert re.fullmatch(pattern(RULES[name]), said)


def test_every_rule_has_a_case():
    assert set(CASES) == set(RULES)
