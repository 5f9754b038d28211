"""The report: JSON for machines, a table and a picture for people; of one run, and of a sweep.

`python eval/reports/report.py SWEEP [SWEEP ...]`: one table and one picture of everything that was judged in these folders.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.table import Table

from common.cli import fail
from common.errors import UserError
from common.files import write_text
from common.progress import Progress
from eval.reports import page
from train.views.recipe import FULL


def write_json(out: Path, report: dict, name: str = "report.json") -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / name, json.dumps(report, indent=1))


def progress() -> Progress:
    """Prompts at a temperature, with a running tau: `update(task, advance=1, tau=...)`."""
    return Progress("prompts")


def print_table(report: dict) -> None:
    """One row a drafter and temperature: the trained one first, then what it has to beat. Milliseconds are a round's."""
    prompts, view, kv = report["prompts"], report["view"], report["drafter_kv"]
    asked = "unseen prompts" if prompts["suite"] == "heldout" else f"prompts of {prompts['suite']}"
    table = Table(
        title=f"tau = tokens per verify step; {prompts['count']} {asked}, {prompts['tokens']} tokens on average",
        caption=(f"view {view['kind']}, {view['budget']} positions" if view["budget"] else "everything visible")
        + f"; K/V that a round reads: {kv['read_mib']:.2f} MiB, that the drafter keeps: {kv['kept_mib']:.2f} MiB",
    )
    for head in page.HEADS:
        table.add_column(head, justify="left" if head in page.TEXT else "right")
    for row in page.rows(report):
        table.add_row(*row, style="bold" if row[1] == "trained" else None, end_section=row[1] == page.BASELINE)
    Console(width=120).print(table)
    if apart := page.parts(report):
        table = Table(title="tau and speedup apart", caption=page.shared_seconds(report) or None)
        for head in page.PART_HEADS:
            table.add_column(head, justify="left" if head in page.TEXT else "right")
        for row, following in zip(apart, [*apart[1:], [""]]):
            table.add_row(*row, end_section=bool(following[0]))
        Console(width=120).print(table)
    for temperature, figures in report["temperatures"].items():
        for text in (f"lossless: {page.lossless_line(figures)}", *page.partly(figures)):
            print(f"T = {temperature}: {text}")


