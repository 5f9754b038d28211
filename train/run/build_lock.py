"""The lock of DeepSpeed's build. PyTorch makes this file before it builds an operation, and waits while it is there. When whoever
builds is killed it stays, and every later start would wait for ever.
"""

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

YOUNG_S = 120  # whoever builds may be on another host with the same home folder; a build takes a minute
QUIET_S = 10


def wait_for_builder(lock: Path, say: Callable[[str], None], young_s: float = YOUNG_S) -> None:
    """Returns once `lock` is gone. It is taken away when it is older than `young_s` and no process of this host has it open, as
    PyTorch has while it builds. Linux only; elsewhere nothing is done."""
    if not Path("/proc/self/fd").exists():
        return
    loud = time.monotonic() + QUIET_S
    while lock.exists():
        with suppress(OSError):  # it goes, or another process is taking it away
            if _age_s(lock) > young_s and not _is_open(lock) and _taken_away(lock, young_s):
                say(f"{lock} was left by a process that was killed: it is taken away, and DeepSpeed's operation is built")
                return
        if time.monotonic() > loud:
            loud = float("inf")
            say(f"waiting for {lock}: DeepSpeed's operation is being built, or who built it was killed a moment ago")
        time.sleep(0.2)


def _age_s(lock: Path) -> float:
    return time.time() - lock.stat().st_mtime


def _is_open(lock: Path) -> bool:
    name = str(lock.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if os.readlink(link) == name:
                return True
    return False


def _taken_away(lock: Path, young_s: float) -> bool:
    """False, or an OSError, when another process was faster: what has this name now may be the lock of whoever builds."""
    handle = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _age_s(lock) <= young_s:
            return False
        lock.unlink()
        return True
    finally:
        os.close(handle)
