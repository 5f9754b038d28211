"""One drafter for every KV budget? A drafter trained under many budgets, against one that always saw everything and one for each
budget, judged at every budget and context: same cache, tokens, anchors, steps, loss and seeds.

    python launchers/budgets.py train RUNS [key=value ...]     capture long documents, then every arm and seed
    python launchers/budgets.py judge RUNS [key=value ...]     score and decode, each a sweep over budgets and contexts
    python launchers/budgets.py table RUNS                     RUNS/sweep.md and RUNS/sweep.png

Options: --jobs 1 (at a time), --seeds 3, --tokens 4000000 (of the cache), --contexts 4096,8192, --budgets 64,256,512,1024,2048,
--what score,decode (of judge), --arms a,b: full, paper, sandwich, only64, only256, ... over the target's own K/V (these are the
usual ones), projected_full, ... over projected K/V, lm_full, ... of the language model in --lm FOLDER (launchers/cut.py).
Overrides go to train/ or eval/main.py and win over an arm's; those of target, data, cache and capture go to the capture, too.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare import ROOT, each  # noqa: E402

SHARED = """loss=kl objective.slots=5 objective.anchors=64 train.lr=2e-3 train.batch=1
    train.max_steps=700 train.save_every=700 train.log_every=100 train.validation_documents=12 train.diagnose=false""".split()
# What drafters read, by what the names of their arms begin with.
READING = {
    "": "reuse=kv drafter.layers=2".split(),
    "projected_": "reuse=kv drafter.layers=2 reuse.source=projected_rope drafter.start=random drafter.qk_norm=false".split(),
    "lm_": ["reuse=none"],
}
VIEW = ["view=topk_chunk", "view.recent=32"]  # a window that leaves room to choose at the smallest budget


def arms_of(budgets: list[int]) -> dict[str, list[str]]:
    sparse = ["objective=budgetdraft", *VIEW]
    found = {"full": ["objective=ttt"], "paper": [*sparse, "objective.budgets=paper"]}
    found["sandwich"] = [*sparse, f"objective.smallest={min(budgets)}", f"objective.largest={max(budgets)}"]
    found |= {f"only{b}": [*sparse, f"view.budget={b}"] for b in budgets}
    return {prefix + name: [*reads, *words] for prefix, reads in READING.items() for name, words in found.items()}


def train(o) -> None:
    longest = max(o.contexts) + 256
    cache = f"cache.dir={o.runs / 'cache'}"
    capture = [str(ROOT / "data_prep/main.py"), "data.long=join", f"data.max_length={longest}", f"data.max_tokens={o.tokens}"]
    named = [word for word in o.overrides if word.startswith(("target", "data", "cache", "capture"))]
    each(1, [("capture", [*capture, "cache.kinds=[kv]", *named, cache], o.runs / "capture.log", None)])
    cached = [cache, "cache.on_missing=fail"]  # it is there, and `data=` among the overrides would ask for one of all the data
    known = arms_of(o.budgets)
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            own = [f"train.pack_tokens={longest}", f"train.seed={seed}"]
            own += [f"drafter.lm={o.lm}"] * arm.startswith("lm_")
            words = [str(ROOT / "train/main.py"), *known[arm], *SHARED, *own, *o.overrides, *cached, f"run.dir={run}"]
            work.append((f"{arm}, seed {seed}", words, run.with_suffix(".log"), None))
    each(o.jobs, work)


def judge(o) -> None:
    sweep = [*VIEW, f"view.budget={','.join(map(str, [*o.budgets, 0]))}"]
    contexts = ",".join(map(str, o.contexts))
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            words = [str(ROOT / "eval/main.py"), "-m", f"drafter={run / 'checkpoints/last'}", *sweep]
            score = [*words, "mode=score", f"cache.dir={o.runs / 'cache'}", "score.new_tokens=256", "score.anchors=64"]
            score.append(f"score.context={contexts}")
            decode = [*words, f"suite.prompt_tokens={contexts}", "data.long=join"]
            decode.append(f"controls={str(seed == 0 and arm.endswith('sandwich')).lower()}")
            for name, one in (("score", score), ("decode", decode)):
                out = run / name
                if name in o.what:
                    work.append((f"{arm}, seed {seed}, {name}", [*one, *o.overrides, f"out={out}"], run / f"{name}.log", out))
    each(o.jobs, work)


def table(o) -> None:
    from common.cli import fail
    from common.errors import UserError
    from eval.reports import sweep

    try:
        sweep.gather([o.runs / arm for arm in o.arms], o.runs)
    except UserError as error:
        fail(error)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    words = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in words(text)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "judge", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--arms", type=words)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--what", type=words, default=["score", "decode"])
    parser.add_argument("--contexts", type=numbers, default=[4096, 8192])
    parser.add_argument("--budgets", type=numbers, default=[64, 256, 512, 1024, 2048])
    parser.add_argument("overrides", nargs="*")
    o = parser.parse_intermixed_args()
    known = arms_of(o.budgets)
    o.arms = o.arms or [arm for arm in known if "_" not in arm]
    o.runs = o.runs.absolute()
    o.lm = o.lm and o.lm.absolute()
    if unknown := sorted(set(o.arms) - set(known)):
        parser.error(f"no arm is called {', '.join(unknown)}; there are {', '.join(known)}")
    if set(o.what) - {"score", "decode"}:
        parser.error(f"--what {','.join(o.what)}: judge scores and decodes, score,decode")
    if o.stage == "train" and not o.lm and any(arm.startswith("lm_") for arm in o.arms):
        parser.error("arms of a language model need --lm FOLDER")
    {"train": train, "judge": judge, "table": table}[o.stage](o)


if __name__ == "__main__":
    main()
