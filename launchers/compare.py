"""Does block-wise training realise the potential of KV reuse? All arms of the comparison: same cache, tokens, anchors, drafted
tokens, depth, loss and seeds; each arm against its control; one table with 95% intervals.

    python launchers/compare.py train RUNS [key=value ...]     capture, then every arm and seed (those that are finished are kept)
    python launchers/compare.py judge RUNS [key=value ...]     decode with every drafter; diagnose the first seed's
    python launchers/compare.py table RUNS                     the table, and RUNS/compare.png

Options: --jobs 1 (at a time), --seeds 3, --arms a,b, --tokens 2000000 (of the cache). Overrides go to train/ or eval/main.py,
those of target, data, cache and capture also to the capture; the arms need as many cached layers as drafter.layers.
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SLOTS = 5  # drafted tokens, in every arm
TTT = f"objective.slots={SLOTS}"
SAME = f"objective.slots={SLOTS + 1}"
SHIFTED = f"objective.slots={SLOTS}"
# What every arm shares. One loss for all, so that the arms differ in what their names say.
SHARED = """
    loss.ce=0 loss.tv=0 loss.kl=1 objective.anchors=64
    drafter.layers=2 drafter.vocabulary=null drafter.own_head=false drafter.qk_norm=null
    train.lr=2e-3 train.batch=1 train.pack_tokens=4096 train.max_steps=1000 train.save_every=1000 train.log_every=100
    train.validation_documents=128
