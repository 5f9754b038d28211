"""The comparison script, whole, on a few small arms; and the recipes that hand weights to each other, by real commands."""

import json
import sys

import numpy as np
import pytest

from tests.support.commands import ROOT, SMALL, command

COMPARE = ROOT / "launchers/compare.py"


def test_intervals_equal_values_computed_by_hand():
    """Tokens and verify steps of two prompts and one seed: tau is their ratio of sums, whatever is drawn."""
    sys.path.insert(0, str(ROOT / "launchers"))
    import compare

    counted = np.array([[[30.0, 10.0], [10.0, 10.0]]])
    assert compare.tau(counted) == 2.0 and compare.tau(counted[:, [0, 0]]) == 3.0
    assert all(control is None or control in compare.ARMS for control, _ in compare.ARMS.values())
    # Three seeds of one prompt: 4.30 standard errors of their mean.
    seeds = np.array([[[10.0, 10.0]], [[20.0, 10.0]], [[30.0, 10.0]]])
    assert compare.interval(compare.tau, seeds) == pytest.approx((2.0, 2 - 4.30 / 3**0.5, 2 + 4.30 / 3**0.5))


@pytest.mark.parametrize("seed_noise,prompt_noise", [(0.1, 0.0), (0.0, 0.3), (0.05, 0.3)])
def test_intervals_cover_the_true_value_as_often_as_they_claim(seed_noise, prompt_noise):
    """Simulated arms that differ in nothing but the noise of seeds and prompts: at most one verdict in twenty is wrong."""
    sys.path.insert(0, str(ROOT / "launchers"))
    import compare

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        prompts = rng.normal(0, prompt_noise, (1, 40))  # arms share prompts, but each prompt suits one of them better
        arms = [
            2 + rng.normal(0, seed_noise, (3, 1)) + prompts + rng.normal(0, prompt_noise, (1, 40)) + rng.normal(0, 0.1, (3, 40))
            for _ in range(2)
        ]
        counted = [np.stack([20 * arm, np.full_like(arm, 20)], axis=-1) for arm in arms]
        _, low, high = compare.interval(compare.gain, *counted)
        covered += low <= 0 <= high
    assert covered >= 94


def test_an_unknown_arm_is_refused(tmp_path):
    done = command(COMPARE, "train", tmp_path / "runs", "--arms", "eagle4")
    assert done.returncode == 2 and "no arm is called eagle4" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_comparison_launcher_trains_judges_and_prints_its_table(tmp_path):
    options = ["--seeds", "2", "--jobs", "2", "--tokens", "30000", "--arms", "dflash,blockwise_hybrid,aligned_random"]
    small = [
        "train.max_steps=4",
        "train.save_every=4",
        "objective.anchors=8",
        "train.pack_tokens=512",
        "train.validation_documents=6",
    ]
    trained = command(COMPARE, "train", "runs", *options, *small, cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    again = command(COMPARE, "train", "runs", *options, *small, cwd=tmp_path)
    assert again.returncode == 0 and "done" not in again.stdout  # nothing was left to do
    early = command(COMPARE, "table", "runs", *options, cwd=tmp_path)
    assert early.returncode == 1 and "is missing; say `judge` again" in early.stderr
    little = ["suite.count=2", "suite.prompt_tokens=64", "suite.new_tokens=16", "score.documents=4", "score.anchors=4"]
    judged = command(COMPARE, "judge", "runs", *options, *little, cwd=tmp_path)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    done = command(COMPARE, "table", "runs", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "runs/compare.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert rows.keys() == {"dflash", "blockwise_hybrid", "aligned_random"} and (tmp_path / "runs/compare.png").exists()
    assert "| dflash |" in rows["blockwise_hybrid"].split("blockwise_hybrid", 1)[1]  # its control, with a verdict
    assert any(verdict in rows["blockwise_hybrid"] for verdict in ("beats it", "WORSE", "no difference shown"))
    recipe = json.loads((tmp_path / "runs/aligned_random/seed1/recipe.json").read_text())
    assert recipe["train"]["seed"] == 1 and recipe["loss"]["kv_align"] > 0 and recipe["drafter"]["start"] == "random"


@pytest.mark.slow
def test_eagle3_is_exported_and_starts_a_hybrid(cache, tmp_path):
    """experiment=eagle3 trains with a vocabulary of its own; its export starts KVShot's hybrid, which starts a hidden drafter."""
    common = [f"cache.dir={cache}", "train.batch=1", "train.max_steps=2", "train.save_every=2", *SMALL]
    train = lambda run, *words: command(ROOT / "train/main.py", *words, *common, f"run.dir={run}", cwd=tmp_path)
    done = train("eagle3", "experiment=eagle3", "drafter.vocabulary=3000")
    assert done.returncode == 0, done.stderr
    drafter = "eagle3/checkpoints/best"
    done = command(ROOT / "eval/main.py", "mode=export", f"drafter={drafter}", "out=served", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "served/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 3000
    assert config["rope_theta"] == 1000000.0 and config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    done = train(
        "hybrid", "experiment=kvshot_hybrid", "drafter.warm_start=served", "drafter.vocabulary=3000", "drafter.own_head=true"
    )
    assert done.returncode == 0, done.stderr
    assert "14 tensors taken" in done.stdout and "layers.0.fuse.gate.weight" in done.stdout
    done = train("ttt", "objective=ttt", "reuse=hidden", "drafter.warm_start=hybrid/checkpoints/best", "drafter.qk_norm=false")
    assert done.returncode == 0 and "tensors taken" in done.stdout, done.stderr
