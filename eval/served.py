"""`mode=served`: what a drafter is worth in a server, beside what our own engine makes of it on the same prompts.

Every temperature is decoded by our engine, one request at a time, and by the server at each concurrency. tau and acceptance are
of whole rounds on both sides: joint_j, the share of rounds that accepted at least j tokens, is what servers count by position.

Whether they differ is tested at concurrency 1, where the counts of each prompt are known on both sides. The drafts of one request
depend on one another, so that a test of two binomials would find differences that are none. Here the two are exchanged within
prompts at random: if the server runs this drafter, it is a matter of chance which of the two a prompt's counts came from. p is
the share of exchanges after which the two lie apart at least as far, corrected for the number of positions.

Shapes: P prompts, or conversations with all of their turns; R exchanges; J positions, C = 1 + J counts (`eval/servers.py`).
"""

import asyncio
import gc
import secrets
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep import cli
from data_prep.cache.manifest import flatten, write_text
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.products import lay_out
from data_prep.decoding.sampling import Sampling
from data_prep.errors import UserError
from data_prep.target import Target, load_target, load_tokenizer, target_sizes
from eval import measure, page
from eval.engine import Engine, room_for
from eval.lengths import lengths_of
from eval.recipe import EvalRecipe, prompts_of, prompts_within
from eval.request import Stops
from eval.servers import Answer, Asked, Server, Vllm, find_server
from eval.started import METHODS, interpreter, started, words
from eval.static_drafting import Proposal, StaticTrained
from eval.suites import Prompt
from train.drafter.export import save_export
from train.drafter.model import Drafter

EXCHANGES = 20_000
SURE = 0.01  # a corrected p below it is a difference beyond chance
HONEST = 0.001  # sampled outputs that are less likely than this are no samples of the target (eval/lossless.py has the same)
HEADS = ("T", "who", "tau", "accepted by position", "TTFT ms", "90% within", "tokens/s", "outputs")
WORDS = [0, 1, 3, 7]  # columns of words
OURS = "ours"


@dataclass
class Run:
    """All requests at one temperature. `answers`: {(conversation, turn): ...}; `count_C`: over all their rounds."""

    answers: dict[tuple[str, int], Answer] = field(default_factory=dict)
    seconds: float = 0.0
    count_C: np.ndarray | None = None

    def by_prompt(self) -> dict[str, np.ndarray]:
        """{conversation: int64 [C] over its turns}; nothing where requests were not counted one by one."""
        found: dict[str, np.ndarray] = {}
        for (id, _), answer in self.answers.items():
            if answer.count_C is None:
                return {}
            found[id] = found.get(id, 0) + answer.count_C
        return found


def served(recipe: EvalRecipe, load: Callable[[EvalRecipe], tuple[Target, Drafter]], described: Callable[..., dict]) -> dict:
    """The figures of served.json. `load` and `described`: of `eval/main.py`.

    Raises:
        UserError: the server refuses, ends or cannot be started.
    """
    server = find_server(recipe.server.url, recipe.target_names) if recipe.server.url else None
    tokenizer = load_tokenizer(recipe.target.location, recipe.target.revision)
    with tempfile.TemporaryDirectory() as folder:
        own: dict[float, Run] = {}
        result: dict = {}
        ends, command = None, []
        if recipe.drafter:
            target, drafter = load(recipe)
            config = drafter.config
            slots = min(server.slots, config.draft_length) if server else recipe.longest(config)
            result = described(recipe, target, drafter)
            ends = target.end_tokens
            prompts, said = prompts_of(recipe, config, tokenizer)
            if not server:
                command = _start_of(recipe, target, drafter, Path(folder) / "drafter", slots, said["positions"])
            own = ours(recipe, target, drafter, prompts, said, slots)
            del target, drafter  # the server needs the memory
            gc.collect()
            torch.cuda.empty_cache()
        else:
            prompts, said = prompts_within(recipe, target_sizes(recipe.target).max_positions - server.slots, tokenizer)
        starting = started(recipe.server, command, Path(recipe.out) / "server.log") if command else nullcontext(server)
        with starting as url:
            server = server or find_server(url, recipe.target_names)
            theirs = asyncio.run(_ask_all(recipe, server, prompts, said, ends))
        odds = _odds(recipe, theirs) if own else {}
    result |= {
        "server": {"kind": server.kind, "version": server.version, "model": server.model, "slots": server.slots}
        | {"positions": server.positions}
        | ({"command": command} if command else {"url": server.url}),
        "prompts": said | {"seed": recipe.seed},
        "software": result.get("software", {}),
        "commit": cli.git_revision(),
        "temperatures": {},
        "tested": {},
        "said": {},
    }
    for temperature, levels in theirs.items():
        name = f"{temperature:g}"
        mine = own.get(temperature)
        runs = ({OURS: mine} if mine else {}) | {str(concurrency): run for concurrency, run in levels.items()}
        result["temperatures"][name] = {who: figures(run, mine if temperature == 0 else None) for who, run in runs.items()}
        for concurrency, p in odds.get(temperature, {}).items():
            result["temperatures"][name][str(concurrency)]["sampling_p"] = p
        result["tested"][name] = compared(mine, levels[1], recipe.seed) if mine and 1 in levels else []
        result["said"][name] = conclusions(result, name, len(prompts))
    return result


