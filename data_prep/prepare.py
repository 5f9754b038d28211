"""A recipe -> a finished cache: the checks that need no GPU, the plan with its size, and the capture itself."""

import gc
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from data_prep import cli, sources
from data_prep.cache.manifest import DOCUMENTS, FORMAT_VERSION, MANIFEST, Manifest, read_manifest, software_versions
from data_prep.cache.writer import CacheWriter, another_cache, claim
from data_prep.capture import Batch, batches, capture
from data_prep.documents import Documents, tokenized, write_documents
from data_prep.errors import UserError
from data_prep.progress import counted
from data_prep.ranks import rank, world_size
from data_prep.recipe import CacheRecipe, CaptureSections
from data_prep.target import Sizes, load_target, load_tokenizer, target_sizes, tokenizer_hashes


def auto_layers(num_layers: int, count: int = 3) -> list[int]:
    """`count` layers spaced uniformly (KVShot), the first and the last among them: a drafter that starts as the target
    with its middle layers left out is the best start measured (docs/log.md)."""
    return sorted(set(torch.linspace(0, num_layers - 1, count).round().long().tolist()))


def chosen_layers(cache: CacheRecipe, sizes: Sizes) -> list[int]:
    """Raises UserError for a layer that the target does not have."""
    layers = auto_layers(sizes.num_layers) if cache.layers == "auto" else sorted(set(cache.layers))
    if wrong := [layer for layer in layers if not 0 <= layer < sizes.num_layers]:
        raise UserError(f"cache.layers: the target has layers 0 to {sizes.num_layers - 1}; there is no layer {wrong[0]}")
    return layers


def check(recipe: CaptureSections) -> None:
    """Raises UserError for everything that can be known before a document is read or a GPU is touched."""
    cli.refuse_file("cache.dir", recipe.cache.dir)
    sources.check(recipe.data)
    if recipe.capture.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError(
            "capture.attention=flash_attention_2, but flash-attn is not installed; capture.attention=auto does without"
        )
    if recipe.capture.spread == "device_map" and find_spec("accelerate") is None:
        raise UserError("capture.spread=device_map, but accelerate is not installed: pip install accelerate")
    sizes = target_sizes(recipe.target)
    if (Path(recipe.cache.dir) / MANIFEST).exists():
        if fields := differences(plan(recipe, {}), read_manifest(Path(recipe.cache.dir))):
            raise another_cache(Path(recipe.cache.dir), fields)
    chosen_layers(recipe.cache, sizes)
    if recipe.data.max_length > sizes.max_positions:
        raise UserError(f"data.max_length={recipe.data.max_length} exceeds the target's {sizes.max_positions} positions")
    if recipe.capture.spread == "tp" and (sizes.kv_heads % world_size() or world_size() == 1):
        raise UserError(
            f"capture.spread=tp needs a launcher with several processes that share {sizes.kv_heads} K/V heads evenly, "
            f"not {world_size()}: deepspeed --num_gpus 2 data_prep/main.py ..."
        )
    if recipe.capture.spread == "device_map" and world_size() > 1:
        raise UserError("capture.spread=device_map is one process that uses all GPUs: run it with python, not with a launcher")


def plan(recipe: CaptureSections, source: dict) -> Manifest:
    """The manifest but for what only the loaded target can tell: its weights' hash and its whole architecture."""
    tokenizer_hash, template_hash = tokenizer_hashes(load_tokenizer(recipe.target.location, recipe.target.revision))
    sizes = target_sizes(recipe.target)
    layers = chosen_layers(recipe.cache, sizes)
    return Manifest(
        format_version=FORMAT_VERSION,
        target={
            "id": recipe.target.id,
            "revision": recipe.target.revision,
            "weights_hash": "",
            "architecture": sizes._asdict(),
            "mask_token_id": recipe.target.mask_token_id,
        },
        tokenizer_hash=tokenizer_hash,
        chat_template_hash=template_hash,
        hidden_layers=layers if "hidden" in recipe.cache.kinds else [],
        kv_layers=layers if "kv" in recipe.cache.kinds else [],
        query_layers=layers if "query" in recipe.cache.kinds else [],
        codec=recipe.cache.codec,
        last_hidden=recipe.cache.last_hidden,
        max_length=recipe.data.max_length,
        source={"name": recipe.data.source, "recipe": recipe.data.model_dump(), **source},
        software=software_versions(),
    )


