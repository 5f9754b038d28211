"""Does block-wise training realise the potential of KV reuse? All arms of the comparison: same cache, tokens, anchors, drafted
tokens, depth, loss and seeds; each arm against its control; tables with 95% intervals.

    python launchers/compare.py train RUNS [key=value ...]     capture, then every arm and seed (those that are finished are kept)
    python launchers/compare.py judge RUNS [key=value ...]     score and decode with every drafter; diagnose the first seed's
    python launchers/compare.py table RUNS                     RUNS/compare.md of what is judged, compare.png and decay.png

Options: --jobs 1 (at a time), --seeds 3, --arms a,b, --tokens 2000000 (of the cache), --slots 5 (drafted tokens), --decay 0.8
(slot j weighs 0.8^(j-1) in every arm; without it, as its recipe says), --what score,decode,diagnose (of judge). Overrides go to
train/ or eval/main.py, those of target, data, cache and capture also to the capture; the arms need as many cached layers as
drafter.layers, and those that they name.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compared import REPORTS, table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# As many drafted tokens in every arm. The first slot of a block drafts nothing, unless blocks are shifted.
TTT = SHIFTED = "objective.slots={slots}"
SAME = "objective.slots={block}"
# What every arm shares. One loss for all, so that the arms differ in what their names say.
SHARED = """
    loss.ce=0 loss.tv=0 loss.kl=1 objective.anchors=64
    drafter.layers=2 drafter.vocabulary=null drafter.own_head=false drafter.qk_norm=null
    train.lr=2e-3 train.batch=1 train.pack_tokens=4096 train.max_steps=1000 train.save_every=1000 train.log_every=100
    train.validation_documents=128
""".split()
# {last}, {before} and {middle} are layers of the target.
NATIVE = ["experiment=kvshot_kv", "reuse.source=native", TTT]  # the target's K/V in place; of the first and the last layer
QUERIES = ["experiment=query_only", TTT]  # queries alone over the target's cache
HALVES = [*QUERIES, "drafter.target_layers=[{middle},{last}]"]
ALIGNED = ["experiment=blockwise_native_aligned", SAME]  # weights of 0.1
# name: (its control, overrides)
ARMS = {
    "ttt_none": (None, ["experiment=eagle3", "reuse=none", TTT]),
    "eagle3": ("ttt_none", ["experiment=eagle3", TTT]),
    "kvshot_kv": ("eagle3", ["experiment=kvshot_kv", TTT]),
    "kvshot_hybrid": ("eagle3", ["experiment=kvshot_hybrid", TTT]),
    "ttt_native_random": ("kvshot_kv", NATIVE),
    "ttt_native_last": ("ttt_native_random", [*NATIVE, "drafter.target_layers=[{last},{last}]"]),
    "ttt_native_last_two": ("ttt_native_random", [*NATIVE, "drafter.target_layers=[{before},{last}]"]),
    "ttt_native_halves": ("ttt_native_random", [*NATIVE, "drafter.target_layers=[{middle},{last}]"]),
    "ttt_native": ("ttt_native_random", [*NATIVE, "drafter.start=target"]),
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
    "blockwise_native_aligned": ("blockwise_native", ALIGNED),
    "blockwise_native_aligned_1": ("blockwise_native", [*ALIGNED, "loss.kv_align=1", "loss.query_align=1"]),
    "blockwise_native_aligned_10": ("blockwise_native", [*ALIGNED, "loss.kv_align=10", "loss.query_align=10"]),
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
        named = [word.removeprefix("drafter=").strip("'") for word in words if word.startswith("drafter=")]
        weights = [Path(path) / "model.safetensors" for paths in named for path in paths.split("','")]
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

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        if any(list(pool.map(one, work))):
            sys.exit("error: some of the runs failed; say the same command again once their logs are understood")


def train(o) -> None:
    cache = [f"cache.dir={o.runs / 'cache'}"]
    about = [word for word in o.overrides if word.startswith(("target", "data", "cache", "capture"))]  # what the cache is made of
    capture = [str(ROOT / "data_prep/main.py"), "cache.kinds=[hidden,kv,query]", f"data.max_tokens={o.tokens}", *about, *cache]
    each(1, [("capture", capture, o.runs / "capture.log", None)])
    target = json.loads((o.runs / "cache/manifest.json").read_text())["target"]
    last = target["architecture"]["num_layers"] - 1
    known = {"last": last, "before": last - 1, "middle": last // 2, "slots": o.slots, "block": o.slots + 1}
    cache.append("cache.on_missing=fail")  # it is there, and `data=` among the overrides would ask for one of all the data
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            named = [word.format(**known) for word in ARMS[arm][1]]
            words = [*named, *SHARED, *decay(o, named), f"train.seed={seed}", *o.overrides, *cache, f"run.dir={run}"]
            work.append((f"{arm}, seed {seed}", [str(ROOT / "train/main.py"), *words], run.with_suffix(".log"), None))
    each(o.jobs, work)


def decay(o, named: list[str]) -> list[str]:
    """What makes slot j weigh R^(j-1): blocks read it as exp(-(j-1)/decay)."""
    if o.decay is None:
        return []
    rate = min(o.decay, 1 - 1e-9)
    blocks = named[0].startswith(("experiment=dflash", "experiment=dspark", "experiment=blockwise"))
    return [f"objective.decay={-1 / math.log(rate) if blocks else rate}"]


def judge(o) -> None:
    """A process for each arm and judgement takes one seed after the other: to start one costs as much as a small judgement."""
    cache = f"cache.dir={o.runs / 'cache'}"
    said = {"score": ["mode=score", cache], "decode": ["controls=false"], "diagnose": ["mode=diagnose", cache]}
    work = []
    for what in o.what:
        for arm in o.arms:
            seeds = range(1 if what == "diagnose" else o.seeds)
            drafters = ",".join(f"'{o.runs / arm / f'seed{seed}/checkpoints/last'}'" for seed in seeds)
            out = o.runs / arm / what
            words = [str(ROOT / "eval/main.py"), "-m", f"drafter={drafters}", *said[what], *o.overrides, f"out={out}"]
            work.append((f"{arm}, {what}", words, out.with_suffix(".log"), out))
    each(o.jobs, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "judge", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--slots", type=int, default=5)
    parser.add_argument("--decay", type=float)
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--what", type=lambda text: text.split(","), default=list(REPORTS))
    parser.add_argument("overrides", nargs="*")
    o = parser.parse_intermixed_args()
    if o.decay is not None and not 0 < o.decay <= 1:
        parser.error(f"--decay {o.decay:g}: slots weigh decay^(j-1), above 0 and up to 1")
    if unknown := sorted(set(o.arms) - set(ARMS)):
        parser.error(f"no arm is called {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if unknown := sorted(set(o.what) - set(REPORTS)):
        parser.error(f"no judgement is called {', '.join(unknown)}; there are {', '.join(REPORTS)}")
    o.runs = o.runs.absolute()
    o.controls = {arm: ARMS[arm][0] for arm in o.arms}
    {"train": train, "judge": judge, "table": table}[o.stage](o)


if __name__ == "__main__":
    main()
