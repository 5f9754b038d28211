"""Many reports -> acceptance and speed against budget and context, as one table, one picture and one page.

`python eval/reports/sweep.py SWEEP [SWEEP ...] [--out FOLDER]`: of everything that was judged in these folders.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.table import Table

from common.cli import fail
from common.errors import UserError
from common.files import write_text
from eval.reports import page
from eval.reports.read import read_report
from train.views.recipe import FULL

FIGURES = ("tau T", "speedup T", "draft ms T", "KV ", "teacher-forced tau", "teacher-forced KL")
DRAWN = FIGURES[:2] + FIGURES[4:5]
UNTRAINED = "untrained"
LOOKUP = "prompt lookup"
CONTROLS = (UNTRAINED, LOOKUP)
# Keys that never go into a drafter's name: they are in it already, have a place of their own, or do not matter.
NAMED = ("budget", "budgets", "objective", "reuse", "lm", "seed", "path", "parameters", "trained_view")
Key = tuple[str, int, str]  # figure, context, drafter
Cells = dict[Key, dict[int, list[float]]]  # {key: {budget: a number of each report}}


class Point(NamedTuple):
    """One figure of one report."""

    who: str
    figure: str
    value: float
    context: int  # 0: any
    budget: int
    seed: int | None
    run: str


def gather(folders: list[Path], out: Path) -> None:
    """`sweep.md`, `sweep.png` and `sweep.html` in `out`, of every report.json and score.json under `folders`. What differs among
    them stands in a drafter's name, its seed aside: seeds are averaged, with the least and the greatest beside.

    Raises:
        UserError: a folder has no report, or one that is damaged or of an earlier release.
    """
    # 1. Read, and put each number in its cell.
    cells = _cells(_points(_read(folders)))
    budgets = sorted({budget for row in cells.values() for budget in row})

    # 2. One table, as Markdown, in the terminal and in a page.
    heads = ["", "context", "drafter", *map(_budget, budgets)]
    rows = {
        (figure, context, who): [figure, str(context or "any"), who, *(_spread(row.get(budget)) for budget in budgets)]
        for (figure, context, who), row in cells.items()
    }
    lines = [f"| {' | '.join(row)} |\n" for row in [heads, ["---"] * len(heads), *rows.values()]]
    write_text(out / "sweep.md", "".join(lines))
    _print(heads, rows)

    # 3. The picture, and the page, which holds it.
    _draw(out / "sweep.png", cells, budgets)
    page.write_sweep(out, heads, list(rows.values()), out / "sweep.png")
    print(f"sweep: {out / 'sweep.md'}, {out / 'sweep.png'}, {out / 'sweep.html'}")


def _read(folders: list[Path]) -> list[tuple[Path, dict]]:
    """Every report, by path."""
    found_in = {folder: [path for name in FIGURES_OF for path in folder.rglob(name)] for folder in folders}
    if empty := [folder for folder, held in found_in.items() if not held]:
        raise UserError(f"{empty[0]}: no report of a drafter is there")
    paths = sorted({path for held in found_in.values() for path in held})
    return [(path, read_report(path)) for path in paths]


def _points(reports: list[tuple[Path, dict]]) -> list[Point]:
    """All figures of all reports, under names that say what differs among the reports."""
    facts = [{**report["view"], **report["drafter"], "suite": _suite(report)} for _, report in reports]
    said = [key for key in dict.fromkeys(key for fact in facts for key in fact) if key not in NAMED]
    # What has no such layers (a language model of its own) does not differ in them.
    differing = [key for key in said if len({str(fact.get(key)) for fact in facts if fact.get(key) != []}) > 1]
    found = []
    for (path, report), fact in zip(reports, facts):
        suffix = {key: f", {key} {fact[key]}" for key in differing if fact.get(key) not in (None, [])}
        context = report["context"] or 0
        budget = report["view"]["budget"] or FULL
        for who, figure, value in FIGURES_OF[path.name](report):
            # Prompt lookup has no view.
            named = (text for key, text in suffix.items() if who != LOOKUP or key not in report["view"])
            found.append(Point(who + "".join(named), figure, value, context, budget, fact.get("seed"), _run_of(fact["path"])))
    return found


def _cells(points: list[Point]) -> Cells:
    """The points by figure, context and drafter, in the order of the table."""
    # Two of one seed that are alike in all that reports say still differ: in how they were trained. Their runs tell them apart.
    seeds = Counter((p.who, p.figure, p.context, p.budget, p.seed) for p in points)
    unclear = {who for (who, *_), count in seeds.items() if count > 1 and not who.startswith(CONTROLS)}
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for p in points:
        who = f"{p.who} ({p.run})" if p.who in unclear else p.who
        cells[p.figure, p.context, who][p.budget].append(p.value)
    return {key: cells[key] for key in sorted(cells, key=_order)}


def _order(key: Key) -> tuple:
    figure, context, who = key
    place = [figure.startswith(name) for name in FIGURES].index(True)
    # "only 64" comes before "only 256".
    numbered = re.sub(r"\d+", lambda digits: digits[0].zfill(9), who)
    return place, figure, context, numbered


def _run_of(path: str) -> str:
    """The run that a drafter is a checkpoint of."""
    return re.sub(r"/checkpoints/.*", "", path)


def _suite(report: dict) -> str | None:
    """What was decoded, unless it was held-out documents, as a score's are."""
    suite = report.get("prompts", {}).get("suite")
    return None if suite == "heldout" else suite


