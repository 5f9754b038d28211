"""`mode=decode`: everyone who drafts, side by side on the same prompts, and what plain decoding does with them."""

import resource
from statistics import mean
from typing import NamedTuple

import torch

from common.errors import UserError
from data_prep.capture.build import say_how_long
from data_prep.decoding.attention import has_flash
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.products import lay_out
from data_prep.decoding.sampling import Sampling
from data_prep.target.loading import load_tokenizer
from data_prep.target.target import Target
from eval.caches.budgeted import KINDS
from eval.caches.offload import OffloadedCache
from eval.caches.partial import PartialCache
from eval.engine.drafting import StaticDrafting, StaticLookup, StaticNobody, StaticTrained
from eval.engine.engine import PREFILL_CHUNK, Engine, room_for
from eval.engine.lengths import lengths_of
from eval.engine.one_by_one import OneByOne
from eval.engine.request import Stops
from eval.engine.verification import Verification
from eval.judging import lossless, measure
from eval.judging.controls import OtherMemory, zero_memory
from eval.judging.session import Session
from eval.oracle.decode import Generation
from eval.oracle.drafting import Trained
from eval.prompts.suites import Prompt
from eval.recipe import EvalRecipe, known_positions, prompts_of, view_of
from eval.reports import report
from eval.reports.answers import Answers
from train.attention.choose import attention_backend
from train.drafter.base import Drafter
from train.drafter.build import new_drafter

FULLY = "full_verification"  # the trained drafter again, verified over the whole cache


def contenders(recipe: EvalRecipe, target: Target, drafter: Drafter, other: OtherMemory) -> dict[str, StaticDrafting]:
    """Who drafts: nobody, the trained drafter, and the controls, all under one view."""
    head = target.frozen_head
    view = view_of(recipe, drafter.config)
    tree = recipe.tree(drafter.config)
    attend = attention_backend(recipe.attention, target.device, training=False)

    def make(who: Drafter, change=None) -> StaticDrafting:
        if head.product.is_laid_out:
            lay_out(who)
        if view is None or view.kind in KINDS:
            return StaticTrained(who, head, change, tree, view)

        def one(b: int) -> Trained:
            return Trained(who, head, attend, view, change.of(b) if change is other else change)

        return OneByOne(recipe.batch, one)

    found = {"baseline": StaticNobody(), "trained": make(drafter)}
    if recipe.verify.partial:
        found[FULLY] = make(drafter)
    if recipe.controls:
        kept_D = drafter.head.kept_D
        counts_V = None if kept_D is None else torch.zeros(len(head.head_VE)).index_fill_(0, kept_D.cpu(), 1)
        try:
            untrained = new_drafter(drafter.config).to(target.device, target.dtype).start(target, head, counts_V)
            found["untrained"] = make(untrained)
        except UserError as error:  # the language model that it began as is no longer there
            print(f"the report has no untrained drafter: {error}")
        found["prompt_lookup"] = StaticLookup()
    if recipe.controls and drafter.config.reuse != "none":
        found |= {"zero_memory": make(drafter, zero_memory), "shuffled_memory": make(drafter, other)}
    return found