def draw(out: Path, report: dict) -> None:
    """`report.png`: conditional acceptance per slot, and speed against the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for temperature, figures in report["temperatures"].items():
        slots = range(1, len(figures["conditional"]) + 1)
        (line,) = left.plot(slots, figures["conditional"], "o-", label=f"conditional, T = {temperature}")
        left.plot(slots, figures["joint"], "o--", color=line.get_color(), alpha=0.6, label=f"joint, T = {temperature}")
    left.set(
        xlabel="drafted token of a round",
        ylabel="acceptance",
        ylim=(0, 1),
        title="Acceptance by slot",
        xticks=range(1, 1 + max(len(f["joint"]) for f in report["temperatures"].values())),
    )
    left.legend(fontsize=8)
    labels, speeds, taus = [], [], []
    for temperature, figures in report["temperatures"].items():
        rows = page.contenders(figures)
        labels += [f"{name.replace('_', ' ')}, T = {temperature}" for name in rows]
        speeds += [r["tokens_per_s"] for r in rows.values()]
        taus += [r["tau_micro"] for r in rows.values()]
    colours = ["C2" if label.startswith("trained") else "0.4" if label.startswith("none") else "0.75" for label in labels]
    bars = right.barh(labels, speeds, color=colours)
    right.bar_label(bars, [f"tau {t:.2f}" for t in taus], padding=3, fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="tokens/s, decode only", title="Speed")
    figure.savefig(out / "report.tmp.png", dpi=120)
    plt.close(figure)
    (out / "report.tmp.png").replace(out / "report.png")


# A sweep: many reports -> acceptance and speed against budget and context.

FIGURES = ("tau T", "speedup T", "draft ms T", "KV ", "teacher-forced tau", "teacher-forced KL")
DRAWN = FIGURES[:2] + FIGURES[4:5]
CONTROLS = UNTRAINED, LOOKUP = "untrained", "prompt lookup"
NAMED = ("budget", "budgets", "objective", "reuse", "lm", "seed", "path", "parameters", "trained_view")  # or no matter
Cells = dict[tuple[str, int, str], dict[int, list[float]]]  # {(figure, context, drafter): {budget: a number of each report}}


def gather(folders: list[Path], out: Path) -> None:
    """`sweep.md`, `sweep.png` and `sweep.html` in `out`, of every report.json and score.json under `folders`. What differs among
    them stands in a drafter's name, its seed aside: seeds are averaged, with the least and the greatest beside.

    Raises:
        UserError: a folder has no report, or one of an earlier release.
    """
    figures_of = {"report.json": _of_decoding, "score.json": _of_score}
    found_in = {folder: [path for name in figures_of for path in folder.rglob(name)] for folder in folders}
    if empty := [folder for folder, held in found_in.items() if not held]:
        raise UserError(f"{empty[0]}: no report of a drafter is there")
    paths = sorted({path for held in found_in.values() for path in held})
    reports = [(path, json.loads(path.read_text())) for path in paths]
    if old := [path for path, report in reports if "view" not in report]:
        raise UserError(f"{old[0]} was made by an earlier release; judge that drafter again")
    facts = [{**report["view"], **report["drafter"], "suite": _suite(report)} for _, report in reports]
    differing = [key for key in dict.fromkeys(k for f in facts for k in f) if key not in NAMED]
    differing = [key for key in differing if len({str(f.get(key)) for f in facts}) > 1]
    found = []
    for (path, report), fact in zip(reports, facts):
        suffix = {key: f", {key} {fact[key]}" for key in differing if fact.get(key) is not None}
        place = report["context"] or 0, report["view"]["budget"] or FULL, fact.get("seed"), _run_of(fact["path"])
        for who, figure, value in figures_of[path.name](report):
            # Prompt lookup has no view.
            shown = (text for key, text in suffix.items() if who != LOOKUP or key not in report["view"])
            found.append((who + "".join(shown), figure, value, *place))
    # Two of one seed, alike in all that reports say, still differ in something: how they were trained.
    seeds = Counter((who, figure, context, budget, seed) for who, figure, _, context, budget, seed, _ in found)
    unclear = {key[0] for key, count in seeds.items() if count > 1 and not key[0].startswith(CONTROLS)}
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for who, figure, value, context, budget, _, run in found:
        cells[figure, context, f"{who} ({run})" if who in unclear else who][budget].append(value)
    numbered = lambda who: re.sub(r"\d+", lambda digits: digits[0].zfill(9), who)
    order = lambda key: ([key[0].startswith(name) for name in FIGURES].index(True), *key[:2], numbered(key[2]))
    cells = {key: cells[key] for key in sorted(cells, key=order)}
    budgets = sorted({budget for row in cells.values() for budget in row})
    heads = ["", "context", "drafter", *map(_budget, budgets)]
    rows = {key: [key[0], str(key[1] or "any"), key[2], *(_spread(row.get(b)) for b in budgets)] for key, row in cells.items()}
    lines = [f"| {' | '.join(row)} |\n" for row in [heads, ["---"] * len(heads), *rows.values()]]
    write_text(out / "sweep.md", "".join(lines))
    table, following = Table(title="against the budget of memory positions"), [*list(cells)[1:], ("",)]
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "drafter") else "right")
    for key, after in zip(cells, following):
        table.add_row(*(cell.split(" [")[0] for cell in rows[key]), end_section=key[:2] != after[:2])
    Console(width=140).print(table)
    _draw_sweep(out / "sweep.png", cells, budgets)
    page.write_sweep(out, heads, list(rows.values()), out / "sweep.png")
    print(f"sweep: {out / 'sweep.md'}, {out / 'sweep.png'}, {out / 'sweep.html'}")


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
    what, budgets = f"{drafter['objective']} {drafter['reuse']}", drafter["budgets"]
    if drafter["lm"]:
        what = f"{Path(drafter['lm']).name}"
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


def _budget(budget: int) -> str:
    return "full" if budget == FULL else str(budget)


def _spread(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{mean(values):.2f}" + f" [{min(values):.2f}, {max(values):.2f}]" * (len(values) > 1)


def _draw_sweep(path: Path, cells: Cells, budgets: list[int]) -> None:
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
            for who, values in ((key[2], row) for key, row in cells.items() if key[:2] == (name, context)):
                x, middle = [budgets.index(b) for b in sorted(values)], [mean(values[b]) for b in sorted(values)]
                if who.startswith(LOOKUP):
                    axis.axhline(mean(middle), color="0.5", linestyle=":", label=who)
                    continue
                low, high = ([pick(values[b]) for b in sorted(values)] for pick in (min, max))
                error = [[m - one for m, one in zip(middle, low)], [one - m for m, one in zip(middle, high)]]
                axis.errorbar(
                    x, middle, error, fmt="s--" if who.startswith(UNTRAINED) else "o-", capsize=2, markersize=4, label=who
                )
            axis.set_xticks(range(len(budgets)), map(_budget, budgets))
            axis.set(title=f"context {context or 'any'}", xlabel="budget", ylabel=name)
            axis.grid(alpha=0.3)
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


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
