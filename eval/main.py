"""python eval/main.py drafter=RUN/checkpoints/best out=REPORT [mode=decode|score|diagnose|export] [-m view.budget=256,1024,0]

python eval/main.py mode=compare runs=[REPORT,REPORT] out=COMPARISON
"""

import resource
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder: no module here may hide another

import torch  # noqa: E402

from data_prep import cli  # noqa: E402
from data_prep.cache.manifest import software_versions  # noqa: E402
from data_prep.errors import UserError  # noqa: E402
from data_prep.target import Target, load_target, load_tokenizer, pick_device  # noqa: E402
from eval import compare, measure, page, report  # noqa: E402
from eval.decode import Generation, decode  # noqa: E402
from eval.drafting import Drafting, Nobody, PromptLookup, Trained, memory_of, zero_memory  # noqa: E402
from eval.recipe import EvalRecipe, check, named_view, prompts_of, view_of  # noqa: E402
from eval.score import diagnose, score  # noqa: E402
from eval.suites import Prompt  # noqa: E402
from train import diagnostics  # noqa: E402
from train.attention import executor  # noqa: E402
from train.drafter.export import save_export  # noqa: E402
from train.drafter.model import Drafter  # noqa: E402
from train.tracking import Tracker  # noqa: E402
from train.views import View  # noqa: E402


def load(recipe: EvalRecipe) -> tuple[Target, Drafter]:
    """The target and the drafter that was trained for it. Raises UserError when they do not belong together."""
    drafter, target = Drafter.from_pretrained(recipe.drafter), load_target(recipe.target)
    if target.weights_hash() != drafter.config.target["weights_hash"]:
        raise UserError(
            f"{recipe.drafter} was trained for other weights of {drafter.config.target['id']} than those of {recipe.target.path}"
        )
    view = view_of(recipe, drafter.config)
    if drafter.config.lm and view and view.positions == "in_cache":
        drafter.check_in_cache()
    target.capture(drafter.config.hidden_layers, drafter.config.kv_layers)
    return target, drafter.to(target.device, target.dtype)


def contenders(target: Target, drafter: Drafter, attend, view: View | None, controls: bool) -> dict[str, Drafting]:
    """Who drafts: nobody, the trained drafter, and the controls, all under one view. `shuffled_memory` is another's for each
    prompt, and still to be made."""
    head, kept_D = target.frozen_head, drafter.head.kept_D
    found = {"baseline": Nobody(), "trained": Trained(drafter, head, attend, view)}
    if controls:
        counts_V = None if kept_D is None else torch.zeros(len(head.head_VE)).index_fill_(0, kept_D.cpu(), 1)
        try:
            untrained = Drafter.of(drafter.config).to(target.device, target.dtype).start(target, head, counts_V)
            found["untrained"] = Trained(untrained, head, attend, view)
        except UserError as error:  # the language model that it began as is no longer there
            print(f"the report has no untrained drafter: {error}")
        found["prompt_lookup"] = PromptLookup(drafter.config.draft_length)
    if controls and drafter.config.reuse != "none":
        found["zero_memory"] = Trained(drafter, head, attend, view, zero_memory)
        found["shuffled_memory"] = None
    return found


def figures(target: Target, prompts: list[Prompt], runs: dict[str, list[Generation]], temperature: float) -> dict:
    """One temperature's part of report.json."""
    along = measure.by_context({name: generations for name, generations in runs.items() if name != "baseline"})

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
        }

    baseline, trained = runs["baseline"], runs["trained"]
    result = one("trained")
    result["baseline_tokens_per_s"] = measure.tokens_per_s(baseline, prefill=False)
    result["baseline_per_prompt_s"] = measure.per_prompt_s(baseline)
    result["baseline_round_ms"] = measure.round_ms(baseline)
    result["speedup_decode"] = result["tokens_per_s"] / result["baseline_tokens_per_s"]
    result["speedup_end_to_end"] = measure.tokens_per_s(trained, prefill=True) / measure.tokens_per_s(baseline, prefill=True)
    if temperature == 0:
        same = [a.tokens == b.tokens for a, b in zip(trained, baseline)]
        result["lossless"], result["lossless_by"] = (
            all(same),
            f"{sum(same)} of {len(same)} outputs equal plain decoding's, token for token",
        )
    else:
        p = measure.sampling_p_value(target, [p.tokens for p in prompts], trained, temperature)
        result["lossless"] = p > 1e-3
        result["lossless_by"] = f"tokens' ranks under the target are uniform: chi-square p = {p:.3f} (NO below 0.001)"
    result["repetition"] = measure.repetition(trained)
    result["controls"] = {name: one(name) for name in runs if name not in ("baseline", "trained")}
    return result


def described(recipe: EvalRecipe, target: Target, drafter: Drafter) -> dict:
    """What a report says of its subject: the drafter, how it was trained, and the view and the context it is judged under."""
    config = drafter.config
    said = ("objective", "reuse", "target_layers", "hidden_layers", "slots", "shifted", "causal", "budgets", "seed")
    return {
        "drafter": {
            "path": recipe.drafter,
            "parameters": sum(p.numel() for p in drafter.parameters()),
            **{name: getattr(config, name) for name in said},
            "lm": config.lm and config.lm["path"],
            "trained_view": config.view,
        },
        "target": {"path": recipe.target.path, "dtype": str(target.dtype), "device": str(target.device), **config.target},
        "view": named_view(recipe, config).model_dump() | {"budget": getattr(view_of(recipe, config), "budget", 0)},
        "context": recipe.span and recipe.span[0],
        "software": software_versions(),
        "commit": cli.git_revision(),
    }


