"""A recipe -> a finished cache: the checks that need no GPU, the plan with its size, and the capture itself."""

import gc
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import cli
from common.errors import UserError
from common.progress import counted
from common.ranks import rank, world_size
from common.rules import refuse
from data_prep import rules
from data_prep.cache.manifest import DOCUMENTS, FORMAT_VERSION, MANIFEST, Manifest, read_manifest, software_versions
from data_prep.cache.writer import CacheWriter, another_cache, claim
from data_prep.capture.capture import Batch, batches, capture
from data_prep.recipe import CaptureSections
from data_prep.sources import records as sources
from data_prep.sources.documents import Documents, tokenized, write_documents
from data_prep.sources.sides import refuse_one_side
from data_prep.target.architecture import layers_with_kv, other_kv_sizes, target_config, target_sizes
from data_prep.target.families import check_kv
from data_prep.target.loading import target_tokenizer, tokenizer_hashes
from data_prep.target.quantised import check_checkpoint, in_words, quantisation_of, unrounded
from data_prep.target.served import ServedTarget, capturing, check_server
from data_prep.target.target import Target
from data_prep.target.transformers_private import active_weights


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
    count = target_sizes(recipe.target).num_layers
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
    cli.refuse_file("cache.dir", recipe.cache.dir)
    sources.check_source(recipe.data)
    refuse(rules.INSTALLED, recipe)
    refuse(rules.SERVED, recipe)
    check_checkpoint(recipe.target, recipe.capture.spread)
    sizes = target_sizes(recipe.target)
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
    tokenizer_hash, template_hash = tokenizer_hashes(target_tokenizer(recipe.target))
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


