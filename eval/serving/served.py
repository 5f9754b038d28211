"""`mode=served`: what a drafter is worth in a server, beside what our own engine makes of it on the same prompts.

Every temperature is decoded by our engine, one request at a time, and by the server at each concurrency; what comes of it is in
`eval/serving/side_by_side.py`. The server is sent our token ids, and a conversation goes on behind its own answers.

Shapes: J positions of a draft, C = 1 + J counts (`eval/serving/counters.py`).
"""

import asyncio
import gc
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.errors import UserError
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.products import lay_out
from data_prep.decoding.sampling import Sampling
from data_prep.target.architecture import target_sizes
from data_prep.target.families import family_of
from data_prep.target.loading import load_target, load_tokenizer, target_tokenizer
from data_prep.target.target import Target
from eval.engine.drafting import Proposal, StaticTrained
from eval.engine.engine import Engine, room_for
from eval.engine.lengths import lengths_of
from eval.engine.request import Stops
from eval.engine.verification import Verification
from eval.judging import measure
from eval.prompts.suites import Prompt
from eval.recipe import EvalRecipe, prompts_of, prompts_within
from eval.reports.answers import Answers
from eval.serving.find import find_server
from eval.serving.servers import Answer, Asked, Server, Vllm, margin
from eval.serving.side_by_side import OURS, PLAIN, Run, compared, conclusions, figures
from eval.serving.started import interpreter, started, without_drafter, words
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig, folder_of, is_foreign, read_fields
from train.drafter.formats.export import save_export, server_format
from train.drafter.formats.names import MASK_FILE, method_of


@dataclass
class Asking:
    """What is asked, and what is known before a server is."""

    prompts: list[Prompt]
    said: dict  # of the prompts, for the report
    described: dict = field(default_factory=dict)  # of the drafter
    config: DrafterConfig | None = None  # None: no drafter was named
    ends: frozenset[int] | None = None
    command: list[str] = field(default_factory=list)  # that starts a server; empty: one that runs is asked
    notes: list[str] = field(default_factory=list)  # what the server does otherwise than we do
    alone: str | None = None  # why our engine was not asked for this drafter; None: it was
    own: dict[float, Run] = field(default_factory=dict)  # our engine's answers at each temperature


def served(recipe: EvalRecipe, load: Callable[[EvalRecipe], tuple[Target, Drafter]], described: Callable[..., dict]) -> dict:
    """The figures of served.json. `load` and `described`: of `eval/main.py`.

    Raises:
        UserError: the server refuses, ends or cannot be started.
    """
    server = find_server(recipe.server.url, recipe.target_names) if recipe.server.url else None
    with tempfile.TemporaryDirectory() as folder:
        # 1. Our engine's answers, and the checkpoint that a server is to load.
        if recipe.drafter:
            asking = _ask_ours(recipe, load, described, server, Path(folder) / "drafter")
        else:
            tokenizer = target_tokenizer(recipe.target)
            room = target_sizes(recipe.target).max_positions - server.slots
            asking = Asking(*prompts_within(recipe, room, tokenizer))
        # The server needs the memory of the target, which nothing holds any more.
        # Reference cycles, as of hooks, would keep the target until the next collection.
        gc.collect()
        torch.cuda.empty_cache()

        with Answers(Path(recipe.out), asking.described) as heard:
            for temperature, run in asking.own.items():
                for (id, turn), answer in run.answers.items():
                    heard.write_served(temperature, OURS, id, turn, answer)

            # 2. The server's answers with the drafter.
            log = Path(recipe.out) / "server.log"
            starting = started(recipe.server, asking.command, log) if asking.command else nullcontext(server)
            with starting as url:
                server = server or find_server(url, recipe.target_names)
                theirs = asyncio.run(_ask_all(recipe, server, asking, heard))

            # 3. Those of the same server once more, without the drafter.
            plain = {}
            if asking.command:
                alone = without_drafter(asking.command)
                with started(recipe.server, alone, Path(recipe.out) / "server_plain.log") as url:
                    nobody = find_server(url, recipe.target_names, drafts=False)
                    plain = asyncio.run(_ask_all(recipe, nobody, asking, heard))

    # 4. The figures, and what they say.
    result = _settings(recipe, server, asking)
    # Loaded anew: it made room for the server.
    judge = load_target(recipe.target) if asking.own and max(recipe.temperatures) > 0 else None
    for temperature, levels in theirs.items():
        name = f"{temperature:g}"
        mine = asking.own.get(temperature)
        runs = {OURS: mine} if mine else {}
        runs |= {str(concurrency): run for concurrency, run in levels.items()}
        runs |= {f"{PLAIN}{concurrency}": run for concurrency, run in plain.get(temperature, {}).items()}
        rows = {who: figures(run, mine if temperature == 0 else None) for who, run in runs.items()}
        for who, run in runs.items():
            if judge and temperature > 0 and who != OURS:
                rows[who]["sampling_p"] = _sampling_p(recipe, judge, temperature, run)
        why_not = _incomparable(server, asking.config, temperature) if mine else asking.alone
        result["temperatures"][name] = rows
        result["tested"][name] = compared(mine, levels[1], recipe.seed) if mine and 1 in levels and not why_not else []
        result["said"][name] = conclusions(result, name, len(asking.prompts), why_not)
    return result


