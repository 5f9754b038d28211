"""`target.server`: states that a vLLM computes, by its own extraction of hidden states, in the place of a `Target` here.

Documents are sent as token ids, many at a time. The server writes the states of each to a file, which is read, checked and
deleted.

Shapes: T tokens of a document, P of a batch, K states of a token that the server writes, E hidden size.
"""

import copy
import fcntl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError, first_line
from common.ranks import from_rank_0, rank
from common.servers import api_key, described
from data_prep.recipe import CaptureSections, TargetRecipe
from data_prep.target.extraction import advice, interpreter_of_vllm, layer_ids, started_server
from data_prep.target.from_gguf import plain
from data_prep.target.loading import load_parts, load_target, pick_device, pick_dtype, target_tokenizer
from data_prep.target.states import States
from data_prep.target.target import Target

REQUESTS = 64  # at a time
TIMEOUT_S = 600.0  # of a request, which may wait behind the others
# Relative distance of last hidden states. Quantised weights may differ by a tenth; a wrong norm, scale or model by all of it.
FAR = 0.5
TEXT = "A short text, whose states are compared with the target's own before a document is sent."


class Server:
    """A vLLM at `url` that writes hidden states.

    Raises:
        UserError: none answers there, it serves another model, has too few positions, or writes no states.
    """

    def __init__(self, url: str, recipe: TargetRecipe, ids: list[int], max_length: int):
        # People give either: clients of OpenAI's want /v1, and the version lies beside it.
        self.url = url.rstrip("/").removesuffix("/v1")
        self.ids = ids
        self.max_length = max_length
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(TIMEOUT_S, connect=30)
        try:
            self._client = httpx.Client(base_url=self.url, headers=api_key(), timeout=timeout, limits=limits)
        except httpx.InvalidURL as error:
            raise UserError(f"target.server={url} is no address ({error})") from error
        self.model = self._find(recipe, max_length)
        version = self._get("/version")
        self.version = str(version.get("version", "")) if isinstance(version, dict) else ""

    def close(self) -> None:
        self._client.close()

    def states(self, ids_T: Tensor) -> Tensor:
        """[T, K, E], checked to be of these tokens. Raises UserError for everything that goes wrong."""
        try:
            asked = {"model": self.model, "prompt": ids_T.tolist(), "max_tokens": 1, "temperature": 0}
            answer = self._client.post("/v1/completions", json=asked)
            if answer.is_error:
                raise UserError(f"target.server: {self.url} answers {answer.status_code}: {' '.join(answer.text.split())[:300]}")
            told = answer.json().get("kv_transfer_params") or {}
        except httpx.TransportError as error:
            raise self._gone(error) from error
        except (ValueError, AttributeError) as error:
            raise UserError(f"target.server: {self.url} does not answer as vLLM would ({described(error)})") from error
        if not told.get("hidden_states_path"):
            raise UserError(f"target.server: {self.url} writes no hidden states; {advice(self.ids)}")
        return self._read(Path(told["hidden_states_path"]), ids_T)

    def _find(self, recipe: TargetRecipe, max_length: int) -> str:
        """The name under which the target is served."""
        try:
            served = self._get("/v1/models")["data"]
            # `id` is the name under which it is served, `root` the path that it was loaded from.
            known = {one[name]: one for one in served for name in ("root", "id") if one.get(name)}
            folder = plain(recipe.location, recipe.revision)
            names = (recipe.id, recipe.location, folder, str(Path(folder).absolute()), str(Path(folder).resolve()))
            model = next((known[name] for name in names if name in known), None)
            if model is None:
                others = ", ".join(one["id"] for one in served) or "nothing"
                raise UserError(
                    f"target.server: {self.url} serves {others}, and the target is {recipe.id} "
                    "(vLLM's --served-model-name gives it that name)"
                )
            longest = model.get("max_model_len")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"target.server: {self.url} does not answer as vLLM would ({described(error)})") from error
        # One token behind the document has to fit, because vLLM generates at least one.
        if longest and longest < max_length + 1:
            raise UserError(
                f"target.server: {self.url} takes {longest} positions, and documents of data.max_length={max_length} need one "
                f"more than they have; start vLLM with --max-model-len {max_length + 1}"
            )
        return model["id"]

    def _get(self, path: str):
        try:
            return self._client.get(path).raise_for_status().json()
        except httpx.HTTPStatusError as error:
            raise UserError(f"target.server: {self.url}{path} answers {error.response.status_code}") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._gone(error) from error
        except ValueError as error:
            raise UserError(f"target.server: {self.url} does not answer as vLLM would ({described(error)})") from error

    def _gone(self, error: Exception) -> UserError:
        return UserError(
            f"target.server: {self.url} cannot be reached ({described(error)}); what is captured is kept: "
            "run the same command again"
        )

    def _read(self, path: Path, ids_T: Tensor) -> Tensor:
        lock = Path(f"{path}.lock")
        try:
            # The server holds the lock until the file is whole.
            with open(lock) as held:
                fcntl.flock(held, fcntl.LOCK_SH)
                found = load_file(path)
        except (OSError, SafetensorError) as error:
            why = "its shared_storage_path has to be a folder of this machine too"
            if lock.exists():
                # The folder is shared, and the server let the lock go without a whole file.
                why = "the server ended, or its disk is full; what is captured is kept: run the same command again"
            what = f"wrote no {path} that can be read here ({first_line(error)})"
            raise UserError(f"target.server: {self.url} {what}: {why}") from error
        finally:
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        states_TKE = found["hidden_states"]
        if not torch.equal(found["token_ids"], ids_T.to(found["token_ids"].dtype)):
            raise UserError(f"target.server: {self.url} wrote the states of other tokens than it was sent")
        if tuple(states_TKE.shape[:2]) != (len(ids_T), len(self.ids)):
            raise UserError(
                f"target.server: {self.url} writes {states_TKE.shape[1]} states of each of {states_TKE.shape[0]} tokens, and "
                f"{len(self.ids)} of {len(ids_T)} are wanted; {advice(self.ids)}"
            )
        if not states_TKE.isfinite().all():
            raise UserError(f"target.server: {self.url} wrote states that are not finite; another --dtype may help")
        return states_TKE


