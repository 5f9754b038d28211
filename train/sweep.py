"""How the ranks of a `-m` sweep keep together: rank 0 runs Hydra and tells the others each point."""

import json
import os
import sys
import time
from datetime import timedelta

from common.errors import UserError
from common.ranks import free_port, rank
from train.run.stopping import AGAIN, run_passing_on


class Sweep:
    """The points of a `-m` sweep, each in processes of its own: nothing can leak from one to the next (ZeRO-3 engines
    leak every tensor when they are destroyed).

    Rank 0 alone runs Hydra's sweeper. It tells the other ranks each point through a store on the launcher's own port,
    with a fresh port for the point's own process group.
    """

    def __init__(self, program: str):
        self.program = program
        self._number = 0  # of the next point
        self._store = None  # a single process has no others to tell
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
                if code != AGAIN:
                    time.sleep(20)  # rank 0 reports; see cli.fail()
                os._exit(code)
        self._store.add("left", 1)

    def _child(self, port: int, overrides: list[str]) -> int:
        env = {"LOCAL_RANK": "0", **os.environ, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        code = run_passing_on([sys.executable, self.program, *overrides], env)
        return code if code >= 0 else 128 - code
