"""Ways to start a run: torchrun, Slurm, Kubernetes, and Hydra's launchers of sweeps, on CPU processes."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from common import cli
from common.errors import UserError
from common.overrides import parsed
from common.ranks import free_port
from data_prep.cache.reader import CacheReader
from tests.support.commands import ROOT, SMALL, command, deepspeed
from tests.support.runs import losses
from train import build
from train.recipe import TrainRecipe
from train.run.ranks import loss_of_a_rank
from train.run.stopping import AGAIN

TRAIN = ROOT / "train/main.py"
BIN = os.path.dirname(sys.executable)
SHORT = ["deepspeed=zero2", "train.batch=2", "train.max_steps=3", "train.diagnose=false", *SMALL]


def launcher():
    parsed([])  # Hydra finds its plugins
    from hydra_plugins import deepspeed_launcher

    return deepspeed_launcher


def test_jobs_of_a_sweep_share_no_gpu():
    places = launcher().places
    gpus = [str(gpu) for gpu in range(8)]
    assert places(2, 3, gpus) == [["--include", "localhost:0,1,2"], ["--include", "localhost:3,4,5"]]
    assert places(3, None, gpus) == [["--include", f"localhost:{pair}"] for pair in ("0,1", "2,3", "4,5")]
    assert places(1, None, ["4", "6"]) == [["--include", "localhost:4,6"]]  # of those that CUDA_VISIBLE_DEVICES names
    assert places(2, 3, []) == [["--num_accelerators", "3"]] * 2  # a CPU
    for jobs, each in ((9, None), (3, 3), (1, 9)):
        with pytest.raises(UserError, match="8 GPU"):
            places(jobs, each, gpus)
    with pytest.raises(UserError, match="jobs=0"):
        places(0, 1, [])


def test_errors_of_collectives_are_recognised():
    assert loss_of_a_rank(RuntimeError("shapes differ"), 5) is None
    reset = RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection closed by peer [10.0.0.2]:4033")
    assert "peer [10.0.0.2]:4033" in str(loss_of_a_rank(reset, 5))


def test_a_launcher_that_starts_ranks_is_refused_under_another(cache, tmp_path):
    words = ["-m", "hydra/launcher=deepspeed", "reuse=hidden,kv", f"cache.dir={cache}"]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = command(TRAIN, *words, cwd=tmp_path, env=env)
    assert done.returncode == 2 and "starts ranks itself: run it with python" in done.stderr and not list(tmp_path.iterdir())


def test_a_deepspeed_job_for_each_point_is_for_training(cache, tmp_path):
    words = ["-m", "hydra/launcher=deepspeed", "mode=inspect", "inspect.examples=1,2", f"cache.dir={cache}"]
    done = command(ROOT / "data_prep/main.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and "is for train/main.py" in done.stderr and not (tmp_path / "inspect.png").exists()


def test_the_manifest_for_kubernetes_says_what_the_command_takes(cache):
    job = yaml.safe_load((ROOT / "launchers/kubernetes.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    (container,) = job["Master"]["template"]["spec"]["containers"]
    assert job["Worker"]["template"] == job["Master"]["template"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert int(env["NODES"]) == sum(kind["replicas"] for kind in job.values())
    assert int(env["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    program, *words = container["args"]
    # The embedded target stands in for the one whose weights are not here, and its cache for the one on the cluster.
    here = [word for word in words if not word.startswith(("target=", "cache.dir="))]
    recipe = cli.compose("train", TrainRecipe, [*here, f"cache.dir={cache}"])
    build.check_training(recipe)
    assert recipe.train.batch % (int(env["NODES"]) * int(env["GPUS"])) == 0
    cli.compose("train", TrainRecipe, words)
    # Its command line, as the operator's environment completes it.
    said = {
        **os.environ,
        **env,
        "RANK": "1",
        "MASTER_ADDR": "master-0",
        "MASTER_PORT": "23456",
        "PATH": f"{ROOT}/none:/usr/bin:/bin",
    }
    line = [
        "bash",
        "-c",
        container["command"][2].replace("exec torchrun", "printf '%s\\n'"),
        *container["command"][3:],
        program,
        "a b",
    ]
    asked = subprocess.run(line, env=said, capture_output=True, text=True, check=True).stdout.splitlines()
    assert asked == "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr master-0 --master-port 23456".split() + [
        program,
        "a b",
    ]


@pytest.fixture(scope="module")
def by_deepspeed(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    words = [*SHORT, "reuse=hidden", f"cache.dir={cache}", f"run.dir={folder / 'run'}"]
    done = command(TRAIN, *words, launcher=deepspeed(2, free_port()), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "run")


@pytest.mark.slow
def test_torchrun_captures_and_sweeps(cache, by_deepspeed, tmp_path):
    """Two ranks of one torchrun: a cache, and a sweep whose points are as the deepspeed launcher's runs."""
    torchrun = [f"{BIN}/torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    words = ["cache=fp32", f"cache.dir={tmp_path / 'cache'}", "data.max_tokens=12000", "data.max_length=128"]
    done = command(ROOT / "data_prep/main.py", *words, launcher=torchrun, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert CacheReader(tmp_path / "cache").manifest.source["tokens"] == 12000
    words = ["-m", *SHORT, "reuse=hidden,kv", f"cache.dir={cache}", "run.dir=sweep"]
    done = command(TRAIN, *words, launcher=torchrun, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "sweep/reuse=hidden") == by_deepspeed and len(losses(tmp_path / "sweep/reuse=kv")) == 3


SCONTROL = """#!/bin/bash
[ "$1 $2 $3" = "show hostnames node[0-1]" ] && printf 'localhost\\nelsewhere\\n'
"""
SRUN = """#!/bin/bash
[ "$1 $2 $3 $4" = "--kill-on-bad-exit=1 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=2" ] || exit 9
shift 4
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=0 "$@" && wait $first
"""


def on_slurm(folder, *words, **imitated):
    """The real script under commands that are imitated: two nodes that are this machine."""
    for name, script in ({"scontrol": SCONTROL, "srun": SRUN} | imitated).items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    env = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": str(free_port()), "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "2"}
    env |= {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    return command(ROOT / "launchers/slurm.sbatch", "train/main.py", *words, launcher=["bash"], env=env, cwd=ROOT)


@pytest.mark.parametrize("code", [0, 1, 2, AGAIN, 137])
def test_a_job_on_slurm_queues_again_when_its_run_was_asked_to_stop(tmp_path, code):
    python = "#!/bin/bash\n[ \"$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $3\" = \"$SLURM_PROCID 0 2 1 a b\" ] || exit 9\n"
    scontrol = SCONTROL + f'[ "$1 $2" = "requeue $SLURM_JOB_ID" ] && touch {tmp_path}/queued; true\n'
    done = on_slurm(tmp_path, "a b", python=f"{python}exit {code}", scontrol=scontrol)
    assert done.returncode == code and (tmp_path / "queued").exists() == (code == AGAIN), done.stderr
    assert "#SBATCH --signal USR1@60" in (ROOT / "launchers/slurm.sbatch").read_text()


@pytest.mark.slow
def test_the_slurm_script_starts_a_rank_for_each_gpu(cache, by_deepspeed, tmp_path):
    words = [*SHORT, "reuse=hidden", f"cache.dir={cache}", f"run.dir='{tmp_path / 'run=1'}'"]
    done = on_slurm(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run=1") == by_deepspeed


@pytest.mark.slow
def test_a_deepspeed_job_for_each_point_two_at_a_time(cache, by_deepspeed, tmp_path):
    """One point that fails keeps no other from running, and the sweep ends with its exit code."""
    words = ["-m", "hydra/launcher=deepspeed", "hydra.launcher.jobs=2", "hydra.launcher.gpus_per_job=2", *SHORT]
    words += [f"cache.dir={cache}", "run.dir=sweep", "reuse=hidden"]
    done = command(TRAIN, *words, "train.batch=2,3", cwd=tmp_path)  # three packs cannot be shared by two ranks
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        done.stderr.count("error: ") == 1
        and "1 of 2 points failed" in done.stderr
        and "train.batch=3 (exit code 2)" in done.stderr
    )
    assert "cannot be shared by 2 ranks" in (tmp_path / "sweep/train.batch=3/launch.log").read_text()
    run = tmp_path / "sweep/train.batch=2"
    assert losses(run) == by_deepspeed and json.loads((run / "recipe.json").read_text())["world_size"] == 2
    assert json.loads((run / "recipe.json").read_text())["run"]["group"] == "sweep"


@pytest.mark.slow
def test_submitit_starts_a_rank_for_each_task(cache, by_deepspeed, tmp_path):
    """Its local executor: the same jobs as Slurm's, without a queue."""
    words = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", *SHORT, f"cache.dir={cache}"]
    done = command(TRAIN, *words, "run.dir=sweep", "reuse=hidden", "train.seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "sweep/train.seed=0") == by_deepspeed != losses(tmp_path / "sweep/train.seed=1")
