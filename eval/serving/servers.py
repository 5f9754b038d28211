"""OpenAI-compatible servers that draft: how they are asked. What they tell of their drafts is read in counters.py.

Both kinds are sent token ids and answer with token ids, so that they read the very prompts that our own judge reads.

    vLLM      /v1/completions; `/metrics` counts the drafts of the whole server, so that a request's own are known only while it
              is alone there
    SGLang    /generate, its own endpoint; the `meta_info` of each answer counts the rounds of that request

Both count whole rounds, as `eval/oracle/decode.py` does: a draft that goes beyond the output's end counts with all of it
that was accepted. vLLM 0.32 was run on a CPU; of SGLang only the sources were read.

Shapes: C counts (counters.py).
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import httpx
import numpy as np
from pydantic import Field, PositiveInt

from common.errors import UserError
from common.recipe import Section
from common.servers import api_key, described
from eval.serving.counters import FINISHED, samples, sglang_counts, vllm_counts

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
        # A request that waits behind many others may be silent for minutes. A server that is not there is known at once.
        return httpx.AsyncClient(base_url=self.url, headers=api_key(), timeout=httpx.Timeout(600, connect=30))

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
            raise UserError(f"{self.url} stopped answering in the middle ({described(error)})") from error
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.url} does not stream token ids as {self.kind} does ({described(error)})") from error
        if not answer.tokens:
            raise UserError(f"{self.url} answered without a token")
        answer.seconds = time.perf_counter() - started
        return answer

    async def _events(self, client: httpx.AsyncClient, prompt: list[int], asked: Asked, seed: int) -> AsyncIterator[dict]:
        path, body = self._request(prompt, asked, seed)
        # Streamed, because the time until the first token is known in no other way.
        async with client.stream("POST", path, json=body | {"stream": True}) as response:
            if response.is_error:
                said = " ".join((await response.aread()).decode(errors="replace").split())
                raise UserError(f"{self.url} answers {response.status_code}: {said[:300]}")
            async for line in response.aiter_lines():
                text = line.removeprefix("data:").strip()
                # Server-sent events: blank lines and comments lie between them.
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
        """(int64 [C], requests that were answered), of the whole server since its start; with `finished`, as soon as that many
        are. Raises UserError when others ask it at the same time, or when it does not count."""
        until = time.monotonic() + SETTLES_S
        while True:
            try:
                text = (await client.get("/metrics")).text
            except httpx.TransportError as error:
                raise UserError(f"{self.url} stopped answering in the middle ({described(error)})") from error
            count_C = vllm_counts(text)
            done = round(sum(value for name, _, value in samples(text) if name == FINISHED))
            if count_C is None:
                raise UserError(f"{self.url}/metrics no longer counts drafts")
            if finished is None or done == finished:
                return count_C, done
            # Counters of all requests together say nothing of ours once others are among them.
            if done > finished:
                raise UserError(f"{self.url} answered others too: its counters are of all requests; let it serve nobody else")
            if time.monotonic() > until:
                raise UserError(f"{self.url}/metrics counts {done} requests, and it answered {finished}: {FINISHED} stands still")
            await asyncio.sleep(0.02)

    def _request(self, prompt: list[int], asked: Asked, seed: int) -> tuple[str, dict]:
        # Our ends and not those that the server reads from its own files: both sides have to stop at the same tokens.
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
        # By default each event repeats everything so far.
        whole = len(ids) == meta["completion_tokens"]  # with --incremental-streaming-output only what is new
        answer.tokens = list(ids) if whole else answer.tokens + ids
        if meta.get("finish_reason"):
            if meta["finish_reason"].get("type") == "abort":
                raise UserError(f"{self.url} gave a request up: {str(meta['finish_reason'].get('message'))[:300]}")
            answer.count_C = sglang_counts(meta, self.slots)
