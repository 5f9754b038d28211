"""A report as one HTML file that opens from disk: text, tables and inline SVG; no script, nothing from any network.

`write_page` is the page of one run; a sweep's and a comparison's are made of the same parts (`document`, `table`, `svg`).
"""

import base64
import io
import re
from html import escape
from pathlib import Path

from common.files import write_text
from data_prep.cache.manifest import flatten

BASELINE = "none (baseline)"
THEIRS = "transformers generate"
HEADS = ("T", "drafter", "tau", "acceptance by slot", "draft ms", "verify ms", "tokens/s", "speedup", "lossless")
PART_HEADS = ("T", "of which", "requests", "tokens", "tau", "speedup", "prompt lookup: tau", "prompt lookup: speedup")
PARTS_OF = ("by_category", "by_positions")
TEXT = {"T", "of which", "category", "drafter", "acceptance by slot", "run", ""}  # columns that are not numbers
INK = "#010203"  # in a picture: the colour of the page's text, light or dark
PARTS = {"draft": "#2a9d6f", "verify": "#4c78c8", "overhead": "#9a9a9a"}
KINDS = {"accepted": "#2a9d6f", "emitted": "#4c78c8", "rejected": "#d64545"}  # of tokens: drafted, the target's own, refused
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); } h3 { margin-bottom: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
.facts th, .facts td { white-space: normal; overflow-wrap: anywhere; } .facts th { white-space: nowrap; vertical-align: top; }
.text, .facts th, .facts td { text-align: left; }
tr.strong td { font-weight: 600; border-top: 2px solid var(--line); }
svg, img { max-width: 100%; height: auto; }
p.note, figcaption { opacity: .75; margin: .4rem 0; } figure { margin: 1rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px; padding: .8rem; }
pre span, .key span { border-radius: 3px; padding: 0 1px; margin-right: 1px; } .prompt { opacity: .6; }
.rejected { text-decoration: line-through #d64545aa; font-size: .85em; }
"""
STYLE += "".join(f".{kind} {{ background: {colour}44; }}\n" for kind, colour in KINDS.items())
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser refuses whatever this page should not need


def contenders(figures: dict) -> dict[str, dict]:
    """Who drafted at one temperature of a report: the trained one first, then what it has to beat."""
    speed, parts = figures["baseline_tokens_per_s"], figures["baseline_round_ms"]
    baseline = {"tau_micro": 1.0, "conditional": [], "tokens_per_s": speed, "round_ms": parts}
    found = {"trained": figures, **figures["controls"]}
    if "transformers_tokens_per_s" in figures:  # whose time is not ours to take apart
        found[THEIRS] = baseline | {"tokens_per_s": figures["transformers_tokens_per_s"], "round_ms": None}
    return found | {BASELINE: baseline}


def rows(report: dict) -> list[list[str]]:
    """A report's table under `HEADS`, for terminal and page."""
    found = []
    for temperature, figures in report["temperatures"].items():
        for name, row in contenders(figures).items():
            trained = name == "trained"
            cells = [
                temperature if trained else "",
                name.replace("_", " "),
                f"{row['tau_micro']:.2f}",
                " ".join(f"{c:.2f}" for c in row["conditional"]),
                *(f"{row['round_ms'][part]:.1f}" if row["round_ms"] else "" for part in ("draft", "verify")),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / figures['baseline_tokens_per_s']:.2f}x",
                lossless(row) if trained else "",
            ]
            found.append(cells)
    return found


def parts(report: dict) -> list[list[str]]:
    """A table under `PART_HEADS` of what is shown apart: requests of each category, and those within and beyond the positions
    that the drafter knows."""
    found = []
    for temperature, figures in report["temperatures"].items():
        lookup = figures["controls"].get("prompt_lookup", {})
        for figure in PARTS_OF:
            for number, (name, one) in enumerate(figures.get(figure, {}).items()):
                other = lookup.get(figure, {}).get(name)
                cells = [temperature if not number else "", name, f"{one['requests']:,}", f"{one['tokens']:,}"]
                cells += [f"{one['tau']:.2f}", f"{one['speedup']:.2f}x"]
                found.append(cells + ([f"{other['tau']:.2f}", f"{other['speedup']:.2f}x"] if other else ["", ""]))
    return found


def shared_seconds(report: dict) -> str:
    """What has to be known of the speedups of `parts`; nothing where requests were decoded one by one."""
    batch = report.get("engine", {}).get("batch", 1)
    if batch == 1:
        return ""
    said = f"a request bears an equal share of its batch's seconds ({batch} at a time)"
    return f"{said}, so that speedups are those of mixed batches"


def lossless(figures: dict) -> str:
    """A temperature's losslessness for a table's cell: yes | yes, to bf16 | yes, within bf16 rounding (trees and audits, whose
    rows are not computed once more) | NO."""
    if not figures["lossless"]:
        return "NO"
    if "ties" not in figures:
        return "yes"
    dtype = figures["ties"]["dtype"]
    return f"yes, to {dtype}" if figures["ties"]["replayed"] else f"yes, within {dtype} rounding"


def lossless_line(figures: dict) -> str:
    """The same with its counts, or with what it was decided by."""
    if figures["lossless"] and "ties" in figures:
        ties = figures["ties"]
        counted = f"{ties['equal']} equal, {ties['count']} part at ties, largest gap {ties['largest_gap']:.2g}"
        return f"{lossless(figures)} ({counted})"
    return f"{lossless(figures)}: {figures['lossless_by']}"


def partly(figures: dict) -> list[str]:
    """What verification over a part of the cache did, in words."""
    found = []
    if lost := figures.get("rollbacks"):
        found.append(f"{lost['count']} rollbacks took back {lost['tokens']} tokens")
    if away := figures.get("divergence"):
        first = away["first_divergent_token"]
        found.append(
            f"{away['same']:.0%} of outputs equal full verification's, {away['agreement']:.0%} of their tokens"
            + (f"; those that differ first do at token {first:.0f} on average" if first else "")
            + f"; perplexity {away['perplexity']['partial']:.2f}, full verification's {away['perplexity']['full']:.2f}"
        )
    return found


def write_page(out: Path, report: dict) -> None:
    """`report.html`: everything that `report` says, whole or not there at all."""
    kv, figures = report["drafter_kv"], report["temperatures"]
    memory = [[name.removesuffix("_mib"), f"{value:.2f}"] for name, value in kv.items()]
    sections = {
        "What was judged": facts(judged(report)) + folded("everything that was set", facts(flatten(settings(report)))),
        "Acceptance and speed": table(HEADS, rows(report), strong=lambda row: row[1] == "trained")
        + "".join(note(f"T = {t}: lossless: {lossless_line(f)}") for t, f in figures.items())
        + "".join(note(f"T = {t}: {f['lossless_by']}") for t, f in figures.items() if "ties" in f and f["lossless"])
        + "".join(note(f"T = {t}: {text}") for t, f in figures.items() for text in partly(f)),
        "Acceptance and speed apart": table(PART_HEADS, apart) + note(shared_seconds(report)) if (apart := parts(report)) else "",
        "Acceptance by slot": figure(
            _draw_slots(figures),
            "Conditional: of the rounds whose earlier slots were all accepted. Dashed: the trained drafter's joint acceptance.",
        ),
        "Where a round's time goes": figure(
            _draw_time(figures),
            "Milliseconds a round, and what that makes a token of the output. Overhead: all that is neither drafter nor target.",
        ),
        "Acceptance along the text": figure(
            _draw_context(figures),
            "tau of the rounds whose anchor stands there; the first positions are those behind the prompt.",
        ),
        "Memory": table(["the drafter's keys and values", "MiB"], memory, text=[0])
        + note(f"The most of any one request. Peak of the GPU, or of the process on a CPU: {report['peak_gib']:.2f} GiB."),
        "Examples": _examples(report.get("examples", {})),
    }
    write_text(out / "report.html", document("Drafter report", judged(report)["drafter"], sections))


def write_sweep(out: Path, heads: list[str], rows: list[list[str]], picture: Path) -> None:
    """`sweep.html`: a sweep's table and its picture."""
    image = base64.b64encode(picture.read_bytes()).decode()
    sections = {
        "Against the budget of memory positions": table(heads, rows)
        + note("Several seeds: their mean [the least, the greatest]."),
        "Pictures": f'<img alt="the table\'s figures against the budget" src="data:image/png;base64,{image}">',
    }
    write_text(out / "sweep.html", document("Sweep", out.name, sections))


def settings(report: dict) -> dict:
    return {name: value for name, value in report.items() if name not in ("temperatures", "examples", "drafter_kv", "peak_gib")}


def judged(report: dict) -> dict[str, str]:
    """What the figures are of, in a line each."""
    drafter, target, view, prompts = (report[name] for name in ("drafter", "target", "view", "prompts"))
    what = drafter["lm"] or f"{drafter['objective']}, reuse {drafter['reuse']}"
    versions = ", ".join(f"{name} {version}" for name, version in report.get("software", {}).items())
    said = {
        "drafter": f"{drafter['path']} ({what}; {drafter['parameters'] / 1e6:.2f}M parameters, seed {drafter['seed']})",
        "target": f"{target['path']} ({target['dtype'].removeprefix('torch.')} on {target['device']}; "
        f"weights {target['weights_hash']})",
        "view": f"{view['kind']}, {view['budget']} positions" if view["budget"] else "everything visible",
        "verify": flat(report.get("verify", "full")),
        "prompts": f"{prompts['count']} of {prompts['tokens']} tokens from {prompts['source']}, "
        f"at most {prompts['max_new_tokens']} new tokens, seed {prompts['seed']}",
        "temperatures": ", ".join(report["temperatures"]),
        "software": versions,
        "commit": report["commit"] or "",
    }
    return {name: value for name, value in said.items() if value}


# The parts of a page. Everything that is not HTML yet is escaped here.


def document(title: str, subtitle: str, sections: dict[str, str]) -> str:
    """`sections`: heading -> HTML."""
    body = "".join(f"<section>\n<h2>{escape(name)}</h2>\n{html}\n</section>\n" for name, html in sections.items() if html)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{note(subtitle)}\n{body}</body>\n</html>\n"
    )


