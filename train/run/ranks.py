"""Who owns the run folder, who is missing when a collective fails, and how a sweep keeps its ranks together."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from common.errors import UserError
from common.ranks import free_port, rank, world_size


def lock_run(folder: Path, patience_s: float = 15) -> int:
    """Own the run folder until this process ends. A killed run's ranks need a moment to follow their launcher.

    Raises:
        UserError: another run is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(f"another run is using {folder}; wait for it or choose another run.dir") from error
            time.sleep(0.5)


def connect(on_gpu: bool, timeout_s: int) -> None:
    """Join the other ranks, through DeepSpeed.

    DeepSpeed gives the CPU ranks of one host 67 MB of shared memory each and removes none of it. Here the name goes once
    every rank has opened every other's, and the memory with the last process, however that ends.
    """
    import deepspeed
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    timeout = timedelta(seconds=timeout_s)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout  # DeepSpeed makes groups of its own and names none
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=timeout, verbose=False)
    if not on_gpu:
        parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank())
        try:
            dist.barrier()
        finally:
            Path("/dev/shm", "_".join(map(str, ("deepspeed_allreduce_buffer", *parts)))).unlink(missing_ok=True)


def loss_of_a_rank(error: Exception, timeout_s: int) -> UserError | None:
    """What to tell of an error of the collectives, None for any other. Takes seconds: ranks that are left count themselves."""
    from torch.distributed import DistError

    said = str(error).strip()
    if "gloo" in said and "Timed out" in said:
        silent = _silent_ranks()
        who = f"rank {', '.join(map(str, silent))}" if silent else "a rank"
        return UserError(
            f"{who} did not answer for {timeout_s} s (train.timeout_s); the last checkpoint is intact: mend that host and "
            "say the same command again"
        )
    if isinstance(error, DistError) or "gloo" in said:
        return UserError(f"the connection between ranks failed (train.timeout_s={timeout_s}): {said}")
    return None


def _silent_ranks(patience_s: float = 4) -> list[int]:
    """Who does not say in `patience_s` that it has waited in vain too. Rank 0 keeps the store: without an answer it is rank 0."""
    from torch.distributed.distributed_c10d import _get_default_store

    found = [0] if rank() else []

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the store is gone, or there is none yet
            store = _get_default_store()
            store.set(f"waited in vain/{rank()}", "")
            time.sleep(patience_s)
            found[:] = [other for other in range(world_size()) if not store.check([f"waited in vain/{other}"])]

    asking = threading.Thread(target=ask, daemon=True)  # a store on a host that is cut off never answers
    asking.start()
    asking.join(2 * patience_s)
    return found


class Sweep:
    """The points of a `-m` sweep, each in processes of its own: nothing can leak from one to the next (ZeRO-3 engines
    leak every tensor when they are destroyed).

    Rank 0 alone runs Hydra's sweeper. It tells the other ranks each point through a store on the launcher's own port,
    with a fresh port for the point's own process group.
    """

    def __init__(self, program: str):
        self.program, self._number, self._store = program, 0, None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from torch.distributed import TCPStore

            self._store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=rank() == 0 and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"),  # torchrun keeps one there itself
                wait_for_workers=False,
                timeout=timedelta(days=365),
            )

    def run(self, overrides: list[str]) -> None:
        """Rank 0: run one point on all ranks. A point that fails ends the sweep with its exit code."""
        port = free_port()
        if self._store:
            self._store.set(f"point/{self._number}", json.dumps([port, overrides]))
        self._number += 1
        if code := self._child(port, overrides):
            os._exit(code)

    def run_as_task(self, overrides: list[str]) -> None:
        """One point, in a job of its own that Hydra's submitit launcher began with a task for each rank.

        Raises:
            UserError: it failed.
        """
        from submitit.helpers import TorchDistributedEnvironment

        port = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True).master_port
        if code := self._child(port, overrides):
            raise UserError(f"rank {rank()} of {' '.join(overrides)} ended with exit code {code}; the job's log says why")

    def finish(self) -> None:
        if self._store:
            self._store.set(f"point/{self._number}", json.dumps(None))
            # The store lives in this process: it stays until every rank has read that there is no more.
            deadline = time.monotonic() + 60
            while self._store.add("left", 0) < int(os.environ["WORLD_SIZE"]) - 1 and time.monotonic() < deadline:
                time.sleep(0.1)

    def follow(self) -> None:
        """Other ranks: run what rank 0 announces until it says that there is no more."""
        while (point := json.loads(self._store.get(f"point/{self._number}"))) is not None:
            self._number += 1
            if code := self._child(*point):
                time.sleep(20)  # rank 0 reports; see cli.fail()
                os._exit(code)
        self._store.add("left", 1)

    def _child(self, port: int, overrides: list[str]) -> int:
        env = {"LOCAL_RANK": "0", **os.environ, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        code = subprocess.run([sys.executable, self.program, *overrides], env=env).returncode
        return code if code >= 0 else 128 - code