def _start_of(recipe: EvalRecipe, target: Target, drafter: Drafter, folder: Path, slots: int, positions: int) -> list[str]:
    """Export the drafter into `folder`; the command that serves it, without a port."""
    format = recipe.served_format(drafter.config)
    save_export(drafter, target, folder, format)
    speculative = {"method": METHODS[format], "model": str(folder), "num_speculative_tokens": slots}
    dtype = str(target.dtype).removeprefix("torch.")
    room = min(positions + margin(slots), target.architecture.max_positions)
    cpu = target.device.type == "cpu"
    return words(recipe.server, interpreter(recipe.server), recipe.target.location, speculative, room, dtype, cpu)


def margin(slots: int) -> int:
    """Positions that vLLM needs behind a request's last: it plans rounds ahead, as if each kept its whole draft, and cuts drafts
    short that would then go beyond its last position."""
    return 8 * (slots + 1)


# Ours.


class Likeliest(StaticTrained):
    """Drafts the likeliest tokens at any temperature, as vLLM and SGLang do unless they are told otherwise. They are accepted
    with the target's own probability, and the output is a sample of the target's all the same."""

    def propose(self, text_BL, anchor_B, length: int, sampling: Sampling, u_BJ) -> Proposal:
        return super().propose(text_BL, anchor_B, length, sampling._replace(temperature=0.0), u_BJ)


def ours(
    recipe: EvalRecipe, target: Target, drafter: Drafter, prompts: list[Prompt], said: dict, slots: int
) -> dict[float, Run]:
    """Our engine on the same prompts, `slots` tokens a draft, one request at a time."""
    limit, a = said["max_new_tokens"], target.architecture
    room = room_for(said["positions"] - limit, limit, slots)
    cache = StaticCache(a.num_layers, 1, room, a.kv_heads, a.head_dim, target.dtype, target.device)
    if recipe.compile:
        target.compile()
    if target.frozen_head.product.is_laid_out:
        lay_out(drafter)
    drafting = Likeliest(drafter, target.frozen_head)
    stops = Stops(target.end_tokens, tuple(recipe.stop), load_tokenizer(target.path, target.revision))
    found = {}
    for temperature in recipe.temperatures:
        sampling = Sampling(temperature, recipe.top_p, recipe.top_k)
        engine = Engine(target, drafting, cache, sampling, lengths_of(None, slots), graphs=recipe.graphs)
        run = found[temperature] = Run(count_C=np.zeros(1 + slots, int))
        for _ in range(max(1, said["warmup"])):
            engine.generate([prompts[0].tokens], limit, [recipe.seed], stops)
        for first in prompts:
            prompt, turn = first, 0
            while prompt:
                one = engine.generate([prompt.tokens], limit, [recipe.seed + len(run.answers)], stops)[0]
                kept = [r.kept for r in one.rounds]
                count_C = np.array([len(kept), *(sum(k >= j for k in kept) for j in range(1, slots + 1))])
                seconds = one.prefill_s + one.decode_s
                run.answers[prompt.id, turn] = Answer(prompt.tokens, one.tokens, one.prefill_s, seconds, count_C)
                run.count_C += count_C
                prompt, turn = prompt.after(one.tokens), turn + 1
        run.seconds = sum(answer.seconds for answer in run.answers.values())
    return found