def table(heads, rows: list[list[str]], strong=lambda row: False, text: list[int] | None = None) -> str:
    """`text`: columns that are no numbers, to the left; by default those called so."""
    left = {i for i, head in enumerate(heads) if head in TEXT} if text is None else set(text)
    line = lambda tag, row: "".join(
        f"<{tag}{' class=text' * (i in left)}>{escape(str(cell))}</{tag}>" for i, cell in enumerate(row)
    )
    body = "".join(f"<tr{' class=strong' * bool(strong(row))}>{line('td', row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{line("th", heads)}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def facts(said: dict) -> str:
    lines = (f"<tr><th>{escape(str(name))}</th><td>{escape(flat(value))}</td></tr>\n" for name, value in said.items())
    return f'<table class="facts">{"".join(lines)}</table>'


def flat(value, most: int = 300) -> str:
    """A setting in one line; a long list is cut."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {one}" for name, one in value.items())
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= most else text[:most] + (f" ... ({len(value)})" if isinstance(value, list) else " ...")


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def svg(label: str, columns: int, height: float, draw, width: float = 10.5) -> str:
    """What `draw`(axes in a row) draws with matplotlib, as inline SVG in the page's own text colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(inks, INK) | {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    style |= {"font.sans-serif": ["DejaVu Sans"], "legend.framealpha": 0, "axes.axisbelow": True, "text.parse_math": False}
    style |= {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
    }  # text stays text; ids are the same every time, and each picture's own
    text = io.StringIO()
    with matplotlib.rc_context(style):
        drawn, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        draw(axes[0])
        drawn.savefig(text, format="svg", transparent=True)
        plt.close(drawn)
    picture = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text.getvalue(), flags=re.DOTALL).replace(INK, "currentColor")
    picture = re.sub(r' xmlns(:xlink)?="[^"]*"', "", picture[picture.index("<svg") :])  # HTML knows both
    return picture.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


