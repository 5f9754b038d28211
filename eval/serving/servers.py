"""OpenAI-compatible servers that draft: how they are asked, and what they tell of their drafts.

Both kinds are sent token ids and answer with token ids, so that they read the very prompts that our own judge reads.

    vLLM      /v1/completions; `/metrics` counts the drafts of the whole server, so that a request's own are known only while it
              is alone there
    SGLang    /generate, its own endpoint; the `meta_info` of each answer counts the verify steps of that request

Both count whole rounds, as `eval/oracle/decode.py` does: a draft that goes beyond the output's end counts with all of it
that was accepted. vLLM 0.32 was run on a CPU; of SGLang only the sources were read.

Shapes: J drafted tokens of a round, C = 1 + J counts: the rounds, and of these the ones that accepted at least 1..J tokens.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import httpx
import numpy as np
from pydantic import Field, PositiveInt

from common.errors import UserError
from common.recipe import Section

DRAFTS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
FINISHED = "vllm:request_success_total"
SETTLES_S = 10.0  # how long vLLM may take to count a request that it has answered


class ServerRecipe(Section):
    """`mode=served`: the server that is asked."""

    url: str | None = None
    """A running server that drafts, http://HOST:PORT; or set `start`."""
    start: Literal["vllm"] | None = None
    """Start a server with the drafter, then one without it, and stop both."""
    model: str | None = None
    """Name of the target at the server; null: the target's path."""
    concurrency: list[PositiveInt] = Field(min_length=1)
    """Conversations at a time; outputs are compared with ours at 1."""
    wait_s: float = Field(gt=0)
    """Seconds until a started server must be healthy."""
    args: list[str | int | float] = []
    """More flags of the started server."""
    python: str | None = None
    """Python that has vLLM; null: that of `vllm` on PATH, or .venv-serving/bin/python."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every request. `ends`: the tokens that end an output; None: those that the server knows."""

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    ends: frozenset[int] | None = None
    salt: str = ""  # requests of another salt share no prefix cache with these


@dataclass
class Answer:
    """Token ids; seconds until the first of them came, and in all. `count_C`: of this request's rounds; None: not known apart."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    seconds: float = 0.0
    count_C: np.ndarray | None = None


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of each line of Prometheus' text format."""
    found = []
    for line in text.splitlines():
        whole = re.match(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)", line)
        if whole and not line.startswith("#"):
            name, labels, value = whole.groups()
            pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")
            found.append((name, dict(pairs), float(value)))
    return found


def vllm_counts(text: str) -> np.ndarray | None:
    """int64 [C] over all engines of a server since its start, from its `/metrics`; None: it does not draft."""
    rounds = None
    accepted = {}
    for name, labels, value in samples(text):
        if name == DRAFTS:
            rounds = (rounds or 0) + round(value)
        if name == ACCEPTED:
            position = int(labels["position"])
            accepted[position] = accepted.get(position, 0) + round(value)
    if rounds is None or not accepted:
        return None
    return np.array([rounds, *(accepted.get(j, 0) for j in range(max(accepted) + 1))])


def sglang_counts(meta: dict, slots: int) -> np.ndarray:
    """int64 [C] of one request, from the `meta_info` of its answer. Raises UserError where it tells no histogram."""
    rounds = int(meta.get("spec_verify_ct") or 0)
    histogram = meta.get("spec_correct_drafts_histogram") or meta.get("spec_accept_histogram") or []
    if rounds and not histogram:
        raise UserError("the SGLang server tells no acceptance by position (spec_correct_drafts_histogram): 0.5.23 does")
    return np.array([rounds, *(sum(histogram[j:]) for j in range(1, slots + 1))])


