"""A training that is asked to stop, by real signals to real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from common.ranks import free_port
from tests.support.commands import ROOT, SMALL, TRAIN, command, deepspeed, wait_for
from tests.support.runs import assert_same_run, losses
from train.run import deepspeed_private
from train.run.build_lock import wait_for_builder
from train.run.folder import latest, step_of
from train.run.stopping import AGAIN, run_passing_on

# A mutex that is taken twice: it is waited for as a collective is, and no handler runs meanwhile.
BLOCKED = """
import ctypes, sys
from train.run.stopping import Asked
with Asked(float(sys.argv[1])):
    mutex = ctypes.create_string_buffer(64)
    print("waits", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("same_s", [0, 1])
def test_a_second_signal_ends_a_rank_that_waits_in_a_collective(same_s):
    blocked = subprocess.Popen([sys.executable, "-c", BLOCKED, str(same_s)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert blocked.stdout.readline() == "waits\n"
        blocked.send_signal(signal.SIGUSR1)
        if same_s:
            time.sleep(0.1)
            blocked.send_signal(signal.SIGTERM)  # what a launcher passes on
        with pytest.raises(subprocess.TimeoutExpired):
            blocked.wait(same_s + 0.3)
        blocked.send_signal(signal.SIGTERM)
        assert blocked.wait(10) == 128 + signal.SIGTERM
    finally:
        blocked.kill()
        blocked.wait()


def test_a_sweep_passes_on_what_asks_it_to_stop(tmp_path):
    child = f"""if True:
        import pathlib, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit({AGAIN}))
        pathlib.Path({str(tmp_path / "runs")!r}).touch()
        time.sleep(60)"""

    def ask():
        wait_for((tmp_path / "runs").exists, 30, "the child's start")
        os.kill(os.getpid(), signal.SIGTERM)

    usual = signal.getsignal(signal.SIGTERM)
    asking = threading.Thread(target=ask)
    asking.start()
    assert run_passing_on([sys.executable, "-c", child], dict(os.environ)) == AGAIN
    asking.join()
    assert signal.getsignal(signal.SIGTERM) == usual


def logged(run) -> int:
    """Lines of the log so far."""
    with suppress(FileNotFoundError):
        return (run / "metrics.jsonl").read_text().count("\n")
    return 0


def test_a_run_that_is_asked_to_stop_goes_on_to_the_same_weights(cache, tmp_path):
    """In the middle of a window of the log, before any checkpoint was judged: lambda, the window and no best go with it."""
    words = ["loss=lk_lambda", f"cache.dir={cache}", "train.batch=2", "train.max_steps=40", *SMALL, "train.diagnose=false"]
    words += ["train.log_every=5", "train.save_every=40"]

    def run(folder):
        folder.mkdir(exist_ok=True)
        return command(TRAIN, *words, "run.dir=run", cwd=folder)

    def ask():
        wait_for(lambda: logged(tmp_path / "stopped/run") >= 1, 60, "a line of the log")
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.cwd() == str(tmp_path / "stopped") and "wandb" not in child.name():
                    child.send_signal(signal.SIGTERM)

    assert (done := run(tmp_path / "whole")).returncode == 0, done.stderr
    asking = threading.Thread(target=ask)
    asking.start()
    done = run(tmp_path / "stopped")
    asking.join()
    assert done.returncode == AGAIN and "the same command goes on" in done.stdout, done.stdout + done.stderr
    checkpoints = tmp_path / "stopped/run/checkpoints"
    assert 5 <= step_of(latest(checkpoints)) < 40
    assert {path.name for path in checkpoints.iterdir()} == {latest(checkpoints).name, "last"}
    done = run(tmp_path / "stopped")
    assert done.returncode == 0 and "resuming run after step" in done.stdout, done.stderr
    assert_same_run(tmp_path / "whole/run", tmp_path / "stopped/run")
    assert len(losses(tmp_path / "whole/run")) == 8 and (checkpoints / "best").exists()


@pytest.mark.slow
def test_two_ranks_stop_together_whoever_is_asked(cache, tmp_path):
    """SIGUSR1 to one rank; then SIGTERM to the `deepspeed` command, which passes nothing on and ends at once."""
    words = [f"cache.dir={cache}", "deepspeed=zero2", "train.batch=2", "train.max_steps=60", "train.save_every=60", *SMALL]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = command(TRAIN, *words, "run.dir=whole", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    for asked, code in (("rank", AGAIN), ("launcher", -signal.SIGTERM)):
        lines, before = logged(run), latest(run / "checkpoints")
        with open(tmp_path / "log", "w") as log:
            started = [*deepspeed(2, free_port()), str(TRAIN), *words, f"run.dir={run}"]
            launcher = subprocess.Popen(started, env=env, stdout=log, stderr=log)
        wait_for(lambda: logged(run) > lines + 2, 300, "some steps")
        processes = psutil.Process(launcher.pid).children(recursive=True)
        who = next(one for one in processes if "--local_rank=1" in one.cmdline()) if asked == "rank" else launcher
        who.send_signal(signal.SIGUSR1 if asked == "rank" else signal.SIGTERM)
        assert launcher.wait(40) == code, (tmp_path / "log").read_text()
        assert psutil.wait_procs(processes, timeout=40)[1] == []
        assert "asked to stop" in (tmp_path / "log").read_text() and latest(run / "checkpoints") != before
    done = command(TRAIN, *words, f"run.dir={run}", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", run)


BUILDS = """
import os, sys, time
held = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)  # as PyTorch's FileBaton
print("builds", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_build_is_taken_away_and_no_other(tmp_path):
    lock = tmp_path / "lock"
    said = []
    builder = subprocess.Popen([sys.executable, "-c", BUILDS, str(lock)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "builds\n"
    starts = [threading.Thread(target=wait_for_builder, args=(lock, said.append)) for _ in range(3)]
    for start in starts:
        start.start()
    os.utime(lock, (0, time.time() - 300))
    time.sleep(0.5)
    assert lock.exists()  # old, and someone builds
    os.utime(lock)
    builder.kill()
    builder.wait()
    time.sleep(0.5)
    assert lock.exists() and not said  # young: whoever builds may be on another host
    os.utime(lock, (0, time.time() - 300))
    for start in starts:
        start.join(10)
    assert not lock.exists() and len(said) == 1 and str(lock) in said[0]


def test_the_lock_that_is_watched_is_the_one_that_pytorch_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    assert deepspeed_private.build_lock() == tmp_path / ShareMemCommBuilder().name / "lock" and tmp_path.is_dir()