def judge(recipe: EvalRecipe, target: Target, drafter: Drafter, answers: Answers) -> dict:
    """The figures of report.json. Every answer is written down in `answers` as it comes."""
    # 1. What is asked, who answers, and in which caches.
    tokenizer = load_tokenizer(target.path, target.revision, target.trust_remote_code)
    prompts, asked = prompts_of(recipe, drafter.config, tokenizer)
    stops = Stops(target.end_tokens, tuple(recipe.stop), tokenizer)
    longest = recipe.longest(drafter.config)
    caches = _caches(recipe, target, asked, longest)
    other = OtherMemory(recipe.batch, caches.room)
    if recipe.compile:
        target.compile()
    everyone = contenders(recipe, target, drafter, other)
    _say_how_long(recipe, target, prompts, asked, len(everyone))
    result = _described(recipe, target, caches, everyone["trained"].graphs and target.graphs) | {
        "prompts": asked | {"seed": recipe.seed},
        "temperatures": {},
        "examples": {},
    }

    # 2. Everyone's answers at each temperature, whether they are lossless, and the figures.
    with report.progress() as progress:
        task = progress.add_task("decode", total=len(recipe.temperatures) * asked.get("conversation_turns", len(prompts)))
        for temperature in recipe.temperatures:
            sampling = Sampling(temperature, recipe.top_p, recipe.top_k)
            engines: dict[str, Engine] = {}
            # All engines before the first answer: none of them reserves memory while another is timed.
            for name, drafting in everyone.items():
                engines[name] = _engine(recipe, target, drafter, name, drafting, caches, sampling)
                engines[name].reserve(asked["max_new_tokens"])
            session = Session(recipe, target, engines, sampling, stops, other)
            session.warm_up(prompts, asked)
            runs = session.runs

            def told(count: int, tau: float, session=session, temperature=temperature) -> None:
                last = {name: generations[-count:] for name, generations in session.runs.items()}
                answers.write(temperature, session.requests[-count:], last)
                progress.update(task, advance=count, tau=tau)

            session.ask(prompts, asked["max_new_tokens"], told)
            texts = [p.tokens for p in session.requests]
            ids = [p.id for p in session.requests]  # its conversation's
            batches = lossless.Batches(session.groups, caches.cache, PREFILL_CHUNK)
            verdict = lossless.decide(recipe, target, texts, ids, runs, sampling, batches)
            with target.uncompiled():
                parts = parts_of(recipe, drafter, session.requests, runs["baseline"])
                found = figures(recipe, target, texts, runs, sampling, parts)
            result["temperatures"][f"{temperature:g}"] = found | verdict | {"per_prompt_id": ids}
            result["examples"][f"{temperature:g}"] = measure.examples(texts, runs["trained"], tokenizer)

    # 3. Memory.
    result["drafter_kv"] = measure.kv_mib(runs["trained"])
    result["peak_gib"] = _peak_gib(target)
    return result


def _say_how_long(recipe: EvalRecipe, target: Target, prompts: list[Prompt], asked: dict, contenders: int) -> None:
    """Long prompts take hours on a CPU, and nothing else would be heard of them before the first is done."""
    lengths = [len(p.tokens) for p in prompts]
    tokens = sum(lengths) + asked["warmup"] * sum(lengths[: recipe.batch])
    tokens += asked.get("conversation_turns", len(prompts)) * asked["max_new_tokens"]
    say_how_long(target, len(recipe.temperatures) * contenders * tokens, PREFILL_CHUNK, context=mean(lengths) / 2)


class _Caches(NamedTuple):
    """The target's caches, which all engines share, one at a time."""

    room: int  # places of a request
    cache: StaticCache  # the one that is judged; on the host where verification offloads it
    whole: StaticCache  # on the device, of those who are verified over all of it
    part: PartialCache | None


def _caches(recipe: EvalRecipe, target: Target, asked: dict, longest: int) -> _Caches:
    partial = recipe.verify.partial
    limit = asked["max_new_tokens"]
    room = room_for(asked["positions"] - limit, limit, longest, partial.longest_interval if partial else 0)
    whole = StaticCache.of(target, recipe.batch, room)
    cache = OffloadedCache.of(target, recipe.batch, room) if recipe.verify.offload else whole
    return _Caches(room, cache, whole, PartialCache(cache, partial, longest + 1) if partial else None)


def _described(recipe: EvalRecipe, target: Target, caches: _Caches, has_graphs: bool) -> dict:
    """How verification and the engine were set."""
    on_gpu = target.device.type == "cuda"
    part = caches.part
    return {
        "verify": recipe.verify.model_dump() if recipe.verify.partial else "full",
        "engine": {
            **{name: getattr(recipe, name) for name in ("batch", "top_p", "top_k")},
            "graphs": recipe.graphs and on_gpu and has_graphs,
            "compile": recipe.compile and (on_gpu or target.frozen_head.product.is_laid_out),
            "stop": list(recipe.stop),
            "draft": recipe.draft.model_dump(),
            "attention": _kernels(caches.whole),
            "target_kv_mib": caches.cache.nbytes / 2**20,
            "partial_kv_mib": part.nbytes / 2**20 if part else None,
        },
    }


def _kernels(cache: StaticCache) -> str:
    """What reads it; of a Gemma 4 the larger heads may be too large for flash-attn."""
    has = {has_flash(block) for block in cache.blocks}
    return " and ".join(name for name, one in (("flash-attn", True), ("dense", False)) if one in has)


