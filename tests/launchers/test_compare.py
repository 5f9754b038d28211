"""The comparison script, whole, on a few small arms; and the recipes that hand weights to each other, by real commands."""

import argparse
import json
import sys

import numpy as np
import pytest

from common import cli
from tests.support.commands import ROOT, SMALL, command
from train.measure.copying import BUCKETS
from train.recipe import TrainRecipe
from train.schedules.registry import OBJECTIVES

COMPARE = ROOT / "launchers/compare.py"


def modules():
    sys.path.insert(0, str(ROOT / "launchers"))
    import compare
    import compared

    return compare, compared


def write(path, **report):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))


def test_intervals_equal_values_computed_by_hand():
    """Tokens and verify steps of two prompts and one seed: tau is their ratio of sums, whatever is drawn."""
    compare, compared = modules()
    counted = np.array([[[30.0, 10.0], [10.0, 10.0]]])
    assert compared.tau(counted) == 2.0 and compared.tau(counted[:, [0, 0]]) == 3.0
    assert all(control is None or control in compare.ARMS for control, _ in compare.ARMS.values())
    # Three seeds of one prompt: 4.30 standard errors of their mean.
    seeds = np.array([[[10.0, 10.0]], [[20.0, 10.0]], [[30.0, 10.0]]])
    assert compared.interval(compared.tau, seeds) == pytest.approx((2.0, 2 - 4.30 / 3**0.5, 2 + 4.30 / 3**0.5))
    assert np.isnan(compared.interval(compared.tau, seeds[:1])[1:]).all()  # nothing is known of other seeds, nor of other prompts


def test_all_arms_draft_as_many_tokens_and_weigh_them_alike_when_told_to():
    """By the objectives' own words for it; a rate of 1 is equal weights."""
    compare, _ = modules()
    for arm, (_, named) in compare.ARMS.items():
        words = [word.format(slots=9, block=10, last=5, before=4, middle=2) for word in named]
        said = {rate: compare.decay(argparse.Namespace(decay=rate), named) for rate in (0.8, 1.0)}
        objective = cli.compose("train", TrainRecipe, words + said[0.8]).objective
        assert objective.slots - (objective.kind == "blockwise" and not objective.shifted) == 9, arm
        for rate, (word,) in said.items():
            weights = OBJECTIVES[objective.kind].slot_weights(9, float(word.removeprefix("objective.decay=")))
            assert (weights / weights[0]).tolist() == pytest.approx([rate**j for j in range(9)], rel=1e-5), arm
    assert compare.decay(argparse.Namespace(decay=None), named) == []


def test_tables_of_what_is_judged(tmp_path):
    """Reports written by hand: two seeds of an arm and its control were scored, one of them was decoded too."""
    _, compared = modules()
    counted = {"conditional": [0.5, 0.25], "rounds": [10.0, 5.0]}
    for arm, taus in (("dflash", (2.0, 2.2)), ("blockwise_kv", (2.5, 2.7))):
        for seed, tau in enumerate(taus):
            drafter = {"path": f"elsewhere/{arm}/seed{seed}/checkpoints/last", "parameters": 1_000_000}
            kind = {"tau": tau, "conditional": [0.5 + 0.1 * seed, 0.25]}
            copies = dict.fromkeys(BUCKETS, {"sampled": counted, "greedy": counted})
            write(
                tmp_path / arm / f"score/{seed}/score.json",
                drafter=drafter,
                context=None,
                sampled=kind,
                greedy=kind,
                copies=copies,
            )
            parts = {"by_category": {"qa": {"tau": tau}, "rag": {"tau": 1.0}}, "round_ms": {"draft": 3.0}}
            figures = {"1": {"per_prompt": [[20, 10]] * 4, "conditional": [0.7, 0.6]} | parts}
            prompts = {"ids": ["1"], "prompt_tokens": 4096 - seed}  # for which a drafter has room: no two prompts
            if arm == "dflash":
                write(tmp_path / arm / f"decode/{seed}/report.json", drafter=drafter, prompts=prompts, temperatures=figures)
    options = argparse.Namespace(
        runs=tmp_path, arms=["dflash", "blockwise_kv", "eagle3"], seeds=2, controls={"dflash": None, "blockwise_kv": "dflash"}
    )
    compared.table(options)
    lines = (tmp_path / "compare.md").read_text().splitlines()
    student = 12.71 * 0.1 * 2**0.5 / 2**0.5
    assert f"| **2.10** [{2.1 - student:.2f}, {2.1 + student:.2f}] | **2.10** " in lines[4] and "| 0.55 0.25 |" in lines[4]
    assert lines[5].endswith("| dflash | +0.50 [+0.50, +0.50] | beats it |")
    by_distance = lines[lines.index("| arm | " + " | ".join(BUCKETS) + " |") + 2]
    assert by_distance == "| dflash" + " | 0.50 0.25 (20 10)" * len(BUCKETS) + " |"
    decoded = lines[lines.index("Decoded; intervals over seeds and prompts") :]
    assert "| **2.00** [2.00, 2.00] | 0.70 0.60 |" in decoded[4] and len(decoded[5]) == 0
    assert "| arm | qa | rag | draft ms |" in decoded and decoded[-3].endswith("| 3.0 |")
    assert decoded[-1] == "not judged: eagle3" and all((tmp_path / f"{name}.png").exists() for name in ("compare", "decay"))
    (tmp_path / "dflash/score/1/score.json").unlink()
    with pytest.raises(SystemExit, match="dflash has no score of seed1"):
        compared.table(options)


