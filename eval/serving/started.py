"""`server.start=vllm`: a vLLM that drafts, as `ServerRecipe` says it."""

import json
from contextlib import AbstractContextManager
from pathlib import Path

from common import servers
from eval.serving.servers import ServerRecipe

START = "server.start=vllm"


def interpreter(server: ServerRecipe) -> str:
    """The Python that has vLLM. Raises UserError when there is none."""
    return servers.interpreter(START, server.python, "; server.python=PATH names the interpreter that has it")


def words(server: ServerRecipe, python: str, target: str, speculative: dict, positions: int, dtype: str, cpu: bool) -> list[str]:
    """The command, without its port. `positions`: the most of any request, the last draft included."""
    command = servers.vllm_command(python, target, dtype, cpu)
    command += ["--max-model-len", str(positions), "--max-num-seqs", str(max(server.concurrency))]
    command += ["--speculative-config", json.dumps(speculative)]
    return [*command, *map(str, server.args)]


def without_drafter(command: list[str]) -> list[str]:
    """The same command for a server that does not draft."""
    flag = command.index("--speculative-config")
    return command[:flag] + command[flag + 2 :]


def started(server: ServerRecipe, command: list[str], log: Path) -> AbstractContextManager[str]:
    """See common/servers.py. The URL of the server that `command` starts, for as long as the context lasts."""
    return servers.started(START, command, log, server.wait_s, "server.wait_s")