def _engine(
    recipe: EvalRecipe,
    target: Target,
    drafter: Drafter,
    name: str,
    drafting: StaticDrafting,
    caches: _Caches,
    sampling: Sampling,
) -> Engine:
    """The engine of one contender."""
    length = 0 if name == "baseline" else recipe.longest(drafter.config)
    if name == "prompt_lookup":  # no tree
        length = min(length, drafter.config.draft_length)
    # Each contender has lengths of its own: adaptive ones are learned from its own rounds.
    lengths = lengths_of(recipe.draft.length, length)
    if caches.part is None or name in ("baseline", FULLY):
        return Engine(target, drafting, caches.whole, lengths, Verification(sampling), graphs=recipe.graphs)
    verification = Verification(sampling, caches.part, audited=recipe.verify.kind == "partial_audited")
    return Engine(target, drafting, caches.cache, lengths, verification, graphs=recipe.graphs)


def _peak_gib(target: Target) -> float:
    """The most memory: of the GPU, or on a CPU of the process."""
    if target.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # KiB, on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parts_of(recipe: EvalRecipe, drafter: Drafter, requests: list[Prompt], baseline: list[Generation]) -> dict[str, list[str]]:
    """{figure: the part that each request belongs to}, of the figures that are shown apart for parts of the requests."""
    found = {}
    known = known_positions(recipe, drafter.config)
    if any(p.category is not None for p in requests):
        found["by_category"] = [recipe.suite.kind_of(p.category) for p in requests]
    if known is not None:
        last = [len(p.tokens) + len(g.tokens) - 2 + drafter.config.slots for p, g in zip(requests, baseline)]  # its draft's end
        if max(last) > known:
            found["by_positions"] = [f"{'beyond' if one > known else 'within'} {known} positions" for one in last]
    return found


def figures(
    recipe: EvalRecipe,
    target: Target,
    prompts: list[list[int]],
    runs: dict[str, list[Generation]],
    sampling: Sampling,
    parts: dict[str, list[str]],
) -> dict:
    """One temperature's part of report.json. `parts`: see `parts_of`."""
    plain = ("baseline", "transformers")
    along = measure.by_context({name: generations for name, generations in runs.items() if name not in plain})

    def one(name: str) -> dict:
        generations = runs[name]
        found = measure.acceptance(generations)
        micro, macro = measure.tau(generations)
        return {
            "tau_micro": micro,
            "tau_macro": macro,
            "per_prompt": [[g.emitted, len(g.rounds)] for g in generations],  # tokens emitted, rounds
            "per_prompt_s": measure.per_prompt_s(generations),
            "by_context": along[name],
            "joint": found.joint,
            "conditional": found.conditional,
            "tokens_per_s": measure.tokens_per_s(generations, prefill=False),
            "round_ms": measure.round_ms(generations),
            **{name: measure.by_part(generations, runs["baseline"], part) for name, part in parts.items()},
        }

    baseline = runs["baseline"]
    trained = runs["trained"]
    result = one("trained")
    result["baseline_tokens_per_s"] = measure.tokens_per_s(baseline, prefill=False)
    result["baseline_per_prompt_s"] = measure.per_prompt_s(baseline)
    result["baseline_round_ms"] = measure.round_ms(baseline)
    if "transformers" in runs:
        result["transformers_tokens_per_s"] = measure.tokens_per_s(runs["transformers"], prefill=False)
    result["speedup_decode"] = result["tokens_per_s"] / result["baseline_tokens_per_s"]
    result["speedup_end_to_end"] = measure.tokens_per_s(trained, prefill=True) / measure.tokens_per_s(baseline, prefill=True)
    if any(g.rollbacks for g in trained):
        result["rollbacks"] = {"count": sum(g.rollbacks for g in trained), "tokens": sum(g.undone for g in trained)}
    if recipe.verify.partial:
        result["interval"] = mean(g.interval for g in trained)
    if recipe.verify.kind == "partial":
        result["divergence"] = measure.divergence(target, prompts, trained, runs[FULLY], sampling)
    result["repetition"] = measure.repetition(trained)
    result["controls"] = {name: one(name) for name in runs if name not in (*plain, "trained")}
    return result
