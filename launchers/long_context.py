"""Lossless long context: who drafts how much faster than plain decoding, at which context.

    python launchers/long_context.py judge RUNS --drafters NAME=FOLDER,... [key=value ...]    reports, each beside plain decoding
    python launchers/long_context.py table RUNS                          RUNS/long_context.md and RUNS/long_context.png

Each drafter is judged at --contexts 1024,4096,8000: seeing everything, under the views of --budgets 256,1024, and with SpecPV
(verify=partial_audited, T = 0); the first one beside prompt lookup. --jobs 1 (at a time). Overrides go to eval/main.py: target,
suite, verify.retrieval, temperatures. Without suite=, prompts are held-out documents, joined.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from compare import ROOT, each  # noqa: E402
from compared import panels  # noqa: E402

from eval.reports import page  # noqa: E402

PLAIN = "no drafter"
LOOKUP = "prompt lookup"
SPECPV = ["verify=partial_audited", "temperatures=[0]", "controls=false"]


def judge(o) -> None:
    """Three processes at most a drafter: in each a sweep over contexts, and over budgets."""
    swept = f"suite.prompt_tokens={','.join(map(str, o.contexts))}"
    work = []
    for place, (name, folder) in enumerate(o.drafters.items()):
        # Prompt lookup is no drafter's own: it is judged once, and with it the other controls.
        kinds = {"full": ["view.budget=0", f"controls={str(place == 0).lower()}"], "specpv": SPECPV}
        if o.budgets:
            kinds["views"] = [f"view.budget={','.join(map(str, o.budgets))}", "controls=false"]
        for kind, own in kinds.items():
            out = o.runs / name / kind
            words = [str(ROOT / "eval/main.py"), "-m", f"drafter={folder}", "data.long=join", *o.overrides, swept, *own]
            work.append((f"{name}, {kind}", [*words, f"out={out}"], out.with_suffix(".log"), out))
    each(o.jobs, work)


class Row(NamedTuple):
    """One contender at one context. `at`: its figures by temperature, with its `speed` beside plain decoding."""

    context: int
    who: str
    at: dict[str, dict]
    peak_gib: float | None


def rows_of(folder: Path) -> list[Row]:
    """Of every report below `folder`, by context: those that need no drafter first, then each drafter, seeing everything, under
    budgets and with SpecPV."""
    found = {}
    for path in folder.rglob("report.json"):
        name = path.relative_to(folder).parts[0]
        report = json.loads(path.read_text())
        context = report["context"]
        budget = report["view"]["budget"]
        audited = report["verify"] != "full"
        how = "SpecPV, audited" if audited else f"{budget} positions" if budget else "full view"
        contenders = {t: page.contenders(figures) for t, figures in report["temperatures"].items()}

        def row(who: str, label: str, peak_gib: float | None = None) -> Row:
            at = {t: everyone[who] for t, everyone in contenders.items()}
            speeds = {t: one["tokens_per_s"] / contenders[t][page.BASELINE]["tokens_per_s"] for t, one in at.items()}
            return Row(context, label, {t: one | {"speed": speeds[t]} for t, one in at.items()}, peak_gib)

        found[context, 2, name, audited, budget] = row("trained", f"{name}, {how}", report["peak_gib"])
        if all("prompt_lookup" in everyone for everyone in contenders.values()):
            found[context, 0] = row(page.BASELINE, PLAIN)
            found[context, 1] = row("prompt_lookup", LOOKUP)
    return [found[key] for key in sorted(found)]


def table(o) -> None:
    rows = rows_of(o.runs)
    if not rows:
        sys.exit(f"error: {o.runs} has no report; say `judge` first")
    temperatures = sorted({t for row in rows for t in row.at}, key=float)
    heads = ["context", "who drafts"]
    heads += [f"{what}, T={t}" for t in temperatures for what in ("tau", "speed", "tokens/s", "draft / verify ms", "lossless")]
    lines = [[*heads, "peak GiB"], ["---"] * (len(heads) + 1)]
    for row in rows:
        cells = [cell for t in temperatures for cell in _cells(row.at.get(t))]
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        lines.append([f"{row.context:,}", row.who, *cells, peak])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = "The peak is that of a report: plain decoding, and where prompt lookup was judged the other controls, are in it."
    (o.runs / "long_context.md").write_text(f"{text}\n\n{note}\n")
    print(text, note, sep="\n\n")
    draw(rows, temperatures, o.runs / "long_context.png")


def _cells(one: dict | None) -> list[str]:
    """A contender's at one temperature; plain decoding and prompt lookup are not judged, and audits are of T = 0 alone."""
    if one is None:
        return [""] * 5
    ms = one["round_ms"]
    verdict = page.lossless(one) if "lossless" in one else ""
    spent = f"{ms['draft']:.1f} / {ms['verify']:.1f}"
    return [f"{one['tau_micro']:.2f}", f"**{one['speed']:.2f}x**", f"{one['tokens_per_s']:.0f}", spent, verdict]


def draw(rows: list[Row], temperatures: list[str], path: Path) -> None:
    """A panel for each temperature, a line for each contender: speed against context."""
    contexts = sorted({row.context for row in rows})
    size = (4.5 * len(temperatures) + 3, 4)
    figure, axes = panels(len(temperatures), size, sharey=True)
    for axis, t in zip(axes, temperatures):
        for who in dict.fromkeys(row.who for row in rows):
            points = [(contexts.index(row.context), row.at[t]["speed"]) for row in rows if row.who == who and t in row.at]
            if points:
                style = {PLAIN: "k:", LOOKUP: "s--"}.get(who, "o-")
                axis.plot(*zip(*points), style, markersize=4, label=who)
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        axis.set(title=f"T = {t}", xlabel="tokens of context", ylabel="speed, plain decoding = 1")
        axis.grid(alpha=0.3)
    # T = 0 has everyone.
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    numbers = lambda text: [int(word) for word in text.split(",") if word]
    named = lambda text: dict(word.split("=", 1) for word in text.split(","))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["judge", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--drafters", type=named, default={}, metavar="NAME=FOLDER,...")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--contexts", type=numbers, default=[1024, 4096, 8000])
    parser.add_argument("--budgets", type=numbers, default=[256, 1024])
    parser.add_argument("overrides", nargs="*")
    o = parser.parse_intermixed_args()
    o.runs = o.runs.absolute()
    if o.stage == "judge" and not (o.drafters and o.contexts):
        parser.error("judge needs --drafters NAME=FOLDER,... and --contexts of one number at least")
    {"judge": judge, "table": table}[o.stage](o)


if __name__ == "__main__":
    main()
