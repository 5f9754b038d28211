"""Whether an evaluation can run. What its rules need to know is read here, stage by stage, without loading the target."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.cli import in_sweep
from common.errors import UserError
from common.files import refuse_unwritable
from common.rules import refuse
from data_prep.cache.reader import CacheReader
from data_prep.target.architecture import Architecture, shortest_window, target_config, target_sizes
from data_prep.target.families import check_decodable
from data_prep.target.loading import pick_device, target_tokenizer, tokenizer_hashes
from eval import drafter_rules, rules
from eval.prompts.asking import check_asking
from eval.read_by import unread
from eval.recipe import EvalRecipe, known_positions, prompts_of, prompts_within, room_of, view_of
from eval.reports import answers, compare
from eval.reports.read import drafter_of
from eval.serving.find import find_server
from eval.serving.started import interpreter
from train.attention.choose import attention_backend
from train.drafter.build import load_config
from train.drafter.config import DrafterConfig, folder_of, is_foreign, read_fields
from train.drafter.formats.export import check_export, server_format


def check_evaluation(recipe: EvalRecipe) -> None:
    """Raises UserError for everything that can be known before the target is loaded, and warns of named keys that the mode does
    not read."""
    _refuse(recipe)
    for line in unread(recipe.mode, recipe.named):
        print(line, flush=True)


def _refuse(recipe: EvalRecipe) -> None:
    # 1. What needs the command alone.
    refuse(rules.TEMPERATURES, recipe)
    refuse(rules.TARGET, recipe)
    if recipe.mode != "chat":
        refuse_unwritable("out", recipe.out)
    check_folder(recipe)
    if recipe.mode == "compare":
        compare.load(recipe.runs)
        return
    refuse(rules.RUNS, recipe)

    # 2. The server, which may be asked without a drafter of ours.
    if recipe.mode == "served":
        _check_server(recipe)
        if recipe.drafter is None:
            return

    # 3. The drafter, the view that it is judged under, and the target's positions.
    judged = _check_drafter(recipe)
    config = judged.config
    if recipe.decodes and recipe.span and not recipe.asks_suite:
        _check_positions(recipe, config, [recipe.span[1] + config.slots] * recipe.suite.count, "prompts")

    # 4. Whether our engine decodes the target.
    if recipe.mode in ("decode", "chat", "demo"):
        found = target_config(recipe.target)
        check_decodable(recipe.target.path, found)
        refuse(rules.DECODED, recipe, rules.Decoded(found.model_type, shortest_window(found)))

    # 5. The target's tokens, and what is asked with them.
    tokenizer = target_tokenizer(recipe.target)
    refuse(drafter_rules.TOKENIZER, recipe, drafter_rules.Tokens(config, tokenizer_hashes(tokenizer)[0]))
    _check_asked(recipe, judged, tokenizer)

    # 6. The machine.
    attention_backend(recipe.attention, pick_device(recipe.target.device), training=recipe.mode == "diagnose")

    # 7. What single modes write and read.
    if recipe.mode == "export":
        refuse(rules.EXPORT, recipe, folder_of(recipe.drafter))
        check_export(config, recipe.format)
    if recipe.mode in ("score", "diagnose"):
        _check_cache(recipe, config)


def check_folder(recipe: EvalRecipe) -> None:
    """Raises UserError where `out` holds the report of another drafter, which a new one would replace or lie beside. In a sweep
    each point has such a folder, which is known when it runs."""
    if recipe.mode in ("compare", "chat", "export"):
        return
    for name in ("report.json", answers.NAME, "score.json", "diagnostics.json", "served.json", "demo.json"):
        try:
            drafter = drafter_of(Path(recipe.out) / name)
        except (OSError, UserError):  # none, or none that can be read
            continue
        refuse(rules.HELD, recipe, rules.Held(name, drafter))


def _check_server(recipe: EvalRecipe) -> None:
    """Raises UserError for a server that cannot be asked or started, and for prompts that it cannot be sent."""
    refuse(rules.SERVER, recipe)
    server = recipe.server
    if server.start:
        config = load_config(recipe.drafter, lambda: target_sizes(recipe.target))
        if not is_foreign(read_fields(recipe.drafter)):
            check_export(config, server_format(config))
        refuse(rules.STARTED, recipe, config)
        interpreter(server)
        return
    found = find_server(server.url, recipe.target_names)
    tokenizer = target_tokenizer(recipe.target)
    _, said = prompts_within(recipe, target_sizes(recipe.target).max_positions - found.slots, tokenizer)
    refuse(rules.RUNNING, recipe, rules.ServerRoom(found.positions, said["positions"]))


def _check_drafter(recipe: EvalRecipe) -> drafter_rules.Judged:
    """The drafter's configuration and view. Raises UserError for one that is not there or that the mode cannot judge."""
    refuse(rules.DRAFTER, recipe)
    config = load_config(recipe.drafter, lambda: target_sizes(recipe.target))
    refuse(rules.WEIGHTS, recipe, list(folder_of(recipe.drafter).glob("*.safetensors")))
    judged = drafter_rules.Judged(config, view_of(recipe, config))
    refuse(drafter_rules.MODES, recipe, judged)
    return judged


