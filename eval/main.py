"""python eval/main.py drafter=RUN/checkpoints/best out=REPORT [mode=decode|score|diagnose|export] [-m view.budget=256,1024,0]

python eval/main.py drafter=RUN/checkpoints/best mode=chat|demo

python eval/main.py drafter=RUN/checkpoints/best mode=served server.start=vllm | server.url=http://HOST:PORT

python eval/main.py mode=compare runs=[REPORT,REPORT] out=COMPARISON
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder: no module here may hide another

from common import ranks  # noqa: E402

ranks.wait_without_spinning()

import torch  # noqa: E402

from common import cli  # noqa: E402
from common.files import said_in_one_line  # noqa: E402
from data_prep.cache.manifest import software_versions  # noqa: E402
from data_prep.target.architecture import target_sizes  # noqa: E402
from data_prep.target.described import Described  # noqa: E402
from data_prep.target.loading import load_parts, load_target, pick_device  # noqa: E402
from data_prep.target.target import Target  # noqa: E402
from eval.check import check_evaluation, check_folder, check_target  # noqa: E402
from eval.judging import measure
from eval.judging.judge import judge  # noqa: E402
from eval.judging.score import diagnose, score  # noqa: E402
from eval.live.chat import chat  # noqa: E402
from eval.live.demo import PICTURE, demo  # noqa: E402
from eval.recipe import EvalRecipe, named_view, view_of  # noqa: E402
from eval.reports import compare, page, report, sweep
from eval.reports.answers import Answers
from eval.serving import served, side_by_side  # noqa: E402
from train.drafter.base import Drafter  # noqa: E402
from train.drafter.build import load_drafter
from train.drafter.config import folder_of  # noqa: E402
from train.drafter.formats.export import save_export  # noqa: E402
from train.drafter.formats.imported_weights import bind  # noqa: E402
from train.measure import copying, pictures  # noqa: E402
from train.run.tracking import Tracker  # noqa: E402

WITHOUT_FORWARDS = ("score", "export")  # modes that ask of the target its embedding, head and norms alone


def load(recipe: EvalRecipe) -> tuple[Described, Drafter]:
    """The target and the drafter that was trained for it, or with `any_target` for one like it. Raises UserError when they do
    not belong together."""
    drafter = load_drafter(recipe.drafter, lambda: target_sizes(recipe.target))
    target = load_parts(recipe.target) if recipe.mode in WITHOUT_FORWARDS else load_target(recipe.target)
    check_target(recipe, drafter.config, target.architecture, target.weights_hash(), target.quantisation)
    if not drafter.config.is_bound:
        bind(drafter, folder_of(recipe.drafter), recipe.target.id, target)
    view = view_of(recipe, drafter.config)
    if drafter.config.lm and view and view.positions == "in_cache":
        drafter.check_in_cache()
    if isinstance(target, Target):
        target.capture(drafter.config.hidden_layers, drafter.config.kv_layers)
    return target, drafter.to(target.device, target.dtype)


def described(recipe: EvalRecipe, target: Described, drafter: Drafter) -> dict:
    """What a report says of its subject: the drafter, how it was trained, and the view and the context it is judged under."""
    config = drafter.config
    judged_on = {"path": recipe.target.id, "dtype": str(target.dtype), "device": str(target.device), **config.target}
    if recipe.any_target:
        judged_on |= {"id": recipe.target.id, "weights_hash": target.weights_hash()}
    said = ("objective", "reuse", "target_layers", "hidden_layers", "slots", "shifted", "causal", "budgets", "seed")
    return {
        "drafter": {
            "path": recipe.drafter,
            "parameters": sum(p.numel() for p in drafter.parameters()),
            **{name: getattr(config, name) for name in said},
            "source": config.source if config.uses_kv else None,
            "lm": config.lm and config.lm["path"],
            "trained_view": config.view,
            "trained_for": "unknown (imported)" if config.imported else config.target["weights_hash"],
            "imported": config.imported,
        },
        "target": judged_on,
        "view": named_view(recipe, config).model_dump() | {"budget": getattr(view_of(recipe, config), "budget", 0)},
        "context": recipe.span and recipe.span[0],
        "software": software_versions(),
        "commit": cli.git_revision(),
    }


# Keys of a report that are no figures, which tracking does not draw.
UNCHARTED = ("drafter", "target", "prompts", "verify", "engine", "software", "commit", "examples")
UNCHARTED += ("runs", "differ", "server", "tested", "said", "view", "context")
DRAWN = {
    "report.json": (report.draw, page.write_page),
    "compare.json": (compare.write_page,),
    "served.json": (side_by_side.write_page,),
}


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
    with said_in_one_line(recipe.out):
        _run(recipe)


def _run(recipe: EvalRecipe) -> None:
    check_folder(recipe)
    # Modes that load the target themselves, when they have room for it, or not at all.
    if recipe.mode == "compare":
        return _compare(recipe)
    if recipe.mode == "served":
        return _served(recipe)
    if pick_device(recipe.target.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the point of a sweep that came before
    target, drafter = load(recipe)
    RUNS[recipe.mode](recipe, target, drafter)


def _compare(recipe: EvalRecipe) -> None:
    out = Path(recipe.out)
    found = compare.compare(compare.load(recipe.runs), recipe.seed)
    publish(recipe, "compare.json", found)
    compare.print_table(found)
    print(f"comparison: {out / 'compare.json'}, {out / 'compare.html'}")


def _served(recipe: EvalRecipe) -> None:
    out = Path(recipe.out)
    found = served.served(recipe, load, described)
    publish(recipe, "served.json", found)
    side_by_side.print_table(found)
    print(f"served: {out / 'served.json'}, {out / 'served.html'}")


def _decode(recipe: EvalRecipe, target: Target, drafter: Drafter) -> None:
    out = Path(recipe.out)
    judged = described(recipe, target, drafter)
    with Answers(out, judged) as answers:
        result = judged | judge(recipe, target, drafter, answers)
    publish(recipe, "report.json", result)
    report.print_table(result)
    print(f"report: {out / 'report.json'}, {out / 'report.png'}, {out / 'report.html'}")


def _score(recipe: EvalRecipe, target: Described, drafter: Drafter) -> None:
    accepted, kl, copies, apart = score(recipe, target, drafter)
    found = {kind: vars(a) for kind, a in accepted.items()}
    result = described(recipe, target, drafter) | {"cache": recipe.cache.dir, "kl": kl, **found, "copies": copies}
    if apart:
        result["by_positions"] = apart
    publish(recipe, "score.json", result)
    print(f"score: {Path(recipe.out) / 'score.json'}; KL {kl:.4f} nats a slot")
    for kind, a in found.items():
        print(f"{kind}: tau {a['tau']:.3f}, conditional acceptance by slot {' '.join(f'{c:.3f}' for c in a['conditional'])}")
        for bucket, kinds in copies.items():
            slots = copying.grouped(**kinds[kind]).items()
            shown = ", ".join(f"{name}: {accepted:.3f} ({rounds:.0f})" for name, (accepted, rounds) in slots)
            print(f"  copy distance {bucket}: acceptance by slots (rounds) {shown}")
    for name in ("within", "beyond"):
        if apart and name in apart:
            taus = ", ".join(f"{kind} {tau:.3f}" for kind, tau in apart[name]["tau"].items())
            print(f"{name} the {apart['known']} positions that it knows: {apart[name]['anchors']} anchors, tau {taus}")


def _diagnose(recipe: EvalRecipe, target: Target, drafter: Drafter) -> None:
    out = Path(recipe.out)
    found = diagnose(recipe, target, drafter)
    report.write_json(out, {"drafter": recipe.drafter, "cache": recipe.cache.dir, **found}, "diagnostics.json")
    pictures.draw(found, out / "diagnostics.png")
    print(f"diagnostics: {out / 'diagnostics.json'}, {out / 'diagnostics.png'}")


def _demo(recipe: EvalRecipe, target: Target, drafter: Drafter) -> None:
    out = Path(recipe.out)
    publish(recipe, "demo.json", described(recipe, target, drafter) | demo(recipe, target, drafter))
    print(f"picture: {out / PICTURE}; figures: {out / 'demo.json'}")


def _export(recipe: EvalRecipe, target: Described, drafter: Drafter) -> None:
    out = Path(recipe.out)
    notes = save_export(drafter, target, out, recipe.format)
    print(f"{recipe.format}: {out}", *notes, sep="\n")


RUNS = {"decode": _decode, "score": _score, "diagnose": _diagnose, "chat": chat, "demo": _demo, "export": _export}


def gather(folder: Path) -> None:
    """What a sweep's points say together. Points of other modes than decode and score say nothing together."""
    with said_in_one_line(str(folder)):
        if any(path for name in ("report.json", "score.json") for path in folder.rglob(name)):
            sweep.gather([folder], folder)


if __name__ == "__main__":
    cli.main("eval", EvalRecipe, check_evaluation, run, gather=gather)