class ServedTarget:
    """What a capture needs of a `Target`, with the states of a server. Of the target's own files it reads one norm.

    Attributes:
        ahead: batches that are asked for before the states of an earlier one are taken.
        server: which server computed the states, for the manifest.
    """

    packs = True  # documents stand back to back: each is a request of its own
    ahead = 1
    device = torch.device("cpu")

    def __init__(self, recipe: TargetRecipe, server: Server, hidden_layers: list[int]):
        self._recipe = recipe
        self._server = server
        self.server = {"kind": "vLLM", "version": server.version}
        parts = load_parts(recipe.model_copy(update={"device": "cpu"}))
        self.architecture = parts.architecture
        self.head_facts = parts.head_facts
        self.quantisation = parts.quantisation
        self.weights_hash = parts.weights_hash
        self._logit_scale = parts.logit_scale
        self._norm = copy.deepcopy(parts.final_norm)
        # In bf16, with some room.
        self._fits = 3 * sum(p.numel() for p in parts.model.parameters()) < psutil.virtual_memory().available
        self._place = {layer: server.ids.index(layer + 1) for layer in hidden_layers}
        self._pool = ThreadPoolExecutor(REQUESTS)

    def capture(self, hidden_layers, kv_layers, query_layers=()) -> None:
        """Choose the layers whose states `forward_packed` hands out, among those that the server writes."""
        assert not kv_layers and not query_layers  # rules.SERVED
        self._place = {layer: self._server.ids.index(layer + 1) for layer in hidden_layers}

    def forward_packed(self, ids_P: Tensor, lengths: Tensor) -> States:
        """States [1, P, ...] of documents of `lengths` back to back, on the CPU, in the server's dtype."""
        documents = ids_P.split(lengths.tolist())
        states_PKE = torch.cat(list(self._pool.map(self._server.states, documents)))
        return self._states(states_PKE).map(lambda t: t[None])

    def _states(self, states_PKE: Tensor) -> States:
        hidden = {layer: states_PKE[:, place].contiguous() for layer, place in self._place.items()}
        with torch.no_grad():
            last_hidden = self._norm.to(states_PKE.dtype)(states_PKE[:, -1])
        if self._logit_scale != 1:
            last_hidden = last_hidden * self._logit_scale
        return States(hidden=hidden, last_hidden=last_hidden)

    def other_kv_shapes(self, layers) -> dict:
        return {}  # a server hands out no keys

    def compare(self) -> None:
        """Raises UserError where a state of a short text is nearer to another layer's than to its own, as the target itself
        computes them here. A target that does not fit into this host's memory is not compared, which is said."""
        if not self._fits:
            print("the server's layers are not compared with the target's: it does not fit into this host's memory", flush=True)
            return
        tokenizer = target_tokenizer(self._recipe)
        ids_T = torch.tensor(tokenizer(TEXT)["input_ids"])[: self._server.max_length]
        states_TKE = self._server.states(ids_T)
        # In bf16, which takes half the memory of float32: layers differ by far more.
        whole = load_target(self._recipe.model_copy(update={"device": "cpu", "dtype": "bfloat16"}))
        layers = range(whole.architecture.num_layers)
        whole.capture(layers, [])
        ours = whole.forward(ids_T[None]).map(lambda t: t[0])
        who = f"target.server: {self._server.url}"
        for id, state_TE in zip(self._server.ids, states_TKE.unbind(1)):
            distances = [apart(state_TE, ours.hidden[layer]) for layer in layers]
            nearest = min(layers, key=distances.__getitem__)
            # Neighbouring layers of a large model differ by little more than rounding: another one has to be clearly nearer.
            if distances[nearest] < distances[id - 1] / 2:
                what = f"sends layer {nearest}'s output in the place of layer {id - 1}'s"
                raise UserError(f"{who} {what}; {advice(self._server.ids)}")
        far = apart(self._states(states_TKE).last_hidden, ours.last_hidden)
        if far > FAR:
            raise UserError(f"{who} serves another model: its last hidden states differ by {far:.0%} from the target's")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._server.close()


