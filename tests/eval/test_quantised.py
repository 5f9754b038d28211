"""Over the states of a quantised target a drafter trains, and it is judged beside that target and no other."""

import json

import pytest

from common.recipe import ROOT
from tests.support.commands import SMALL, TRAIN, command
from tests.support.quantised import TINY, quantised


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "bnb4"])
def test_a_drafter_trains_over_a_quantised_target_and_is_judged_beside_it(name, tmp_path):
    target = quantised(name, tmp_path)
    source = [f"target.path={target}", "data=stdlib", "data.max_tokens=6000", "data.max_length=128"]
    done = command(TRAIN, *source, f"cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", *SMALL, "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    method = json.loads((tmp_path / "cache/manifest.json").read_text())["target"]["quantisation"]["method"]
    config = json.loads((tmp_path / "run/checkpoints/best/config.json").read_text())
    assert config["start"] == "target" and config["target"]["quantisation"]["method"] == method

    quick = ["suite.count=2", "suite.prompt_tokens=16", "suite.new_tokens=8", "temperatures=[0]", "controls=false"]
    words = [ROOT / "eval/main.py", f"drafter={tmp_path / 'run/checkpoints/best'}", f"out={tmp_path / 'report'}", *quick]
    refused = command(*words, f"target.path={TINY}")
    assert refused.returncode == 2
    assert f"(the one is quantised by {method}, " in refused.stderr and "the other not quantised)" in refused.stderr
    done = command(*words, f"target.path={target}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["target"]["quantisation"]["method"] == method
    assert report["temperatures"]["0"]["lossless"]