# The pictures of one run.


def _look(name: str) -> dict:
    """How a contender's line looks: the trained drafter's stands out."""
    order = ("untrained", "prompt_lookup", "zero_memory", "shuffled_memory")
    if name == "trained":
        return {"color": "#2a9d6f", "linewidth": 2.4, "marker": "o", "zorder": 3}
    colours = ("#c77d2e", "#8e62c4", "#8a8a8a", "#4c9bc8", "#c85a9a", "#9a8a3a")
    at = order.index(name) if name in order else 4 + len(name) % 2
    return {"color": colours[at], "linewidth": 1.2, "marker": ".", "alpha": 0.9}


def _draw_slots(figures: dict) -> str:
    def draw(axes) -> None:
        for axis, (temperature, found) in zip(axes, figures.items()):
            for name, row in contenders(found).items():
                slots = range(1, len(row["conditional"]) + 1)
                if slots:
                    axis.plot(slots, row["conditional"], label=name.replace("_", " "), **_look(name))
            slots = range(1, len(found["joint"]) + 1)
            axis.plot(slots, found["joint"], **_look("trained") | {"linestyle": "--", "linewidth": 1.2, "marker": ""})
            axis.set(xlabel="drafted token of a round", ylabel="acceptance", title=f"T = {temperature}", ylim=(0, 1.02))
            axis.set_xticks(slots)
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg("acceptance by slot", len(figures), 3.4, draw)


