"""What happens to a training when something breaks: docs/design.md has the table. Real processes, signals, disks and files."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from common.errors import UserError
from common.ranks import free_port
from tests.support.commands import ROOT, SMALL, TRAIN, command, deepspeed, environments, wait_for
from tests.support.runs import assert_same_run, losses
from train.drafter.build import load_drafter
from train.run.folder import latest

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# All that is drawn for a step: budgets, ages of selections, anchors; lambda and the GRU's state go with them.
WORDS = """objective=budgetdraft objective.kind=blockwise drafter.sequential=gru reuse=hybrid loss=lk_lambda view.recent=8
    view.refresh=9 objective.smallest=24 objective.largest=90 train.batch=2 train.diagnose=false""".split()


def start(run, *words, ranks=2):
    launcher = deepspeed(ranks, free_port()) if ranks > 1 else [sys.executable]
    log = open(run.with_suffix(".log"), "w")
    return subprocess.Popen([*launcher, str(TRAIN), f"run.dir={run}", *words], env=ENVIRONMENT, stdout=log, stderr=log)


def ranks_of(launcher):
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # short-lived helpers come and go
            found |= {word: process for word in process.cmdline() if word.startswith("--local_rank=")}
    return [found[word] for word in sorted(found)]


def caught_writing(run, launcher):
    """The ranks, of which rank 0 is stopped in the middle of writing a checkpoint; this run has written a whole one already."""
    before = latest(run / "checkpoints")
    while True:
        wait_for(lambda: latest(run / "checkpoints") != before, 120, "a checkpoint")
        wait_for(lambda: list(run.glob("checkpoints/step-*.tmp/engine/*.safetensors")), 60, "half a checkpoint")
        ranks = ranks_of(launcher)
        ranks[0].suspend()
        wait_for(lambda: ranks[0].status() == psutil.STATUS_STOPPED, 10, "stopping")
        if list(run.glob("checkpoints/step-*.tmp/engine")):
            return ranks
        ranks[0].resume()  # too late: the next one


def test_a_run_killed_while_writing_a_checkpoint_resumes_to_the_same_weights(cache, tmp_path):
    """The rank that writes, then the launcher: half a checkpoint counts for nothing, the run ends as one never touched, and
    none of it leaves shared memory behind."""
    words = [*WORDS, f"cache.dir={cache}", "deepspeed=zero3", "train.max_steps=12", "train.save_every=2", *SMALL]
    assert start(tmp_path / "whole", *words).wait(300) == 0, (tmp_path / "whole.log").read_text()
    run = tmp_path / "killed"
    for victim in ("rank", "launcher"):
        launcher = start(run, *words)
        ranks = caught_writing(run, launcher)
        good = latest(run / "checkpoints")
        mapped = [line for one in ranks for line in Path(f"/proc/{one.pid}/maps").read_text().splitlines()]
        shared = [line.split()[-1] for line in mapped if "/dev/shm/" in line]
        os.kill(launcher.pid if victim == "launcher" else ranks[0].pid, signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            ranks[0].resume()  # it may go on until it notices that its launcher is gone
        launcher.wait(60)
        assert psutil.wait_procs(ranks, timeout=60)[1] == []
        assert shared == ["(deleted)"] * 4  # of two ranks, by each: it was in use, and its name was gone
        if victim == "rank":
            assert latest(run / "checkpoints") == good and list((run / "checkpoints").glob("step-*.tmp"))
        load_drafter(latest(run / "checkpoints") / "drafter")
    assert start(run, *words).wait(300) == 0, run.with_suffix(".log").read_text()
    assert f"resuming {run} after step" in run.with_suffix(".log").read_text()
    assert_same_run(tmp_path / "whole", run)
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_the_best_is_kept_and_a_damaged_checkpoint_is_refused(cache, tmp_path):
    """At a learning rate of nothing no checkpoint is better than the first."""
    words = [*WORDS, f"cache.dir={cache}", "run.dir=run", "train.max_steps=8", "train.save_every=2", *SMALL, "train.lr=1e-30"]
    done = command(TRAIN, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run/checkpoints"
    found = {path.name: {p.name for p in path.iterdir()} for path in folder.iterdir() if not path.is_symlink()}
    whole = {"engine", "drafter"}
    assert found == {"step-000002": {"drafter"}, "step-000006": whole, "step-000008": whole}
    assert [os.readlink(folder / name) for name in ("best", "last")] == ["step-000002/drafter", "step-000008/drafter"]

    os.truncate(folder / "step-000008/engine/exp_avg.safetensors", 100_000)
    done = command(TRAIN, *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert (
        "step-000008 cannot be resumed from" in done.stderr and "remove it to go on from the checkpoint before it" in done.stderr
    )
    shutil.rmtree(folder / "step-000008")
    done = command(TRAIN, *words, cwd=tmp_path)
    assert done.returncode == 0 and "after step 6" in done.stdout, done.stderr
    assert len(losses(tmp_path / "run")) == 8

    for path in folder.glob("step-*/engine"):
        path.rename(path.with_name("deepspeed"))
    with pytest.raises(UserError, match="step-000008 is of an earlier format"):
        latest(folder)


def test_a_frozen_rank_ends_the_run_with_one_line(cache, tmp_path):
    """A frozen process closes no connection, and ranks of one host exchange through memory, which knows no time-out."""
    run = tmp_path / "run"
    words = [*WORDS, f"cache.dir={cache}", "train.batch=3", "train.max_steps=100000", "train.save_every=4", *SMALL]
    launcher = start(run, *words, "train.timeout_s=15", ranks=3)
    wait_for(lambda: latest(run / "checkpoints"), 120, "a checkpoint")
    ranks_of(launcher)[1].suspend()
    assert launcher.wait(90) == 1
    said = run.with_suffix(".log").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: not heard of for 15 s: rank 1 (") and "the same command goes on" in line
    assert "Traceback" not in said and "Exception" not in said


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_under_nccl_a_lost_rank_ends_the_others_with_one_line(tmp_path, how, lost):
    """A rank on each GPU, without a launcher, which would end the others itself."""
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    cache = ["cache.dir=cache", "data.max_tokens=60000", "data.max_length=256"]  # documents for all ranks
    assert command(ROOT / "data_prep/main.py", *cache, cwd=tmp_path).returncode == 0
    world = torch.cuda.device_count()
    words = [str(TRAIN), "run.dir=run", "cache.dir=cache", "reuse=hidden", "deepspeed=zero2", f"train.batch={world}", *SMALL]
    words += ["train.diagnose=false", "train.max_steps=100000", "train.timeout_s=15"]
    ranks = []
    for environment in environments({**os.environ, "OMP_NUM_THREADS": "1"}, world):
        with open(tmp_path / f"{environment['RANK']}.log", "w") as log:
            ranks.append(subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log, cwd=tmp_path))
    try:
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, 200, "the first steps")
        os.kill(ranks[lost].pid, getattr(signal, how))
        since = time.monotonic()
        left = [rank for number, rank in enumerate(ranks) if number != lost]
        assert {rank.wait(90) for rank in left} == {1}
        assert time.monotonic() - since < 60
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: not heard of for 15 s: rank {lost} (")
    assert "Traceback" not in said and "frame #" not in said


@pytest.mark.parametrize("damage,ranks", [("removed", 1), ("cut", 2)])
def test_a_shard_lost_during_training_ends_with_one_line_and_the_run_can_be_resumed(cache, tmp_path, damage, ranks):
    """One line that names it, from whichever rank needs it; once it is back the run goes on."""
    mine, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(cache, mine)
    words = [*WORDS, f"cache.dir={mine}", "train.max_steps=100000", "train.save_every=4", *SMALL]
    launcher = start(run, *words, ranks=ranks)
    wait_for(lambda: latest(run / "checkpoints"), 120, "a checkpoint")
    shards = sorted(mine.glob("*.safetensors"))
    for path in shards:
        path.unlink() if damage == "removed" else os.truncate(path, 4096)
    assert launcher.wait(60) == 2
    said = run.with_suffix(".log").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "was removed, cut or replaced since it was opened" in line and any(str(path) in line for path in shards)
    assert "Traceback" not in said and "SIGBUS" not in said
    refused = subprocess.run([sys.executable, TRAIN, f"run.dir={run}", *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert refused.returncode == 2 and "is missing or truncated" in refused.stderr
    for path in shards:
        shutil.copy(cache / path.name, path)
    good = latest(run / "checkpoints")
    launcher = start(run, *words, ranks=1)
    try:
        wait_for(lambda: latest(run / "checkpoints") != good, 120, "another checkpoint")
    finally:
        launcher.kill()
        launcher.wait(60)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace (unshare -rm)",
)
def test_a_training_on_a_full_disk_ends_with_one_line_and_can_be_resumed(cache, tmp_path):
    """A real file system with room for one checkpoint and a half, then with none at all, then with enough."""
    words = [*WORDS, f"cache.dir={cache}", "train.max_steps=8", "train.save_every=4", *SMALL]
    assert start(tmp_path / "whole", *words, ranks=1).wait(300) == 0, (tmp_path / "whole.log").read_text()
    size = sum(path.stat().st_size for path in (tmp_path / "whole/checkpoints/step-000008").rglob("*")) * 3 // 2
    disk, out = tmp_path / "disk", tmp_path / "out"
    train = f"{TRAIN} {' '.join(words)} run.dir={disk}/run"
    script = f"""
        mkdir {disk} {out}; mount -t tmpfs -o size={size} tmpfs {disk}
        {" ".join(deepspeed(2, free_port()))} {train} 2> {out}/half; echo "half $?"
        ls {disk}/run/checkpoints
        head -c 1G /dev/zero > {disk}/more 2> /dev/null
        {sys.executable} {train} 2> {out}/none; echo "none $?"
        rm {disk}/more; mount -o remount,size=1g {disk}
        {sys.executable} {train}; echo "room $?"
        cp -a {disk}/run {out}/run
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", textwrap.dedent(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    said = done.stdout.splitlines()
    assert [line for line in said if line.split()[0] in ("half", "none", "room")] == ["half 2", "none 2", "room 0"], done.stdout
    assert "step-000004" in said and not any(".tmp" in line or line == "step-000008" for line in said)
    assert any("resuming" in line for line in said)
    for name, what in (("half", "step-000008"), ("none", "run")):
        (line,) = [line for line in (out / name).read_text().splitlines() if line.startswith("error: ")]
        assert f"{what} cannot be written" in line and "No space left on device" in line
        assert line.endswith("Make room, then run the same command again")
    assert losses(out / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
