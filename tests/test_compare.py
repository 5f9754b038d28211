"""The comparison script, whole, on a few small arms; and the recipes that hand weights to each other, by real commands."""

import json
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, SMALL, command

COMPARE = ROOT / "launchers/compare.py"


def test_intervals_by_hand():
    """Tokens and verify steps of two prompts and one seed: tau is their ratio of sums, whatever is drawn."""
    sys.path.insert(0, str(ROOT / "launchers"))
    import compare

    counted = np.array([[[30.0, 10.0], [10.0, 10.0]]])
    assert compare.tau(counted) == 2.0 and compare.tau(counted[:, [0, 0]]) == 3.0
    assert compare.interval(list(range(101))) == (2.5, 97.5)
    assert all(control is None or control in compare.ARMS for control, _ in compare.ARMS.values())


def test_an_unknown_arm_is_refused(tmp_path):
    done = command(COMPARE, "train", tmp_path / "runs", "--arms", "eagle4")
    assert done.returncode == 2 and "no arm is called eagle4" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_comparison_runs_to_its_table(tmp_path):
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
    little = ["prompts.count=2", "prompts.tokens=64", "prompts.max_new_tokens=16", "score.documents=4", "score.anchors=4"]
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
    assert "15 tensors taken" in done.stdout and "layers.0.fuse.gate.weight" in done.stdout
    done = train("ttt", "objective=ttt", "reuse=hidden", "drafter.warm_start=hybrid/checkpoints/best")
    assert done.returncode == 0 and "tensors taken" in done.stdout, done.stderr
