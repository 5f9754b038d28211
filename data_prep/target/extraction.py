"""How vLLM is started so that it writes hidden states to files, and where which layer's state is among them. vLLM 0.32."""

import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from common.recipe import ROOT
from common.servers import interpreter, started, vllm_command
from data_prep.recipe import CaptureSections
from data_prep.target.from_gguf import plain

START = "target.server=vllm"
WAIT_S = 3600.0  # a large model is read from a slow disk
# On a CPU, vLLM's own connector fails at the first request: its copies need CUDA.
ON_GPU = {"kv_connector": "ExampleHiddenStatesConnector"}
ON_CPU = {"kv_connector": "HiddenStatesOnCpu", "kv_connector_module_path": "data_prep.target.vllm_private"}


def layer_ids(hidden_layers: Sequence[int], num_layers: int) -> list[int]:
    """vLLM's numbers of the states, ascending, as they are written. Its state i is what layer i reads: layer l's output is l + 1.
    The last layer's is always among them, for the last hidden state is its norm."""
    return sorted({*(layer + 1 for layer in hidden_layers), num_layers})


def flags(ids: list[int], folder: str, cpu: bool = False) -> list[str]:
    """What a vLLM is started with that is to write these states into `folder`."""
    states = {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}}
    speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": states}
    files = {"kv_role": "kv_producer", "kv_connector_extra_config": {"shared_storage_path": folder}}
    transfer = (ON_CPU if cpu else ON_GPU) | files
    # With it the states of a beginning that is known would come from an earlier request: right in 0.32, but promised nowhere.
    plain = ["--no-enable-prefix-caching"]
    return [*plain, "--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]


def advice(ids: list[int]) -> str:
    """The same as the end of a refusal. The folder is the reader's to choose."""
    return f"start vLLM with {shlex.join(flags(ids, '/A/FOLDER/THAT/BOTH/READ'))}"


def interpreter_of_vllm() -> str:
    """Raises UserError when there is none."""
    return interpreter(START, otherwise="; put the environment that has it first on PATH, or make one (make serving)")


@contextmanager
def started_server(recipe: CaptureSections, ids: list[int], dtype: torch.dtype, cpu: bool) -> Iterator[str]:
    """The URL of a vLLM that serves the target and writes its states, for as long as the context lasts. Its log lies beside the
    cache, and stays there only when something fails."""
    target = recipe.target
    cache = Path(recipe.cache.dir).absolute()
    beside = next(folder for folder in cache.parents if folder.exists())
    log = beside / f"{cache.name}.vllm.log"
    name = str(dtype).removeprefix("torch.")
    command = vllm_command(interpreter_of_vllm(), plain(target.location, target.revision), name, cpu)
    # One token behind the document has to fit, because vLLM generates at least one.
    command += ["--served-model-name", target.id, "--max-model-len", str(recipe.data.max_length + 1)]
    if target.revision:
        command += ["--revision", target.revision]
    # On the cache's disk, because /tmp may be small: a few batches of states lie there at a time.
    with tempfile.TemporaryDirectory(prefix=f"{cache.name}.states-", dir=beside) as folder:
        command += [*flags(ids, folder, cpu), *map(str, target.server_args)]
        with started(START, command, log, WAIT_S, environment={"PYTHONPATH": str(ROOT)} if cpu else {}) as url:
            yield url
    log.unlink()