# The server's.


async def _ask_all(
    recipe: EvalRecipe, server: Server, prompts: list[Prompt], said: dict, ends: frozenset[int] | None
) -> dict[float, dict[int, Run]]:
    """{temperature: {concurrency: ...}}"""
    found: dict[float, dict[int, Run]] = {}
    async with server.client() as client:
        for temperature in recipe.temperatures:
            found[temperature] = {}
            for concurrency in recipe.server.concurrency:
                # Another salt each time: no prompt is read from what an earlier run left in the server's cache.
                salt = secrets.token_hex(8)
                limits = (said["max_new_tokens"], temperature, recipe.top_p, recipe.top_k, tuple(recipe.stop), ends)
                for _ in range(max(1, said["warmup"])):
                    await server.ask(client, prompts[0].tokens, Asked(*limits, salt=f"{salt} warm-up"), recipe.seed)
                run = await _level(server, client, prompts, concurrency, Asked(*limits, salt=salt), recipe.seed)
                if not run.count_C[0] and any(len(answer.tokens) > 1 for answer in run.answers.values()):
                    raise UserError(f"{server.url} drafted nothing for {len(run.answers)} requests: its counters stand still")
                found[temperature][concurrency] = run
    return found


async def _level(server: Server, client, prompts: list[Prompt], concurrency: int, asked: Asked, seed: int) -> Run:
    """All prompts, `concurrency` conversations at a time, each behind the server's own answers."""
    run, waiting, loop = Run(count_C=np.zeros(1 + server.slots, int)), deque(prompts), asyncio.get_running_loop()
    alone = isinstance(server, Vllm) and concurrency == 1
    before_C, answered = await server.counted(client) if isinstance(server, Vllm) else (None, 0)

    async def converse() -> None:
        nonlocal before_C, answered
        while waiting:
            prompt, turn = waiting.popleft(), 0
            while prompt:
                answer = await server.ask(client, prompt.tokens, asked, seed + len(run.answers))
                run.answers[prompt.id, turn] = answer
                if alone:
                    after_C, answered = await server.counted(client, answered + 1)
                    answer.count_C, before_C = after_C - before_C, after_C
                prompt, turn = prompt.after(answer.tokens), turn + 1

    begun = loop.time()
    await asyncio.gather(*(converse() for _ in range(concurrency)))
    run.seconds = loop.time() - begun
    if alone:  # without the time that looking at the counters took
        run.seconds = sum(answer.seconds for answer in run.answers.values())
    if isinstance(server, Vllm) and not alone:
        run.count_C = (await server.counted(client, answered + len(run.answers)))[0] - before_C
    else:
        run.count_C = sum((answer.count_C for answer in run.answers.values()), run.count_C)
    return run


def _odds(recipe: EvalRecipe, theirs: dict[float, dict[int, Run]]) -> dict[float, dict[int, float]]:
    """{temperature above 0: {concurrency: how likely outputs at least this odd are, if they are samples of the target}}. Reads
    the target anew: it made room for the server."""
    sampled = {temperature: levels for temperature, levels in theirs.items() if temperature > 0}
    if not sampled:
        return {}
    target, found = load_target(recipe.target), {}
    for temperature, levels in sampled.items():
        sampling = Sampling(temperature, recipe.top_p, recipe.top_k)
        for concurrency, run in levels.items():
            answers = list(run.answers.values())
            p = measure.sampling_p_value(target, [answer.prompt for answer in answers], answers, sampling)
            found.setdefault(temperature, {})[concurrency] = p
    return found


# What it comes to.


def figures(run: Run, own: Run | None) -> dict:
    """One row of the table. TTFT and seconds are what the client saw; ours are the engine's, without a network. `own`: whose
    outputs these should be, token for token."""
    answers = list(run.answers.values())
    first_ms = [1e3 * answer.first_s for answer in answers]
    tokens = sum(len(answer.tokens) for answer in answers)
    joint = (run.count_C[1:] / max(1, run.count_C[0])).tolist()
    found = {
        "tau_micro": 1 + sum(joint),
        "joint": joint,
        "rounds": int(run.count_C[0]),
        "requests": len(answers),
        "tokens": tokens,
        "ttft_ms": {"median": float(np.median(first_ms)), "p90": float(np.quantile(first_ms, 0.9))},
        "tokens_per_s": tokens / max(run.seconds, 1e-9),
        "per_prompt_count": {id: count_C.tolist() for id, count_C in run.by_prompt().items()},
    }
    if own and own is not run:
        same = (key in own.answers and own.answers[key].tokens == answer.tokens for key, answer in run.answers.items())
        found["equal"] = sum(same)
    return found


