"""Sweeps over budgets and contexts by the real commands: a folder a point, one table, one picture, one W&B group."""

import dataclasses
import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file

from common import cli, overrides
from common.errors import UserError
from common.ranks import free_port
from data_prep.cache.reader import CacheReader
from data_prep.target.loading import load_target
from eval.check import check_evaluation
from eval.main import run
from eval.recipe import EvalRecipe
from eval.reports import compare, sweep
from tests.support.commands import ROOT, SMALL, command, deepspeed
from tests.support.runs import losses
from train.build import drafter_config
from train.drafter.build import new_drafter
from train.recipe import TrainRecipe

EVAL = ROOT / "eval/main.py"
VIEW = ["view=topk_chunk", "view.recent=8"]
SPARSE = ["objective=budgetdraft", "reuse=kv", "view.recent=8", "objective.smallest=24", "objective.largest=90"]


def group_of(point) -> str:
    """The group of the W&B run that was logged there, from its own record: a header of 7 bytes, then blocks of 32 KiB, in which
    records, or parts of records, follow (crc, length, type)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (log,) = (point / "wandb").glob("offline-run-*/run-*.wandb")
    data = log.read_bytes()
    at = 7
    parts = b""
    while at < len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts = parts + data[at + 7 : at + 7 + length]
        at = at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "run":
                return record.run.run_group
    raise AssertionError(f"{log} holds no run")


@pytest.fixture(scope="module")
def drafter(cache, tmp_path_factory):
    """An untrained drafter of the embedded target, under its name for what it was trained for."""
    recipe = cli.compose("train", TrainRecipe, [*SPARSE, f"cache.dir={cache}", *SMALL])
    target = load_target(recipe.target)
    folder = tmp_path_factory.mktemp("drafter")
    new_drafter(drafter_config(recipe, CacheReader(cache).manifest)).start(target, target.frozen_head).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_sweep_of_evaluations_is_one_table_one_picture_and_one_group(cache, drafter, tmp_path):
    words = [
        "-m",
        f"drafter={drafter}",
        *VIEW,
        "view.budget=24,0",
        "tracking=wandb",
        "suite.new_tokens=8",
    ]
    env = {"WANDB_MODE": "offline"}
    few = ["suite.count=2", "temperatures=[1]", "transformers=false"]
    done = command(EVAL, *words, "suite.prompt_tokens=64,100", "out=decoded", *few, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    words += ["score.context=64,100", "out=scored", "mode=score", f"cache.dir={cache}"]
    scored = command(EVAL, *words, cwd=tmp_path, env=env)
    assert scored.returncode == 0, scored.stderr
    decoded, scores = ("decoded", "report.json", "suite.prompt_tokens"), ("scored", "score.json", "score.context")
    for folder, name, key in (decoded, scores):
        for budget in (24, 0):
            for context in (64, 100):
                point = tmp_path / folder / f"{key}={context},view.budget={budget}"
                found = json.loads((point / name).read_text())
                assert found["context"] == context and found["view"]["budget"] == budget
                assert found["view"]["kind"] == "topk_chunk"
                assert found["drafter"]["budgets"] == "sandwich" and found["drafter"]["trained_view"]["recent"] == 8
                assert group_of(point) == folder
                if folder == "decoded":
                    (log,) = (point / "wandb").glob("offline-run-*")
                    (logged,) = log.glob("files/media/html/report_html*.html")
                    assert logged.read_text() == (point / "report.html").read_text()
                    assert list(log.glob("files/media/images/report_png*.png"))
                    (record,) = log.glob("*.wandb")
                    for figure in (b"by_context.tau/1", b"round_ms.overhead", b"drafter_kv.read_mib", b"peak_gib"):
                        assert figure in record.read_bytes()
                    assert b"per_prompt" not in record.read_bytes() and b"rejected" not in record.read_bytes()
                    assert any(kind == "rejected" for one in found["examples"]["1"] for _, kind in one["pieces"])
        assert (tmp_path / folder / "sweep.png").stat().st_size > 10_000
        assert "teacher-forced" in (tmp_path / folder / "sweep.html").read_text() or folder == "decoded"
    points = compare.load([str(tmp_path / f"decoded/suite.prompt_tokens=100,view.budget={budget}") for budget in (24, 0)])
    compared = compare.compare(points, seed=0)
    assert [one["paired"] for one in compared["temperatures"]["1"].values()] == [True, True] and "view.budget" in compared[
        "differ"
    ]
    at_100 = {b: tmp_path / f"decoded/suite.prompt_tokens=100,view.budget={b}/report.json" for b in (24, 0)}
    read = {b: json.loads(path.read_text()) for b, path in at_100.items()}
    assert 0 < read[24]["drafter_kv"]["read_mib"] <= 24 * 2 * 2 * 64 * 4 / 2**20  # 24 positions of K and V in one layer, float32
    assert read[0]["drafter_kv"]["read_mib"] > 3 * read[24]["drafter_kv"]["read_mib"]
    assert read[24]["temperatures"]["1"]["lossless"]
    text = (tmp_path / "decoded/sweep.md").read_text()
    assert text.startswith("|  | context | drafter | 24 | full |")
    for who in ("ttt kv, sandwich", "untrained", "prompt lookup"):
        assert f"| tau T=1 | 100 | {who} | " in text and f"| speedup T=1 | 64 | {who} | " in text
    both = command(ROOT / "eval/reports/sweep.py", "decoded", "scored", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert "teacher-forced tau T=1" in (tmp_path / "decoded/sweep.md").read_text()


def test_a_folder_without_reports_is_a_one_line_error(tmp_path):
    done = command(ROOT / "eval/reports/sweep.py", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "no report of a drafter" in done.stderr


def test_seeds_are_averaged_and_drafters_named_after_their_budgets(tmp_path):
    """Three reports by hand: two seeds of one drafter and another that always saw everything."""

    def write(name, budgets, budget, tau, seed, view=None, **more):
        drafter = {
            "objective": "ttt",
            "reuse": "kv",
            "budgets": budgets,
            "lm": None,
            "seed": seed,
            "path": f"{name}/checkpoints/best",
        }
        found = {"drafter": drafter | more, "view": {"kind": "h2o", "budget": budget} | (view or {}), "context": 4096, "kl": 1.0}
        (tmp_path / name).mkdir()
        (tmp_path / name / "score.json").write_text(json.dumps(found | {k: {"tau": tau} for k in ("sampled", "greedy")}))

    def gathered():
        sweep.gather([tmp_path], tmp_path)
        lines = (tmp_path / "sweep.md").read_text().splitlines()
        assert lines[0] == "|  | context | drafter | 256 | full |"
        return [line.split("4096 | ")[1] for line in lines if "tau T=1" in line]

    write("a", 512, 256, 2.0, 0)
    write("b", 512, 256, 3.0, 1)
    write("c", None, 0, 2.5, 0)
    assert gathered() == ["ttt kv, 512 only | 2.50 [2.00, 3.00] |  |", "ttt kv, full view only |  | 2.50 |"]
    # What differs is named, and never averaged: another view, another drafter, and one whose difference no report knows.
    write("d", 512, 256, 4.0, 2, {"kind": "snapkv"})
    assert "ttt kv, 512 only, kind snapkv | 4.00 |  |" in gathered()
    write("e", 512, 256, 5.0, 3, slots=9)
    assert "ttt kv, 512 only, kind h2o, slots 9 | 5.00 |  |" in gathered()
    write("f", 512, 256, 6.0, 0)
    rows = gathered()
    for name, tau in (("a", 2.0), ("b", 3.0), ("f", 6.0)):
        assert f"ttt kv, 512 only, kind h2o ({name}) | {tau:.2f} |  |" in rows
    write("g", 512, 256, 7.0, 0, lm="a/small", target_layers=[])  # of layers that it has not, nothing is said
    assert "small, 512 only, kind h2o | 7.00 |  |" in gathered()
    (tmp_path / "f/score.json").write_text(json.dumps({"drafter": "x"}))
    with pytest.raises(UserError, match="made by an earlier release"):
        sweep.gather([tmp_path], tmp_path)


@pytest.mark.parametrize(
    "words,message",
    [
        (["suite.prompt_tokens=32766"], "32766 tokens of context and suite.new_tokens=64 exceed the target's 32768 positions"),
        (["view.budget=16"], "always shows 8 sinks and 8 recent positions"),  # auto: the view of training
        (["view=h2o", "view.budget=0"], None),
        (["mode=score", "score.context=4000", "cache.dir=CACHE"], None),  # refused once the documents are counted
    ],
)
def test_eval_refuses_what_a_view_cannot_be(cache, drafter, words, message):
    words = [word.replace("CACHE", str(cache)) for word in words]
    check = lambda: check_evaluation(cli.compose("eval", EvalRecipe, [f"drafter={drafter}", *words]))
    if message is None:
        return check()
    with pytest.raises(UserError, match=message):
        check()


def test_settings_that_cannot_be_swept_or_diagnosed_are_one_line_errors(cache, drafter, tmp_path):
    words = [f"drafter={drafter}", f"cache.dir={cache}"]
    done = command(EVAL, "-m", *words, "mode=score", "out=a,b", cwd=tmp_path)
    assert done.returncode == 2 and "out is the folder of the whole sweep" in done.stderr and not list(tmp_path.iterdir())
    for mode in ("diagnose", "export"):
        with pytest.raises(UserError, match=f"mode={mode} knows the full view only: leave out view.budget"):
            check_evaluation(cli.compose("eval", EvalRecipe, [*words, f"mode={mode}", "view.budget=24"]))
    with pytest.raises(UserError, match="/none: no report of a drafter is there"):
        sweep.gather([tmp_path / "none"], tmp_path)
    assert overrides.parsed(["drafter=a/view.budget=2/best"])[0].value() == "a/view.budget=2/best"  # a folder of a sweep
    with pytest.raises(UserError, match="""quote what belongs together: "drafter='a/view=x,y=2/best'\""""):
        overrides.parsed(["drafter=a/view=x,y=2/best"], multirun=True)
    with pytest.raises(UserError, match="/dev/null is a file; it must be a folder"):
        check_evaluation(cli.compose("eval", EvalRecipe, [*words, "out=/dev/null/x"]))
    swept = overrides.sweep_words("out", "o", ["drafter=a/b,c", "cache.dir=x,y", "seed=64"], ("out", "cache.dir"))
    assert swept[2].endswith("exclude_keys=[out,seed]")  # what is swept stands in the folder's name
    assert overrides.folder_name("drafter=a/b/c") == "drafter=a_b_c" and len(overrides.folder_name("x" * 999)) < 200


