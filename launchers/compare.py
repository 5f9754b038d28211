"""Does block-wise training realise the potential of KV reuse? All arms of the comparison: same cache, tokens, anchors, drafted
tokens, depth, loss and seeds; each arm against its control; one table with confidence intervals.

    python launchers/compare.py train RUNS [key=value ...]     capture, then every arm and seed (those that are finished are kept)
    python launchers/compare.py judge RUNS [key=value ...]     decode with every drafter; diagnose the first seed's
    python launchers/compare.py table RUNS                     the table, and RUNS/compare.png

Options: --jobs 1 (at a time), --seeds 3, --arms a,b, --tokens 2000000 (of the cache). Overrides go to train/ or eval/main.py.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SLOTS = 5  # drafted tokens, in every arm
TTT, SAME, SHIFTED = (f"objective.slots={SLOTS}", f"objective.slots={SLOTS + 1}", f"objective.slots={SLOTS}")
# What every arm shares. One loss for all, so that the arms differ in what their names say.
SHARED = """
    loss.ce=0 loss.tv=0 loss.kl=1 objective.anchors=64
    drafter.layers=2 drafter.vocabulary=null drafter.own_head=false drafter.qk_norm=null
    train.lr=2e-3 train.batch=1 train.pack_tokens=4096 train.max_steps=1000 train.save_every=1000 train.log_every=100
    train.validation_documents=128