@pytest.mark.parametrize("seed_noise,prompt_noise", [(0.1, 0.0), (0.0, 0.3), (0.05, 0.3)])
def test_intervals_cover_the_true_value_as_often_as_they_claim(seed_noise, prompt_noise):
    """Simulated arms that differ in nothing but the noise of seeds and prompts: at most one verdict in twenty is wrong."""
    _, compared = modules()
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        prompts = rng.normal(0, prompt_noise, (1, 40))  # arms share prompts, but each prompt suits one of them better
        arms = [
            2 + rng.normal(0, seed_noise, (3, 1)) + prompts + rng.normal(0, prompt_noise, (1, 40)) + rng.normal(0, 0.1, (3, 40))
            for _ in range(2)
        ]
        counted = [np.stack([20 * arm, np.full_like(arm, 20)], axis=-1) for arm in arms]
        _, low, high = compared.interval(compared.gain, *counted)
        covered += low <= 0 <= high
    assert covered >= 94


def test_an_unknown_arm_is_refused(tmp_path):
    done = command(COMPARE, "train", tmp_path / "runs", "--arms", "eagle4")
    assert done.returncode == 2 and "no arm is called eagle4" in done.stderr and not (tmp_path / "runs").exists()
    done = command(COMPARE, "judge", tmp_path / "runs", "--what", "taste")
    assert done.returncode == 2 and "no judgement is called taste" in done.stderr


@pytest.mark.slow
def test_the_comparison_launcher_trains_judges_and_prints_its_table(tmp_path):
    arms = "dflash,blockwise_hybrid"
    options = ["--seeds", "2", "--jobs", "2", "--tokens", "30000", "--slots", "6", "--arms", arms]
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
    assert early.returncode == 1 and "is judged; say `judge` first" in early.stderr
    little = ["suite.count=2", "suite.prompt_tokens=64", "suite.new_tokens=16", "score.documents=4", "score.anchors=4"]
    judged = command(COMPARE, "judge", "runs", *options, *little, cwd=tmp_path)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    done = command(COMPARE, "table", "runs", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "runs/compare.md").read_text()
    for name in ("Held-out documents", "Acceptance (rounds)", "Decoded", "tau by kind of prompt, T = 0", "Diagnosis of seed 0"):
        part = table.split(name, 1)[1].strip().split("\n\n")[1]
        assert [line.split("|")[1].strip() for line in part.splitlines()[2:]] == arms.split(","), name
    assert all((tmp_path / f"runs/{name}.png").exists() for name in ("compare", "decay"))
    assert table.count("| dflash |") >= 2  # the control, with a verdict, of what was scored and of what was decoded
    assert sum(table.count(verdict) for verdict in ("beats it", "WORSE", "no difference shown")) == 2
    scored = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("score.json")]
    assert len(scored) == 4 and all(len(report["sampled"]["conditional"]) == 6 for report in scored)
    recipe = json.loads((tmp_path / "runs/blockwise_hybrid/seed1/recipe.json").read_text())
    assert recipe["train"]["seed"] == 1 and recipe["reuse"]["kind"] == "hybrid"


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