def test_a_context_longer_than_the_cached_documents_is_a_one_line_error(cache, drafter, tmp_path):
    done = command(EVAL, "mode=score", f"drafter={drafter}", f"cache.dir={cache}", "score.context=4000", "out=no", cwd=tmp_path)
    assert done.returncode == 2 and "score.context=4000: the longest held-out document" in done.stderr
    assert not (tmp_path / "no").exists()


def test_a_drafter_beyond_its_positions_is_judged_with_a_warning(cache, tmp_path, capsys):
    """One that began at random has known as many positions as its documents; in the cache it needs no more than its budget."""
    recipe = cli.compose("train", TrainRecipe, [*SPARSE, f"cache.dir={cache}", "drafter.start=random", *SMALL])
    target = load_target(recipe.target)
    new_drafter(drafter_config(recipe, CacheReader(cache).manifest)).start(target, target.frozen_head).save_pretrained(tmp_path)

    def check(*words) -> str:
        check_evaluation(cli.compose("eval", EvalRecipe, [f"drafter={tmp_path}", *words]))
        return capsys.readouterr().out

    warned = check("suite.prompt_tokens=512", "view.budget=64")
    assert "knows positions below 128, and 20 of 20 prompts reach up to 580: outputs are the target's" in warned
    assert warned.count("\n") == 1 and "view.positions=in_cache" in warned
    assert check("suite.prompt_tokens=512", "view.budget=64", "view.positions=in_cache") == ""
    assert check("suite.prompt_tokens=56", "suite.new_tokens=64") == ""
    # Nothing is hidden: positions are those of the text.
    assert "knows positions below 128" in check("suite.prompt_tokens=512", "view.budget=0", "view.positions=in_cache")
    auto = cli.compose("eval", EvalRecipe, ["drafter=x", "view.budget=99", "view.recent=16"]).view
    assert auto.model_fields_set == {"kind", "budget", "recent"}  # all else is as trained
    assert check("mode=score", f"cache.dir={cache}") == ""  # the documents that it was trained on
    short = dataclasses.replace(drafter_config(recipe, CacheReader(cache).manifest), positions=100)  # of packs of 100 tokens
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(short)))
    (tmp_path / "files.json").unlink()  # it tells that config.json was changed
    assert check("mode=score", f"cache.dir={cache}", "score.pack_tokens=100") == ""
    words = ["mode=score", f"cache.dir={cache}", "view.budget=0", f"out={tmp_path / 'score'}"]
    said = "knows positions below 100, and [0-9]+ of [0-9]+ documents reach up to 128: tau is shown apart"
    assert re.search(said, check(*words))
    run(cli.compose("eval", EvalRecipe, [f"drafter={tmp_path}", *words]))
    assert "beyond the 100 positions that it knows:" in capsys.readouterr().out
    found = json.loads((tmp_path / "score/score.json").read_text())
    apart = found["by_positions"]
    whole = found["sampled"]["tau"]
    assert apart["known"] == 100 and min(apart[part]["anchors"] for part in ("within", "beyond")) > 10
    taus = [apart[part]["tau"]["sampled"] for part in ("within", "beyond")]
    assert min(taus) < whole < max(taus)


