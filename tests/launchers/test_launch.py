"""The real `deepspeed` launcher with two CPU ranks: ZeRO 0-3, other numbers of ranks, sweeps, errors on all ranks."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.ranks import free_port
from data_prep.cache.manifest import flatten
from tests.support.caches import rewrite
from tests.support.commands import ROOT, SMALL, TRAIN, command, deepspeed, wait_for
from tests.support.runs import assert_same_run, losses

pytestmark = pytest.mark.slow
COMMON = ["train.batch=4", "train.max_steps=12", "train.save_every=4", "train.keep_last=3", *SMALL]
# As much as one drafter can have: terms with divisors of their own, a lambda that follows the step before, a head, gates.
RICH = """reuse=hybrid objective=ttt loss=lk_lambda loss.expected_length=0.5 loss.kv_align=0.1 drafter.vocabulary=4000
    drafter.own_head=true reuse.source=projected_rope reuse.gate.hold_steps=4 reuse.gate.lr_ratio=2""".split()


def stopped_after(step, run, folder):
    """What `run`, killed after that step's checkpoint, would have left: a copy."""
    shutil.copytree(run, folder, symlinks=True)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return folder


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """The loss curve of one process on the same global batch."""
    folder = tmp_path_factory.mktemp("alone")
    done = command(TRAIN, *RICH, f"cache.dir={cache}", f"run.dir={folder / 'run'}", "deepspeed=zero0", *COMMON, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_two_ranks_equal_one_process_and_go_on_as_one_and_as_two(cache, alone, tmp_path, zero):
    """A run of two ranks; stopped after four steps it goes on as one process, and stopped after eight with one or two again."""

    def run(name, ranks, zero, *words):
        done = command(
            TRAIN,
            *RICH,
            f"cache.dir={cache}",
            f"run.dir={tmp_path / name}",
            f"deepspeed={zero}",
            *COMMON,
            *words,
            ranks=ranks,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("run", 2, zero)
    quiet = "train.diagnose=false"
    assert len(losses(alone)) == 12
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-4)
    # AdamW forgives a wrong scale of the gradient; its norm before clipping does not.
    assert losses(tmp_path / "run", "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-3)
    assert losses(alone)[-1] < losses(alone)[0] - 0.1  # something was learnt, else equal curves say little
    # What the diagnostics say of gradients does not depend on how ZeRO keeps them.
    mine, theirs = ([flatten(d["gradients"]) for d in losses(run, "diagnostics")] for run in (alone, tmp_path / "run"))
    assert len(mine) == 3 and "layer0.kv.k_over_q" in mine[0]
    for a, b in zip(mine, theirs):
        # Norms carry the loss's scale, which DeepSpeed divides by the packs of a rank.
        assert {k: v for k, v in a.items() if "norm" not in k} == pytest.approx(
            {k: v for k, v in b.items() if "norm" not in k}, rel=1e-2
        )
    one, two = (load_file(run / "checkpoints/last/model.safetensors") for run in (alone, tmp_path / "run"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)

    stopped_after(4, tmp_path / "run", tmp_path / "one")
    assert "after step 4" in run("one", 1, zero, quiet)
    if zero in ("zero0", "zero3"):
        stopped_after(8, tmp_path / "one", tmp_path / "again")
        assert "after step 8" in run("again", 1, zero, quiet)
        assert_same_run(tmp_path / "one", tmp_path / "again")
    names = ["one"]
    if zero in ("zero2", "zero3_offload"):  # ZeRO-2 goes on as it was, and ZeRO-3 as ZeRO-2
        stopped_after(8, tmp_path / "one", tmp_path / "two")
        assert "after step 8" in run("two", 2, "zero2", quiet)
        names.append("two")
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(alone), abs=1e-4)
        assert losses(tmp_path / name, "lr") == losses(alone, "lr")
        # What held-out documents say is no function of the number of ranks either.
        taus = [v["sampled"]["tau"] for v in losses(tmp_path / name, "validation")]
        assert taus == pytest.approx([v["sampled"]["tau"] for v in losses(alone, "validation")], abs=1e-4) and len(taus) == 3


def test_p_eagle_under_zero3_equals_one_process_and_goes_on(cache, tmp_path):
    """Its learned hidden state and its norms before fc are gathered as all other weights are."""
    words = ["experiment=peagle", "drafter.layers=2", "drafter.fc_norm=true", f"cache.dir={cache}", *COMMON]
    one, two = tmp_path / "one", tmp_path / "two"
    done = command(TRAIN, *words, "deepspeed=zero0", f"run.dir={one}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command(TRAIN, *words, "deepspeed=zero3", f"run.dir={two}", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) == 12
    mine, theirs = (load_file(run / "checkpoints/last/model.safetensors") for run in (one, two))
    assert {"mask.weight", "mask_hidden.weight", "fc_norm.0.weight"} <= mine.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    again = stopped_after(8, one, tmp_path / "again")
    done = command(TRAIN, *words, "deepspeed=zero0", f"run.dir={again}", cwd=tmp_path)
    assert done.returncode == 0 and "after step 8" in done.stdout, done.stderr
    assert_same_run(one, again)


@pytest.fixture(scope="module")
def queries_alone(cache, tmp_path_factory):
    """(words of a query-only drafter of two layers, its run in one process)."""
    folder = tmp_path_factory.mktemp("queries")
    words = ["experiment=query_only", "objective.positions=constant", "drafter.layers=2", f"cache.dir={cache}", *COMMON]
    done = command(TRAIN, *words, "deepspeed=zero0", f"run.dir={folder / 'run'}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return words, folder / "run"


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_queries_alone_on_two_ranks_equal_one_process_and_go_on(queries_alone, tmp_path, zero):
    """Layers without keys are gathered and checkpointed as others are, and their gradients looked at."""
    words, one = queries_alone
    two = tmp_path / "two"
    changed = [f"deepspeed={zero}", "train.recompute=true", f"run.dir={two}"]
    done = command(TRAIN, *words, *changed, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) == 12
    mine, theirs = (load_file(run / "checkpoints/last/model.safetensors") for run in (one, two))
    assert "layers.1.branches.kv.q.weight" in mine and not any(".k." in name or ".v." in name for name in mine)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    gradients = [flatten(d["gradients"]) for d in losses(two, "diagnostics")]
    assert gradients and all({"layer0.kv.rank_q", "layer1.kv.rank_q"} < set(g) for g in gradients)


def test_queries_alone_resume_as_they_were(queries_alone, tmp_path):
    words = [*queries_alone[0], "train.precision=bf16", "deepspeed=zero2"]
    run = tmp_path / "run"
    done = command(TRAIN, *words, f"run.dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(losses(queries_alone[1]), abs=0.05)
    again = stopped_after(8, run, tmp_path / "again")
    done = command(TRAIN, *words, f"run.dir={again}", cwd=tmp_path)
    assert done.returncode == 0 and "after step 8" in done.stdout, done.stderr
    assert_same_run(run, again)


@pytest.mark.parametrize("zero,tolerance", [("zero0", 0.3), ("zero2", 0.05), ("zero3", 0.05)])
def test_bf16_follows_float32_and_resumes_as_it_was(cache, alone, tmp_path, zero, tolerance):
    """bf16 has 8 bits of mantissa: a few per mille of a loss of about 6. ZeRO-0 also adds up four packs' gradients in it."""
    run = tmp_path / "run"
    words = [TRAIN, *RICH, f"cache.dir={cache}", f"deepspeed={zero}", "train.precision=bf16", *COMMON]
    done = command(*words, f"run.dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(losses(alone), abs=tolerance)
    with safe_open(run / "checkpoints/last/model.safetensors", framework="pt") as weights:
        assert weights.get_tensor("norm.weight").dtype == torch.bfloat16
    with safe_open(run / "checkpoints/step-000012/engine/weights.safetensors", framework="pt") as weights:
        master = weights.get_tensor("drafter.norm.weight")
        assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())
    again = stopped_after(8, run, tmp_path / "again")
    done = command(*words, f"run.dir={again}", cwd=tmp_path)
    assert done.returncode == 0 and "after step 8" in done.stdout, done.stderr
    assert_same_run(run, again)


def test_sweep_runs_every_point_in_one_launch(cache, tmp_path):
    done = command(
        TRAIN,
        "-m",
        "reuse=hidden,kv",
        "deepspeed=zero3",
        f"cache.dir={cache}",
        "run.dir=sweep",
        "tracking=wandb",
        "train.batch=2",
        "train.max_steps=3",
        *SMALL,
        launcher=deepspeed(2, free_port()),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for reuse in ("hidden", "kv"):
        run = tmp_path / "sweep" / f"reuse={reuse}"
        assert len(losses(run)) == 3
        assert json.loads((run / "recipe.json").read_text())["run"]["group"] == "sweep"
        assert json.loads((run / "checkpoints/best/config.json").read_text())["reuse"] == reuse


@pytest.mark.parametrize(
    "words,message",
    [
        (["train.batch=3"], "train.batch=3 packs a step cannot be shared by 2 ranks"),
        (["reuse=nothing"], "Could not find 'reuse/nothing'"),
    ],
)
def test_rank_0_alone_reports_a_mistake(cache, tmp_path, words, message):
    done = command(TRAIN, f"cache.dir={cache}", "run.dir=run", *words, launcher=deepspeed(2, free_port()), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_target_is_refused_by_all_ranks(cache, tmp_path):
    """Noticed only once the target is loaded: still one line, and no rank is left behind or dies of another's end."""
    other = tmp_path / "other"
    shutil.copytree(cache, other)
    manifest = json.loads((other / "manifest.json").read_text())
    rewrite(other, manifest | {"target": manifest["target"] | {"weights_hash": "0"}})
    done = command(TRAIN, f"cache.dir={other}", "run.dir=run", launcher=deepspeed(2, free_port()), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "was captured from another target" in done.stderr
    assert "Traceback" not in done.stderr


def test_nan_stops_all_ranks_and_names_the_batch(cache, tmp_path):
    """One document of the cache is poisoned; the run ends on the step that meets it, on both ranks, with its name."""
    bad = tmp_path / "bad"
    shutil.copytree(cache, bad)
    import pyarrow.parquet as pq

    rows = pq.read_table(bad / "index.parquet").to_pylist()
    row = max(rows, key=lambda r: r["length"])
    path = bad / f"{row['shard']}.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name in tensors:
        if name.startswith(("hidden", "last_hidden")):
            start, count = (row["teacher_offset"], row["supervised"]) if name == "last_hidden" else (row["offset"], row["length"])
            tensors[name][start : start + count] = float("nan")
    save_file(tensors, path)
    # As an earlier release wrote it, without checksums of tensors: those would be the first to notice.
    pq.write_table(pq.read_table(bad / "index.parquet").drop_columns("sums"), bad / "index.parquet")
    rewrite(bad, json.loads((bad / "manifest.json").read_text()))
    done = command(
        TRAIN,
        f"cache.dir={bad}",
        "run.dir=run",
        "reuse=hidden",
        "train.batch=2",
        "train.max_steps=200",
        "train.save_every=1000",
        *SMALL,
        launcher=deepspeed(2, free_port()),
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert "is not finite" in line and row["id"] in line
    checked = command(ROOT / "data_prep/main.py", "mode=verify", f"cache.dir={bad}", cwd=tmp_path)
    assert checked.returncode == 2 and path.name in checked.stderr


def test_a_run_folder_has_one_owner(cache, tmp_path):
    words = [TRAIN, f"cache.dir={cache}", "run.dir=run", "train.batch=2", "train.max_steps=100000", *SMALL]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [os.sys.executable, *map(str, words)], env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists(), 90, "the first run's start")
        second = command(*words, cwd=tmp_path)
        assert second.returncode == 2 and "another run is using run" in second.stderr
    finally:
        first.kill()
        first.wait()