class Server:
    """One that answers at `url`. `slots`: how many tokens it drafts in a round, 0: it does not draft; `positions`: of a request,
    None: not told."""

    kind: str
    samples_drafts = False  # above temperature 0; all but SGLang's DSpark draft the likeliest tokens

    def __init__(self, url: str, model: str, positions: int | None, slots: int, version: str):
        self.url = url
        self.model = model
        self.positions = positions
        self.slots = slots
        self.version = version

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers=_key(), timeout=httpx.Timeout(600, connect=30))

    async def ask(self, client: httpx.AsyncClient, prompt: list[int], asked: Asked, seed: int) -> Answer:
        """Raises UserError when the server refuses or stops answering."""
        answer = Answer(prompt)
        started = time.perf_counter()
        try:
            async for event in self._events(client, prompt, asked, seed):
                self._take(answer, event)
                if answer.tokens and not answer.first_s:
                    answer.first_s = time.perf_counter() - started
        except (httpx.TransportError, ValueError) as error:
            raise UserError(f"{self.url} stopped answering in the middle ({_what(error)})") from error
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.url} does not stream token ids as {self.kind} does ({_what(error)})") from error
        if not answer.tokens:
            raise UserError(f"{self.url} answered without a token")
        answer.seconds = time.perf_counter() - started
        return answer

    async def _events(self, client: httpx.AsyncClient, prompt: list[int], asked: Asked, seed: int) -> AsyncIterator[dict]:
        path, body = self._request(prompt, asked, seed)
        async with client.stream("POST", path, json=body | {"stream": True}) as response:
            if response.is_error:
                said = " ".join((await response.aread()).decode(errors="replace").split())
                raise UserError(f"{self.url} answers {response.status_code}: {said[:300]}")
            async for line in response.aiter_lines():
                text = line.removeprefix("data:").strip()
                if not line.startswith("data:") or text == "[DONE]":
                    continue
                event = json.loads(text)
                if "error" in event:
                    raise UserError(f"{self.url} answers: {str(event['error'])[:300]}")
                yield event

    def _request(self, prompt: list[int], asked: Asked, seed: int) -> tuple[str, dict]:
        raise NotImplementedError

    def _take(self, answer: Answer, event: dict) -> None:
        raise NotImplementedError


class Vllm(Server):
    kind = "vLLM"

    async def counted(self, client: httpx.AsyncClient, finished: int | None = None) -> tuple[np.ndarray, int]:
        """(int64 [C], requests that were answered), of the whole server since its start; with `finished`, as soon as so many
        are. Raises UserError when others ask it at the same time, or when it does not count."""
        until = time.monotonic() + SETTLES_S
        while True:
            try:
                text = (await client.get("/metrics")).text
            except httpx.TransportError as error:
                raise UserError(f"{self.url} stopped answering in the middle ({_what(error)})") from error
            count_C = vllm_counts(text)
            done = round(sum(value for name, _, value in samples(text) if name == FINISHED))
            if count_C is None:
                raise UserError(f"{self.url}/metrics no longer counts drafts")
            if finished is None or done == finished:
                return count_C, done
            if done > finished:
                raise UserError(f"{self.url} answered others too: its counters are of all requests; let it serve nobody else")
            if time.monotonic() > until:
                raise UserError(f"{self.url}/metrics counts {done} requests, and it answered {finished}: {FINISHED} stands still")
            await asyncio.sleep(0.02)

    def _request(self, prompt: list[int], asked: Asked, seed: int) -> tuple[str, dict]:
        ends = {} if asked.ends is None else {"ignore_eos": True, "stop_token_ids": sorted(asked.ends)}
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k or -1,
            # A model's generation_config.json may say otherwise, and vLLM would take it.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "stop": list(asked.stop),
            "return_token_ids": True,
            "cache_salt": asked.salt or "none",
        }
        return "/v1/completions", body | ends

    def _take(self, answer: Answer, event: dict) -> None:
        for choice in event["choices"]:
            answer.tokens += choice["token_ids"]


def margin(slots: int) -> int:
    """Positions that vLLM needs behind a request's last: it plans rounds ahead, as if each kept its whole draft, and cuts drafts
    short that would then go beyond its last position."""
    return 8 * (slots + 1)