""".split()
# Queries alone over the target's cache; {last}, {before} and {middle} are layers of the target.
QUERIES = ["experiment=query_only", TTT]
HALVES = [*QUERIES, "drafter.target_layers=[{middle},{last}]"]
# name: (its control, overrides)
ARMS = {
    "ttt_none": (None, ["experiment=eagle3", "reuse=none", TTT]),
    "eagle3": ("ttt_none", ["experiment=eagle3", TTT]),
    "kvshot_kv": ("eagle3", ["experiment=kvshot_kv", TTT]),
    "kvshot_hybrid": ("eagle3", ["experiment=kvshot_hybrid", TTT]),
    "ttt_native_random": ("kvshot_kv", ["experiment=kvshot_kv", "reuse.source=native", TTT]),
    "ttt_native": ("ttt_native_random", ["experiment=kvshot_kv", "reuse.source=native", "drafter.start=target", TTT]),
    "queries_last": ("eagle3", [*QUERIES, "drafter.target_layers=[{last},{last}]"]),
    "queries_last_two": ("queries_last", [*QUERIES, "drafter.target_layers=[{before},{last}]"]),
    "queries_halves": ("queries_last", HALVES),
    "queries_ends": ("queries_last", [*QUERIES, "drafter.target_layers=[0,{last}]"]),
    "queries_mixture": ("queries_last", [*QUERIES, "reuse.source=head_concat"]),
    "queries_with_kv": ("queries_halves", [*HALVES, "reuse.own_kv=true"]),
    "queries_constant": ("queries_halves", [*HALVES, "objective.positions=constant"]),
    "queries_from_target": ("queries_halves", [*HALVES, "drafter.start=target"]),
    "queries_aligned_0.1": ("queries_halves", [*HALVES, "loss.query_align=0.1"]),
    "queries_aligned_1": ("queries_halves", [*HALVES, "loss.query_align=1"]),
    "queries_aligned_10": ("queries_halves", [*HALVES, "loss.query_align=10"]),
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
# Is what the target's K/V add (the first arm over the second) larger for blocks than for steps (the third over the fourth)?
CONTRASTS = {
    "hybrid over hidden: block-wise against ttt": ("blockwise_hybrid", "dflash", "kvshot_hybrid", "eagle3"),
    "hybrid over hidden: block-wise with a Markov head against ttt": ("dspark_hybrid", "dspark_like", "kvshot_hybrid", "eagle3"),
    "K/V over hidden: block-wise against ttt": ("blockwise_kv", "dflash", "kvshot_kv", "eagle3"),
}


def said(word: str) -> str:
    """An override as the commands take it: Hydra would sweep over a path with a comma in it."""
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if key in ("drafter", "cache.dir", "run.dir", "out") and "'" not in value else word


def each(jobs: int, work: list[tuple[str, list[str], Path, Path | None]]) -> None:
    """Run commands (name, words, log, what they make), some at a time. One that has ended well is not run again, unless its words
    or the weights that it reads are others. What it made before is removed: no old result can pass for a new one."""

    def one(item):
        name, words, log, out = item
        weights = [Path(w.removeprefix("drafter=")) / "model.safetensors" for w in words if w.startswith("drafter=")]
        key = " ".join([*words, *(str(path.stat().st_mtime_ns) for path in weights if path.exists())])
        done = log.with_suffix(".done")
        if done.exists() and done.read_text() == key:
            return 0
        done.unlink(missing_ok=True)
        if out:
            shutil.rmtree(out, ignore_errors=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            code = subprocess.run([sys.executable, *map(said, words)], stdout=file, stderr=subprocess.STDOUT).returncode
        if code == 0:
            done.write_text(key)
        print(f"{name}: {'done' if code == 0 else f'FAILED, see {log}'}", flush=True)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        if any(list(pool.map(one, work))):
            sys.exit("error: some of the runs failed; say the same command again once their logs are understood")


def train(o) -> None:
    cache = [f"cache.dir={o.runs / 'cache'}"]
    about = [word for word in o.overrides if word.startswith(("target", "data", "cache", "capture"))]  # what the cache is made of
    capture = [str(ROOT / "data_prep/main.py"), "cache.kinds=[hidden,kv,query]", f"data.max_tokens={o.tokens}", *about, *cache]
    each(1, [("capture", capture, o.runs / "capture.log", None)])
    target = json.loads((o.runs / "cache/manifest.json").read_text())["target"]
    last = target["architecture"]["num_layers"] - 1
    layers = {"{last}": last, "{before}": last - 1, "{middle}": last // 2}
    cache.append("cache.on_missing=fail")  # it is there, and `data=` among the overrides would ask for one of all the data
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            named = ARMS[arm][1]
            for word, layer in layers.items():
                named = [override.replace(word, str(layer)) for override in named]
            words = [*named, *SHARED, f"train.seed={seed}", *o.overrides, *cache, f"run.dir={run}"]
            work.append((f"{arm}, seed {seed}", [str(ROOT / "train/main.py"), *words], run.with_suffix(".log"), None))
    each(o.jobs, work)


def judge(o) -> None:
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            words = [
                str(ROOT / "eval/main.py"),
                f"drafter={run / 'checkpoints/last'}",
                *o.overrides,
            ]
            report = run / "report"
            diagnosis = run / "diagnosis"
            work.append((f"{arm}, seed {seed}", [*words, "controls=false", f"out={report}"], run / "report.log", report))
            if seed == 0:
                words = [*words, "mode=diagnose", f"cache.dir={o.runs / 'cache'}", f"out={diagnosis}"]
                work.append((f"{arm}, diagnosis", words, run / "diagnosis.log", diagnosis))
    each(o.jobs, work)


def reports(o, arm: str) -> list[dict]:
    """Every seed's. They must be there, and judged alike."""
    paths = [o.runs / arm / f"seed{seed}/report/report.json" for seed in range(o.seeds)]
    if absent := [str(path) for path in paths if not path.exists()]:
        sys.exit(f"error: {absent[0]} is missing; say `judge` again")
    return [json.loads(path.read_text()) for path in paths]


def counts(found: list[dict], temperature: str) -> np.ndarray:
    """[seeds, prompts, 2]: tokens emitted, rounds."""
    return np.array([report["temperatures"][temperature]["per_prompt"] for report in found], dtype=float)


def tau(counted: np.ndarray) -> float:
    emitted, steps = counted.reshape(-1, 2).sum(0)
    return emitted / steps


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # by the number of seeds: 97.5% quantiles