def _name(report: dict) -> str:
    """What a drafter is and was trained for."""
    drafter = report["drafter"]
    budgets = drafter["budgets"]
    what = Path(drafter["lm"]).name if drafter["lm"] else f"{drafter['objective']} {drafter['reuse']}"
    return f"{what}, " + {None: "full view only", "paper": "paper", "sandwich": "sandwich"}.get(budgets, f"{budgets} only")


def _of_decoding(report: dict) -> Iterator[tuple[str, str, float]]:
    """(who, figure, value) of the drafter and of those that it has to beat."""
    for temperature, figures in report["temperatures"].items():
        others = {name.replace("_", " "): one for name, one in figures["controls"].items() if not name.endswith("memory")}
        for who, one in {_name(report): figures, **others}.items():
            yield who, f"tau T={temperature}", one["tau_micro"]
            yield who, f"speedup T={temperature}", one["tokens_per_s"] / figures["baseline_tokens_per_s"]
            yield who, f"draft ms T={temperature}", one["round_ms"]["draft"]
    for name, value in report["drafter_kv"].items():
        yield _name(report), f"KV {name.removesuffix('_mib')} MiB", value


def _of_score(report: dict) -> Iterator[tuple[str, str, float]]:
    for kind, temperature in (("sampled", 1), ("greedy", 0)):
        yield _name(report), f"teacher-forced tau T={temperature}", report[kind]["tau"]
    yield _name(report), "teacher-forced KL", report["kl"]


FIGURES_OF = {"report.json": _of_decoding, "score.json": _of_score}


def _budget(budget: int) -> str:
    return "full" if budget == FULL else str(budget)


def _spread(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{mean(values):.2f}" + f" [{min(values):.2f}, {max(values):.2f}]" * (len(values) > 1)


def _print(heads: list[str], rows: dict[Key, list[str]]) -> None:
    """The table in the terminal, means alone; a line below each group of one figure and context."""
    table = Table(title="against the budget of memory positions")
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "drafter") else "right")
    following = [*list(rows)[1:], ("",)]
    for (key, row), after in zip(rows.items(), following):
        table.add_row(*(cell.split(" [")[0] for cell in row), end_section=key[:2] != after[:2])
    Console(width=140).print(table)


def _draw(path: Path, cells: Cells, budgets: list[int]) -> None:
    """A row of panels for each figure, a column for each context; a drafter is a line over budgets. Prompt lookup knows none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in dict.fromkeys(key[0] for key in cells) if name.startswith(DRAWN)]
    contexts = sorted({key[1] for key in cells})
    size = (5 * len(contexts) + 2, 3.2 * len(names))
    figure, axes = plt.subplots(len(names), len(contexts), figsize=size, layout="constrained", squeeze=False, sharey="row")
    for row, name in zip(axes, names):
        for axis, context in zip(row, contexts):
            for (of, at, who), values in cells.items():
                if (of, at) == (name, context):
                    _line(axis, who, values, budgets)
            axis.set_xticks(range(len(budgets)), map(_budget, budgets))
            axis.set(title=f"context {context or 'any'}", xlabel="budget", ylabel=name)
            axis.grid(alpha=0.3)
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def _line(axis, who: str, values: dict[int, list[float]], budgets: list[int]) -> None:
    """One drafter's means over budgets, with the least and the greatest of its seeds."""
    of_budget = [values[budget] for budget in sorted(values)]
    middle = [mean(seeds) for seeds in of_budget]
    if who.startswith(LOOKUP):
        axis.axhline(mean(middle), color="0.5", linestyle=":", label=who)
        return
    x = [budgets.index(budget) for budget in sorted(values)]
    below = [m - min(seeds) for m, seeds in zip(middle, of_budget)]
    above = [max(seeds) - m for m, seeds in zip(middle, of_budget)]
    style = "s--" if who.startswith(UNTRAINED) else "o-"
    axis.errorbar(x, middle, [below, above], fmt=style, capsize=2, markersize=4, label=who)


def main() -> None:
    parser = argparse.ArgumentParser(description="One table and one picture of everything that was judged in some folders.")
    parser.add_argument("folders", type=Path, nargs="+", help="reports, searched for in all their subfolders")
    parser.add_argument("--out", type=Path, help="where sweep.md and sweep.png go (the first folder)")
    o = parser.parse_args()
    try:
        gather(o.folders, o.out or o.folders[0])
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
