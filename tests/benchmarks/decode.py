"""Rounds a second, and where a round's time goes; plain decoding against transformers' compiled `generate`; SpecPV's rounds
against full verification's and plain decoding's; drafting under a budget against drafting behind the shortest context.

    python -m tests.benchmarks.decode what=rounds shape=tiny
    python -m tests.benchmarks.decode what=products shape=smollm2
    python -m tests.benchmarks.decode what=rounds shape=qwen3_8b contexts=[2048,16384,32768]
    python -m tests.benchmarks.decode what=partial shape=qwen3_8b contexts=[8192,32768] batches=[1,8]
    python -m tests.benchmarks.decode what=views contexts=[64,192] budget=96
    python -m tests.benchmarks.decode what=views shape=smollm2 contexts=[256,4096,8192]
    python -m tests.benchmarks.decode what=views shape=qwen3_8b contexts=[256,8192,32768]

Drafters begin as the target's layers and are not trained: what a round costs does not depend on what it accepts.

Shapes: B requests, T rows of each.
"""

import time
from itertools import product
from statistics import median

import torch
from omegaconf import OmegaConf

from common.recipe import ROOT
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.sampling import Sampling
from data_prep.target.target import Target
from eval.caches.partial import PartialCache, PartialRecipe
from eval.engine.drafting import StaticLookup, StaticNobody, StaticTrained
from eval.engine.engine import Engine, Stopwatch, room_for
from eval.engine.lengths import Lengths
from eval.engine.request import Stops
from eval.engine.tree import TreeShape
from eval.engine.verification import Verification
from tests.benchmarks import line, options, target_of, timed
from train.drafter.base import Drafter
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.views.recipe import View


