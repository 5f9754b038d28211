"""W&B as it is lost on the way."""

import json

import psutil
from PIL import Image

from train.recipe import TrackingRecipe
from train.run.tracking import Tracker


def test_a_run_goes_on_when_the_service_of_wandb_is_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = set(psutil.Process().children(recursive=True))
    tracker = Tracker(TrackingRecipe(kind="wandb"), tmp_path, None, {}, 0)
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    tracker.log(1, {"loss": 1.0})
    tracker.picture(1, "one", tmp_path / "one.png")
    services = [one for one in psutil.Process().children(recursive=True) if one not in before and "wandb" in one.name()]
    for one in services:
        one.kill()
    assert services and not psutil.wait_procs(services, timeout=10)[1]
    for step in (2, 3, 4):
        tracker.log(step, {"loss": 1.0})
        tracker.picture(step, "one", tmp_path / "one.png")
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("W&B is lost") == 1
