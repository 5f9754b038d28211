"""Real commands on a small real cache of the embedded target, shared by the tests of one session."""

import os
import sys
from pathlib import Path

import pytest
import torch

from common import ranks

ranks.wait_without_spinning()  # whoever imports a command sets this: now it never changes while tests run

# Helpers' assertions say what they compared, as those of tests do. Before anybody imports them.
pytest.register_assert_rewrite("tests.support")

# Programs of tests that use DeepSpeed build its operation with one ninja, as train/main.py does.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder fails at once
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels then run on a CPU
torch.set_num_threads(1)  # two ranks and a test runner share two cores

from tests.support.commands import ROOT, command  # takes the environment as it is now for that of all tests


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache of 12,000 tokens of the standard library, float32, made by the real command."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    done = command(
        ROOT / "data_prep/main.py",
        "cache=fp32",
        f"cache.dir={folder}",
        "data.max_tokens=12000",
        "data.max_length=128",
        "cache.shard_bytes=20000000",
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder
