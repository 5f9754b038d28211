"""Every combination that data_prep refuses by a table has a case that meets it."""

import re
from importlib.util import find_spec

import pytest

from common import cli
from common.rules import first_broken
from data_prep import rules
from data_prep.recipe import DataPrepRecipe
from data_prep.target.architecture import Sizes
from tests.support.rules import by_name, pattern

RULES = by_name(rules.TABLES)
THREE = rules.Spread(world=3, kv_heads=2)
LONG = Sizes(6, 64, 4, 2, 16, max_positions=32768, vocab_size=100)
CASES = {
    "flash_attention_2 without flash-attn": (["capture.attention=flash_attention_2"], ()),
    "device_map without accelerate": (["capture.spread=device_map"], ()),
    "documents beyond the target": (["data.max_length=40000"], (LONG,)),
    "tp over processes that do not fit": (["capture.spread=tp"], (THREE,)),
    "device_map under a launcher": (["capture.spread=device_map"], (THREE,)),
    "decoding over several devices of one process": (["mode=regenerate", "capture.spread=device_map"], ()),
    "spread beside a server": (["mode=regenerate", "regenerate.base_url=http://here", "capture.spread=tp"], ()),
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
