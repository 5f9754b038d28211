"""Where does partial verification (SpecPV) pay? One drafter and its target over contexts and batches: verified over a part of the
cache (lossy), over a part with audits (exact), and with audits as often as pays; each beside full verification and plain decoding
in the same run.

    python launchers/partial.py judge RUNS drafter=DRAFTER [key=value ...]     decode everywhere (what is finished is kept)
    python launchers/partial.py table RUNS                                     RUNS/partial.md and RUNS/partial.png

Options: --contexts 4096,8192, --batches 1,8,32, --at CONTEXT,BATCH (the longest context, the middle batch), --prompts 8 (or as
many as the batch), --retrieval 512,256,1024 (the first everywhere, the others at --at), --partial-tokens 16,64 (at --at, beside
the recipe's own interval). Prompts are held-out documents, or what suite= says. Overrides go to eval/main.py.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare import ROOT, each  # noqa: E402
from compared import panels  # noqa: E402

SHARED = "temperatures=[0] transformers=false controls=false suite.new_tokens=256 suite.warmup_tokens=64".split()
KINDS = ["partial", "partial_audited", "partial_adaptive"]  # choices of verify=


def judge(o) -> None:
    """Each command is a sweep, which starts once: a batch's grid, or what is tried at one place."""
    asked = [] if any(word.startswith("suite=") for word in o.overrides) else ["data.long=join"]
    work = []

    def sweep(name: str, batch: int, contexts: list[int], kinds: list[str], retrieval: list[int], *words: str) -> None:
        swept = {"suite.prompt_tokens": contexts, "verify.retrieval": retrieval, "verify": kinds}
        words = [f"{key}={','.join(map(str, values))}" for key, values in swept.items()] + list(words)
        words += [*SHARED, *asked, f"batch={batch}", f"suite.count={max(batch, o.prompts)}", *o.overrides]
        out = o.runs / name
        work.append((name, [str(ROOT / "eval/main.py"), "-m", *words, f"out={out}"], out.with_suffix(".log"), out))

    first, *others = o.retrieval
    for batch in o.batches:
        sweep(f"grid/batch{batch}", batch, o.contexts, KINDS, [first])
    context, batch = o.at
    if others:
        sweep("retrieval", batch, [context], KINDS, others)
    if o.partial_tokens:
        intervals = f"verify.partial_tokens={','.join(map(str, o.partial_tokens))}"
        sweep("intervals", batch, [context], KINDS[:2], [first], intervals)
    each(1, work)  # one at a time: what is timed has the machine to itself


HEADS = ["context", "batch", "verify", "chosen", "interval", "tau", "of full", "verify ms", "of full", "tokens/s"]
HEADS += ["against full", "against plain", "full against plain", "errs", "lossless"]


def cell(report: dict) -> dict:
    """What one report says of one place, ratios within its own run."""
    found = report["temperatures"]["0"]
    full = found["controls"]["full_verification"]
    said = report["verify"]
    rate, plain = found["tokens_per_s"], found["baseline_tokens_per_s"]
    lost = found.get("rollbacks", {"count": 0})["count"]
    emitted = sum(tokens for tokens, _ in found["per_prompt"])
    audited = said["kind"] == "partial_audited"
    return {
        "context": report["context"],
        "batch": report["engine"]["batch"],
        "verify": f"audited{', adaptive' * (said['partial_tokens'] == 'adaptive')}" if audited else "partial",
        "chosen": said["retrieval"],
        "interval": found["interval"],
        "tau": (found["tau_micro"], full["tau_micro"]),
        "verify_ms": (found["round_ms"]["verify"], full["round_ms"]["verify"]),
        "rate": rate,
        "of_full": rate / full["tokens_per_s"],
        "of_plain": rate / plain,
        "full_of_plain": full["tokens_per_s"] / plain,
        "errs": f"{1000 * lost / emitted:.1f} rollbacks in 1,000 tokens"
        if audited
        else f"{found['divergence']['agreement']:.0%} of tokens equal full verification's",
        "lossless": "yes" if found["lossless"] else "no",
    }


def table(o) -> None:
    """`partial.md` of everything, `partial.png` of the grid."""
    found = {path: cell(json.loads(path.read_text())) for path in sorted(o.runs.rglob("report.json"))}
    if not found:
        sys.exit(f"error: {o.runs} has no report; say `judge` first")
    order = lambda one: [one[key] for key in ("context", "batch", "verify", "chosen", "interval")]
    lines = [HEADS, ["---"] * len(HEADS)]
    for one in sorted(found.values(), key=order):
        pairs = [f"{value:.2f}" for key in ("tau", "verify_ms") for value in one[key]]
        ratios = [f"{one[key]:.2f}x" for key in ("of_full", "of_plain", "full_of_plain")]
        where = [str(one[key]) for key in ("context", "batch", "verify", "chosen")] + [f"{one['interval']:.3g}"]
        lines.append([*where, *pairs, f"{one['rate']:.1f}", *ratios, one["errs"], one["lossless"]])
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    (o.runs / "partial.md").write_text(text + "\n")
    print(text)
    draw([one for path, one in found.items() if path.is_relative_to(o.runs / "grid")], o.runs / "partial.png")


def draw(grid: list[dict], path: Path) -> None:
    """A panel for each kind of verification: contexts by batches, blue where it is faster than full verification."""
    kinds, contexts, batches = (sorted({one[key] for one in grid}) for key in ("verify", "context", "batch"))
    size = (1.7 * len(batches) * len(kinds) + 2.5, 0.9 * len(contexts) + 1.6)
    figure, axes = panels(len(kinds), size, sharey=True)
    for axis, kind in zip(axes, kinds):
        log_YX = np.full((len(contexts), len(batches)), np.nan)
        for one in (one for one in grid if one["verify"] == kind):
            y, x = contexts.index(one["context"]), batches.index(one["batch"])
            log_YX[y, x] = np.log2(one["of_full"])
            said = f"{one['of_full']:.2f}x full\n{one['of_plain']:.2f}x plain\ntau {one['tau'][0]:.2f} ({one['tau'][1]:.2f})"
            ink = "white" if abs(log_YX[y, x]) > 0.7 else "black"
            axis.text(x, y, said, ha="center", va="center", fontsize=8, color=ink)
        drawn = axis.imshow(log_YX, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        axis.set_xticks(range(len(batches)), batches)
        axis.set_yticks(range(len(contexts)), contexts)
        axis.set(title=kind, xlabel="batch")
    axes[0].set_ylabel("context")
    bar = figure.colorbar(drawn, ax=axes, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["half", "as fast", "twice"])
    bar.set_label("tokens/s against full verification")
    figure.savefig(path, dpi=110)


def main() -> None:
    numbers = lambda text: [int(word) for word in text.split(",") if word]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["judge", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--contexts", type=numbers, default=[4096, 8192])
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--retrieval", type=numbers, default=[512, 256, 1024])
    parser.add_argument("--partial-tokens", type=numbers, default=[16, 64])
    parser.add_argument("--at", type=numbers)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("overrides", nargs="*")
    o = parser.parse_intermixed_args()
    if not (o.contexts and o.batches and o.retrieval):
        parser.error("--contexts, --batches and --retrieval name one number at least")
    if o.at and len(o.at) != 2:
        parser.error("--at is CONTEXT,BATCH")
    o.at = o.at or [max(o.contexts), o.batches[len(o.batches) // 2]]
    o.runs = o.runs.absolute()
    {"judge": judge, "table": table}[o.stage](o)


if __name__ == "__main__":
    main()