def interval(statistic, *arms: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of several arms' counts: 95%, for other seeds and other prompts.

    Two errors, added in quadrature: that of the seeds, Student's interval over the statistic of each seed (4.30 standard errors
    for three seeds), and that of the prompts, a bootstrap over prompts with all seeds kept. The seeds' error has some of the
    prompts' in it, so that the interval is rather too wide than too narrow. One seed: the prompts' alone.
    """
    value = statistic(*arms)
    (seeds, prompts) = arms[0].shape[:2]
    rng = np.random.default_rng(0)
    draws = (rng.integers(prompts, size=prompts) for _ in range(1000))
    error = 1.96 * np.std([statistic(*(arm[:, draw] for arm in arms)) for draw in draws])
    if seeds > 1:
        each_seed = [statistic(*(arm[[seed]] for arm in arms)) for seed in range(seeds)]
        error = np.hypot(error, STUDENT.get(seeds, 2.3) * np.std(each_seed, ddof=1) / np.sqrt(seeds))
    return value, value - error, value + error


def gain(arm: np.ndarray, control: np.ndarray) -> float:
    return tau(arm) - tau(control)


def difference(block: np.ndarray, block_control: np.ndarray, step: np.ndarray, step_control: np.ndarray) -> float:
    return gain(block, block_control) - gain(step, step_control)


HEADS = ["arm", "parameters", "GFLOP an anchor", "tau T=1", "tau T=0", "acceptance by slot, T=1"]
HEADS += ["control", "gain at T=1", "verdict"]
HEADS += ["seed 0, held-out tau", "zero memory", "another's memory", "oracle queries", "draft ms"]
ACCEPTANCE = ("trained", "zero_memory", "other_memory", "oracle_queries")  # of the diagnosis
Counts = dict[tuple[str, str], np.ndarray]  # {(arm, temperature): [seeds, prompts, 2]}


def table(o) -> None:
    """An arm and its control are compared on the same seeds and prompts."""
    # 1. Every report, all of them made alike.
    every = {arm: reports(o, arm) for arm in o.arms}
    settings = {json.dumps([r["prompts"], list(r["temperatures"])], sort_keys=True) for found in every.values() for r in found}
    if len(settings) > 1:
        sys.exit(
            "error: the reports were made with different prompts or temperatures; say `judge` again with one set of overrides"
        )
    found = {(arm, t): counts(every[arm], t) for arm in o.arms for t in ("1", "0")}

    # 2. A row for each arm, then the differences between gains.
    lines = [HEADS, ["---"] * len(HEADS)]
    for arm in o.arms:
        diagnosis = json.loads((o.runs / arm / "seed0/diagnosis/diagnostics.json").read_text())
        lines.append(_row(arm, every[arm], diagnosis, found))
    lines += _contrasts(o.arms, found)

    # 3. The table and the picture.
    text = "\n".join("| " + " | ".join(cells) + " |" if cells else "" for cells in lines)
    (o.runs / "compare.md").write_text(text + "\n")
    print(text)
    draw({arm: interval(tau, found[arm, "1"]) for arm in o.arms}, o.runs / "compare.png")


def _row(arm: str, every: list[dict], diagnosis: dict, found: Counts) -> list[str]:
    """An arm's cells under `HEADS`."""
    cells = [arm, f"{every[0]['drafter']['parameters'] / 1e6:.2f}M", f"{diagnosis['compute']['gflop_per_anchor']:.2f}"]
    for t in ("1", "0"):
        value, low, high = interval(tau, found[arm, t])
        cells.append(f"**{value:.2f}** [{low:.2f}, {high:.2f}]")
    conditional = zip(*(report["temperatures"]["1"]["conditional"] for report in every))
    cells.append(" ".join(f"{np.mean(seeds):.2f}" for seeds in conditional))

    control = ARMS[arm][0]
    if (control, "1") in found:
        value, low, high = interval(gain, found[arm, "1"], found[control, "1"])
        verdict = "beats it" if low > 0 else "WORSE" if high < 0 else "no difference shown"
        cells += [control, f"{value:+.2f} [{low:+.2f}, {high:+.2f}]", verdict]
    else:
        cells += ["", "", ""]

    acceptance = {name: kinds["sampled"]["tau"] for name, kinds in diagnosis["acceptance"].items()}
    cells += [f"{acceptance[name]:.2f}" if name in acceptance else "" for name in ACCEPTANCE]
    draft_ms = np.mean([report["temperatures"]["1"]["round_ms"]["draft"] for report in every])
    return [*cells, f"{draft_ms:.1f}"]


def _contrasts(arms: list[str], found: Counts) -> list[list[str]]:
    """A table below the first one, of those contrasts whose arms are all there."""
    held = {name: four for name, four in CONTRASTS.items() if set(four) <= set(arms)}
    if not held:
        return []
    lines = [[], ["difference of gains at T=1", "block-wise", "ttt", "difference"], ["---"] * 4]
    for name, four in held.items():
        counted = [found[arm, "1"] for arm in four]
        value, low, high = interval(difference, *counted)
        gains = [f"{gain(*counted[:2]):+.2f}", f"{gain(*counted[2:]):+.2f}"]
        lines.append([name, *gains, f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"])
    return lines


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