def apart(a_TE: Tensor, b_TE: Tensor) -> float:
    """Relative distance of states, the median over tokens: a first token's may be a thousand times as long as others."""
    a_TE, b_TE = a_TE.float(), b_TE.float()
    return float(((a_TE - b_TE).norm(dim=-1) / b_TE.norm(dim=-1)).median())


def check_server(recipe: CaptureSections, hidden_layers: list[int], num_layers: int) -> None:
    """Raises UserError for a server that cannot be started or, where one runs, that does not write as many states as are wanted.
    Which layers' they are is compared when the capture begins."""
    if recipe.target.server == "vllm":
        interpreter_of_vllm()
    elif recipe.target.server:
        server = Server(recipe.target.server, recipe.target, layer_ids(hidden_layers, num_layers), recipe.data.max_length)
        server.states(torch.arange(4))
        server.close()


@contextmanager
def capturing(recipe: CaptureSections, hidden_layers: list[int], num_layers: int) -> Iterator[Target | ServedTarget]:
    """What computes the states of a capture: a target of this process, or one at a server, which the first process starts where
    `target.server=vllm`. Called by all processes."""
    url = recipe.target.server
    if url is None:
        yield load_target(recipe.target, recipe.capture)
        return
    ids = layer_ids(hidden_layers, num_layers)
    with ExitStack() as stack:
        if url == "vllm":
            device = pick_device(recipe.target.device)
            if rank() == 0:
                starting = started_server(recipe, ids, pick_dtype(recipe.target.dtype, device), device.type == "cpu")
                url = stack.enter_context(starting)
            url = from_rank_0(lambda: url)
        server = Server(url, recipe.target, ids, recipe.data.max_length)
        target = ServedTarget(recipe.target, server, hidden_layers)
        stack.callback(target.close)
        if rank() == 0:
            target.compare()
        yield target
