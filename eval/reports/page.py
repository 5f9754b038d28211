"""A report as one HTML file that opens from disk: text, tables and inline SVG; no script, nothing from any network.

`write_page` is the page of one run; a sweep's and a comparison's are made of the same parts (`document`, `table`, `charts.svg`).
"""

import base64
import re
from html import escape
from pathlib import Path

from common.files import write_text
from data_prep.cache.manifest import flatten
from eval.reports import charts

BASELINE = "none (baseline)"
THEIRS = "transformers generate"
HEADS = ("T", "drafter", "tau", "acceptance by slot", "draft ms", "verify ms", "tokens/s", "speedup", "lossless")
PART_HEADS = ("T", "of which", "requests", "tokens", "tau", "speedup", "prompt lookup: tau", "prompt lookup: speedup")
PARTS_OF = ("by_category", "by_positions")
TEXT = {"T", "of which", "category", "drafter", "acceptance by slot", "run", ""}  # columns that are not numbers
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
# A browser refuses whatever this page should not need: scripts, and anything from a network.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def contenders(figures: dict) -> dict[str, dict]:
    """Who drafted at one temperature of a report: the trained one first, then what it has to beat."""
    baseline = {
        "tau_micro": 1.0,
        "conditional": [],
        "tokens_per_s": figures["baseline_tokens_per_s"],
        "round_ms": figures["baseline_round_ms"],
    }
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
    if "interval" in figures:
        found.append(f"up to {figures['interval']:.3g} tokens between full rounds, on average")
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


def mib(value: float) -> str:
    """In hundredths; "0" is said of nothing at all."""
    return "0" if value == 0 else "< 0.01" if value < 0.005 else f"{value:.2f}"


def write_page(out: Path, report: dict) -> None:
    """`report.html`: everything that `report` says, whole or not there at all."""
    figures = report["temperatures"]
    everyone = {temperature: contenders(found) for temperature, found in figures.items()}
    memory = [[name.removesuffix("_mib"), mib(value)] for name, value in report["drafter_kv"].items()]
    apart = parts(report)
    sections = {
        "What was judged": facts(judged(report)) + folded("everything that was set", facts(flatten(settings(report)))),
        "Acceptance and speed": table(HEADS, rows(report), strong=lambda row: row[1] == "trained")
        + "".join(note(f"T = {t}: lossless: {lossless_line(f)}") for t, f in figures.items())
        + "".join(note(f"T = {t}: {f['lossless_by']}") for t, f in figures.items() if "ties" in f and f["lossless"])
        + "".join(note(f"T = {t}: {text}") for t, f in figures.items() for text in partly(f)),
        "Acceptance and speed apart": table(PART_HEADS, apart) + note(shared_seconds(report)) if apart else "",
        "Acceptance by slot": figure(
            charts.by_slot(everyone),
            "Conditional: of the rounds whose earlier slots were all accepted. Dashed: the trained drafter's joint acceptance.",
        ),
        "Where a round's time goes": figure(
            charts.of_a_round(everyone),
            "Milliseconds a round, and what that makes a token of the output. Overhead: all that is neither drafter nor target.",
        ),
        "Acceptance along the text": figure(
            charts.along_the_text(everyone),
            "tau of the rounds whose anchor stands there; the first positions are those behind the prompt.",
        ),
        "Memory": table(["the drafter's keys and values", "MiB"], memory, text=[0])
        + note(f"The most of any one request. Peak of the GPU, or of the process on a CPU: {report['peak_gib']:.2f} GiB."),
        "Examples": _examples(report.get("examples", {})),
    }
    write_text(out / "report.html", document("Drafter report", judged(report)["drafter"], sections))


def write_sweep(out: Path, heads: list[str], rows: list[list[str]], picture: Path) -> None:
    """`sweep.html`: a sweep's table and its picture."""
    # Inside the page, which has to open without any file beside it.
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
    drafter = report["drafter"]
    target = report["target"]
    view = report["view"]
    prompts = report["prompts"]
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
    """`text`: which columns hold words, aligned to the left; by default those whose head is in `TEXT`."""
    left = {i for i, head in enumerate(heads) if head in TEXT} if text is None else set(text)

    def line(tag: str, row) -> str:
        return "".join(f"<{tag}{' class=text' * (i in left)}>{escape(str(cell))}</{tag}>" for i, cell in enumerate(row))

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
