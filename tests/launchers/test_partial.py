"""The script that asks where partial verification pays: its table from reports, and the whole of it by real commands."""

import json

import pytest

from tests.support.commands import ROOT, SMALL, command

PARTIAL = ROOT / "launchers/partial.py"


def report(kind, partial_tokens, rate, **more):
    """What the table reads of a report; plain decoding makes 50 tokens/s, full verification 80."""
    full = {"tau_micro": 2.5, "round_ms": {"verify": 20.0}, "tokens_per_s": 80.0}
    figures = {"tau_micro": 2.0, "round_ms": {"verify": 10.0}, "tokens_per_s": rate, "baseline_tokens_per_s": 50.0, **more}
    figures |= {"per_prompt": [[300, 150], [200, 100]], "controls": {"full_verification": full}, "lossless": kind != "partial"}
    verify = {"kind": kind, "retrieval": 512, "partial_tokens": partial_tokens}
    return {"context": 4096, "engine": {"batch": 8}, "verify": verify, "temperatures": {"0": figures}}


def test_the_table_says_where_it_pays(tmp_path):
    """Ratios are to what was decoded in the same run, and rollbacks to all tokens that were kept."""
    made = {
        "grid/batch8/a": report("partial", 32, 100.0, interval=32.0, divergence={"agreement": 0.75}),
        "grid/batch8/b": report("partial_audited", "adaptive", 60.0, interval=23.5, rollbacks={"count": 5, "tokens": 40}),
        "intervals/c": report("partial_audited", 16, 40.0, interval=16.0),
    }
    missing = command(PARTIAL, "table", tmp_path)
    assert missing.returncode == 1 and "has no report; say `judge` first" in missing.stderr
    for odd, said in (("--batches=", "one number at least"), ("--at=4096", "--at is CONTEXT,BATCH")):
        refused = command(PARTIAL, "judge", tmp_path, odd)
        assert refused.returncode == 2 and said in refused.stderr and not list(tmp_path.iterdir())
    for folder, one in made.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "report.json").write_text(json.dumps(one))
    done = command(PARTIAL, "table", tmp_path)
    assert done.returncode == 0, done.stderr
    heads, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    common = ["2.00", "2.50", "10.00", "20.00"]
    assert rows == [
        ["4096", "8", "audited", "512", "16", *common, "40.0", "0.50x", "0.80x", "1.60x", "0.0 rollbacks in 1,000 tokens", "yes"],
        ["4096", "8", "audited, adaptive", "512", "23.5", *common, "60.0", "0.75x", "1.20x", "1.60x"]
        + ["10.0 rollbacks in 1,000 tokens", "yes"],
        ["4096", "8", "partial", "512", "32", *common, "100.0", "1.25x", "2.00x", "1.60x"]
        + ["75% of tokens equal full verification's", "no"],
    ]
    assert len(heads) == len(rows[0]) and (tmp_path / "partial.md").exists() and (tmp_path / "partial.png").exists()


@pytest.mark.slow
def test_the_launcher_judges_a_grid_and_draws_it(cache, tmp_path):
    words = ["objective=ttt", "reuse=kv", f"cache.dir={cache}", "run.dir=run", "train.batch=2", "train.max_steps=4", *SMALL]
    assert command(ROOT / "train/main.py", *words, cwd=tmp_path).returncode == 0
    options = ["--contexts", "64", "--batches", "2", "--retrieval", "16", "--partial-tokens", "16", "--prompts", "2"]
    small = ["suite.new_tokens=24", "suite.warmup_tokens=8", "verify.sink=4", "verify.window=32"]
    judged = command(PARTIAL, "judge", "runs", *options, *small, "drafter=run/checkpoints/last", cwd=tmp_path)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    done = command(PARTIAL, "table", "runs", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    found = [(row[2], row[4], row[-1]) for row in rows if row[2] != "audited, adaptive"]
    assert found == [("audited", "16", "yes"), ("audited", "32", "yes"), ("partial", "16", "no"), ("partial", "32", "no")]
    assert [row[-1] for row in rows if row[2] == "audited, adaptive"] == ["yes"] and (tmp_path / "runs/partial.png").exists()