UNCHARTED = ("drafter", "target", "prompts", "software", "commit", "examples", "runs", "differ")  # no figures
DRAWN = {"report.json": (report.draw, page.write_page), "compare.json": (compare.write_page,)}


def publish(recipe: EvalRecipe, name: str, found: dict) -> None:
    """Write the report and what is drawn of it; to W&B too, a sweep's points as one group."""
    out = Path(recipe.out)
    report.write_json(out, found, name)
    for draw in DRAWN.get(name, ()):
        draw(out, found)
    if recipe.tracking.kind != "none":
        config = recipe.model_dump(mode="json", exclude={"out"})
        tracker = Tracker(recipe.tracking, out, out.parent.name if cli.in_sweep() else None, config, resumed_at=0)
        tracker.log(0, measure.charted({key: value for key, value in found.items() if key not in UNCHARTED}))
        stem = Path(name).stem
        for suffix, log in ((".png", tracker.picture), (".html", tracker.page)):
            if (out / (stem + suffix)).exists():
                log(0, stem + suffix.replace(".", "_"), out / (stem + suffix))
        tracker.close()


def run(recipe: EvalRecipe) -> None:
    if recipe.mode == "compare":
        found = compare.compare(compare.load(recipe.runs), recipe.seed)
        publish(recipe, "compare.json", found)
        compare.print_table(found)
        print(f"comparison: {Path(recipe.out) / 'compare.json'}, {Path(recipe.out) / 'compare.html'}")
        return
    if pick_device(recipe.target.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the point of a sweep that came before
    target, drafter = load(recipe)
    out = Path(recipe.out)
    if recipe.mode == "score":
        accepted, loss = score(recipe, target, drafter)
        found = {kind: vars(a) for kind, a in accepted.items()}
        publish(recipe, "score.json", described(recipe, target, drafter) | {"cache": recipe.cache.dir, "kl": loss, **found})
        print(f"score: {out / 'score.json'}; KL {loss:.4f} nats a slot")
        for kind, a in found.items():
            print(f"{kind}: tau {a['tau']:.3f}, conditional acceptance by slot {' '.join(f'{c:.3f}' for c in a['conditional'])}")
        return
    if recipe.mode == "diagnose":
        found = diagnose(recipe, target, drafter)
        report.write_json(out, {"drafter": recipe.drafter, "cache": recipe.cache.dir, **found}, "diagnostics.json")
        diagnostics.draw(found, out / "diagnostics.png")
        print(f"diagnostics: {out / 'diagnostics.json'}, {out / 'diagnostics.png'}")
        return
    if recipe.mode == "export":
        notes = save_export(drafter, target, out, recipe.format)
        print(f"{recipe.format}: {out}", *notes, sep="\n")
        return
    tokenizer = load_tokenizer(target.path, target.revision)
    prompts, asked = prompts_of(recipe, drafter.config, tokenizer)
    attend, view = executor(recipe.attention, target.device, training=False), view_of(recipe, drafter.config)
    result = {**described(recipe, target, drafter), "prompts": asked | {"seed": recipe.seed}, "temperatures": {}, "examples": {}}
    everyone, limit = contenders(target, drafter, attend, view, recipe.controls), asked["max_new_tokens"]
    with report.progress() as progress:
        task = progress.add_task("decode", total=len(recipe.temperatures) * len(prompts))
        for temperature in recipe.temperatures:
            runs: dict[str, list[Generation]] = {name: [] for name in everyone}
            requests: list[Prompt] = []
            for number, prompt in enumerate(prompts):
                if "shuffled_memory" in everyone:
                    other = target.forward(torch.tensor([prompts[number - 1].tokens], device=target.device)).map(lambda t: t[0])
                    everyone["shuffled_memory"] = Trained(drafter, target.frozen_head, attend, view, memory_of(other))
                while prompt:
                    for name, drafting in everyone.items():  # side by side, so that a machine's moods meet all alike
                        arguments = (target, drafting, prompt.tokens)
                        for _ in range(0 if requests else asked["warmup"]):  # nobody's first request pays for the warm-up
                            decode(*arguments, asked["warmup_tokens"] or limit, temperature, recipe.seed)
                        seed = recipe.seed + len(requests)
                        runs[name].append(decode(*arguments, limit, temperature, seed, target.end_tokens))
                    requests.append(prompt)
                    prompt = prompt.after(runs["baseline"][-1].tokens)  # one history for all, so that they can be compared
                progress.update(task, advance=1, tau=measure.tau(runs["trained"])[0])
            result["temperatures"][f"{temperature:g}"] = figures(target, requests, runs, temperature)
            result["examples"][f"{temperature:g}"] = measure.examples([p.tokens for p in requests], runs["trained"], tokenizer)
    result["drafter_kv"] = measure.kv_mib(runs["trained"])
    result["peak_gib"] = (
        torch.cuda.max_memory_allocated() / 2**30
        if target.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    publish(recipe, "report.json", result)
    report.print_table(result)
    print(f"report: {out / 'report.json'}, {out / 'report.png'}, {out / 'report.html'}")


def gather(folder: Path) -> None:
    """What a sweep's points say together. Points of other modes than decode and score say nothing together."""
    if any(path for name in ("report.json", "score.json") for path in folder.rglob(name)):
        report.gather([folder], folder)


if __name__ == "__main__":
    cli.main("eval", EvalRecipe, check, run, gather=gather)