""".split()
# name: (its control, overrides)
ARMS = {
    "ttt_none": (None, ["experiment=eagle3", "reuse=none", TTT]),
    "eagle3": ("ttt_none", ["experiment=eagle3", TTT]),
    "kvshot_kv": ("eagle3", ["experiment=kvshot_kv", TTT]),
    "kvshot_hybrid": ("eagle3", ["experiment=kvshot_hybrid", TTT]),
    "ttt_native": ("kvshot_kv", ["experiment=kvshot_kv", "reuse.source=native", "drafter.start=target", TTT]),
    "blockwise_none": (None, ["experiment=dflash", "reuse=none", SAME]),
    "dflash": ("blockwise_none", ["experiment=dflash", SAME]),
    "blockwise_kv": ("dflash", ["experiment=blockwise_kv", SAME]),
    "blockwise_hybrid": ("dflash", ["experiment=blockwise_hybrid", SAME]),
    "dspark_like": ("dflash", ["experiment=dspark_like", SHIFTED]),
    "dspark_hybrid": ("dspark_like", ["experiment=dspark_like", "reuse=hybrid", "reuse.source=projected_rope", SHIFTED]),
    "native_random": ("dflash", ["experiment=blockwise_native", "drafter.start=random", SAME]),
    "aligned_random": ("native_random", ["experiment=blockwise_native_aligned", "drafter.start=random", SAME]),
    "dflash_from_target": ("dflash", ["experiment=dflash", "drafter.start=target", SAME]),
    "blockwise_native": ("dflash_from_target", ["experiment=blockwise_native", SAME]),
    "blockwise_native_aligned": ("blockwise_native", ["experiment=blockwise_native_aligned", SAME]),
}


def each(jobs: int, work: list[tuple[str, list[str], Path]]) -> None:
    """Run commands, some at a time; each writes its output to a log. A command that has ended well is not run again."""

    def one(item):
        name, words, log = item
        done = log.with_suffix(".done")
        if done.exists() and done.read_text() == " ".join(words):
            return 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            code = subprocess.run([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT).returncode
        if code == 0:
            done.write_text(" ".join(words))
        print(f"{name}: {'done' if code == 0 else f'FAILED, see {log}'}", flush=True)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        if any(list(pool.map(one, work))):
            sys.exit("error: some of the runs failed; say the same command again once their logs are understood")


def train(o) -> None:
    cache = [f"cache.dir={o.runs / 'cache'}"]
    capture = [str(ROOT / "data_prep/main.py"), *cache, "cache.kinds=[hidden,kv,query]", f"data.max_tokens={o.tokens}"]
    each(1, [("capture", capture, o.runs / "capture.log")])
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            words = [*ARMS[arm][1], *SHARED, f"train.seed={seed}", *o.overrides, *cache, f"run.dir={run}"]
            work.append((f"{arm}, seed {seed}", [str(ROOT / "train/main.py"), *words], run.with_suffix(".log")))
    each(o.jobs, work)


def judge(o) -> None:
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            words = [
                str(ROOT / "eval/main.py"),
                f"drafter={run / 'checkpoints/last'}",
                f"cache.dir={o.runs / 'cache'}",
                *o.overrides,
            ]
            work.append((f"{arm}, seed {seed}", [*words, "controls=false", f"out={run / 'report'}"], run / "report.log"))
            if seed == 0:
                work.append((f"{arm}, diagnosis", [*words, "mode=diagnose", f"out={run / 'diagnosis'}"], run / "diagnosis.log"))
    each(o.jobs, work)


def reports(o, arm: str) -> list[dict]:
    return [json.loads((o.runs / arm / f"seed{seed}/report/report.json").read_text()) for seed in range(o.seeds)]


def counts(o, arm: str, temperature: str) -> np.ndarray:
    """[seeds, prompts, 2]: tokens emitted, verify steps."""
    return np.array([report["temperatures"][temperature]["per_prompt"] for report in reports(o, arm)], dtype=float)


def tau(counted: np.ndarray) -> float:
    emitted, steps = counted.reshape(-1, 2).sum(0)
    return emitted / steps


def interval(values: list[float]) -> tuple[float, float]:
    return tuple(np.percentile(values, [2.5, 97.5]))


def table(o) -> None:
    """95% intervals by bootstrap over seeds and prompts; an arm and its control are compared on the same seeds and prompts."""
    rng, rows, picture = np.random.default_rng(0), [], {}
    found = {(arm, t): counts(o, arm, t) for arm in o.arms for t in ("1", "0")}
    seeds, prompts = next(iter(found.values())).shape[:2]
    draws = [(rng.integers(seeds, size=seeds)[:, None], rng.integers(prompts, size=prompts)[None]) for _ in range(4000)]
    for arm in o.arms:
        control, first = ARMS[arm][0], reports(o, arm)[0]
        diagnosis = json.loads((o.runs / arm / "seed0/diagnosis/diagnostics.json").read_text())
        acceptance = {name: kinds["sampled"]["tau"] for name, kinds in diagnosis["acceptance"].items()}
        cells = [arm, f"{first['drafter']['parameters'] / 1e6:.2f}M", f"{diagnosis['compute']['gflop_per_anchor']:.2f}"]
        for t in ("1", "0"):
            low, high = interval([tau(found[arm, t][d]) for d in draws])
            cells.append(f"**{tau(found[arm, t]):.2f}** [{low:.2f}, {high:.2f}]")
        picture[arm] = (tau(found[arm, "1"]), *interval([tau(found[arm, "1"][d]) for d in draws]))
        cells.append(
            " ".join(f"{np.mean(c):.2f}" for c in zip(*(r["temperatures"]["1"]["conditional"] for r in reports(o, arm))))
        )
        if control in o.arms:
            gains = {t: [tau(found[arm, t][d]) - tau(found[control, t][d]) for d in draws] for t in ("1", "0")}
            low, high = interval(gains["1"])
            verdict = "beats it" if low > 0 else "WORSE" if high < 0 else "no difference shown"
            cells += [control, f"{tau(found[arm, '1']) - tau(found[control, '1']):+.2f} [{low:+.2f}, {high:+.2f}]", verdict]
        else:
            cells += ["", "", ""]
        cells += [
            f"{acceptance[n]:.2f}" if n in acceptance else ""
            for n in ("trained", "zero_memory", "other_memory", "oracle_queries")
        ]
        draft = np.mean([r["temperatures"]["1"]["round_ms"]["draft"] for r in reports(o, arm)])
        cells.append(f"{draft:.1f}")
        rows.append(cells)
    heads = [
        "arm",
        "parameters",
        "GFLOP an anchor",
        "tau T=1",
        "tau T=0",
        "acceptance by slot, T=1",
        "control",
        "gain at T=1",
        "verdict",
    ]
    heads += ["held-out tau", "zero memory", "another's memory", "oracle queries", "draft ms"]
    lines = [heads, ["---"] * len(heads), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    (o.runs / "compare.md").write_text(text + "\n")
    print(text)
    draw(picture, o.runs / "compare.png")


def draw(found: dict[str, tuple[float, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.35 * len(found) + 1.2), layout="constrained")
    middle, low, high = np.array(list(found.values())).T
    axis.errorbar(middle, range(len(found)), xerr=[middle - low, high - middle], fmt="o", capsize=3)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set(xlabel="tau at T = 1, with 95% intervals over seeds and prompts")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "judge", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("overrides", nargs="*")
    o = parser.parse_intermixed_args()
    if unknown := sorted(set(o.arms) - set(ARMS)):
        parser.error(f"no arm is called {', '.join(unknown)}; there are {', '.join(ARMS)}")
    o.runs = o.runs.absolute()
    {"train": train, "judge": judge, "table": table}[o.stage](o)


if __name__ == "__main__":
    main()
