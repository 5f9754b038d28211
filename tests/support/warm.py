"""Commands without the seconds of their imports: a process that has imported what they import forks itself for each of them.

What runs is the real command: its file as `__main__`, in a process, a folder and an environment of its own, to its own exit code.
Tests of what happens before or while a command imports (its first line, its memory, a launcher) start it cold.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

# What training, capturing and judging import, the slowest first.
IMPORTED = ["deepspeed", "datasets", "transformers.models.llama.modeling_llama", "matplotlib.pyplot", "train.run.loop"]
IMPORTED += ["data_prep.main", "eval.main"]
SECONDS = 600

# Beginnings of names of environment variables that modules read when they are imported. All others are read when they are needed.
READ_ON_IMPORT = ("CUDA", "DS_", "HF_", "HOME", "KMP", "LD_", "MPL", "OMP", "PYTHON", "TORCH", "TRANSFORMERS", "TRITON", "XDG")
SET_ON_IMPORT = {"TORCHINDUCTOR_CACHE_DIR"}  # by PyTorch's compiler, in whichever process imports it


def _read_on_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_ON_IMPORT) and name not in SET_ON_IMPORT}


# In which the process imports: as tests/conftest.py leaves it, and not what a test that comes first has made of it.
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run(words: list[str], environments: list[dict[str, str]], cwd=None) -> subprocess.CompletedProcess:
    """`python words...` in `cwd`: one process for each environment. The first to fail ends the others, and its code is the code.

    Raises:
        subprocess.TimeoutExpired: after ten minutes.
    """
    context = multiprocessing.get_context("forkserver")
    with mock.patch.dict(os.environ, ENVIRONMENT):
        context.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        processes, files = [], []
        for number, environment in enumerate(environments):
            files += [(Path(folder, f"out{number}"), Path(folder, f"err{number}"))]
            arguments = (words, environment, str(cwd or os.getcwd()), *files[-1])
            processes += [context.Process(target=_become, args=arguments)]
            processes[-1].start()
        code = _wait(processes)
        out, err = ("".join(path.read_text() for path in kind) for kind in zip(*files, strict=True))
        if code is None:
            raise subprocess.TimeoutExpired(words, SECONDS, out, err)
        return subprocess.CompletedProcess(words, code, out, err)


def _wait(processes) -> int | None:
    """The exit code; None: they took too long. None of them is left."""
    deadline = time.monotonic() + SECONDS
    code: int | None = 0
    while code == 0 and (running := [one for one in processes if one.exitcode is None]):
        if not connection.wait([one.sentinel for one in running], deadline - time.monotonic()):
            code = None
            break
        code = next((one.exitcode for one in processes if one.exitcode), 0)
    for one in processes:
        one.kill()
        one.join()
    return code


def fits(environment: dict[str, str]) -> bool:
    """Whether modules that were imported once read what a command in this environment would."""
    return _read_on_import(environment) == _read_on_import(ENVIRONMENT)


def _become(words, environment, cwd, out, err) -> None:
    """In the forked process: end as `python words...` would have ended."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for path, number in ((out, 1), (err, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:  # its argument is a code, or a message for stderr
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
