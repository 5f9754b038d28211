"""Every combination that data_prep refuses by a table has a case that meets it."""

import re
from importlib.util import find_spec

import pytest

from common import cli
from common.errors import UserError
from common.rules import first_broken
from data_prep import rules
from data_prep.recipe import DataPrepRecipe
from data_prep.synthesis.regenerate import check_regeneration
from data_prep.synthesis.synthesize import check_synthesis
from data_prep.target.architecture import Sizes
from data_prep.target.checkpoint import Checkpoint
from tests.support.families import configuration
from tests.support.rules import by_name, pattern

RULES = by_name(rules.TABLES)
THREE = rules.Spread(world=3, kv_heads=2)
LONG = Sizes(6, 64, 4, 2, 16, max_positions=32768, vocab_size=100)
WHOLE = Checkpoint(
    path="p", method="fp8", known=True, missing=None, modelopt=False, adapter=False, scale="s", safetensors=True, spread="none"
)
BARE = WHOLE._replace(method=None, scale=None)
CASES = {
    "flash_attention_2 without flash-attn": (["capture.attention=flash_attention_2"], ()),
    "device_map without accelerate": (["capture.spread=device_map"], ()),
    "documents beyond the target": (["data.max_length=40000"], (LONG,)),
    "keys and values of a server": (["target.server=vllm", "cache.kinds=[hidden,kv]"], ()),
    "a forward of this process at a server": (["target.server=vllm", "cache.kinds=[hidden]", "capture.spread=device_map"], ()),
    "flags for no server": (["target.server_args=[--tensor-parallel-size,2]"], ()),
    "live of a target for several processes": (["cache.on_missing=live", "capture.spread=tp"], ()),
    "live from a server": (["cache.on_missing=live", "target.server=vllm"], ()),
    "documents that fill a server's positions": (["target.server=http://h:1/v1", "data.max_length=32768"], (LONG,)),
    "conversations of a server that captures": (["mode=regenerate", "target.server=vllm"], ()),
    "tp over processes that do not fit": (["capture.spread=tp"], (THREE,)),
    "device_map under a launcher": (["capture.spread=device_map"], (THREE,)),
    "adapter instead of a model": ([], (BARE._replace(adapter=True),)),
    "unknown quantisation": ([], (WHOLE._replace(method="modelopt", known=False),)),
    "ModelOpt without a word in config.json": ([], (BARE._replace(modelopt=True),)),
    "scales without a word in config.json": ([], (BARE._replace(scale="a.weight_scale"),)),
    "quantisation without its package": ([], (WHOLE._replace(missing="accelerate"),)),
    "quantised weights outside of safetensors": ([], (WHOLE._replace(safetensors=False),)),
    "a file of the index that is not there": ([], (BARE._replace(absent="a.safetensors"),)),
    "quantisation of nothing": ([], (WHOLE._replace(scale=None),)),
    "quantised weights under tp": ([], (WHOLE._replace(spread="tp"),)),
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


def test_a_checkpoint_that_is_whole_meets_no_rule():
    assert first_broken(rules.CHECKPOINT, None, WHOLE) is first_broken(rules.CHECKPOINT, None, BARE) is None


def test_a_target_that_our_engine_does_not_decode_generates_no_text(tmp_path):
    """By its configuration: there are no weights. A server may be asked for it."""
    configuration("gemma2").save_pretrained(tmp_path / "target")
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')

    def composed(mode: str, *words: str) -> DataPrepRecipe:
        words = [f"mode={mode}", f"target.path={tmp_path / 'target'}", f"{mode}.out={tmp_path / 'out.jsonl'}", *words]
        return cli.compose("data_prep", DataPrepRecipe, words)

    chats = ["data=chat", f"data.path={tmp_path / 'in.jsonl'}"]
    said = "is a 'gemma2', which is not decoded here: .*regenerate.base_url"
    with pytest.raises(UserError, match=said):
        check_regeneration(composed("regenerate", *chats))
    with pytest.raises(UserError, match=said):
        check_synthesis(composed("synthesize", "synthesize.count=1"))
    check_regeneration(composed("regenerate", *chats, "regenerate.base_url=http://here"))


def test_every_rule_has_a_case():
    assert set(CASES) == set(RULES)
