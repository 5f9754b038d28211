"""Conversations that a server answers, many at a time, each turn by turn."""

import asyncio
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import httpx

from common.errors import UserError
from data_prep.recipe import RegenerateRecipe
from data_prep.sources.counts import Counts
from data_prep.sources.tokens import LeftOut
from data_prep.synthesis.conversation import Conversation, Write

TRANSIENT = {408, 409, 425, 429}  # and 5xx: worth another attempt
THIS_EXAMPLE = {400, 413, 422}  # the server refuses one conversation (too long, say); any other 4xx concerns all of them


class Reply(NamedTuple):
    message: dict
    finish: str  # "stop", or "length" when max_tokens cut it


class Server:
    """An OpenAI-compatible server (vLLM, SGLang) that answers conversations, at most `concurrency` of them at a time.

    `write`(conversation, messages, finish) keeps what was answered; what cannot be is counted in `counts` by reason.
    """

    def __init__(self, ask: RegenerateRecipe, settings: dict, write: Write, counts: Counts):
        self._ask = ask
        self._settings = settings
        self._write = write
        self._counts = counts

    async def answer(self, todo: Iterator[Conversation]) -> None:
        """Raises UserError when the server cannot be reached, or says something that concerns every conversation."""
        key = os.environ.get("OPENAI_API_KEY")
        async with httpx.AsyncClient(
            base_url=self._ask.base_url.rstrip("/") + "/",
            timeout=self._ask.timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=self._ask.concurrency),
        ) as client:
            running: set[asyncio.Task] = set()
            try:
                for conversation in todo:
                    running.add(asyncio.create_task(self._converse(client, conversation)))
                    if len(running) == self._ask.concurrency:
                        running = await _without_finished(running)
                while running:
                    running = await _without_finished(running)
            finally:
                # One error ends the command; the others' answers would come too late to be written.
                for task in running:
                    task.cancel()

    async def _converse(self, client: httpx.AsyncClient, conversation: Conversation) -> None:
        """One conversation, turn by turn: each reply stands before the next prompt."""
        history: list[dict] = []
        finish = "stop"
        try:
            for prompt in conversation.prompts:
                history += prompt
                message, finish = await self._reply(client, history)
                history.append(message)
                if finish == "length":  # what was cut cannot be followed by another turn
                    break
            self._write(conversation, history, finish)
        except LeftOut as reason:
            self._counts.end([conversation.number], str(reason))

    async def _reply(self, client: httpx.AsyncClient, history: list[dict]) -> Reply:
        """Raises LeftOut for what concerns this conversation alone, UserError for what concerns all."""
        ask = self._ask
        try:
            return _reply_of(await self._posted(client, history))
        except httpx.HTTPStatusError as error:
            said = " ".join(error.response.text.split())[:200]
            if error.response.status_code in THIS_EXAMPLE:
                what = re.sub(r"\d+", "N", said)[:100]  # numbers differ from example to example
                raise LeftOut(f"the server refuses it ({error.response.status_code}: {what})") from error
            raise UserError(f"{ask.base_url} answers {error.response.status_code}: {said}; what is done is kept") from error
        # Before TransportError, of which it is a kind: one long answer is no reason to end.
        except httpx.ReadTimeout as error:
            raise LeftOut(f"no answer within regenerate.timeout_s={ask.timeout_s:g}") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            what = f"{type(error).__name__} {error}".strip()
            raise UserError(
                f"{ask.base_url} cannot be reached ({what}); what is done is kept, run the same command again"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{ask.base_url} does not answer as an OpenAI-compatible server would") from error

    async def _posted(self, client: httpx.AsyncClient, history: list[dict]) -> httpx.Response:
        """The answer to one request, after as many attempts as are worth it. Raises httpx's errors."""
        import tenacity  # only a server needs it: capture and synthesis run without

        body = {key: self._settings[key] for key in ("model", "temperature", "top_p", "max_tokens", "seed")}
        body["messages"] = history
        if self._ask.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self._ask.thinking}
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._ask.attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
            retry=tenacity.retry_if_exception(_is_transient),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                answer = await client.post("chat/completions", json=body)
                answer.raise_for_status()
        return answer


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TRANSIENT or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _reply_of(answer: httpx.Response) -> Reply:
    choice = answer.json()["choices"][0]
    kept = {k: v for k, v in choice["message"].items() if k in ("content", "reasoning_content") and v is not None}
    return Reply({"role": "assistant", "content": "", **kept}, choice.get("finish_reason") or "stop")


async def _without_finished(running: set[asyncio.Task]) -> set[asyncio.Task]:
    """Wait until one task has finished; returns those that have not. Raises what a finished one raised."""
    finished, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in finished:
        task.result()
    return rest
