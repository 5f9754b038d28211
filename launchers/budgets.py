"""One drafter for every KV budget? A drafter trained under many budgets, against one that always saw everything and one for each
budget, judged at every budget and context: same cache, tokens, anchors, steps, loss and seeds.

    python launchers/budgets.py train RUNS [key=value ...]     capture long documents, then every arm and seed
    python launchers/budgets.py judge RUNS [key=value ...]     score and decode, each a sweep over budgets and contexts
    python launchers/budgets.py table RUNS                     RUNS/sweep.md and RUNS/sweep.png

Options: --jobs 1 (at a time), --seeds 3, --arms a,b, --tokens 4000000 (of the cache), --contexts 4096,8192,
--budgets 64,256,512,1024,2048. Overrides go to train/ or eval/main.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare import ROOT, each  # noqa: E402

SHARED = """reuse=kv loss=kl objective.slots=5 objective.anchors=64 drafter.layers=2 train.lr=2e-3 train.batch=1
    train.max_steps=700 train.save_every=700 train.log_every=100 train.validation_documents=12 train.diagnose=false""".split()
VIEW = ["view=topk_chunk", "view.recent=32"]  # a window that leaves room to choose at the smallest budget


def arms_of(budgets: list[int]) -> dict[str, list[str]]:
    sparse = ["objective=budgetdraft", *VIEW]
    found = {"full": ["objective=ttt"], "paper": [*sparse, "objective.budgets=paper"]}
    found["sandwich"] = [*sparse, f"objective.smallest={min(budgets)}", f"objective.largest={max(budgets)}"]
    return found | {f"only{b}": [*sparse, f"view.budget={b}"] for b in budgets}


def train(o) -> None:
    longest = max(o.contexts) + 256
    cache = f"cache.dir={o.runs / 'cache'}"
    capture = [str(ROOT / "data_prep/main.py"), "data.long=join", f"data.max_length={longest}", f"data.max_tokens={o.tokens}"]
    named = [word for word in o.overrides if word.startswith(("target", "data", "cache", "capture"))]
    each(1, [("capture", [*capture, "cache.kinds=[kv]", *named, cache], o.runs / "capture.log", None)])
    work = []
    for seed in range(o.seeds):
        for arm in o.arms:
            run = o.runs / arm / f"seed{seed}"
            own = [f"train.pack_tokens={longest}", f"train.seed={seed}"]
            words = [*arms_of(o.budgets)[arm], *SHARED, *own, *o.overrides]
            words = [str(ROOT / "train/main.py"), *words, cache, f"run.dir={run}"]
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
            decode.append(f"controls={str(seed == 0 and arm == 'sandwich').lower()}")
            for name, one in (("score", score), ("decode", decode)):
                out = run / name
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
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "judge", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--arms", type=lambda text: text.split(","))
    parser.add_argument("--contexts", type=numbers, default=[4096, 8192])
    parser.add_argument("--budgets", type=numbers, default=[64, 256, 512, 1024, 2048])
    parser.add_argument("overrides", nargs="*")
    o = parser.parse_intermixed_args()
    known = arms_of(o.budgets)
    o.arms = o.arms or list(known)
    o.runs = o.runs.absolute()
    if unknown := sorted(set(o.arms) - set(known)):
        parser.error(f"no arm is called {', '.join(unknown)}; there are {', '.join(known)}")
    {"train": train, "judge": judge, "table": table}[o.stage](o)


if __name__ == "__main__":
    main()