def compared(own: Run, theirs: Run, seed: int) -> list[dict]:
    """{"position" (from 1), "ours", "server", "p"} of every position that both draft."""
    mine, other = own.by_prompt(), theirs.by_prompt()
    ids = [id for id in mine if id in other]
    if not ids:
        return []
    slots = min(len(own.count_C), len(theirs.count_C)) - 1
    ours_PC, server_PC = (np.array([counts[id][: 1 + slots] for id in ids]) for counts in (mine, other))
    p_J = exchanged(ours_PC, server_PC, seed)
    ours_J, server_J = (joint(count_PC.sum(0)) for count_PC in (ours_PC, server_PC))
    rows = zip(ours_J.tolist(), server_J.tolist(), p_J.tolist())
    return [{"position": j, "ours": a, "server": b, "p": p} for j, (a, b, p) in enumerate(rows, 1)]


def joint(count: np.ndarray) -> np.ndarray:
    """[..., C] counts -> [..., J] shares of the rounds."""
    return count[..., 1:] / np.maximum(count[..., :1], 1)


def exchanged(a_PC: np.ndarray, b_PC: np.ndarray, seed: int) -> np.ndarray:
    """[J] p-values of joint_j being equal in a and b, over random exchanges of the two within prompts, what was seen among them:
    the share of exchanges in which *any* position lies apart as far as j does, each measured in its own standard deviations. That
    corrects for the number of positions (Westfall and Young)."""
    swap_RP = np.random.default_rng(seed).integers(0, 2, (EXCHANGES, len(a_PC)))
    swap_RP[0] = 0
    both_C = (a_PC + b_PC).sum(0)
    first_RC = a_PC.sum(0) + swap_RP @ (b_PC - a_PC)
    apart_RJ = np.abs(joint(first_RC) - joint(both_C - first_RC))
    apart_RJ /= np.maximum(np.sqrt((apart_RJ**2).mean(0)), 1e-12)  # nothing apart in any exchange stays nothing
    return (apart_RJ.max(1, keepdims=True) >= apart_RJ[0] - 1e-9).mean(0)


def conclusions(result: dict, temperature: str, prompts: int) -> list[str]:
    """What the figures of one temperature say, a sentence each."""
    rows, tested, server = result["temperatures"][temperature], result["tested"][temperature], result["server"]
    levels = [int(name) for name in rows if name.isdigit()]
    found = [f"only {prompts} conversations: never more at a time, whatever the concurrency"] * (max(levels) > prompts)
    if OURS not in rows:
        return [*found, "no drafter= was named: the server's figures stand alone"]
    needed = result["prompts"]["positions"] + margin(server["slots"])
    if server["kind"] == Vllm.kind and server["positions"] and server["positions"] < needed:
        found.append(
            f"the server has {server['positions']} positions and cuts drafts short near them: with fewer than {needed} "
            "(--max-model-len) it accepts less than the drafter is worth"
        )
    mine = len(rows[OURS]["joint"])
    if mine < server["slots"]:
        found.append(f"the server drafts {server['slots']} tokens a round and this drafter {mine}: compare positions, not tau")
    for name, row in rows.items():
        if "equal" in row and row["equal"] < row["requests"]:
            found.append(
                f"{row['equal']} of {row['requests']} outputs at concurrency {name} equal ours, token for token; the others part "
                "where the two compute otherwise (another dtype, other kernels), or the server is at fault"
            )
        if row.get("sampling_p", 1) < HONEST:
            found.append(
                f"the outputs at concurrency {name} are no samples of the target (p < {HONEST}): the server samples wrongly, "
                "whoever drafts, and its acceptance at this temperature says nothing of the drafter"
            )
    if not tested:
        return [*found, "not tested: each prompt's counts are known at concurrency 1 alone (server.concurrency=[1,...])"]
    apart = [one for one in tested if one["p"] < SURE]
    for one in apart:
        p = f"p = {one['p']:.3f}" if one["p"] >= 0.001 else "p < 0.001"
        found.append(f"position {one['position']}: server {one['server']:.2f}, ours {one['ours']:.2f} ({p})")
    if apart and rows["1"].get("sampling_p", 1) >= HONEST:
        found.append("the server does not run this drafter as it was trained")
    elif not apart:
        found.append(f"no position differs beyond chance (p >= {SURE}, exchanges within prompts)")
    if not apart and 2 / 2**prompts >= SURE:
        found.append(f"{prompts} prompts are too few for this test to find any difference")
    return found