def tokenise(recipe: CaptureSections, path: Path, processes: int = 1) -> dict:
    """Write the tokenised source to `path`, as one of `processes` that do so at once; returns the manifest's word on it and
    says what was left out."""
    tokenizer = target_tokenizer(recipe.target)
    left_out: Counter = Counter()
    workers = recipe.capture.workers or max(1, (os.cpu_count() or 1) // processes)
    documents = tokenized(sources.records(recipe.data, heldout=False), tokenizer, recipe.data, left_out, workers)
    if rank() == 0:
        documents = counted(documents, lambda number: f"tokenise: {number:,} documents")
    source = write_documents(path, documents, left_out)
    if rank() == 0:
        say(left_out)
    return source


def say(left_out: Counter) -> None:
    """Print what was left out of a source, or kept with a loss, and why."""
    for reason, count in left_out.most_common():
        print(f"{'' if reason.startswith('kept') else 'left out: '}{count:,} x {reason}", flush=True)


def describe(manifest: Manifest) -> int:
    """Print what will be stored; returns its bytes."""
    source = manifest.source
    size = manifest.bytes_of(source["tokens"], source["supervised"])
    layers = {"hidden": manifest.hidden_layers, "kv": manifest.kv_layers, "query": manifest.query_layers}
    kinds = [kind for kind in layers if layers[kind]]
    alike = all(layers[kind] == layers[kinds[0]] for kind in kinds)
    stored = f"layers {layers[kinds[0]]}, {'+'.join(kinds)}" if alike else ", ".join(f"{k} of layers {layers[k]}" for k in kinds)
    print(
        f"{source['documents']:,} documents, {source['tokens']:,} tokens, {source['supervised']:,} supervised; "
        f"{stored}, {manifest.codec}: "
        f"{size / 2**30:.2f} GiB, {size / source['tokens']:,.0f} bytes a token",
        flush=True,
    )
    return size


def advice(recipe: CaptureSections, source: dict) -> str:
    """What gives a capture more source documents. `source`: what `tokenise` returned."""
    data = recipe.data
    if data.max_tokens is not None and source["tokens"] >= data.max_tokens:
        return (
            f"data.max_tokens={data.max_tokens} ends within the first; make it larger, or take of each text only the first "
            f"data.max_length={data.max_length} tokens (data.long=cut)"
        )
    if data.long == "join":
        return f"data.long=join made few pieces of all texts; give it more, or a data.max_length below {data.max_length}"
    if data.long == "drop" and any(reason.startswith("longer than") for reason in source["left_out"]):
        return "data.long=split keeps the texts that were left out as too long"
    return "give it more texts, or cut this one into several records"


def build(recipe: CaptureSections, barrier: Callable[[], None], for_training: bool = False) -> None:
    """Tokenise, capture and seal `recipe.cache.dir`; a capture that was interrupted goes on. Called by all processes. Documents
    that training could not divide into two sides are refused `for_training`, and told of before the target is loaded in any
    case (caches can be merged).

    Raises:
        UserError: the folder holds another cache, the source gives nothing or too little, or the disk cannot hold the cache.
    """
    folder = Path(recipe.cache.dir)
    claimed = None
    manifest = None
    try:
        if rank() == 0:
            # Owned before anything is tokenised, so that a second capture into this folder is refused at once and not after an
            # hour.
            claimed = claim(folder)
            manifest = plan(recipe, tokenise(recipe, folder / DOCUMENTS))
            _say_or_refuse_one_side(recipe, manifest.source, Documents(folder / DOCUMENTS), for_training)
            # Before the target is loaded, which takes minutes.
            _refuse_small_disk(folder, describe(manifest))
        barrier()
        with _target_of(recipe) as target:
            if rank() == 0:
                _say_of_target(recipe, target, manifest.source["tokens"])
            together = recipe.capture.spread == "tp"
            if together and rank() != 0:
                target.weights_hash()  # gathering the shards takes all processes
            if manifest:
                manifest = completed(manifest, target)
            writer = CacheWriter(folder, manifest, recipe.cache.shard_bytes, rank(), world_size(), barrier, claimed)
            _say_what_is_there(writer)
            capture(target, Documents(folder / DOCUMENTS), writer, recipe.capture.batch_tokens, share=not together)
    except BaseException:
        if claimed is not None:
            _leave(folder)
        raise
    if rank() == 0:
        print(f"cache: {folder} (manifest {writer.manifest.hash()})", flush=True)
    del target  # its hooks refer to it: without a collection it would stay on the GPU beside what is trained next
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _target_of(recipe: CaptureSections) -> AbstractContextManager[Target | ServedTarget]:
    """What computes the states, here or at a server."""
    return capturing(recipe, chosen_layers(recipe).hidden, target_sizes(recipe.target).num_layers)


def _say_of_target(recipe: CaptureSections, target: Target | ServedTarget, tokens: int) -> None:
    if target.server:
        return
    if unrounded(target.quantisation):
        print(
            f"{recipe.target.path} is {in_words(target.quantisation)}: states differ a little from those of a server, which "
            "rounds activations too",
            flush=True,
        )
    say_how_long(target, tokens, recipe.capture.batch_tokens)


def _say_what_is_there(writer: CacheWriter) -> None:
    for name in writer.removed:
        print(f"{name} was damaged: it is removed and its documents are captured again", flush=True)
    if writer.rank == 0 and len(writer.done):
        print(f"{len(writer.done):,} documents are there already", flush=True)


def estimate(recipe: CaptureSections) -> None:
    """Print bytes and hours of a capture: the source is tokenised, and the rate measured on a few of its own batches.

    Called by one process, or by all that share the target (`capture.spread=tp`): each tokenises for itself, and reads
    the same batches.
    """
    sharing = world_size() if recipe.capture.spread == "tp" else 1
    with tempfile.TemporaryDirectory(dir=_existing(Path(recipe.cache.dir).absolute().parent)) as folder:  # /tmp may be small
        path = Path(folder) / DOCUMENTS
        manifest = plan(recipe, tokenise(recipe, path, sharing))
        size = describe(manifest) if rank() == 0 else 0
        documents = Documents(path)
        with _target_of(recipe) as target:
            rate = _rate(target, documents, manifest, recipe.capture.batch_tokens)
            where = "at the server" if target.server else f"on {target.device}"
    if rank() != 0:
        return
    hours = manifest.source["tokens"] / rate / 3600
    free = shutil.disk_usage(_existing(Path(recipe.cache.dir))).free
    scales = f"{hours:.2g} hours on these {sharing} processes"
    if sharing == 1 and target.server:
        scales = f"{hours:.2g} hours"
    elif sharing == 1:
        scales = f"{hours:.2g} hours on one process, {hours / 8:.2g} on eight"
    print(f"{rate:,.0f} tokens/s {where} (disk aside): {scales}")
    print(f"{recipe.cache.dir}: {free / 2**30:.1f} GiB are free" + ("" if free > size else ", which is NOT enough"))


def _rate(target: Target | ServedTarget, documents: Documents, manifest: Manifest, batch_tokens: int) -> float:
    """Tokens a second of a few batches."""
    target.capture(manifest.hidden_layers, manifest.kv_layers, manifest.query_layers)
    every = batches(documents.by_length(), documents.lengths, batch_tokens, target.packs)
    tokens = seconds = 0
    # Batches are in the order of length, so that these are spread from the longest documents to the shortest.
    for number, i in enumerate(np.linspace(0, len(every) - 1, 6).astype(int)):
        batch = Batch([documents[index] for index in every[i]])
        began = time.perf_counter()
        stored = batch.tensors(batch.forward(target), manifest)
        # To copy to the host is to wait for the device: only then is the clock the batch's.
        {name: tensor.cpu() for name, tensor in stored.items()}
        if number:  # the first one warms up
            tokens += len(batch.ids_P)
            seconds += time.perf_counter() - began
    return tokens / seconds


def _say_or_refuse_one_side(recipe: CaptureSections, source: dict, documents: Documents, refuse: bool) -> None:
    try:
        refuse_one_side(documents.ids, f"data={recipe.data.source} gives", advice(recipe, source))
    except UserError as error:
        if refuse:
            raise
        print(f"WARNING: {error}", flush=True)


def say_how_long(target: Target, tokens: int, batch_tokens: int) -> None:
    """Print about how long the forwards of a capture will take, before the first of them: two operations a weight and token, at
    the rate of one product of the target's own sizes, timed for a moment. Attention, copies and the disk come on top."""
    weights = active_weights(target.model)
    shape = target.architecture
    a = torch.ones(min(batch_tokens, 2048), shape.hidden_size, dtype=target.dtype, device=target.device)
    b = torch.ones(shape.hidden_size, shape.intermediate_size, dtype=target.dtype, device=target.device)
    # A multiplication and an addition for each pair of numbers.
    operations = 2 * a.shape[0] * b.numel()
    count = 0
    spent = 0.0
    a @ b  # the first one warms up
    while spent < 0.3:
        began = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        spent += time.perf_counter() - began
        count += 1
    seconds = 2 * weights * tokens / (operations * count / spent) / world_size()
    print(f"the target's forwards will take about {_rounded(seconds)} or more on {target.device.type}", flush=True)


def _rounded(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _refuse_small_disk(folder: Path, size: int) -> None:
    there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    free = shutil.disk_usage(folder).free
    if size - there > free:
        raise UserError(
            f"{folder}: the cache takes {size / 2**30:.2f} GiB, of which {there / 2**30:.2f} are there, and "
            f"{free / 2**30:.2f} GiB are free; make room, or store less: cache=fp8, cache.layers, cache.kinds, data.max_tokens"
        )


def _leave(folder: Path) -> None:
    """After a refusal: nothing half-written stays, and no folder that was made for nothing."""
    for name in (DOCUMENTS, DOCUMENTS + ".tmp"):
        (folder / name).unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.absolute().parent)
