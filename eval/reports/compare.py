"""Reports side by side: `python eval/main.py mode=compare runs=[A,B,C] out=COMPARISON`.

tau and speedup of every run and temperature with 95% intervals, and differences from the first run: percentile bootstrap over
prompts, the same draw of prompts for all runs that were judged on the same ones. The intervals are for other prompts; they know
nothing of other seeds of training (`launchers/compare.py` does), and are rather too narrow below some twenty prompts.

Shapes: P prompts, R resamples.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.cli import git_revision
from common.errors import UserError
from common.files import write_text
from data_prep.cache.manifest import flatten
from eval.reports import charts, page
from eval.reports.read import read_report

CATEGORY_HEADS = ("T", "category", "run", "requests", "tokens", "tau", "speedup")
RESAMPLES = 2000
COUNTED = ("per_prompt", "per_prompt_s", "baseline_per_prompt_s")
HEADS = ("T", "run", "prompts", "lossless", "tau", "speedup", "tau - the first's", "speedup - the first's")


def load(runs: list[str]) -> dict[str, dict]:
    """Folder -> its report.json.

    Raises:
        UserError: fewer than two, no report, one that is damaged or of an earlier release, or reports of different targets.
    """
    if len(set(runs)) < 2:
        raise UserError("mode=compare sets reports side by side: name two different ones or more, runs=[A,B]")
    found = {}
    for run in runs:
        path = Path(run) / "report.json"
        try:
            found[run] = read_report(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"runs: {run} holds no report.json; make one with eval/main.py drafter=... out={run}") from error
    first, *others = found
    target = lambda run: found[run]["target"]["weights_hash"]
    for run in others:
        if target(run) != target(first):
            raise UserError(f"runs: {first} and {run} judged drafters of different targets ({target(first)}, {target(run)})")
    return found


def compare(reports: dict[str, dict], seed: int) -> dict:
    """What compare.json holds. `paired`: a run was judged on the first one's prompts, so that both are resampled alike."""
    first = next(iter(reports))
    temperatures = dict.fromkeys(t for report in reports.values() for t in report["temperatures"])
    found = {"runs": list(reports), "target": reports[first]["target"], "differ": differences(reports), "resamples": RESAMPLES}
    found |= {"seed": seed, "commit": git_revision(), "temperatures": {t: {} for t in temperatures}}
    for temperature, rows in found["temperatures"].items():
        base = None
        for number, (run, report) in enumerate(reports.items()):
            if temperature not in report["temperatures"]:
                continue
            figures = report["temperatures"][temperature]
            counts = counted(figures, _requests(report, figures))
            paired = report["prompts"]["ids"] == reports[first]["prompts"]["ids"]
            value = statistics(counts.sum(0))
            # The same prompts are drawn for both runs where they were judged on the same ones. What makes a prompt easy or hard
            # then leaves the difference.
            drawn = statistics(resampled(counts, seed, 0 if paired else number))
            rows[run] = {"prompts": len(counts), "paired": paired, **_with_interval("", value, drawn)}
            rows[run] |= {"conditional": figures["conditional"], "lossless": page.lossless(figures)}
            rows[run] |= {"by_category": figures.get("by_category", {})}
            if number == 0:
                base = value, drawn
            elif base is not None:
                rows[run] |= _with_interval("_difference", value - base[0], drawn - base[1])
    return found


def _requests(report: dict, figures: dict) -> list[str]:
    """The prompt, or conversation, that each request of a temperature belongs to."""
    return figures.get("per_prompt_id") or report["prompts"]["ids"]


def counted(figures: dict, requests: list[str]) -> np.ndarray:
    """[P, 6], for each prompt, or conversation with all of its turns: tokens emitted by rounds, rounds; output
    tokens, seconds; the baseline's output tokens, its seconds."""
    each = np.hstack([np.array(figures[name], float) for name in COUNTED])
    place = {}
    found = np.zeros((len(set(requests)), each.shape[1]))
    # Turns of a conversation are no independent draws: they are counted together.
    np.add.at(found, [place.setdefault(one, len(place)) for one in requests], each)
    return found


def statistics(sums: np.ndarray) -> np.ndarray:
    """[..., 6] sums over prompts -> [..., 2]: tau (micro) and speedup, as in a report."""
    emitted, steps, tokens, seconds, base_tokens, base_seconds = np.moveaxis(sums, -1, 0)
    speed = tokens / np.maximum(seconds, 1e-9)
    base_speed = base_tokens / np.maximum(base_seconds, 1e-9)
    return np.stack([1 + (emitted - steps) / np.maximum(steps, 1), speed / np.maximum(base_speed, 1e-9)], axis=-1)