def _draw_context(figures: dict) -> str:
    def draw(axes) -> None:
        for axis, (temperature, found) in zip(axes, figures.items()):
            for name, row in contenders(found).items():
                if bins := row.get("by_context"):
                    middle = [(low + high) / 2 for low, high in zip(bins["from"], bins["to"])]
                    axis.plot(middle, bins["tau"], label=name.replace("_", " "), **_look(name))
            axis.axhline(1, color=INK, linewidth=0.8, linestyle=":")
            axis.set(xlabel="position of the anchor in the text", ylabel="tau", title=f"T = {temperature}")
            axis.set_ylim(bottom=min(0.9, axis.get_ylim()[0]))  # below 1 where audits took tokens back
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg("tau by position in the text", len(figures), 3.2, draw)


def _draw_time(figures: dict) -> str:
    def draw(axes) -> None:
        for axis, (temperature, found) in zip(axes, figures.items()):
            named = {name.replace("_", " "): row for name, row in contenders(found).items() if row["round_ms"]}
            left = [0.0] * len(named)
            for part, colour in PARTS.items():
                widths = [row["round_ms"][part] for row in named.values()]
                bars = axis.barh(list(named), widths, left=left, color=colour, label=part)
                left = [one + width for one, width in zip(left, widths)]
            speeds = (row["tokens_per_s"] for row in named.values())
            axis.bar_label(bars, [f"{1e3 / speed:.1f} ms a token" if speed else "" for speed in speeds], padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
            axis.set(xlabel="ms a round", xlim=(0, 1.5 * max(left)), title=f"T = {temperature}")
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg("milliseconds of a round", len(figures), 0.8 + 0.38 * max(map(len, map(contenders, figures.values()))), draw)


def _examples(examples: dict[str, list[dict]]) -> str:
    """`examples`: temperature -> what `measure.examples` made."""
    if not examples:
        return ""
    named = {"accepted": "drafted and accepted", "rejected": "drafted and refused", "emitted": "the target's own token"}
    key = " ".join(f"<span class={kind}>{name}</span>" for kind, name in named.items())
    html = [f'<p class="key">{key}; grey: the end of the prompt.</p>']
    for temperature, shown in examples.items():
        for number, one in enumerate(shown, 1):
            html.append(
                f"<h3>T = {escape(temperature)}, prompt {number}</h3>\n<pre><span class=prompt>{escape(one['prompt'])}</span>"
            )
            html += (f"<span class={kind}>{escape(_seen(text, kind))}</span>" for text, kind in one["pieces"])
            html.append("</pre>\n")
    return "".join(html)


def _seen(text: str, kind: str) -> str:
    """Line breaks are marked; a refused token breaks no line, indents nothing, and is seen if it is half a character."""
    if kind != "rejected":
        return text.replace("\n", "\u21b5\n")
    return re.sub(" {2,}", lambda spaces: f"\u2423{len(spaces[0])}", text or "\ufffd").replace("\n", "\u21b5")