def _check_asked(recipe: EvalRecipe, judged: drafter_rules.Judged, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a way to draft or to verify that cannot be, and for prompts that cannot be asked."""
    config = judged.config
    if recipe.mode in ("decode", "chat", "demo", "served"):
        refuse(drafter_rules.DECODING, recipe, judged)
    if recipe.mode in ("chat", "demo"):
        refuse(rules.PERSON, recipe, in_sweep())
        demo = recipe.demo if recipe.mode == "demo" else None
        check_asking(recipe.target.path, recipe.chat, demo, room_of(recipe, config), tokenizer)
    if recipe.asks_suite:
        takes = [prompt.takes + config.slots for prompt in prompts_of(recipe, config, tokenizer)[0]]
        _check_positions(recipe, config, takes, "prompts")


def _check_cache(recipe: EvalRecipe, config: DrafterConfig) -> None:
    """Raises UserError for a cache that the drafter cannot be judged on."""
    reader = CacheReader(recipe.cache.dir)
    cached = rules.Cached(config, reader.manifest, int(reader.lengths.max()))
    refuse(rules.CACHE, recipe, cached)
    # No position behind the anchors counts.
    read = recipe.span[1] + config.slots if recipe.span else recipe.score.pack_tokens
    _check_positions(recipe, config, np.minimum(reader.lengths, read).tolist(), "documents")
    refuse(rules.DOCUMENTS, recipe, cached)


def _check_positions(recipe: EvalRecipe, config: DrafterConfig, takes: list[int], what: str) -> None:
    """Warns of texts beyond the positions that the drafter knows, since outputs are the target's all the same. `takes`: how many
    positions each of the texts has, its new tokens and its last draft included; `what` they are. Raises UserError for positions
    that do not exist."""
    known = known_positions(recipe, config)
    beyond = [one for one in takes if known is not None and one > known]
    if not beyond:
        return
    refuse(drafter_rules.POSITIONS, recipe, drafter_rules.Reach(config, known, what, len(takes), len(beyond), max(beyond)))
    shown = {"decode": "outputs are the target's all the same, and tau is shown apart", "score": "tau is shown apart"}
    print(
        f"warning: {recipe.drafter} knows positions below {known}, and {len(beyond)} of {len(takes)} {what} reach up to "
        f"{max(beyond)}: {shown.get(recipe.mode, 'figures hold them too')} (it would know them if trained on longer documents, "
        "started from the target's layers or with drafter.rope_factor, and need none with view.positions=in_cache and a budget)",
        flush=True,
    )


def check_target(
    recipe: EvalRecipe,
    config: DrafterConfig,
    architecture: Architecture,
    weights_hash: str,
    quantisation: dict | None = None,
) -> None:
    """Raises UserError when the target that was loaded is not the drafter's, or with `any_target` not of its architecture; and
    when a cache that is read with it is of another one."""
    reads_cache = recipe.mode in ("score", "diagnose")
    cached = CacheReader(recipe.cache.dir).manifest.target if reads_cache else None
    refuse(rules.LOADED, recipe, rules.Loaded(config, architecture, weights_hash, cached, quantisation))
