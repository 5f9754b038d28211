"""The learning rate of every step, and what a run logs of it."""

import json

import pytest
from safetensors import safe_open

from tests.support.commands import SMALL, TRAIN, command
from tests.support.runs import losses
from train.recipe import TrainSection
from train.run.rates import share_of_peak


def shares(max_steps, warmup_ratio):
    train = TrainSection.model_construct(max_steps=max_steps, warmup_ratio=warmup_ratio, min_lr_ratio=0.1)
    return [share_of_peak(train, step) for step in range(1, max_steps + 1)]


def test_the_peak_and_the_floor_are_used():
    assert shares(3, 0) == pytest.approx([1, 0.55, 0.1])
    assert shares(6, 0.5) == pytest.approx([1 / 3, 2 / 3, 1, 0.775, 0.325, 0.1])
    assert shares(1, 0) == shares(1, 0.9) == [1]


SHORT = ["train.batch=2", "train.save_every=1", "train.diagnose=false", "train.workers=0", *SMALL]


def test_the_first_step_learns_and_the_log_says_its_own_rate(cache, tmp_path):
    """Two ranks without a warm-up: the peak moves weights by about itself (AdamW's first step), and resuming changes nothing."""
    words = [TRAIN, f"cache.dir={cache}", "run.dir=run", "train.warmup_ratio=0", "train.keep_last=9", "train.max_steps=3", *SHORT]
    done = command(*words, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run", "lr") == pytest.approx([1e-3, 0.51e-3, 0.02e-3])
    names = [tmp_path / f"run/checkpoints/step-00000{step}/drafter/model.safetensors" for step in (1, 2)]
    one, two = (safe_open(path, framework="pt").get_tensor("norm.weight") for path in names)
    assert (one - two).abs().max().item() == pytest.approx(0.51e-3, rel=0.5)


@pytest.mark.parametrize("rate,zero", [("1e38", "zero3")])
def test_a_checkpoint_that_is_not_finite_is_not_written(cache, tmp_path, rate, zero):
    """Weights that one step made absurd, on two ranks: no checkpoint, no NaN in the log, and the rate is blamed."""
    words = [TRAIN, f"cache.dir={cache}", "run.dir=run", f"deepspeed={zero}", "train.max_steps=4", *SHORT]
    done = command(*words, "train.warmup_ratio=0", f"train.lr={rate}", ranks=2, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not finite" in done.stderr and "ower train.lr" in done.stderr
    assert not list((tmp_path / "run/checkpoints").iterdir())
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_loss_that_its_own_weights_break_does_not_blame_the_rate(cache, tmp_path):
    words = [TRAIN, f"cache.dir={cache}", "run.dir=run", "objective=ttt", "objective.decay=1e30", "train.max_steps=2", *SHORT]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not finite" in done.stderr and "objective" in done.stderr and "train.lr" not in done.stderr