def _ask_ours(recipe: EvalRecipe, load: Callable, described: Callable, server: Server | None, folder: Path) -> Asking:
    """Our engine's answers. Where no server runs yet, the checkpoint that one is to load goes into `folder`."""
    target, drafter = load(recipe)
    config = drafter.config
    slots = min(server.slots, config.draft_length) if server else recipe.longest(config)
    facts = described(recipe, target, drafter)
    prompts, said = prompts_of(recipe, config, target_tokenizer(recipe.target))
    asking = Asking(prompts, said, facts, config, target.end_tokens)
    if not server:
        place, asking.notes = _checkpoint(recipe, target, drafter, folder)
        asking.command = _start_of(recipe, target, config, place, slots, said["positions"])
    if why_not := family_of(target.model.config).decode:
        asking.alone = f"our engine does not decode this target ({why_not}): the server's figures stand alone"
    else:
        asking.own = ours(recipe, target, drafter, prompts, said, slots)
    return asking


def _settings(recipe: EvalRecipe, server: Server, asking: Asking) -> dict:
    """served.json without figures."""
    facts = {name: getattr(server, name) for name in ("kind", "version", "model", "slots", "positions")}
    how = {"command": asking.command, "notes": asking.notes} if asking.command else {"url": server.url}
    return asking.described | {
        "server": facts | how,
        "prompts": asking.said | {"seed": recipe.seed},
        "software": asking.described.get("software", {}),
        "commit": cli.git_revision(),
        "temperatures": {},
        "tested": {},
        "said": {},
    }


def _incomparable(server: Server, config: DrafterConfig, temperature: float) -> str | None:
    """Why acceptance in this server says nothing of ours; None: it does."""
    if not config.schedule.causal(config) and server.slots != config.draft_length:
        return (
            f"not tested: the server fills blocks of {server.slots} drafted tokens and this drafter learned blocks of "
            f"{config.draft_length}; its slots see each other, so that it is another function there"
        )
    if temperature > 0 and server.samples_drafts:
        return "not tested: this server samples its drafts, and ours are the likeliest tokens"
    return None


def _checkpoint(recipe: EvalRecipe, target: Target, drafter: Drafter, folder: Path) -> tuple[Path, list[str]]:
    """What a server loads, and what vLLM does with it otherwise than we: an export into `folder`, unless the drafter stands in a
    server's format already."""
    own = folder_of(recipe.drafter)
    # An export of what was imported might be another checkpoint than the one that is asked about.
    if is_foreign(read_fields(own)):
        return own, []
    notes = save_export(drafter, target, folder, server_format(drafter.config))
    return folder, [note for note in notes if "vLLM" in note and MASK_FILE not in note]


def _start_of(recipe: EvalRecipe, target: Target, config: DrafterConfig, folder: Path, slots: int, positions: int) -> list[str]:
    """The command that serves the checkpoint in `folder`, without a port."""
    method = method_of(config)
    speculative = {"method": method, "model": str(folder), "num_speculative_tokens": slots}
    # vLLM's names of them.
    if method == "peagle":
        speculative |= {"method": "eagle3", "parallel_drafting": True}
    if method == "gemma4_assistant":
        speculative["method"] = "mtp"
    dtype = str(target.dtype).removeprefix("torch.")
    room = min(positions + margin(slots), target.architecture.max_positions)
    cpu = target.device.type == "cpu"
    known_as = ["--served-model-name", recipe.target_names[0]]
    return words(recipe.server, interpreter(recipe.server), target.folder, speculative, room, dtype, cpu) + known_as


# Ours.


class Likeliest(StaticTrained):
    """Drafts the likeliest tokens at any temperature, as servers do unless they are told otherwise (`Server.samples_drafts`: as
    all but one do). They are accepted with the target's own probability, and the output is a sample of the target's all the
    same."""

    def propose(self, text_BL, anchor_B, length: int, sampling: Sampling, u_BJ) -> Proposal:
        return super().propose(text_BL, anchor_B, length, sampling._replace(temperature=0.0), u_BJ)


