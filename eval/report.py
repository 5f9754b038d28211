"""The report: JSON for machines, a table and a picture for people; of one run, and of a sweep.

python eval/report.py SWEEP [SWEEP ...]     one table and one picture of everything that was judged in these folders
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from data_prep.cache.manifest import write_text


def write_json(out: Path, report: dict, name: str = "report.json") -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / name, json.dumps(report, indent=1))


def print_table(report: dict) -> None:
    """One row a drafter and temperature: the trained one first, then what it has to beat. Milliseconds are a round's."""
    prompts = report["prompts"]
    table = Table(title=f"tau = tokens per verify step; {prompts['count']} unseen prompts of {prompts['tokens']} tokens")
    for column in ("T", "drafter", "tau", "acceptance by slot", "draft ms", "verify ms", "tokens/s", "speedup", "lossless"):
        table.add_column(column, justify="left" if column in ("drafter", "acceptance by slot") else "right")
    for temperature, figures in report["temperatures"].items():
        baseline = {"tau_micro": 1.0, "conditional": [], "tokens_per_s": figures["baseline_tokens_per_s"]}
        baseline["round_ms"] = figures["baseline_round_ms"]
        for name, row in {"trained": figures, **figures["controls"], "none (baseline)": baseline}.items():
            trained = name == "trained"
            table.add_row(
                temperature if trained else "",
                name.replace("_", " "),
                f"{row['tau_micro']:.2f}",
                " ".join(f"{c:.2f}" for c in row["conditional"]),
                f"{row['round_ms']['draft']:.1f}",
                f"{row['round_ms']['verify']:.1f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / baseline['tokens_per_s']:.2f}x",
                ("yes" if row["lossless"] else "NO") if trained else "",
                style="bold" if trained else None,
                end_section=name.startswith("none"),
            )
    Console(width=120).print(table)


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
        rows = {"trained": figures, **figures["controls"]}
        labels += [f"{name.replace('_', ' ')}, T = {temperature}" for name in rows] + [f"baseline, T = {temperature}"]
        speeds += [r["tokens_per_s"] for r in rows.values()] + [figures["baseline_tokens_per_s"]]
        taus += [r["tau_micro"] for r in rows.values()] + [1.0]
    colours = ["C2" if label.startswith("trained") else "0.4" if label.startswith("baseline") else "0.75" for label in labels]
    bars = right.barh(labels, speeds, color=colours)
    right.bar_label(bars, [f"tau {t:.2f}" for t in taus], padding=3, fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="tokens/s, decode only", title="Speed")
    figure.savefig(out / "report.tmp.png", dpi=120)
    plt.close(figure)
    (out / "report.tmp.png").replace(out / "report.png")


# A sweep: many reports -> acceptance and speed against budget and context.

FULL = "full"


def gather(folders: list[Path], out: Path) -> None:
    """`sweep.md` and `sweep.png` in `out`, of every report.json and score.json under `folders`. Drafters that differ in their seed
    alone are averaged, with the least and the greatest."""
    decoded, scored = (
        [json.loads(p.read_text()) for f in folders for p in sorted(f.rglob(n))] for n in ("report.json", "score.json")
    )
    found = {"decoded": _cells(decoded, _of_decoding), "teacher-forced": _cells(scored, _of_score)}
    found = {name: cells for name, cells in found.items() if cells}
    if not found:
        return
    tables = [_table(name, cells) for name, cells in found.items()]
    write_text(out / "sweep.md", "\n\n".join(_markdown(table) for table in tables) + "\n")
    for table in tables:
        Console(width=150).print(table)
    _draw_sweep(out / "sweep.png", found)
    print(f"sweep: {out / 'sweep.md'}, {out / 'sweep.png'}")


def _name(report: dict) -> str:
    """What a drafter was trained for."""
    drafter = report["drafter"]
    budgets = drafter["budgets"]
    views = "full view only" if budgets is None else f"{budgets} alone" if isinstance(budgets, int) else f"multi-view ({budgets})"
    what = f"lm {Path(drafter['lm']).name}" if drafter["lm"] else f"{drafter['objective']} {drafter['reuse']}"
    return f"{what}, {views}"