def resampled(counts: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """[R, 6] sums over P prompts drawn with replacement. Equal seeds, streams and P draw the same prompts."""
    prompts = len(counts)
    # How often each prompt is drawn is all that a sum needs: a product with these counts gives all resamples at once.
    drawn = np.random.default_rng([seed, stream]).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    return drawn.astype(float) @ counts


def _with_interval(suffix: str, value: np.ndarray, drawn: np.ndarray) -> dict:
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {
        name: one
        for i, figure in enumerate(("tau", "speedup"))
        for name, one in ((figure + suffix, float(value[i])), (f"{figure}{suffix}_ci", [float(low[i]), float(high[i])]))
    }


def differences(reports: dict[str, dict]) -> dict[str, list]:
    """Setting -> its value in each run, of those that are not the same in all."""
    said = [flatten({k: v for k, v in page.settings(report).items() if k != "target"}) for report in reports.values()]
    said = [
        one | {f"target.{k}": report["target"].get(k) for k in ("dtype", "device")} for one, report in zip(said, reports.values())
    ]
    keys = dict.fromkeys(key for one in said for key in one)
    return {key: values for key in keys if len(set(map(str, values := [one.get(key) for one in said]))) > 1}


def rows(found: dict) -> list[list[str]]:
    """The table under `HEADS`."""
    lines = []
    for temperature, runs in found["temperatures"].items():
        for run, one in runs.items():
            cells = [temperature, run, str(one["prompts"]), one["lossless"], _said(one, "tau", ""), _said(one, "speedup", "x")]
            if "tau_difference" in one:
                cells += [_said(one, "tau_difference", "", "+"), _said(one, "speedup_difference", "x", "+")]
                cells[2] += "" if one["paired"] else ", unpaired"
            lines.append(cells + [""] * (len(HEADS) - len(cells)))
    return lines


def rows_of_categories(found: dict) -> list[list[str]]:
    """The table under `CATEGORY_HEADS`: of each temperature and category every run that has it."""
    lines = []
    for temperature, runs in found["temperatures"].items():
        for category in dict.fromkeys(category for one in runs.values() for category in one["by_category"]):
            for run, one in runs.items():
                if category in one["by_category"]:
                    part = one["by_category"][category]
                    counts = [f"{part['requests']:,}", f"{part['tokens']:,}"]
                    lines.append([temperature, category, run, *counts, f"{part['tau']:.2f}", f"{part['speedup']:.2f}x"])
    return lines


def _said(one: dict, name: str, unit: str, sign: str = "") -> str:
    low, high = one[f"{name}_ci"]
    return f"{one[name]:{sign}.2f}{unit} [{low:{sign}.2f}, {high:{sign}.2f}]"


def print_table(found: dict) -> None:
    table = Table(
        title=f"95% intervals: bootstrap over prompts, {found['resamples']:,} resamples; differences from the first run"
    )
    for head in HEADS:
        table.add_column(head, justify="left" if head in page.TEXT else "right")
    lines = rows(found)
    for row, following in zip(lines, [*lines[1:], [""]]):
        table.add_row(*map(escape, row), end_section=row[0] != following[0])
    Console(width=140).print(table)
    if lines := rows_of_categories(found):
        table = Table(title="by category")
        for head in CATEGORY_HEADS:
            table.add_column(head, justify="left" if head in page.TEXT else "right")
        for row, following in zip(lines, [*lines[1:], ["", ""]]):
            table.add_row(*map(escape, row), end_section=row[:2] != following[:2])
        Console(width=140).print(table)


def write_page(out: Path, found: dict) -> None:
    """`compare.html`, whole or not there at all."""
    differ = [[key, *(page.flat(value, 120) for value in values)] for key, values in found["differ"].items()]
    sections = {
        "Side by side": page.table(HEADS, rows(found))
        + page.note(
            f"95% intervals by bootstrap over prompts, {found['resamples']:,} resamples; differences from the first run, on the "
            "same draws where the prompts are the same, else marked unpaired. For other prompts; other seeds of training are "
            "not in them, and below some twenty prompts they are rather too narrow."
        ),
        "By category": page.table(CATEGORY_HEADS, lines) if (lines := rows_of_categories(found)) else "",
        "tau and speedup": page.figure(_draw(found), "Bars: 95% intervals. Dotted: no drafter."),
        "Acceptance by slot": page.figure(
            _draw_slots(found), "Conditional: of the rounds whose earlier slots were all accepted."
        ),
        "What else differs": page.table(["setting", *found["runs"]], differ, text=list(range(len(found["runs"]) + 1)))
        if differ
        else "",
    }
    title = f"{len(found['runs'])} runs on {found['target'].get('id', 'one target')}"
    write_text(out / "compare.html", page.document("Drafters side by side", title, sections))


def _draw(found: dict) -> str:
    runs = found["runs"]

    def draw(axes) -> None:
        for axis, figure in zip(axes, ("tau", "speedup")):
            for number, (temperature, of) in enumerate(found["temperatures"].items()):
                at = [runs.index(run) + 0.16 * (number - (len(found["temperatures"]) - 1) / 2) for run in of]
                middle = [one[figure] for one in of.values()]
                error = [[abs(one[figure] - one[f"{figure}_ci"][side]) for one in of.values()] for side in (0, 1)]
                axis.errorbar(middle, at, xerr=error, fmt="o", capsize=3, label=f"T = {temperature}")
            axis.axvline(1, color=charts.INK, linestyle=":", linewidth=0.8)
            axis.set_yticks(range(len(runs)), runs if figure == "tau" else [""] * len(runs))
            axis.set_ylim(len(runs) - 0.5, -0.5)
            axis.set(xlabel=figure + " (no drafter: 1)")
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return charts.svg("tau and speedup with intervals", 2, 1 + 0.5 * len(runs), draw)


def _draw_slots(found: dict) -> str:
    def draw(axes) -> None:
        for axis, (temperature, of) in zip(axes, found["temperatures"].items()):
            for run, one in of.items():
                axis.plot(range(1, len(one["conditional"]) + 1), one["conditional"], "o-", label=run)
            axis.set(xlabel="drafted token of a round", ylabel="acceptance", title=f"T = {temperature}", ylim=(0, 1.02))
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return charts.svg("acceptance by slot of all runs", len(found["temperatures"]), 3.2, draw)
