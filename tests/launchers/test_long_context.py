"""The table of long contexts: from reports by hand, and by the real commands."""

import json
import sys
from types import SimpleNamespace

import pytest

from tests.support.commands import ROOT, command

sys.path.insert(0, str(ROOT / "launchers"))
import long_context  # noqa: E402

LAUNCHER = ROOT / "launchers/long_context.py"


def write(folder, context, budget, taus, verify="full", lossless=True, lookup=None):
    """A report of one drafter that decodes tau times 10 tokens a second, plain decoding 10."""

    def one(tau):
        return {"tau_micro": tau, "tokens_per_s": 10 * tau, "round_ms": {"draft": 1.0, "verify": 2.0, "overhead": 0.5}}

    plain = {"baseline_tokens_per_s": 10.0, "baseline_round_ms": {"draft": 0.0, "verify": 4.0, "overhead": 0.0}}
    controls = {"prompt_lookup": one(lookup)} if lookup else {}
    found = {t: one(tau) | plain | {"controls": controls, "lossless": lossless} for t, tau in taus.items()}
    folder.mkdir(parents=True)
    report = {"context": context, "view": {"budget": budget}, "verify": verify, "temperatures": found, "peak_gib": 1.5}
    (folder / "report.json").write_text(json.dumps(report))


def test_the_table_has_a_row_for_each_contender_at_each_context(tmp_path):
    write(tmp_path / "kv/full/suite.prompt_tokens=64", 64, 0, {"0": 2.0, "1": 1.5}, lookup=1.2)
    write(tmp_path / "kv/full/suite.prompt_tokens=1024", 1024, 0, {"0": 3.0, "1": 1.25}, lookup=1.1)
    write(tmp_path / "kv/views/suite.prompt_tokens=1024,view.budget=256", 1024, 256, {"0": 2.5, "1": 1.2}, lossless=False)
    write(tmp_path / "kv/views/suite.prompt_tokens=1024,view.budget=32", 1024, 32, {"0": 2.4, "1": 1.1})
    write(tmp_path / "kv/specpv/suite.prompt_tokens=1024", 1024, 0, {"0": 2.75}, verify={"kind": "partial_audited"})
    write(tmp_path / "another/full/suite.prompt_tokens=1024", 1024, 0, {"0": 1.75, "1": 1.1})
    long_context.table(SimpleNamespace(runs=tmp_path))
    lines = [line.split(" | ") for line in (tmp_path / "long_context.md").read_text().splitlines()[2:-2]]
    assert [(line[0].strip("| "), line[1]) for line in lines] == [
        ("64", "no drafter"),
        ("64", "prompt lookup"),
        ("64", "kv, full view"),
        ("1,024", "no drafter"),
        ("1,024", "prompt lookup"),
        ("1,024", "another, full view"),
        ("1,024", "kv, full view"),
        ("1,024", "kv, 32 positions"),
        ("1,024", "kv, 256 positions"),
        ("1,024", "kv, SpecPV, audited"),
    ]
    rows = {(line[0].strip("| "), line[1]): " | ".join(line[2:]) for line in lines}
    assert rows["64", "no drafter"].startswith("1.00 | **1.00x** | 10 | 0.0 / 4.0 |  | 1.00 ")
    assert rows["64", "prompt lookup"].startswith("1.20 | **1.20x** | 12 | 1.0 / 2.0 |  | 1.20 ")
    both = "2.00 | **2.00x** | 20 | 1.0 / 2.0 | yes | 1.50 | **1.50x** | 15 | 1.0 / 2.0 | yes | 1.50 |"
    assert rows["64", "kv, full view"] == both
    assert "| NO |" in rows["1,024", "kv, 256 positions"] and "NO" not in rows["1,024", "kv, 32 positions"]
    assert rows["1,024", "kv, SpecPV, audited"] == "2.75 | **2.75x** | 28 | 1.0 / 2.0 | yes |  |  |  |  |  | 1.50 |"
    assert (tmp_path / "long_context.png").stat().st_size > 10_000


def test_a_table_of_nothing_and_a_judgement_of_nobody_are_refused(tmp_path):
    done = command(LAUNCHER, "table", tmp_path)
    assert done.returncode == 1 and "has no report; say `judge` first" in done.stderr
    done = command(LAUNCHER, "judge", tmp_path)
    assert done.returncode == 2 and "judge needs --drafters NAME=FOLDER" in done.stderr and not list(tmp_path.iterdir())
    done = command(LAUNCHER, "judge", tmp_path, "--drafters", "a=b", "--contexts=")
    assert done.returncode == 2 and "--contexts of one number" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_launcher_judges_a_drafter_at_two_contexts(cache, tmp_path):
    small = ["train.max_steps=2", "train.save_every=2", "objective.anchors=8", "train.pack_tokens=256", "train.batch=1"]
    words = ["objective=ttt", "reuse=kv", f"cache.dir={cache}", f"run.dir={tmp_path / 'run'}", *small]
    assert command(ROOT / "train/main.py", *words).returncode == 0
    options = ["--drafters", f"kv={tmp_path / 'run/checkpoints/last'}", "--contexts", "64,128", "--budgets", "80", "--jobs", "2"]
    few = ["suite.count=2", "suite.new_tokens=12", "transformers=false"]
    few += ["verify.sink=16", "verify.retrieval=32", "verify.window=32"]
    for stage, more in (("judge", [*options, *few]), ("table", [])):
        done = command(LAUNCHER, stage, tmp_path / "runs", *more)
        assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "runs/long_context.md").read_text().splitlines()[2:-2]
    whos = ["no drafter", "prompt lookup", "kv, full view", "kv, 80 positions", "kv, SpecPV, audited"]
    assert [line.split(" | ")[1] for line in lines] == 2 * whos
    assert "NO" not in "".join(lines) and all("| yes |" in line for line in lines if "kv" in line)
