"""A capture that is killed, moved to another number of processes, damaged or out of disk: the next run completes it, and
nothing stands twice, is missing or has changed. Real processes, signals and disks."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import psutil
import pytest
import torch

from common.ranks import free_port
from data_prep.cache.reader import CacheReader
from tests.support.commands import ROOT, command, deepspeed

pytestmark = pytest.mark.slow
PROGRAM = str(ROOT / "data_prep/main.py")
WORDS = ["cache=fp32", "data.max_tokens=40000", "data.max_length=256", "capture.batch_tokens=512", "cache.shard_bytes=1000000"]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(folder, ranks):
    launcher = [sys.executable] if ranks == 1 else deepspeed(ranks, free_port())
    log = open(folder.parent / f"{folder.name}.log", "a")
    return subprocess.Popen([*launcher, PROGRAM, *WORDS, f"cache.dir={folder}"], env=ENVIRONMENT, stdout=log, stderr=log)


def processes(launcher, word=""):
    """The launcher and all below it whose command line holds `word`."""
    found = []
    for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # short-lived helpers come and go
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_for(condition, launcher, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and launcher.poll() is None, "the moment to kill never came"
        time.sleep(0.01)


def shards(folder):
    return sorted(folder.glob("shard-*.parquet"))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched") / "cache"
    done = command(PROGRAM, *WORDS, f"cache.dir={folder}")
    assert done.returncode == 0, done.stderr
    return CacheReader(folder)


def assert_equal(folder, expected):
    reader = CacheReader(folder)
    assert list(reader.problems()) == []
    assert reader.ids == expected.ids and reader.manifest.hash() == expected.manifest.hash()
    for index in range(len(reader)):
        names = ["input_ids", "loss_mask", "key.5", "last_hidden"]
        for name, tensor in reader.read(index, names).items():
            torch.testing.assert_close(tensor, expected.read(index, names)[name], rtol=1e-3, atol=1e-2)


def test_a_capture_killed_repeatedly_resumes_with_any_number_of_processes(tmp_path, untouched):
    folder = tmp_path / "cache"

    def killed(ranks, victim, moment):
        launcher = start(folder, ranks)
        family = []
        wait_for(lambda: family.extend(processes(launcher)) or moment(), launcher)
        (processes(launcher, victim)[-1] if victim else psutil.Process(launcher.pid)).send_signal(signal.SIGKILL)
        launcher.wait(60)
        for process in {p.pid: p for p in family}.values():
            process.wait(60)  # nobody is left behind, holding the folder
        with pytest.raises(Exception, match="has not finished|is not a cache"):
            CacheReader(folder)

    killed(2, "", lambda: (folder / "documents.arrow.tmp").exists())  # the launcher, while rank 0 tokenises
    killed(2, "--local_rank=1", lambda: len(shards(folder)) >= 2)
    sealed = len(shards(folder))
    killed(1, "", lambda: len(shards(folder)) >= sealed + 2)
    flipped = shards(folder)[0].with_suffix(".safetensors")
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    sealed = len(shards(folder))
    killed(3, "--local_rank=0", lambda: len(shards(folder)) >= sealed + 1)
    assert not flipped.exists()  # found, and removed
    cut = shards(folder)[-1].with_suffix(".safetensors")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    last = start(folder, 2)
    assert last.wait(240) == 0, (tmp_path / "cache.log").read_text()[-3000:]
    log = (tmp_path / "cache.log").read_text()
    assert f"{flipped.name} was damaged" in log and f"{cut.name} was damaged" in log
    assert_equal(folder, untouched)


def test_a_second_capture_of_the_same_folder_is_refused(tmp_path):
    launcher = start(tmp_path / "cache", 2)
    family = []
    try:
        wait_for(lambda: shards(tmp_path / "cache"), launcher)
        family = processes(launcher)
        for process in family:
            process.suspend()  # else it may have ended before the second has started
        second = command(PROGRAM, *WORDS, f"cache.dir={tmp_path / 'cache'}")
        assert second.returncode == 2 and "is being written by another process" in second.stderr
    finally:
        for process in family:
            process.resume()
        assert launcher.wait(240) == 0


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace (unshare -rm)",
)
def test_a_capture_on_a_full_disk_ends_with_one_line_and_resumes_once_there_is_room(tmp_path, untouched):
    """A real file system of 600 MB: too small by the estimate is refused; filled by somebody else on the way, the capture
    ends with one line, and goes on once there is room."""
    script = f"""
        mount -t tmpfs -o size=600m tmpfs {tmp_path} && cd {tmp_path}
        capture="{sys.executable} {PROGRAM} {" ".join(WORDS)}"
        $capture cache.dir=cache data.max_tokens=600000 2> {tmp_path}-refused; echo "refused $?"
        test ! -e cache && echo nothing written
        $capture cache.dir=cache 2> {tmp_path}-full & pid=$!  # what it says needs room elsewhere
        while kill -0 $pid && ! ls cache/shard-*.parquet > /dev/null 2>&1; do sleep 0.05; done
        head -c 600000000 /dev/zero > more 2> /dev/null
        wait $pid; echo "full $?"
        rm more; ls cache/*.tmp 2> /dev/null
        $capture cache.dir=cache > /dev/null; echo "again $?"
        cp -r cache {tmp_path}-out; cat {tmp_path}-refused {tmp_path}-full
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", textwrap.dedent(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    said = done.stdout.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert [line for line in said if line.split()[0] in ("refused", "nothing", "full", "again")] == [
        "refused 2",
        "nothing written",
        "full 2",
        "again 0",
    ], done.stdout + done.stderr
    assert "GiB are free; make room" in errors[0]
    assert "cannot be written (No space left on device); make room, then run the same command again" in errors[1]
    assert ".tmp" not in done.stdout
    out = tmp_path.with_name(tmp_path.name + "-out")
    assert_equal(out, untouched)
    shutil.rmtree(out)


@pytest.mark.parametrize("spread,ranks", [("tp", 2), ("device_map", 1)])
def test_a_target_spread_over_processes_or_devices_computes_the_same(tmp_path, untouched, spread, ranks):
    """Two processes with half of each layer; transformers' placement of layers on devices (one, here). One of them says
    how long it will take."""
    words = [PROGRAM, *WORDS, f"capture.spread={spread}", f"cache.dir={tmp_path / 'cache'}"]
    said = command(*words, "mode=estimate", ranks=ranks)
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.count("tokens/s on cpu") == 1 and ("hours on these 2 processes" in said.stdout) == (ranks == 2)
    done = command(*words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal(tmp_path / "cache", untouched)