def ours(recipe: EvalRecipe, target: Target, drafter: Drafter, prompts: list[Prompt], said: dict, slots: int) -> dict[float, Run]:
    """Our engine on the same prompts, `slots` tokens a draft, one request at a time."""
    limit = said["max_new_tokens"]
    cache = StaticCache.of(target, 1, room_for(said["positions"] - limit, limit, slots))
    if recipe.compile:
        target.compile()
    if target.frozen_head.product.is_laid_out:
        lay_out(drafter)
    drafting = Likeliest(drafter, target.frozen_head)
    stops = Stops(target.end_tokens, tuple(recipe.stop), load_tokenizer(target.path, target.revision, target.trust_remote_code))
    found = {}
    for temperature in recipe.temperatures:
        sampling = Sampling(temperature, recipe.top_p, recipe.top_k)
        engine = Engine(target, drafting, cache, lengths_of(None, slots), Verification(sampling), graphs=recipe.graphs)
        run = Run(count_C=np.zeros(1 + slots, int))
        found[temperature] = run
        for _ in range(max(1, said["warmup"])):
            engine.generate([prompts[0].tokens], limit, [recipe.seed], stops)
        for first in prompts:
            prompt = first
            turn = 0
            while prompt:
                one = engine.generate([prompt.tokens], limit, [recipe.seed + len(run.answers)], stops)[0]
                kept = [r.kept for r in one.rounds]
                count_C = np.array([len(kept), *(sum(k >= j for k in kept) for j in range(1, slots + 1))])
                seconds = one.prefill_s + one.decode_s
                run.answers[prompt.id, turn] = Answer(prompt.tokens, one.tokens, one.prefill_s, seconds, count_C)
                run.count_C += count_C
                prompt = prompt.after(one.tokens)
                turn += 1
        run.seconds = sum(answer.seconds for answer in run.answers.values())
    return found


# The server's.


async def _ask_all(recipe: EvalRecipe, server: Server, asking: Asking, heard: Answers) -> dict[float, dict[int, Run]]:
    """{temperature: {concurrency: ...}}"""
    prompts = asking.prompts
    said = asking.said
    found: dict[float, dict[int, Run]] = {}
    async with server.client() as client:
        for temperature in recipe.temperatures:
            found[temperature] = {}
            for concurrency in recipe.server.concurrency:
                # Another salt each time: no prompt is read from what an earlier run left in the server's cache.
                salt = secrets.token_hex(8)
                limits = (said["max_new_tokens"], temperature, recipe.top_p, recipe.top_k, tuple(recipe.stop), asking.ends)
                for _ in range(max(1, said["warmup"])):
                    await server.ask(client, prompts[0].tokens, Asked(*limits, salt=f"{salt} warm-up"), recipe.seed)
                name = f"{concurrency}" if server.slots else f"{PLAIN}{concurrency}"
                told = partial(heard.write_served, temperature, name)
                run = await _level(server, client, prompts, concurrency, Asked(*limits, salt=salt), recipe.seed, told)
                if server.slots and not run.count_C[0] and any(len(answer.tokens) > 1 for answer in run.answers.values()):
                    raise UserError(f"{server.url} drafted nothing for {len(run.answers)} requests: its counters stand still")
                found[temperature][concurrency] = run
    return found


async def _level(server: Server, client, prompts: list[Prompt], concurrency: int, asked: Asked, seed: int, told: Callable) -> Run:
    """All prompts, `concurrency` conversations at a time, each behind the server's own answers. `told`(conversation,
    turn, Answer) hears of each at once."""
    run = Run(count_C=np.zeros(1 + server.slots, int))
    waiting = deque(prompts)
    numbers = count()
    counts = isinstance(server, Vllm) and server.slots > 0  # those of all requests together
    alone = counts and concurrency == 1
    # The counters run since the server's start: a run's own are a difference of two looks.
    before_C, answered = await server.counted(client) if counts else (None, 0)

    async def converse() -> None:
        nonlocal before_C, answered
        while waiting:
            prompt = waiting.popleft()
            turn = 0
            while prompt:
                # A seed for each request, also where several are asked at once.
                answer = await server.ask(client, prompt.tokens, asked, seed + next(numbers))
                run.answers[prompt.id, turn] = answer
                if alone:
                    # vLLM answers first and counts then. Without this wait the last rounds would be counted for the next request.
                    after_C, answered = await server.counted(client, answered + 1)
                    answer.count_C = after_C - before_C
                    before_C = after_C
                told(prompt.id, turn, answer)
                prompt = prompt.after(answer.tokens)
                turn += 1

    begun = time.perf_counter()
    await asyncio.gather(*(converse() for _ in range(concurrency)))
    run.seconds = time.perf_counter() - begun
    if alone:  # without the time that looking at the counters took
        run.seconds = sum(answer.seconds for answer in run.answers.values())
    if counts and not alone:
        run.count_C = (await server.counted(client, answered + len(run.answers)))[0] - before_C
    elif server.slots:
        run.count_C = sum((answer.count_C for answer in run.answers.values()), run.count_C)
    return run


def _sampling_p(recipe: EvalRecipe, target: Target, temperature: float, run: Run) -> float:
    """How likely outputs at least this odd are, if they are samples of the target."""
    answers = list(run.answers.values())
    sampling = Sampling(temperature, recipe.top_p, recipe.top_k)
    return measure.sampling_p_value(target, [answer.prompt for answer in answers], answers, sampling)
