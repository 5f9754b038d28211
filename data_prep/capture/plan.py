"""What a capture will store, and every refusal that needs neither a document nor a GPU."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import UserError
from common.files import refuse_unwritable
from common.ranks import world_size
from common.rules import refuse
from data_prep import rules
from data_prep.cache.manifest import FILES, FORMAT_VERSION, MANIFEST, Manifest, read_manifest, software_versions
from data_prep.cache.writer import another_cache
from data_prep.recipe import CaptureSections
from data_prep.sources import records as sources
from data_prep.sources.tokens import put_before
from data_prep.target.architecture import last_layers_with_kv, layers_with_kv, other_kv_sizes, target_config, target_sizes
from data_prep.target.checkpoint import check_checkpoint
from data_prep.target.families import check_kv
from data_prep.target.loading import target_tokenizer, tokenizer_hashes
from data_prep.target.quantised import quantisation_of
from data_prep.target.served import check_server


def auto_layers(num_layers: int, count: int = 3) -> list[int]:
    """`count` layers spaced uniformly (KVShot), the first and the last among them: a drafter that starts as the target
    with its middle layers left out is the best start measured (docs/research/log.md)."""
    return sorted(set(torch.linspace(0, num_layers - 1, count).round().long().tolist()))


class Layers(NamedTuple):
    """Whose states are stored."""

    hidden: list[int]
    kv: list[int]
    query: list[int]


def chosen_layers(recipe: CaptureSections) -> Layers:
    """Raises UserError for a layer that the target does not have, or that has no keys and values."""
    cache = recipe.cache
    config = target_config(recipe.target)
    count = config.get_text_config(decoder=True).num_hidden_layers
    if cache.layers == "assistant":
        check_kv(recipe.target.path, config)
        read = {"hidden": [count - 1]} | dict.fromkeys(("kv", "query"), sorted(last_layers_with_kv(config).values()))
        return Layers(**{kind: layers if kind in cache.kinds else [] for kind, layers in read.items()})
    named = [] if cache.layers == "auto" else sorted(set(cache.layers))
    if wrong := [layer for layer in named if not 0 <= layer < count]:
        raise UserError(f"cache.layers: the target has layers 0 to {count - 1}; there is no layer {wrong[0]}")
    of_attention = []
    if {"kv", "query"} & set(cache.kinds):
        check_kv(recipe.target.path, config)
        attending = layers_with_kv(config)
        if wrong := [layer for layer in named if layer not in attending]:
            raise UserError(
                f"cache.layers: layer {wrong[0]} of this '{config.model_type}' has no keys and values of its own; layers "
                f"{', '.join(map(str, attending))} have. cache.layers=auto chooses among them; cache.kinds=[hidden] takes any"
            )
        of_attention = named or [attending[i] for i in auto_layers(len(attending))]
    return Layers(
        hidden=(named or auto_layers(count)) if "hidden" in cache.kinds else [],
        kv=of_attention if "kv" in cache.kinds else [],
        query=of_attention if "query" in cache.kinds else [],
    )


def check_capture(recipe: CaptureSections) -> None:
    """Raises UserError for everything that can be known before a document is read or a GPU is touched."""
    if recipe.cache.on_missing != "live" and not (Path(recipe.cache.dir) / FILES).exists():  # of a finished one nothing changes
        refuse_unwritable("cache.dir", recipe.cache.dir)
    sources.check_source(recipe.data)
    refuse(rules.INSTALLED, recipe)
    refuse(rules.SERVED, recipe)
    check_checkpoint(recipe.target, recipe.capture.spread)
    sizes = target_sizes(recipe.target)
    target_tokenizer(recipe.target)
    if (Path(recipe.cache.dir) / MANIFEST).exists():
        if fields := differences(plan(recipe, {}), read_manifest(Path(recipe.cache.dir))):
            raise another_cache(Path(recipe.cache.dir), fields)
    layers = chosen_layers(recipe)
    refuse(rules.LENGTHS, recipe, sizes)
    check_spread(recipe)
    check_server(recipe, layers.hidden, sizes.num_layers)


def check_spread(recipe: CaptureSections) -> None:
    """Raises UserError where the target cannot be spread as `capture.spread` says."""
    refuse(rules.INSTALLED, recipe)
    if recipe.capture.spread == "none":
        return
    check_checkpoint(recipe.target, recipe.capture.spread)
    refuse(rules.SPREAD, recipe, rules.Spread(world_size(), target_sizes(recipe.target).kv_heads))


def plan(recipe: CaptureSections, source: dict) -> Manifest:
    """The manifest but for what only the loaded target can tell: its weights' hash and its whole architecture."""
    tokenizer = target_tokenizer(recipe.target)
    tokenizer_hash, template_hash = tokenizer_hashes(tokenizer)
    sizes = target_sizes(recipe.target)
    layers = chosen_layers(recipe)
    config = target_config(recipe.target)
    quantisation = quantisation_of(recipe.target.location, recipe.target.revision, config)
    # Of layers that differ from `sizes`, what is needed to know how much will be stored; the loaded target tells the rest.
    shapes = other_kv_sizes(config, sizes, {*layers.kv, *layers.query})
    return Manifest(
        format_version=FORMAT_VERSION,
        target={
            "id": recipe.target.id,
            "revision": recipe.target.revision,
            "weights_hash": "",
            "architecture": asdict(sizes),
            "mask_token_id": recipe.target.mask_token_id,
            **({"kv_shapes": shapes} if shapes else {}),
            **({"quantisation": quantisation} if quantisation else {}),
        },
        tokenizer_hash=tokenizer_hash,
        chat_template_hash=template_hash,
        hidden_layers=layers.hidden,
        kv_layers=layers.kv,
        query_layers=layers.query,
        codec=recipe.cache.codec,
        last_hidden=recipe.cache.last_hidden,
        max_length=recipe.data.max_length,
        before_texts=put_before(tokenizer) if recipe.data.format in ("auto", "text") else [],
        source={"name": recipe.data.source, "recipe": recipe.data.model_dump(), **source},
        software=software_versions(),
    )


def differences(planned: Manifest, manifest: Manifest) -> list[str]:
    """Fields in which a cache is not the one that is planned, as far as a plan without documents and weights can tell."""
    of_target = ("weights_hash", "architecture.", "kv_shapes", "head", "quantisation.computed")
    later = ("source.", *(f"target.{name}" for name in of_target))
    return [f for f in planned.differs(manifest) if not f.startswith(later)]


def completed(manifest: Manifest, target) -> Manifest:
    """A plan with what the loaded target says of itself."""
    known = {"weights_hash": target.weights_hash(), "architecture": asdict(target.architecture)}
    if shapes := target.other_kv_shapes({*manifest.kv_layers, *manifest.query_layers}):
        known["kv_shapes"] = {str(layer): asdict(shape) for layer, shape in shapes.items()}
    if facts := target.head_facts:
        known["head"] = facts
    if target.quantisation:
        known["quantisation"] = target.quantisation
    if target.server:
        known["server"] = target.server
    return manifest.model_copy(update={"target": manifest.target | known})
