"""Every combination that an evaluation refuses has a case that meets it, on the command line where one can."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from common import cli
from common.errors import UserError
from common.rules import first_broken
from data_prep.cache.reader import CacheReader
from data_prep.target.architecture import Architecture, KVLayer
from eval import drafter_rules, rules
from eval.check import check_evaluation, check_folder, check_target
from eval.main import run
from eval.read_by import READ_BY, unread
from eval.recipe import EvalRecipe
from tests.support.families import configuration
from tests.support.rules import by_name, pattern
from train.drafter.config import DrafterConfig

RULES = by_name((*rules.TABLES, *drafter_rules.TABLES))

# A language model with a table of 100 positions.
LM = {"path": "lm", "layers": 1, "positions": 100, "config": {}}
# Drafters by name: what is special about them, beside ttt over K/V.
DRAFTERS = {
    "ttt": {},
    "block": {"objective": "blockwise"},
    "dflash": {"objective": "blockwise", "reuse": "hidden", "mask_token_id": 2},
    "projected": {"source": "projected", "source_layers": [0]},
    "lm": {"reuse": "none", "target_layers": [], "positions": 100, "lm": LM},
    "small vocabulary": {"draft_vocab": 4, "own_head": True},
    "other layers": {"target_layers": [3]},
    "clusters": {"kind": "gemma4_assistant", "constant_positions": True, "own_kv": False, "centroids": 7},
    "windowed": {"kv_shapes": [KVLayer(1, 8, [1.0], 1.0, window=8)]},
}
VIEW = ["view=topk_chunk", "view.budget=128"]
H2O = ["view=h2o", "view.budget=128"]
PARTIAL = ["verify=partial"]
# The drafter, and what else the line says. {drafter}, {cache} and {prompt} are paths.
LINES = {
    "negative temperature": ("ttt", ["temperatures=[-1]"]),
    "a server for captures": ("ttt", ["target.server=vllm"]),
    "runs without compare": ("ttt", ["runs=[a]"]),
    "not one server": ("ttt", ["mode=served"]),
    "started server without a drafter": (None, ["mode=served", "server.start=vllm"]),
    "shorter blocks that look ahead": ("dflash", ["mode=served", "server.start=vllm", "draft.length=2"]),
    "clusters of tokens on a CPU": ("clusters", ["mode=served", "server.start=vllm", "target.device=cpu"]),
    "no drafter": (None, []),
    "view of a window": ("windowed", VIEW),
    "in_cache positions of mixed keys": ("projected", [*VIEW, "view.positions=in_cache"]),
    "view in a mode of the full view": ("ttt", [*VIEW, "mode=export"]),
    "diagnose of a language model": ("lm", ["mode=diagnose"]),
    "clusters of tokens elsewhere than in decoding": ("clusters", ["mode=score"]),
    "context beyond the target": ("ttt", ["suite.prompt_tokens=40000"]),
    "texts beyond a table of positions": ("lm", ["suite.prompt_tokens=200"]),
    "length that is not drafted": ("ttt", ["draft.length=5"]),
    "trees of blocks": ("block", ["draft.breadth=2"]),
    "trees under a view that goes one by one": ("ttt", [*H2O, "draft.breadth=2"]),
    "adaptive length of trees": ("ttt", ["draft.breadth=2", "draft.length=adaptive"]),
    "adaptive length under a view that goes one by one": ("ttt", [*H2O, "draft.length=adaptive"]),
    "fewer nodes than depths": ("ttt", ["draft.breadth=2", "draft.nodes=3"]),
    "breadth beyond the nodes": ("ttt", ["draft.breadth=17"]),
    "trees beyond memory": ("ttt", ["draft.breadth=8192", "draft.nodes=8192", "batch=64"]),
    "breadth beyond the vocabulary": ("small vocabulary", ["draft.breadth=5"]),
    "empty stop": ("ttt", ["stop=['']"]),
    "nodes without trees": ("ttt", ["draft.nodes=4"]),
    "offload of full verification": ("ttt", ["verify.offload=true"]),
    "partial verification elsewhere": ("ttt", [*PARTIAL, "mode=chat"]),
    "partial verification under a view": ("ttt", [*PARTIAL, *VIEW]),
    "audit of samples": ("ttt", ["verify=partial_audited"]),
    "adaptive intervals without an audit": ("ttt", [*PARTIAL, "verify.partial_tokens=adaptive"]),
    "no partial round": ("ttt", [*PARTIAL, "verify.partial_tokens=4"]),
    "offload under trees": ("ttt", [*PARTIAL, "verify.offload=true", "draft.breadth=2"]),
    "controls over one prompt": ("ttt", ["suite=jsonl", "suite.path={prompt}"]),
    "export onto the drafter": ("ttt", ["mode=export", "out={drafter}"]),
    "export for any target": ("ttt", ["mode=export", "any_target=true"]),
    "state that the cache lacks": ("other layers", ["mode=score"]),
    "diagnose of parts of documents": ("ttt", ["mode=diagnose", "score.pack_tokens=64"]),
}


@pytest.fixture(scope="module")
def manifest(cache):
    return CacheReader(cache).manifest


@pytest.fixture(scope="module")
def ttt(manifest) -> DrafterConfig:
    """A drafter of the cache's target over its deepest stored K/V."""
    about = {name: manifest.target[name] for name in ("id", "weights_hash")} | {"tokenizer_hash": manifest.tokenizer_hash}
    architecture = Architecture(**manifest.target["architecture"])
    return DrafterConfig("ttt", "kv", manifest.kv_layers[-1:], [], 4, False, False, 0, "target", None, architecture, about)