def _of_decoding(report: dict) -> dict[str, dict]:
    """Figures of the drafter and of its controls."""
    rows: dict[str, dict] = defaultdict(dict)
    for temperature, figures in report["temperatures"].items():
        own = {_name(report): figures, "plain decoding": None, **figures["controls"]}
        for who, one in own.items():
            if one is None or who in ("zero_memory", "shuffled_memory"):
                continue
            rows[who][f"tau T={temperature}"] = one["tau_micro"]
            rows[who][f"speedup T={temperature}"] = one["tokens_per_s"] / figures["baseline_tokens_per_s"]
            rows[who][f"draft ms T={temperature}"] = one["round_ms"]["draft"]
    rows[_name(report)] |= {"KV read MiB": report["drafter_kv"]["read_mib"], "KV kept MiB": report["drafter_kv"]["kept_mib"]}
    return rows


def _of_score(report: dict) -> dict[str, dict]:
    return {_name(report): {"tau T=1": report["sampled"]["tau"], "tau T=0": report["greedy"]["tau"], "KL": report["kl"]}}


def _cells(reports: list[dict], figures_of) -> dict[tuple, dict[str, list[float]]]:
    """{(context, drafter, view, budget): {figure: one number a report}}."""
    cells: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for report in reports:
        budget = report["view"]["budget"] or FULL
        for who, figures in figures_of(report).items():
            for name, value in figures.items():
                cells[report["context"] or 0, who.replace("_", " "), budget][name].append(value)
    return dict(
        sorted(cells.items(), key=lambda item: (*item[0][:2], item[0][2] == FULL, item[0][2] if item[0][2] != FULL else 0))
    )


def _table(title: str, cells: dict) -> Table:
    columns = sorted({name for figures in cells.values() for name in figures}, key=lambda n: (n.startswith("KV"), "KL" == n, n))
    table = Table(title=title)
    for column in ("context", "drafter", "budget", *columns):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    for (context, who, budget), figures in cells.items():
        table.add_row(str(context or "any"), who, str(budget), *(_spread(figures.get(column)) for column in columns))
    return table


def _spread(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{mean(values):.2f}" + f" [{min(values):.2f}, {max(values):.2f}]" * (len(values) > 1)


def _markdown(table: Table) -> str:
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *rows = (" | ".join(row) for row in zip(*columns))
    return "\n".join([f"{table.title}:", "", f"| {head} |", "|" + " --- |" * len(columns), *(f"| {row} |" for row in rows)])


def _draw_sweep(path: Path, found: dict[str, dict]) -> None:
    """A row a figure, a column a context; each drafter a line over budgets. Prompt lookup knows no budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = [(kind, figure) for kind in found for figure in ("tau T=1", "tau T=0", "speedup T=1", "speedup T=0")]
    wanted = [(kind, figure) for kind, figure in wanted if any(figure in cell for cell in found[kind].values())]
    contexts = sorted({key[0] for cells in found.values() for key in cells})
    size = (4.5 * len(contexts), 3.2 * len(wanted))
    figure, axes = plt.subplots(len(wanted), len(contexts), figsize=size, layout="constrained", squeeze=False)
    for row, (kind, name) in zip(axes, wanted):
        budgets = list(
            dict.fromkeys(key[2] for key in sorted(found[kind], key=lambda k: (k[2] == FULL, k[2] if k[2] != FULL else 0)))
        )
        for axis, context in zip(row, contexts):
            lines: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
            for (there, who, budget), cell in found[kind].items():
                if there == context and name in cell:
                    lines[who].append((budgets.index(budget), cell[name]))
            for who, points in lines.items():
                x, y = [p[0] for p in points], [mean(p[1]) for p in points]
                if who == "prompt lookup":
                    axis.axhline(mean(y), color="0.5", linestyle=":", label=who)
                    continue
                error = [[m - min(p[1]) for m, p in zip(y, points)], [max(p[1]) - m for m, p in zip(y, points)]]
                axis.errorbar(x, y, error, fmt="s--" if who == "untrained" else "o-", capsize=2, markersize=4, label=who)
            axis.set_xticks(range(len(budgets)), list(map(str, budgets)))
            axis.set(title=f"{kind}, {f'context {context}' if context else 'any context'}", xlabel="budget", ylabel=name)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


if __name__ == "__main__":
    gather([Path(word) for word in sys.argv[1:]], Path(sys.argv[1]))
