"""A recipe -> a finished cache: texts are tokenised, captured and sealed."""

import gc
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from common.errors import UserError
from common.progress import counted
from common.ranks import rank, world_size
from data_prep.cache.manifest import DOCUMENTS, Manifest
from data_prep.cache.writer import CacheWriter, claim
from data_prep.capture.capture import capture
from data_prep.capture.plan import chosen_layers, completed, plan
from data_prep.recipe import CaptureSections
from data_prep.sources import records as sources
from data_prep.sources.counts import Counts
from data_prep.sources.documents import Documents, tokenized, write_documents
from data_prep.sources.sides import refuse_idle_ranks, refuse_too_few
from data_prep.target.architecture import target_sizes
from data_prep.target.loading import target_tokenizer
from data_prep.target.quantised import in_words, unrounded
from data_prep.target.served import ServedTarget, capturing
from data_prep.target.target import Target
from data_prep.target.transformers_private import active_weights


def tokenise(recipe: CaptureSections, path: Path, processes: int = 1) -> dict:
    """Write the tokenised source to `path`, as one of `processes` that do so at once; returns the manifest's word on it and
    says what was left out."""
    tokenizer = target_tokenizer(recipe.target)
    counts = Counts()
    workers = recipe.capture.workers or max(1, (os.cpu_count() or 1) // processes)
    records = sources.records(recipe.data, heldout=None, whole=recipe.data.max_tokens is None)
    documents = tokenized(records, tokenizer, recipe.data, counts, workers)
    if rank() == 0:
        documents = counted(documents, lambda number: f"tokenise: {number:,} documents")
    source = write_documents(path, documents, counts)
    if rank() == 0:
        read = source["records"]
        heldout = f"{read['held_out']:,} held out for evaluation"
        print(f"{read['read']:,} records: {read['captured']:,} captured, {heldout}", flush=True)
        say(Counter(source["left_out"]) + Counter(source["kept"]))
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
            _say_or_refuse_too_few(recipe, manifest.source, Documents(folder / DOCUMENTS), for_training)
            # Before the target is loaded, which takes minutes.
            _refuse_small_disk(folder, describe(manifest))
        barrier()
        with target_of(recipe) as target:
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


def target_of(recipe: CaptureSections) -> AbstractContextManager[Target | ServedTarget]:
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


def _say_or_refuse_too_few(recipe: CaptureSections, source: dict, documents: Documents, refuse: bool) -> None:
    what = f"data={recipe.data.source} gives"
    try:
        refuse_too_few(documents.ids, what, advice(recipe, source), world_size() if refuse else 1)
    except UserError as error:
        if refuse:
            raise
        print(f"WARNING: {error}", flush=True)
    if recipe.capture.spread != "tp":  # there all ranks run every document
        refuse_idle_ranks(what, source["documents"], "document(s)", world_size())


def say_how_long(target: Target, tokens: int, batch_tokens: int, context: float = 0) -> None:
    """Print about how long the target's forwards will take, before the first of them: two operations a weight and token, and two
    products with each of the `context` positions that a token sees on average, at the rate of one product of the target's own
    sizes, timed for a moment. Copies and the disk come on top."""
    shape = target.architecture
    attention = 4 * shape.num_layers * shape.heads * shape.head_dim * context
    needed = tokens * (2 * active_weights(target.model) + attention)
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
    seconds = needed / (operations * count / spent) / world_size()
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


def existing(folder: Path) -> Path:
    return folder if folder.exists() else existing(folder.absolute().parent)
