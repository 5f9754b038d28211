"""hydra/launcher=deepspeed: one `deepspeed` job for each point of a sweep, some at a time, each on GPUs of its own.

Hydra looks for launchers in packages of this name alone.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


def visible_gpus() -> list[str]:
    """The GPUs that may be used, as `deepspeed --include` names them; none on a CPU."""
    import torch

    from common.ranks import on_gpu

    if not on_gpu():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]


def places(jobs: int, gpus_per_job: int | None, gpus: list[str]) -> list[list[str]]:
    """`deepspeed`'s options for each of `jobs` jobs at a time, which share no GPU.

    Raises:
        UserError: there are too few GPUs.
    """
    from common.errors import UserError

    if jobs < 1:
        raise UserError(f"hydra.launcher.jobs={jobs} must be 1 or more")
    each = gpus_per_job or max(1, len(gpus) // jobs)
    if not gpus:
        return [["--num_accelerators", str(each)]] * jobs
    if jobs * each > len(gpus):
        raise UserError(f"hydra.launcher: {jobs} job(s) at a time on {each} GPU(s) each, but {len(gpus)} GPU(s) are here")
    return [["--include", "localhost:" + ",".join(gpus[job * each : (job + 1) * each])] for job in range(jobs)]


class DeepSpeedLauncher(Launcher):
    """The task function runs here and returns the words of a point's command; what they train runs in its own processes.

    A point that fails keeps no other from running. At the end one line names those that failed, and the exit code is that of
    the first of them; the same command again runs what is unfinished. With several jobs at a time each writes to `launch.log`
    in its folder.
    """

    def __init__(self, jobs: int, gpus_per_job: int | None):
        self.jobs = jobs
        self.gpus_per_job = gpus_per_job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context = hydra_context
        self.task = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from common import cli
        from common.errors import UserError

        setup_globals()
        try:
            if "deepspeed" not in self.config:
                raise UserError("hydra/launcher=deepspeed is for train/main.py; leave it out")
            free = places(self.jobs, self.gpus_per_job, visible_gpus())
        except UserError as error:
            cli.fail(error)
        found = [self._prepared(number, list(words)) for number, words in enumerate(job_overrides, initial_job_idx)]
        waiting = list(found)
        running = {}
        failed = []
        ports = set()
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                place = free.pop(0)
                running[self._started(job, place, ports)] = job, place
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job, place = running.pop(process)
                free.append(place)
                if process.returncode:
                    failed.append((_folder(job), process.returncode))
        if failed:
            told = ", ".join(f"{folder} (exit code {code})" for folder, code in failed)
            first = failed[0][1]
            cli.fail(UserError(f"{len(failed)} of {len(found)} points failed: {told}"), first if first > 0 else 128 - first)
        return found

    def _prepared(self, number: int, overrides: list[str]) -> JobReturn:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _started(self, job: JobReturn, place: list[str], ports: set[int]) -> subprocess.Popen:
        from common import ranks

        while (port := ranks.free_port()) in ports:  # a job that has just begun does not listen yet
            pass
        ports.add(port)
        deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", os.devnull, *place]
        print(f"{_folder(job)}: {' '.join(place)}", flush=True)
        log = open(_folder(job) / "launch.log", "a") if self.jobs > 1 else None
        return subprocess.Popen(
            [*deepspeed, "--master_port", str(port), *job.return_value],
            stdout=log, stderr=log, preexec_fn=ranks.killed_with_parent,
        )  # fmt: skip


def _folder(job: JobReturn) -> Path:
    return Path(job.hydra_cfg.hydra.runtime.output_dir)