def written(folder: Path, config: DrafterConfig) -> Path:
    """A drafter of which a check sees all: its configuration, and that there are weights."""
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def composed(*words: str) -> EvalRecipe:
    return cli.compose("eval", EvalRecipe, list(words))


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_meets_the_rule_is_refused_with_its_words(cache, ttt, tmp_path, name):
    drafter, words = LINES[name]
    (tmp_path / "prompt.jsonl").write_text('{"prompt": "a"}\n')
    paths = {"drafter": tmp_path, "cache": cache, "prompt": tmp_path / "prompt.jsonl"}
    if drafter:
        layers = {"hidden_layers": [0, 1, 2]} if DRAFTERS[drafter].get("reuse") == "hidden" else {}
        written(tmp_path, replace(ttt, **DRAFTERS[drafter], **layers))
        words = ["drafter={drafter}", *words]
    words = [word.format(**paths) for word in ["cache.dir={cache}", *words]]
    with pytest.raises(UserError, match=pattern(RULES[name])):
        check_evaluation(composed(*words))


def test_a_drafter_without_weights_or_of_another_target_is_refused(cache, ttt, tmp_path):
    def said(*words: str) -> str:
        with pytest.raises(UserError) as refused:
            check_evaluation(composed(f"drafter={tmp_path}", f"cache.dir={cache}", *words))
        return str(refused.value)

    (tmp_path / "config.json").write_text(json.dumps(asdict(ttt)))
    assert said() == f"{tmp_path} holds no weights (model.safetensors)"
    written(tmp_path, replace(ttt, target=ttt.target | {"tokenizer_hash": "another"}))
    assert said().startswith(f"{tmp_path} was trained for target {ttt.target['id']}, whose tokenizer is not that of ")
    written(tmp_path, replace(ttt, target=ttt.target | {"weights_hash": "another"}))
    assert said("mode=score") == f"{cache} is a cache of another target than the drafter's"


def test_a_folder_keeps_the_reports_of_one_drafter(cache, ttt, tmp_path):
    """In a sweep, whose points get their folders when they run, `run` says it; before a target is looked for."""
    written(tmp_path, ttt)
    (tmp_path / "out").mkdir()
    recipe = composed(f"drafter={tmp_path}", f"cache.dir={cache}", f"out={tmp_path / 'out'}", "mode=score", "target.path=nowhere")
    for name, about in (("report.json", {"path": "other"}), ("diagnostics.json", "other"), ("answers.jsonl", {"path": None})):
        path = tmp_path / "out" / name
        path.write_text(json.dumps({"drafter": about}) + "\n")
        for refuses in (check_evaluation, run):
            with pytest.raises(UserError, match=pattern(RULES["report of another drafter"])):
                refuses(recipe)
        # Its own by another path, one that cannot be read, and one that does not say.
        for text in (json.dumps({"drafter": {"path": f"{tmp_path}/../{tmp_path.name}"}}), "", "{", "{}", '{"drafter": {}}', "[]"):
            path.write_text(text)
            check_folder(recipe)


@pytest.mark.parametrize("mode", ["decode", "chat", "demo", "score"])
def test_a_target_that_our_engine_does_not_decode_is_refused_where_it_would(cache, ttt, tmp_path, mode):
    """By its configuration: there are no weights. A drafter is judged over its cache all the same, as far as this goes."""
    written(tmp_path, ttt)
    configuration("gemma2").save_pretrained(tmp_path / "target")
    words = [f"drafter={tmp_path}", f"cache.dir={cache}", f"target.path={tmp_path / 'target'}"]
    with pytest.raises(UserError) as refused:
        check_evaluation(composed(*words, f"mode={mode}"))
    decoded_here = "is a 'gemma2', which is not decoded here: it caps the scores of its attention" in str(refused.value)
    assert decoded_here == (mode != "score")