# Launchers


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    words = [*SPARSE, f"cache.dir={cache}", f"run.dir={folder / 'run'}", "deepspeed=zero0", *STEPS]
    done = command(ROOT / "train/main.py", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


# Two layers over the target's K/V under a view that looks at queries, whose selection is up to eight tokens old; lambda per view.
STEPS = ["reuse=hybrid", "view.refresh=9", "drafter.layers=2", "loss=lk_lambda", "objective.draws=2"]
STEPS += ["train.batch=4", "train.max_steps=8", "train.save_every=4", *SMALL, "train.pack_tokens=128"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_whose_budgets_differ_equal_one_process(cache, alone, tmp_path, zero):
    """Every rank runs the same forwards and collectives, whatever its documents' budgets are; else this would hang or differ."""
    done = command(
        ROOT / "train/main.py", *SPARSE, f"cache.dir={cache}", f"run.dir={tmp_path / 'run'}", f"deepspeed={zero}", *STEPS,
        ranks=2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-4) and len(losses(alone)) == 8
    assert losses(tmp_path / "run", "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-3)
    validations = losses(tmp_path / "run", "validation")
    assert [set(v["budget"]) for v in validations] == [{"24", "37", "58", "90"}] * 2
    one, two = (load_file(run / "checkpoints/last/model.safetensors") for run in (alone, tmp_path / "run"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_train_a_drafter_per_budget_in_one_launch(cache, tmp_path):
    """One drafter a budget, by two ranks, in one launch; a language model of its own beside them."""
    import transformers

    lm = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(lm).save_pretrained(tmp_path / "lm")
    shared = ["train.batch=2", "train.max_steps=2", f"cache.dir={cache}", *SMALL]
    done = command(
        ROOT / "train/main.py", "-m", "objective=budgetdraft", "view.budget=96,100", *shared, "run.dir=sweep",
        launcher=deepspeed(2, free_port()), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for budget in (96, 100):
        config = json.loads((tmp_path / f"sweep/view.budget={budget}/checkpoints/best/config.json").read_text())
        assert config["budgets"] == budget and config["view"]["kind"] == "topk_chunk"
    words = ["experiment=budgetdraft", "drafter.lm=lm", *shared, "run.dir=lm_run", "deepspeed=zero3", "train.pack_tokens=128"]
    done = command(ROOT / "train/main.py", *words, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    words = ["drafter=lm_run/checkpoints/best", "view.budget=96"]
    words += ["suite.prompt_tokens=100", "suite.count=2", "suite.new_tokens=8"]
    done = command(EVAL, *words, "out=lm_report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "lm_report/report.json").read_text())
    assert found["view"]["refresh"] == "never" and all(t["lossless"] for t in found["temperatures"].values())


@pytest.mark.slow
def test_the_budgets_launcher_on_a_few_small_arms(tmp_path):
    options = ["--seeds", "1", "--arms", "full,projected_sandwich,lm_only64", "--contexts", "256", "--budgets", "64,128"]
    launcher = ROOT / "launchers/budgets.py"
    small = ["train.max_steps=4", "train.save_every=4", "objective.anchors=8", "train.validation_documents=2"]
    assert command(ROOT / "launchers/cut.py", ROOT / "data_prep/targets/tiny", tmp_path / "lm", "--count", "2").returncode == 0
    for stage, more in (
        ("train", ["--tokens", "30000", "--lm", tmp_path / "lm", *small]),
        ("judge", ["suite.count=2", "suite.new_tokens=8", "controls=false"]),
        ("table", []),
    ):
        done = command(launcher, stage, tmp_path / "runs", *options, "--jobs", "2", *more)
        assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "runs/sweep.md").read_text()
    for who in ("ttt kv, full view only, source native", "ttt kv, sandwich, source projected_rope", "lm, 64 only"):
        assert f"| tau T=1 | 256 | {who} | " in text and f"| teacher-forced tau T=0 | 256 | {who} | " in text
    assert (tmp_path / "runs/sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words,message",
    [
        (["table", "--arms", "nothing"], "no arm is called nothing; there are full, paper, sandwich, only64"),
        (["train", "--arms", "lm_full"], "arms of a language model need --lm FOLDER"),
        (["judge", "--what", "scores"], "--what scores: judge scores and decodes"),
    ],
)
def test_what_the_budgets_launcher_does_not_know_is_refused(tmp_path, words, message):
    done = command(ROOT / "launchers/budgets.py", words[0], tmp_path / "runs", *words[1:])
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())
