"""`mode=decode`: everyone who drafts, side by side on the same prompts, and what plain decoding does with them."""

import resource

import torch

from common.errors import UserError
from data_prep.decoding.attention import has_flash
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.products import lay_out
from data_prep.decoding.sampling import Sampling
from data_prep.target.target import Target, load_tokenizer
from eval.caches.offload import OffloadedCache
from eval.caches.partial import PartialCache
from eval.engine.drafting import StaticDrafting, StaticLookup, StaticNobody, StaticTrained
from eval.engine.engine import PREFILL_CHUNK, Engine, room_for
from eval.engine.lengths import lengths_of
from eval.engine.one_by_one import OneByOne
from eval.engine.request import Stops
from eval.judging import lossless, measure
from eval.judging.baseline import Transformers
from eval.judging.controls import OtherMemory, zero_memory
from eval.oracle.decode import Generation
from eval.oracle.drafting import Trained
from eval.prompts.suites import Prompt
from eval.recipe import EvalRecipe, known_positions, prompts_of, view_of
from eval.reports import report
from train.attention.choose import attention_backend
from train.drafter.base import Drafter
from train.drafter.build import new_drafter

FULLY = "full_verification"  # the trained drafter again, verified over the whole cache


def contenders(recipe: EvalRecipe, target: Target, drafter: Drafter, other: OtherMemory) -> dict[str, StaticDrafting]:
    """Who drafts: nobody, the trained drafter, and the controls, all under one view."""
    head, view, tree = target.frozen_head, view_of(recipe, drafter.config), recipe.tree(drafter.config)
    attend = attention_backend(recipe.attention, target.device, training=False)

    def make(who: Drafter, change=None) -> StaticDrafting:
        if head.product.is_laid_out:
            lay_out(who)
        if view is None:
            return StaticTrained(who, head, change, tree)
        of = lambda b: change.of(b) if change is other else change
        return OneByOne(recipe.batch, lambda b: Trained(who, head, attend, view, of(b)))

    found = {"baseline": StaticNobody(), "trained": make(drafter)}
    if recipe.verify.kind == "partial":
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