# For people.


def rows(result: dict) -> list[list[str]]:
    """The table under `HEADS`."""
    lines = []
    for temperature, found in result["temperatures"].items():
        for who, row in found.items():
            name = "ours, one at a time" if who == OURS else f"{result['server']['kind']}, {who} at a time"
            cells = [temperature, name, f"{row['tau_micro']:.3f}", " ".join(f"{one:.3f}" for one in row["joint"])]
            cells += [f"{row['ttft_ms'][which]:,.0f}" for which in ("median", "p90")]
            lines.append([*cells, f"{row['tokens_per_s']:,.0f}", _outputs(row)])
    return lines


def _outputs(row: dict) -> str:
    """A row's outputs in a cell: against ours at temperature 0, against the target's distribution above it."""
    if "equal" in row:
        return f"{row['equal']} of {row['requests']} as ours"
    if "sampling_p" in row:
        return f"sampled, p = {row['sampling_p']:.3f}" if row["sampling_p"] >= HONEST else f"NO samples, p < {HONEST}"
    return ""


CAPTION = (
    "tau: tokens per verify step; by position: the share of rounds that accepted at least so many tokens. TTFT: until the first "
    "token, in our engine without a network, in the server with it."
)


def print_table(result: dict) -> None:
    table = Table(title=f"{result['prompts']['count']} prompts, ours and the server's", caption=CAPTION)
    for number, head in enumerate(HEADS):
        table.add_column(head, justify="left" if number in WORDS else "right")
    for row in rows(result):
        table.add_row(*map(escape, row), style="bold" if row[1].startswith(OURS) else None)
    Console(width=140).print(table)
    for temperature, said in result["said"].items():
        for sentence in said:
            print(f"T = {temperature}: {sentence}")


def write_page(out: Path, result: dict) -> None:
    """`served.html`, whole or not there at all."""
    server, temperatures = result["server"], result["temperatures"]
    tested = [
        [t, str(one["position"]), f"{one['ours']:.3f}", f"{one['server']:.3f}", f"{one['p']:.4f}"]
        for t, found in result["tested"].items()
        for one in found
    ]
    heads = ("T", "position", "ours", "server", "p")
    hidden = ("temperatures", "tested", "said")
    settings = flatten({name: value for name, value in result.items() if name not in hidden})
    sections = {
        "Ours and the server's": page.table(HEADS, rows(result), strong=lambda row: row[1].startswith(OURS), text=WORDS)
        + page.note(CAPTION)
        + "".join(page.note(f"T = {t}: {one}") for t, said in result["said"].items() for one in said),
        "Acceptance by position": page.figure(_draw(temperatures, server["kind"]), "The share of rounds that accepted so many."),
        "Position by position": page.table(heads, tested)
        + page.note(f"p: {EXCHANGES:,} exchanges within prompts at concurrency 1, corrected for the number of positions.")
        if tested
        else "",
        "What was judged": page.facts(settings),
    }
    title = f"{server['kind']} {server['version']}: {server['model']}"
    write_text(out / "served.html", page.document("A drafter in a server", title, sections))


def _draw(temperatures: dict, kind: str) -> str:
    def draw(axes) -> None:
        for axis, (temperature, found) in zip(axes, temperatures.items()):
            for who, row in found.items():
                look = {"linewidth": 2.4} if who == OURS else {"linestyle": "--", "linewidth": 1.2}
                label = OURS if who == OURS else f"{kind}, {who} at a time"
                axis.plot(range(1, 1 + len(row["joint"])), row["joint"], marker="o", label=label, **look)
            axis.set(xlabel="position of a draft", ylabel="accepted", title=f"T = {temperature}", ylim=(0, 1.02))
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return page.svg("acceptance by position", len(temperatures), 3.4, draw)