def drafter_of(target: Target, objective: str, reuse: str, slots: int) -> Drafter:
    a = target.architecture
    last = a.num_layers - 1
    spread = [1, a.num_layers // 2, a.num_layers - 3]
    config = DrafterConfig(
        objective=objective, reuse=reuse, target_layers=[last], hidden_layers=spread if reuse in ("hidden", "hybrid") else [],
        slots=slots, shifted=True, causal=False, seed=0, start="target", mask_token_id=2, architecture=a, target={},
    )  # fmt: skip
    target.capture(config.hidden_layers, config.kv_layers)
    return new_drafter(config).to(target.dtype).start(target, target.frozen_head).to(target.device)


def transformers_tokens_per_s(target: Target, prompt: list[int], new_tokens: int) -> float:
    """`generate` with a static cache, which it compiles on a GPU: seconds of a long run less those of a short one, which pays the
    same for the prompt."""
    ids = torch.tensor([prompt], device=target.device)
    options = dict(do_sample=False, cache_implementation="static", eos_token_id=None, pad_token_id=0)

    def seconds(count: int) -> float:
        times = []
        for _ in range(4):
            began = time.perf_counter()
            target.model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return median(times[1:])

    return (new_tokens - 8) / (seconds(new_tokens) - seconds(8))


def view_of(kind: str, o) -> View | None:
    """With the defaults of conf/view; full: None."""
    if kind == "full":
        return None
    defaults = OmegaConf.load(ROOT / f"conf/view/{kind}.yaml")
    return View(**{**defaults, "budget": o.budget, "refresh": o.refresh})


def propose_ms(engine: Engine, length: int, repeats: int = 50) -> float:
    """Of a proposal, and of the selection before it where every round has one; many in a row, so that no wait counts."""
    rounds = engine._rounds
    anchors = rounds.length_B.tolist()
    rounds.drafting.due(anchors)
    chooses = rounds.drafting.due(anchors)  # again, so that it is not for the first time

    @torch.no_grad()
    def proposals() -> None:
        for _ in range(repeats):
            if chooses:
                engine._graph(rounds.select, 0)()
            engine._graph(rounds.propose, length)()

    return median(timed(proposals, rounds.target.device) for _ in range(5)) / repeats


def compare_products(target: Target, context: int) -> None:
    """Forwards of a few rows behind `context` tokens on a CPU: weights as they stand, and laid out (`Target.compile`)."""
    base_B = torch.tensor([context])
    cache = StaticCache.of(target, 1, context + 16)
    as_they_stand = {}
    for laid_out in (False, True):
        if laid_out:
            target.compile()
        for rows in (1, 2, 4, 6):
            ids_BT = torch.full((1, rows), 5)
            position_BT = base_B[:, None] + torch.arange(rows)
            seconds = []
            for _ in range(15):
                began = time.perf_counter()
                target.logits(target.forward_through(ids_BT, position_BT, cache.attention(base_B, rows)).last_hidden)
                seconds.append(time.perf_counter() - began)
            milliseconds = 1e3 * median(seconds[3:])
            as_they_stand.setdefault(rows, milliseconds)
            ratio = round(milliseconds / as_they_stand[rows], 3)
            figures = {"ms": round(milliseconds, 2), "of_as_they_stand": ratio}
            line("decode products", laid_out=laid_out, rows=rows, context=context, **figures)


def round_ms(engine: Engine, missing: int | None = 0) -> dict[str, float]:
    """Milliseconds of one round of `engine`, the same again and again: no request is active, so that no length moves. `missing`:
    see `Rounds`."""
    device = engine._rounds.target.device
    times = []
    for _ in range(23):
        watch = Stopwatch(device.type == "cuda")
        total = timed(lambda: engine._round(engine.lengths.longest, False, missing, watch), device)
        times.append((total, *(1e3 * watch.seconds(kind) for kind in ("draft", "verify"))))
    return dict(zip(("round_ms", "draft_ms", "verify_ms"), map(median, zip(*times[3:]))))


@torch.no_grad()
def compare_partial(target: Target, drafting: StaticTrained, context: int, batch: int, o) -> None:
    """A plain step, a full round, a partial one, and full rounds that make good an interval. Nothing is read: caches hold random
    keys, and each round stands at `context`. What a round emits is not known, so that tau is what would equal plain decoding."""
    recipe = PartialRecipe(retrieval=o.retrieval, window=o.window, partial_tokens="adaptive")  # which has rounds of all intervals
    cache = StaticCache.of(target, batch, room_for(context, 1, o.length, recipe.longest_interval))
    part = PartialCache(cache, recipe, o.length + 1)

    def standing(drafting, length: int, partial: PartialCache | None = None) -> Engine:
        engine = Engine(target, drafting, cache, Lengths(length), Verification(Sampling(0.0), partial, audited=True))
        engine.reserve(1)
        rounds = engine._rounds
        rounds.begin([], 1, [])
        rounds.prefill([], 1)
        for block in cache.blocks:
            block.normal_()
        for counted_B in (rounds.length_B, rounds.exact_B):
            counted_B.fill_(context)
        if partial:
            partial.begin(rounds.length_B)
        return engine

    plain = round_ms(standing(StaticNobody(), 0))
    full = round_ms(standing(drafting, o.length))
    engine = standing(drafting, o.length, part)
    found = {"plain": plain, "full": full}
    for missing in engine.intervals.choices[1:]:  # the first of them takes the part
        found[f"full, makes good {missing}"] = round_ms(engine, missing)
    found[f"partial, {o.retrieval} chosen"] = round_ms(engine, None)
    for verify, figures in found.items():
        said = {"rounds_per_s": 1e3 / figures["round_ms"], "verify_of_full": figures["verify_ms"] / full["verify_ms"]}
        said["rounds_of_full"] = full["round_ms"] / figures["round_ms"]
        said["tau_of_plain"] = figures["round_ms"] / plain["round_ms"]
        rounded = {name: round(value, 3) for name, value in (figures | said).items()}
        about = {"length": 0 if verify == "plain" else o.length, "compiled": o.compile, "part_mib": round(part.nbytes / 2**20)}
        line("decode partial", verify=verify, context=context, batch=batch, **about, **rounded)


def main() -> None:
    o = options(
        what="rounds,transformers", shape="tiny", contexts=[256], new=64, batch=1, length=4, breadth=4, nodes=16, compile=True,
        eager=True, sampling=0.0, retrieval=4096, window=128, batches=[1], chunk=2048, who=["ttt kv", "ttt hidden"],
        views=["full", "sink_recent", "topk_chunk", "snapkv"], budget=256, refresh="verify",
    )  # fmt: skip
    target = target_of(o.shape, "sdpa")
    if o.what == "products":
        compare_products(target, o.contexts[0])
        return
    a = target.architecture
    on_gpu = target.device.type == "cuda"
    sampling = Sampling(o.sampling)
    generator = torch.Generator().manual_seed(0)
    head = target.frozen_head
    drafters = {
        "ttt kv": lambda view=None: StaticTrained(drafter_of(target, "ttt", "kv", o.length), head, view=view),
        "ttt hidden": lambda view=None: StaticTrained(drafter_of(target, "ttt", "hidden", o.length), head, view=view),
        "block hybrid": lambda view=None: StaticTrained(drafter_of(target, "blockwise", "hybrid", o.length), head, view=view),
        "tree kv": lambda: StaticTrained(drafter_of(target, "ttt", "kv", o.length), head, tree=TreeShape(o.length, o.breadth)),
        "lookup": StaticLookup,
        "none": StaticNobody,
    }
    texts = {c: torch.randint(3, a.vocab_size, (o.batch, c), generator=generator).tolist() for c in o.contexts}
    references = dict.fromkeys(o.contexts)
    for context in o.contexts if "transformers" in o.what else []:  # before our own compilation, which it would go through
        references[context] = reference = transformers_tokens_per_s(target, texts[context][0], o.new)
        line("decode", who="transformers generate, static cache", context=context, batch=1, tokens_per_s=round(reference, 2))
    if o.compile:
        target.compile()
    for context, batch in product(o.contexts, o.batches) if "partial" in o.what else []:
        compare_partial(target, drafters["ttt kv"](), context, batch, o)
    short: dict[str, dict] = {}  # who drafts -> figures behind the first context, under no budget
    for context, prompts in texts.items() if "rounds" in o.what or "views" in o.what else []:
        reference = references[context]
        room = room_for(context, o.new, max(o.length, o.nodes))
        cache = StaticCache.of(target, o.batch, room)
        plain = None

        def run(who: str, graphs: bool, view: View | None = None) -> dict:
            length = {"none": 0, "tree kv": o.nodes}.get(who, o.length)
            verification = Verification(sampling)
            engine = Engine(
                target, drafters[who](view) if view else drafters[who](), cache, Lengths(length), verification, graphs=graphs,
                prefill_chunk=o.chunk,
            )  # fmt: skip
            runs = [engine.generate(prompts, o.new, list(range(o.batch)), Stops()) for _ in range(4)][1:]
            ms = lambda kind: median(1e3 * o.batch * getattr(r[0], f"{kind}_s") / len(r[0].rounds) for r in runs)
            total, draft, verify = ms("decode"), ms("draft"), ms("verify")
            rate = median(sum(len(g.tokens) - 1 for g in r) / sum(g.decode_s for g in r) for r in runs)
            tau = sum(g.emitted for g in runs[0]) / sum(len(g.rounds) for g in runs[0])
            figures = {
                "who": who, "graphs": graphs and on_gpu, "compiled": o.compile, "context": context,
                "batch": o.batch, "length": length, "temperature": o.sampling, "rounds_per_s": round(1e3 / total, 1),
                "draft_ms": round(draft, 3), "verify_ms": round(verify, 3),
                "overhead_share": round(1 - (draft + verify) / total, 4), "tokens_per_s": round(rate, 2), "tau": round(tau, 3),
                "prefill_s": round(median(o.batch * r[0].prefill_s for r in runs), 3),
            }  # fmt: skip
            if "views" in o.what:
                kv_mib = {f"{what}_mib": round(nbytes / 2**20, 3) for what, nbytes in runs[0][0].kv_bytes.items()}
                figures |= {"propose_ms": round(propose_ms(engine, length), 3), **kv_mib}
            return figures

        for graphs in ([True] + [False] * (on_gpu and o.eager)) if "rounds" in o.what else []:
            for who in reversed(drafters):
                figures = run(who, graphs)
                plain = plain or figures["tokens_per_s"]
                of_transformers = round(figures["tokens_per_s"] / reference, 3) if reference else None
                line("decode", **figures, of_plain=round(figures["tokens_per_s"] / plain, 3), of_transformers=of_transformers)
        for who in o.who if "views" in o.what else []:
            for kind in o.views:
                view = view_of(kind, o)
                figures = run(who, True, view=view)
                reference = short.setdefault(who, figures)  # the first view behind the first context
                ratio = lambda key: round(figures[key] / reference[key], 3)
                of_short = {"draft_of_short": ratio("draft_ms"), "propose_of_short": ratio("propose_ms")}
                said = {"budget": view.budget, "refresh": view.refresh} if view else {}
                line("decode views", shape=o.shape, view=kind, **said, **figures, short=reference["context"], **of_short)


if __name__ == "__main__":
    main()