class Sglang(Server):
    kind = "SGLang"

    def _request(self, prompt: list[int], asked: Asked, seed: int) -> tuple[str, dict]:
        sampling = {
            "max_new_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(asked.stop),
            "stop_token_ids": sorted(asked.ends or ()),
        }
        return "/generate", {"input_ids": prompt, "sampling_params": sampling, "extra_key": asked.salt}

    def _take(self, answer: Answer, event: dict) -> None:
        meta = event["meta_info"]
        ids = event["output_ids"]
        whole = len(ids) == meta["completion_tokens"]  # with --incremental-streaming-output only what is new
        answer.tokens = list(ids) if whole else answer.tokens + ids
        if meta.get("finish_reason"):
            if meta["finish_reason"].get("type") == "abort":
                raise UserError(f"{self.url} gave a request up: {str(meta['finish_reason'].get('message'))[:300]}")
            answer.count_C = sglang_counts(meta, self.slots)


def find_server(url: str, names: list[str], drafts: bool = True) -> Server:
    """The server that answers at `url`. `names`: what its model may be called; `drafts`: whether it has to draft (False: it may).

    Raises:
        UserError: nobody is there, it serves another model, does not draft, or does not tell of it.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=url, headers=_key(), timeout=30) as client:
            return _found(client, url, names, drafts)
    except httpx.HTTPStatusError as error:
        raise UserError(f"server.url={url}: {error.request.url.path} answers {error.response.status_code}") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise UserError(f"server.url={url}: no server answers there ({_what(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"server.url={url} does not answer as vLLM or SGLang would ({_what(error)})") from error


def _found(client: httpx.Client, url: str, names: list[str], drafts: bool) -> Server:
    served = client.get("/v1/models").raise_for_status().json()["data"]
    known = {one[name]: one for one in served for name in ("root", "id") if one.get(name)}
    model = next((known[name] for name in names if name in known), None)
    if model is None:
        raise UserError(
            f"server.url={url} serves {', '.join(one['id'] for one in served) or 'nothing'}, and the target is {names[0]} "
            "(server.model=NAME, if it goes by another name there)"
        )
    said = (url, model["id"], model.get("max_model_len"))
    told = client.get("/metrics")
    if not told.is_error and "vllm:" in told.text:
        slots = _vllm_slots(url, told.text) if drafts else 0
        version = client.get("/version")
        return Vllm(*said, slots, "" if version.is_error else str(version.json().get("version", "")))
    for path in ("/server_info", "/get_server_info"):
        answer = client.get(path)
        info = {} if answer.is_error else answer.json()
        if "speculative_algorithm" in info:
            server = Sglang(*said, _sglang_slots(url, info), str(info.get("version", "")))
            server.samples_drafts = str(info["speculative_algorithm"]).upper() == "DSPARK"
            return server
    raise UserError(
        f"server.url={url} tells nothing of its drafts: neither /metrics with vLLM's counters (start vLLM without "
        "--disable-log-stats) nor SGLang's /server_info"
    )


def _vllm_slots(url: str, metrics: str) -> int:
    """Raises UserError when it does not draft."""
    count_C = vllm_counts(metrics)
    if count_C is None:
        raise UserError(f"server.url={url} does not draft: /metrics has no {DRAFTS} (start vLLM with --speculative-config)")
    return len(count_C) - 1


def _sglang_slots(url: str, info: dict) -> int:
    """Raises UserError when it does not draft."""
    if not info["speculative_algorithm"]:
        raise UserError(f"server.url={url} does not draft (start SGLang with --speculative-algorithm)")
    if (info.get("speculative_eagle_topk") or 1) > 1:
        return info["speculative_num_steps"]  # the depth of its trees
    return info["speculative_num_draft_tokens"] - 1  # the anchor's row is counted there


def _key() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _what(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