def test_a_loaded_target_that_does_not_belong_there_is_refused(cache, ttt):
    def said(config: DrafterConfig, architecture: Architecture, weights: str, *words: str, quantisation=None) -> str:
        with pytest.raises(UserError) as refused:
            check_target(composed("drafter=d", f"cache.dir={cache}", *words), config, architecture, weights, quantisation)
        return str(refused.value)

    path = "data_prep/targets/tiny"
    other = replace(ttt.architecture, hidden_size=1)
    assert said(ttt, other, "b", "mode=score") == f"{cache} is a cache of another target than {path}"
    assert "d was trained for other weights of " in said(ttt, ttt.architecture, "b")
    gptq = {"method": "gptq", "bits": 4}
    apart = f"those of {path} (the one is not quantised, the other quantised by gptq, bits=4): its drafts"
    assert apart in said(ttt, ttt.architecture, "b", quantisation=gptq)
    apart = f"another target than {path} (the one is not quantised, the other quantised by gptq, bits=4)"
    assert said(ttt, ttt.architecture, "b", "mode=score", quantisation=gptq) == f"{cache} is a cache of {apart}"
    size = ttt.architecture.hidden_size
    assert said(ttt, other, "b", "any_target=true") == f"d is for targets with hidden_size {size}, and {path} has 1"
    # Draft layers of sizes of their own need the target's states alone to be of the right size.
    narrow = replace(ttt.architecture, hidden_size=8, heads=2)
    own = replace(ttt, architecture=narrow, target_hidden=size, own_sizes=["hidden_size", "heads"])
    check_target(composed("drafter=d", "any_target=true"), own, ttt.architecture, "b")
    assert said(own, other, "b", "any_target=true") == f"d is for targets with hidden_size {size}, and {path} has 1"


# What no short test can make: a server, a sweep. The rule, its context and the line.
CONTEXTS = {
    "requests beyond the server": (rules.ServerRoom(positions=100, takes=101), ["mode=served", "server.url=http://here"]),
    "partial verification of windows": (rules.Decoded("gemma3_text", window=512), ["verify=partial"]),
    "sweep of a person": (True, ["mode=chat"]),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_rules_of_what_is_not_here_speak_too(name):
    context, words = CONTEXTS[name]
    assert first_broken([RULES[name]], composed(*words), context)


def test_drafts_that_no_server_makes_are_refused(ttt):
    """Servers are asked before, and none is here: the table itself."""
    for words in (["draft.breadth=2"], ["draft.length=adaptive"]):
        said = first_broken(drafter_rules.DECODING, composed("mode=served", *words), drafter_rules.Judged(ttt, None))
        assert said == RULES["drafts that no server makes"].words


def test_every_rule_has_a_case():
    elsewhere = {"no weights", "target of another tokenizer", "cache of another target", "drafts that no server makes"}
    elsewhere |= {"report of another drafter"}
    elsewhere |= {rule.name for rule in rules.LOADED}
    assert {*LINES, *CONTEXTS, *elsewhere} == set(RULES)


# A line of the mode, and the keys that it warns about.
UNREAD = [
    ("mode=score", ["score.documents=4", "score.new_tokens=8", "view.budget=0", "seed=1"], []),
    ("mode=score", ["draft.length=2", "batch=2", "suite.new_tokens=4"], ["draft.length", "batch", "suite.new_tokens"]),
    ("mode=diagnose", ["suite=heldout"], ["suite"]),
    ("mode=decode", ["batch=2", "draft.length=2", "temperatures=[0]", "+suite.balanced=false"], []),
    ("mode=decode", ["score.documents=4", "chat.thinking=true", "format=dflash"], ["score.documents", "chat.thinking", "format"]),
    ("mode=export", ["format=drafter", "seed=1", "data=stdlib"], ["seed", "data"]),
]


@pytest.mark.parametrize("mode,words,expected", UNREAD)
def test_a_named_key_that_the_mode_does_not_read_is_a_line(cache, ttt, tmp_path, capsys, mode, words, expected):
    check_evaluation(composed(mode, f"drafter={written(tmp_path, ttt)}", f"cache.dir={cache}", f"out={tmp_path}/out", *words))
    lines = capsys.readouterr().out.splitlines()
    if mode in ("mode=decode", "mode=export"):
        assert lines.pop(0) == f"warning: {mode} does not read cache.dir; mode=score, mode=diagnose would"
    assert [line.split(";")[0] for line in lines] == [f"warning: {mode} does not read {key}" for key in expected]


def test_every_key_of_the_table_is_warned_about_in_the_other_modes_alone():
    modes = EvalRecipe.model_fields["mode"].annotation.__args__
    for key, readers in READ_BY.items():
        assert readers and set(readers) <= set(modes)
        section, _, name = key.partition(".")
        assert section in EvalRecipe.model_fields
        assert not name or name in EvalRecipe.model_fields[section].annotation.model_fields
        for mode in modes:
            warned = bool(unread(mode, [f"{key}.any" if key in ("score", "draft") else key]))
            above = {mode for other, more in READ_BY.items() if other.startswith(f"{key}.") for mode in more}
            assert warned == (mode not in {*readers, *above})