def judge(recipe: EvalRecipe, target: Target, drafter: Drafter) -> dict:
    """The figures of report.json."""
    tokenizer = load_tokenizer(target.path, target.revision)
    prompts, asked = prompts_of(recipe, drafter.config, tokenizer)
    limit, a = asked["max_new_tokens"], target.architecture
    stops = Stops(target.end_tokens, tuple(recipe.stop), tokenizer)
    partial, longest = recipe.verify.partial, recipe.longest(drafter.config)
    room = room_for(asked["positions"] - limit, limit, longest, partial.partial_tokens if partial else 0)
    kind = OffloadedCache if recipe.verify.offload else StaticCache
    sizes = (a.num_layers, recipe.batch, room, a.kv_heads, a.head_dim, target.dtype, target.device)
    cache, other = kind(*sizes), OtherMemory(recipe.batch, room)
    whole = StaticCache(*sizes) if recipe.verify.offload else cache  # of those who are verified over all of it
    part = PartialCache(cache, partial, longest + 1) if partial else None
    if recipe.compile:
        target.compile()
    everyone = contenders(recipe, target, drafter, other)
    result = {
        "verify": recipe.verify.model_dump() if partial else "full",
        "engine": {
            **{name: getattr(recipe, name) for name in ("batch", "top_p", "top_k")},
            "graphs": recipe.graphs and target.device.type == "cuda" and everyone["trained"].graphs,
            "compile": recipe.compile and (target.device.type == "cuda" or target.frozen_head.product.is_laid_out),
            "stop": list(recipe.stop),
            "draft": recipe.draft.model_dump(),
            "attention": "flash-attn" if has_flash(cache.key[:0].to(target.device)) else "dense",
            "target_kv_mib": cache.nbytes / 2**20,
            "partial_kv_mib": part.nbytes / 2**20 if part else None,
        },
        "prompts": asked | {"seed": recipe.seed},
        "temperatures": {},
        "examples": {},
    }
    with report.progress() as progress:
        task = progress.add_task("decode", total=len(recipe.temperatures) * asked.get("conversation_turns", len(prompts)))
        for temperature in recipe.temperatures:
            sampling = Sampling(temperature, recipe.top_p, recipe.top_k)
            engines = {}
            for name, drafting in everyone.items():
                full = part is None or name in ("baseline", FULLY)
                length = 0 if name == "baseline" else longest
                if name == "prompt_lookup":  # no tree
                    length = min(length, drafter.config.draft_length)
                lengths = lengths_of(recipe.draft.length, length)
                audited = recipe.verify.kind == "partial_audited" and not full
                held = whole if full else cache
                engines[name] = Engine(
                    target, drafting, held, sampling, lengths, None if full else part, audited, graphs=recipe.graphs
                )
                engines[name].reserve(limit)
            theirs = Transformers(target, sampling) if recipe.transformers and recipe.batch == 1 else None
            runs: dict[str, list[Generation]] = {name: [] for name in engines} | ({"transformers": []} if theirs else {})
            requests: list[Prompt] = []
            groups: list[range] = []  # of requests that were decoded side by side

            def answer(group: list[Prompt], others: list[Prompt], new_tokens: int, seed: int) -> None:
                """All of them, side by side, so that a machine's moods meet all alike."""
                if "shuffled_memory" in engines:
                    for b, one in enumerate(others):
                        with target.uncompiled():  # prompts have any length
                            states = target.forward(torch.tensor([one.tokens], device=target.device))
                        other.fill(b, states.map(lambda t: t[0]))
                seeds = [seed + b for b in range(len(group))]
                for name, engine in engines.items():
                    runs[name] += engine.generate([p.tokens for p in group], new_tokens, seeds, stops)
                if theirs:
                    runs["transformers"].append(theirs.generate(group[0].tokens, new_tokens, seed, stops))

            if asked["warmup"]:  # nobody's first request pays for it
                first = prompts[: recipe.batch]
                for _ in range(asked["warmup"]):
                    answer(first, first, min(asked["warmup_tokens"] or limit, limit), recipe.seed)
                if theirs:  # compiled for a cache of the size that it will need
                    most = asked["positions"] - limit
                    theirs.generate((first[0].tokens * most)[:most], limit, recipe.seed, stops)
                for generations in runs.values():
                    generations.clear()
            wave = prompts
            while wave:
                for start in range(0, len(wave), recipe.batch):
                    group = wave[start : start + recipe.batch]
                    others = [_other(p, wave[start + b - 1], prompts) for b, p in enumerate(group)]
                    answer(group, others, limit, recipe.seed + len(requests))
                    groups.append(range(len(requests), len(requests) + len(group)))
                    requests += group
                    progress.update(task, advance=len(group), tau=measure.tau(runs["trained"])[0])
                # One history for all, so that they can be compared.
                replies = runs["baseline"][-len(wave) :]
                wave = [after for p, reply in zip(wave, replies) if (after := p.after(reply.tokens))]
            texts = [p.tokens for p in requests]
            ids = [p.id for p in requests]  # its conversation's
            verdict = lossless.decide(recipe, target, texts, ids, runs, sampling, lossless.Batches(groups, cache, PREFILL_CHUNK))
            with target.uncompiled():
                parts = parts_of(recipe, drafter, requests, runs["baseline"])
                result["temperatures"][f"{temperature:g}"] = figures(target, texts, runs, sampling, parts) | verdict
            result["temperatures"][f"{temperature:g}"]["per_prompt_id"] = ids
            result["examples"][f"{temperature:g}"] = measure.examples(texts, runs["trained"], tokenizer)
    result["drafter_kv"] = measure.kv_mib(runs["trained"])
    result["peak_gib"] = (
        torch.cuda.max_memory_allocated() / 2**30
        if target.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    return result


def _other(prompt: Prompt, before: Prompt, prompts: list[Prompt]) -> Prompt:
    """Whose memory a request is shown as the control: the one before it, or anyone else's."""
    return before if before.id != prompt.id else next((p for p in prompts if p.id != prompt.id), before)


def parts_of(recipe: EvalRecipe, drafter: Drafter, requests: list[Prompt], baseline: list[Generation]) -> dict[str, list[str]]:
    """{figure: the part that each request belongs to}, of the figures that are shown apart for parts of the requests."""
    found, known = {}, known_positions(recipe, drafter.config)
    if any(p.category is not None for p in requests):
        found["by_category"] = [recipe.suite.kind_of(p.category) for p in requests]
    if known is not None:
        last = [len(p.tokens) + len(g.tokens) - 2 + drafter.config.slots for p, g in zip(requests, baseline)]  # its draft's end
        if max(last) > known:
            found["by_positions"] = [f"{'beyond' if one > known else 'within'} {known} positions" for one in last]
    return found


def figures(
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
        found, (micro, macro) = measure.acceptance(generations), measure.tau(generations)
        return {
            "tau_micro": micro,
            "tau_macro": macro,
            "per_prompt": [[g.emitted, len(g.rounds)] for g in generations],  # tokens emitted, verify steps
            "per_prompt_s": measure.per_prompt_s(generations),
            "by_context": along[name],
            "joint": found.joint,
            "conditional": found.conditional,
            "tokens_per_s": measure.tokens_per_s(generations, prefill=False),
            "round_ms": measure.round_ms(generations),
            **{name: measure.by_part(generations, runs["baseline"], part) for name, part in parts.items()},
        }

    baseline, trained = runs["baseline"], runs["trained"]
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
    if FULLY in runs:
        result["divergence"] = measure.divergence(target, prompts, trained, runs[FULLY], sampling)
    result["repetition"] = measure.repetition(trained)
    result["controls"] = {name: one(name) for name in runs if name not in (*plain, "trained")}
    return result
