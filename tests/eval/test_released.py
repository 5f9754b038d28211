"""Drafters that have names, and drafters beside a target that is not theirs."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import cli
from common.errors import UserError
from data_prep.target.target import Target
from eval.check import check_target
from eval.recipe import EvalRecipe
from tests.support.commands import ROOT, command
from tests.support.gguf_files import small_model, write_gguf
from tests.support.tiny_drafter import save_tiny_drafter
from train.drafter import config as drafter_config
from train.drafter import warm_start as exchange
from train.drafter.build import load_config, load_drafter
from train.drafter.config import folder_of, released

QUICK = ["suite.count=2", "suite.prompt_tokens=16", "suite.new_tokens=4", "temperatures=[0]"]
QUICK += ["controls=false", "transformers=false"]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory) -> Path:
    return save_tiny_drafter(tmp_path_factory.mktemp("drafter") / "own")


@pytest.fixture
def shelf(tmp_path, monkeypatch, drafter) -> Path:
    """A folder of released drafters with two of them."""
    for name in ("one", "two"):
        (tmp_path / "shelf" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "shelf" / name).symlink_to(drafter)
    (tmp_path / "shelf/nothing").mkdir()  # no drafter
    monkeypatch.setattr(drafter_config, "RELEASED", tmp_path / "shelf")
    return tmp_path / "shelf"


def test_a_name_means_the_released_drafter_and_a_path_comes_first(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert released() == ["one", "two"]
    assert folder_of("one") == shelf / "one" and load_drafter("one").config == load_config(shelf / "two")
    config = load_config("two")
    assert exchange._config("two", config).objective == "ttt" and exchange._weights("two", config, None)
    Path("one").mkdir()  # something of this name lies here
    assert folder_of("one") == Path("one") and folder_of("shelf/../shelf/two") == Path("shelf/../shelf/two")
    with pytest.raises(UserError, match="one holds no drafter"):
        load_drafter("one")


def test_an_unknown_name_is_answered_with_those_that_there_are(shelf):
    for name in ("three", "nothing", "../shelf/one", "one/config.json"):
        with pytest.raises(UserError, match="holds no drafter .*; released drafters have names: one, two$"):
            load_config(name)
    with pytest.raises(UserError, match="config.json holds no drafter"):
        load_config(shelf / "one/config.json")  # a file that there is
    with pytest.raises(UserError, match="warm_start=three holds no checkpoint .*; released drafters have names: one, two$"):
        exchange.check_warm_start("three", load_config("one"))


def test_the_released_drafters_are_these_three():
    assert released() == ["smollm2-block", "smollm2-eagle3", "smollm2-ttt"]


@pytest.mark.parametrize("name", released())
def test_a_released_drafter_is_whole_small_and_described(name):
    folder = folder_of(name)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 20_000_000 and len((folder / "README.md").read_text()) > 500
    assert {t.dtype for t in load_file(weights).values() if t.is_floating_point()} == {torch.bfloat16}
    assert load_drafter(name).config.target["weights_hash"]


def test_git_keeps_what_is_released():
    """And would tell if it did not: a run's folder is ignored."""
    said = lambda path: subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode
    assert said("runs/run/model.safetensors") == 0
    for name in ("config.json", "model.safetensors", "README.md"):
        assert said(f"eval/drafters/smollm2-ttt/{name}") == 1


def test_another_targets_weights_are_refused_unless_told_otherwise(tmp_path, drafter):
    """A copy of the target in which one number differs is another target, and the command says so before it decodes."""
    tiny, other = ROOT / "data_prep/targets/tiny", tmp_path / "other"
    other.mkdir()
    for file in tiny.iterdir():
        (other / file.name).symlink_to(file)
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    (other / "model.safetensors").unlink()
    save_file(weights, other / "model.safetensors", {"format": "pt"})

    words = [ROOT / "eval/main.py", f"drafter={drafter}", "out=report", f"target.path={other}", *QUICK]
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "any_target=true" in refused.stderr
    assert f"{drafter} was trained for other weights of tiny than those of {other}" in refused.stderr
    assert not (tmp_path / "report").exists() and "tau" not in refused.stdout
    done = command(*words, "any_target=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["temperatures"]["0"]["lossless"] and report["target"]["id"] == str(other)
    assert report["target"]["weights_hash"] == Target(str(other)).weights_hash() != report["drafter"]["trained_for"]


def test_a_target_of_other_sizes_and_a_cache_of_another_target_are_refused_all_the_same(drafter, cache):
    compose = lambda *words: cli.compose("eval", EvalRecipe, [f"drafter={drafter}", "any_target=true", *words])
    config = load_config(drafter)
    check_target(compose(), config, config.architecture, "another")
    with pytest.raises(UserError, match="is for targets with num_layers 6, and data_prep/targets/tiny has 7"):
        check_target(compose(), config, replace(config.architecture, num_layers=7), "another")
    for field, other in (("intermediate_size", 9), ("max_positions", 64), ("qk_norm", not config.architecture.qk_norm)):
        with pytest.raises(UserError, match=f"is for targets with {field} "):
            check_target(compose(), config, replace(config.architecture, **{field: other}), "another")
    with pytest.raises(UserError, match="is for targets with another inv_freq"):
        check_target(compose(), config, replace(config.architecture, inv_freq=[1.0]), "another")
    rounded = replace(config.architecture, norm_eps=config.architecture.norm_eps * (1 + 1e-8))
    check_target(compose(), config, rounded, "another")
    read = compose("mode=score", f"cache.dir={cache}")
    check_target(read, config, config.architecture, config.target["weights_hash"])
    with pytest.raises(UserError, match="is a cache of another target than"):
        check_target(read, config, config.architecture, "another")


def test_a_gguf_target_has_one_hash_whatever_it_is_loaded_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    file = str(write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True)))
    found = {Target(file, dtype=dtype).weights_hash() for dtype in (torch.float32, torch.bfloat16)}
    assert len(found) == 1
    other = str(write_gguf(tmp_path / "other.gguf", small_model("llama", tied=True, seed=1)))
    assert Target(other).weights_hash() not in found


def test_an_export_in_our_own_format_is_the_drafter_in_bf16(tmp_path, drafter):
    """And never lies where the drafter itself does, nor holds a part of another target."""
    words = [ROOT / "eval/main.py", "mode=export", "format=drafter", f"drafter={drafter}"]
    before = (drafter / "model.safetensors").read_bytes()
    refused = command(*words, f"out={drafter.parent}/../{drafter.parent.name}/own", cwd=tmp_path)
    assert refused.returncode == 2 and "is the drafter's own folder" in refused.stderr
    assert (drafter / "model.safetensors").read_bytes() == before
    done = command(*words, "out=small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "small") == load_config(drafter)
    small, own = load_file(tmp_path / "small/model.safetensors"), load_file(drafter / "model.safetensors")
    assert small.keys() == own.keys() and all(torch.equal(t, own[name].bfloat16()) for name, t in small.items())
    other = command(*words[:2], "format=eagle3", f"drafter={drafter}", "any_target=true", "out=x", cwd=tmp_path)
    assert other.returncode == 2 and "leave out any_target=true" in other.stderr