def differences(planned: Manifest, manifest: Manifest, data: bool = False) -> list[str]:
    """Fields in which a cache is not the one that is planned, as far as a plan without documents and weights can tell; with
    `data` also how the source is named."""
    later = ("source.", "target.weights_hash", "target.architecture.")
    fields = [f for f in planned.differs(manifest) if not f.startswith(later)]
    return fields + ["data"] * (data and planned.source["recipe"] != manifest.source.get("recipe"))


def completed(manifest: Manifest, target) -> Manifest:
    """A plan with what the loaded target says of itself."""
    known = {"weights_hash": target.weights_hash(), "architecture": asdict(target.architecture)}
    return manifest.model_copy(update={"target": manifest.target | known})


def tokenise(recipe: CaptureSections, path: Path, processes: int = 1) -> dict:
    """Write the tokenised source to `path`, as one of `processes` that do so at once; returns the manifest's word on it and
    says what was left out."""
    tokenizer = load_tokenizer(recipe.target.location, recipe.target.revision)
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
    print(
        f"{source['documents']:,} documents, {source['tokens']:,} tokens, {source['supervised']:,} supervised; "
        f"layers {layers[kinds[0]]}, {'+'.join(kinds)}, {manifest.codec}: "
        f"{size / 2**30:.2f} GiB, {size / source['tokens']:,.0f} bytes a token",
        flush=True,
    )
    return size


def build(recipe: CaptureSections, barrier: Callable[[], None]) -> None:
    """Tokenise, capture and seal `recipe.cache.dir`; a capture that was interrupted goes on. Called by all processes.

    Raises:
        UserError: the folder holds another cache, the source gives nothing, or the disk cannot hold the cache.
    """
    folder, claimed, manifest = Path(recipe.cache.dir), None, None
    try:
        if rank() == 0:
            claimed = claim(folder)
            manifest = plan(recipe, tokenise(recipe, folder / DOCUMENTS))
            _refuse_small_disk(folder, describe(manifest))
        barrier()
        target = load_target(recipe.target, recipe.capture)
        together = recipe.capture.spread == "tp"
        if together and rank() != 0:
            target.weights_hash()  # gathering the shards takes all processes
        if manifest:
            manifest = completed(manifest, target)
        writer = CacheWriter(folder, manifest, recipe.cache.shard_bytes, rank(), world_size(), barrier, claimed)
        for name in writer.removed:
            print(f"{name} was damaged: it is removed and its documents are captured again", flush=True)
        if rank() == 0 and len(writer.done):
            print(f"{len(writer.done):,} documents are there already", flush=True)
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


def estimate(recipe: CaptureSections) -> None:
    """Bytes and hours of a capture: the source is tokenised, and the rate measured on a few of its own batches."""
    with tempfile.TemporaryDirectory(dir=_existing(Path(recipe.cache.dir).absolute().parent)) as folder:  # /tmp may be small
        path = Path(folder) / DOCUMENTS
        manifest = plan(recipe, tokenise(recipe, path))
        size = describe(manifest)
        documents = Documents(path)
        target = load_target(recipe.target, recipe.capture)
        target.capture(manifest.hidden_layers, manifest.kv_layers, manifest.query_layers)
        every = batches(documents.by_length(), documents.lengths, recipe.capture.batch_tokens, target.packs)
        tokens = seconds = 0
        for number, i in enumerate(np.linspace(0, len(every) - 1, 6).astype(int)):
            batch = Batch([documents[index] for index in every[i]])
            began = time.perf_counter()
            stored = batch.tensors(batch.forward(target), manifest)
            {name: tensor.cpu() for name, tensor in stored.items()}
            if number:  # the first one warms up
                tokens, seconds = tokens + len(batch.ids_P), seconds + time.perf_counter() - began
    rate = tokens / seconds
    hours = manifest.source["tokens"] / rate / 3600
    free = shutil.disk_usage(_existing(Path(recipe.cache.dir))).free
    print(f"{rate:,.0f} tokens/s on {target.device} (disk aside): {hours:.2g} hours on one process, {hours / 8:.2g} on eight")
    print(f"{recipe.cache.dir}: {free / 2**30:.1f} GiB are free" + ("" if free > size else ", which is NOT enough"))


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
