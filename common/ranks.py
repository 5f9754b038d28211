"""Being one of N processes: who one is, who dies with whom, and how all wait for each other."""

import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from common.errors import UserError

Said = TypeVar("Said")
PR_SET_PDEATHSIG = 1


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def _number(variable: str, default: int) -> int:
    """Raises UserError where a launcher's environment variable holds no number."""
    value = os.environ.get(variable, str(default))
    if not value.isdigit():
        raise UserError(f"environment variable {variable}={value}: it must be a number, or unset")
    return int(value)


def wait_without_spinning() -> None:
    """Threads of OpenMP that wait sleep instead of spinning. To be called before torch is imported, for its OpenMP (GNU's, in
    the wheels for CPUs and for CUDA) reads this once; what the user says stands.

    Spinning saves microseconds where every core is free. Where another process wants one, a thread spins for as long as
    the one that it waits for is not scheduled: on two cores with a load of 7, steps of small matrix products (as in
    decoding with the embedded target) took 85 ms by default and 8 ms like this.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def on_gpu() -> bool:
    """Whether this process may use a GPU: DS_ACCELERATOR=cpu keeps it off."""
    import torch

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def free_port() -> int:
    with socket.socket() as probe:
        # The port is free at this moment. It is closed again, and another process may take it before it is used.
        probe.bind(("", 0))
        return probe.getsockname()[1]


def single_process_defaults() -> None:
    """A command run without a launcher is a world of one on a port of its own."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))


@contextmanager
def together(silent_s: float | None = None) -> Iterator[Callable[[], None]]:
    """For what all processes do: a function that returns when all have called it, however long that takes. They leave together,
    too. A process that is lost meanwhile, though no connection was closed, ends the others: one that nobody has heard of for
    `silent_s` seconds (None: as `common/pulse.py` says)."""
    if world_size() == 1:
        yield lambda: None
        return
    from torch import distributed

    group, pulse = _joined()
    with pulse.watched(silent_s):
        yield lambda: distributed.barrier(group)
        distributed.barrier(group)  # one that had ended would count as lost


def from_rank_0(say: Callable[[], Said]) -> Said:
    """What `say` returns on rank 0, on all ranks. To be called within `together`: the others wait for however long that takes."""
    if world_size() == 1:
        return say()
    from torch import distributed

    group, _ = _joined()
    said = [say() if rank() == 0 else None]
    distributed.broadcast_object_list(said, src=0, group=group)
    return said[0]


def without_nccl_dumps() -> None:
    """PyTorch writes no dump of NCCL's last collectives when one fails. To be called before ranks join; what the user says
    stands.

    To learn whether another rank dumps, every rank asks rank 0's store each second, and prints a page whenever nobody answers.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")


@functools.cache
def _joined():
    """All processes, on the host, and how they hear of each other. To be asked for by all."""
    from torch import distributed

    from common.pulse import SILENT_S, Pulse

    # Ranks of a capture wait for the slowest one, which may take hours: no limit that a capture could reach.
    patience = timedelta(days=30)
    # One group serves both: NCCL for a target that is spread over GPUs, gloo for what is on the host.
    if not distributed.is_initialized():
        without_nccl_dumps()
        store, *_ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=SILENT_S)))  # who never comes
        backend = "cpu:gloo,cuda:nccl" if on_gpu() else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=patience)
    pulse = Pulse(rank(), world_size())
    group = distributed.new_group(backend="gloo", timeout=patience)  # NCCL's own would give up after minutes
    pulse.start()
    return group, pulse


def ended(error: Exception) -> bool:
    """Whether a collective failed because another process has ended, or never came."""
    from torch.distributed import DistError

    found = isinstance(error, DistError) or "gloo" in str(error)
    if found and _joined.cache_info().currsize:
        _joined()[1].left_to_speak()
    return found


def die_with_parent() -> None:
    """A rank must not outlive its launcher, however that ends: it would hold the GPU and the port.

    The kernel kills it with its parent. DeepSpeed's parent (launch.py) survives the `deepspeed` command that started
    it, so that one is watched too: with it gone a rank is asked to stop (SIGTERM), and 30 s later it is killed. Linux only;
    elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux") or "LOCAL_RANK" not in os.environ:
        return
    killed_with_parent()
    parent = os.getppid()
    command = Path(f"/proc/{parent}/cmdline").read_bytes()
    grandparent = _parent_of(parent) if b"deepspeed.launcher.launch" in command else None

    def watch() -> None:
        while os.getppid() == parent and (grandparent is None or _parent_of(parent) == grandparent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def killed_with_parent() -> None:
    """From now on the kernel ends this process when its parent ends. Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _parent_of(pid: int) -> int | None:
    try:
        # `pid (command) state parent ...`: the command may hold blanks and brackets, so the line is split behind the last
        # bracket.
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return None
