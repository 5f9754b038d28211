"""Ours and the server's: figures, whether they differ beyond chance, table and page.

tau and acceptance are of whole rounds on both sides: joint_j, the share of rounds that accepted at least j tokens, is what
servers count by position.

Whether they differ is tested at concurrency 1, where the counts of each prompt are known on both sides. The drafts of one request
depend on one another, so that a test of two binomials would find differences that are none. Here the two are exchanged within
prompts at random: if the server runs this drafter, it is a matter of chance which of the two a prompt's counts came from. p is
the share of exchanges after which the two lie apart at least as far, corrected for the number of positions.

Shapes: P prompts, or conversations with all of their turns; R exchanges; J positions, C = 1 + J counts (`counters.py`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.files import write_text
from data_prep.cache.manifest import flatten
from eval.reports import charts, page
from eval.serving.servers import Answer, Vllm, margin

EXCHANGES = 20_000
SURE = 0.01  # a corrected p below it is a difference beyond chance
HONEST = 0.001  # sampled outputs that are less likely than this are no samples of the target (lossless.py has the same)
HEADS = ("T", "who", "tau", "accepted by position", "TTFT ms", "90% within", "tokens/s", "speedup", "outputs")
WORDS = [0, 1, 3, 8]  # columns of words
OURS = "ours"
PLAIN = "plain, "  # before the concurrency at which a server was asked that does not draft


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
    mine = own.by_prompt()
    other = theirs.by_prompt()
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
    # Row 0 exchanges nothing: it is what was seen.
    swap_RP[0] = 0
    both_C = (a_PC + b_PC).sum(0)
    first_RC = a_PC.sum(0) + swap_RP @ (b_PC - a_PC)
    apart_RJ = np.abs(joint(first_RC) - joint(both_C - first_RC))
    # Positions late in a draft are seldom reached and vary more. In their own deviations all can be compared.
    apart_RJ /= np.maximum(np.sqrt((apart_RJ**2).mean(0)), 1e-12)  # nothing apart in any exchange stays nothing
    return (apart_RJ.max(1, keepdims=True) >= apart_RJ[0] - 1e-9).mean(0)


def conclusions(result: dict, temperature: str, prompts: int, why_not: str | None = None) -> list[str]:
    """What the figures of one temperature say, a sentence each. `why_not`: why acceptance was not compared, or
    why there are no figures of ours."""
    rows = result["temperatures"][temperature]
    tested = result["tested"][temperature]
    server = result["server"]
    levels = [int(name) for name in rows if name.isdigit()]
    found = [f"only {prompts} conversations: never more at a time, whatever the concurrency"] * (max(levels) > prompts)
    if OURS not in rows:
        return [*found, why_not or "no drafter= was named: the server's figures stand alone"]
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
                f"{row['equal']} of {row['requests']} outputs ({name} at a time) equal ours, token for token; the others part "
                "where the two compute otherwise (another dtype, other kernels), or the server is at fault"
            )
        if row.get("sampling_p", 1) < HONEST:
            found.append(
                f"the outputs ({name} at a time) are no samples of the target (p < {HONEST}): the server samples wrongly, "
                "whoever drafts, and its acceptance at this temperature says nothing of the drafter"
            )
    if not tested:
        alone = "not tested: each prompt's counts are known at concurrency 1 alone (server.concurrency=[1,...])"
        return [*found, why_not or alone]
    # Greedy decoding leaves no chance, so that counts are compared before any test.
    if "equal" in rows["1"]:
        found += _counts(rows["1"], rows[OURS])
    apart = [one for one in tested if one["p"] < SURE]
    for one in apart:
        p = f"p = {one['p']:.3f}" if one["p"] >= 0.001 else "p < 0.001"
        found.append(f"position {one['position']}: server {one['server']:.2f}, ours {one['ours']:.2f} ({p})")
    if apart and rows["1"].get("sampling_p", 1) >= HONEST:
        found.append("the server does not run this drafter as it was trained")
        found += [f"known of it: {note}" for note in server.get("notes", [])]
    elif not apart:
        found.append(f"no position differs beyond chance (p >= {SURE}, exchanges within prompts)")
    if not apart and 2 / 2**prompts >= SURE:
        found.append(f"{prompts} prompts are too few for this test to find any difference")
    return found


def _counts(theirs: dict, mine: dict) -> list[str]:
    """Greedy outputs that are equal leave nothing to chance: what their counts say."""
    counts = theirs["per_prompt_count"]
    other = mine["per_prompt_count"]
    slots = min(len(theirs["joint"]), len(mine["joint"]))
    differ = sum(one[: 1 + slots] != other[id][: 1 + slots] for id, one in counts.items() if id in other)
    if theirs["equal"] < theirs["requests"]:
        return []
    if not differ:
        return ["the counts of every prompt are exactly ours"]
    return [f"the counts of {differ} of {len(counts)} prompts differ from ours, with equal outputs: rounding, or other drafts"]


# For people.


def rows(result: dict) -> list[list[str]]:
    """The table under `HEADS`."""
    lines = []
    for temperature, found in result["temperatures"].items():
        for who, row in found.items():
            name = "ours, one at a time" if who == OURS else f"{result['server']['kind']}, {who} at a time"
            plain = found.get(PLAIN + who)
            cells = [temperature, name, f"{row['tau_micro']:.3f}", " ".join(f"{one:.3f}" for one in row["joint"])]
            cells += [f"{row['ttft_ms'][which]:,.0f}" for which in ("median", "p90")]
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['tokens_per_s'] / plain['tokens_per_s']:.2f}x" if plain else ""]
            lines.append([*cells, _outputs(row)])
    return lines


def _outputs(row: dict) -> str:
    """A row's outputs in a cell: against ours at temperature 0, against the target's distribution above it."""
    if "equal" in row:
        return f"{row['equal']} of {row['requests']} as ours"
    if "sampling_p" in row:
        return f"sampled, p = {row['sampling_p']:.3f}" if row["sampling_p"] >= HONEST else f"NO samples, p < {HONEST}"
    return ""


CAPTION = (
    "tau: tokens per round; by position: the share of rounds that accepted at least that many tokens. TTFT: until the first "
    "token, in our engine without a network, in the server with it. Speedup: against the same server without a drafter, as many "
    "at a time."
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
    server = result["server"]
    temperatures = result["temperatures"]
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
                if who.startswith(PLAIN):
                    continue
                look = {"linewidth": 2.4} if who == OURS else {"linestyle": "--", "linewidth": 1.2}
                label = OURS if who == OURS else f"{kind}, {who} at a time"
                axis.plot(range(1, 1 + len(row["joint"])), row["joint"], marker="o", label=label, **look)
            axis.set(xlabel="position of a draft", ylabel="accepted", title=f"T = {temperature}", ylim=(0, 1.02))
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return charts.svg("acceptance by position", len(temperatures), 3.4, draw)
