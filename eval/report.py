"""The report: JSON for machines, a table and a picture for people."""

import json
from pathlib import Path

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
