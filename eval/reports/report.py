"""The report of one run: JSON for machines, a table and a picture for people. `page.py` makes its page, `sweep.py` joins many."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.files import write_text
from common.progress import Progress
from eval.reports import page


def write_json(out: Path, report: dict, name: str = "report.json") -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / name, json.dumps(report, indent=1))


def progress() -> Progress:
    """Prompts at a temperature, with a running tau: `update(task, advance=1, tau=...)`."""
    return Progress("prompts")


def print_table(report: dict) -> None:
    """One row a drafter and temperature: the trained one first, then what it has to beat. Milliseconds are a round's."""
    prompts = report["prompts"]
    view = report["view"]
    kv = report["drafter_kv"]
    asked = "unseen prompts" if prompts["suite"] == "heldout" else f"prompts of {prompts['suite']}"
    table = Table(
        title=f"tau = tokens per round; {prompts['count']} {asked}, {prompts['tokens']} tokens on average",
        caption=(f"view {view['kind']}, {view['budget']} positions" if view["budget"] else "everything visible")
        + f"; K/V that a round reads: {page.mib(kv['read_mib'])} MiB, that the drafter keeps: {page.mib(kv['kept_mib'])} MiB",
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
    labels = []
    speeds = []
    taus = []
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
    # Written beside and renamed, so that no half picture stands under the name. It is not synced: it can be drawn again.
    figure.savefig(out / "report.tmp.png", dpi=120)
    plt.close(figure)
    (out / "report.tmp.png").replace(out / "report.png")
