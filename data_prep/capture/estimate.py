"""`mode=estimate`: bytes and hours of a capture."""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from common.ranks import rank, world_size
from data_prep.cache.manifest import DOCUMENTS, Manifest
from data_prep.capture.build import describe, existing, target_of, tokenise
from data_prep.capture.capture import Batch, batches
from data_prep.capture.plan import plan
from data_prep.recipe import CaptureSections
from data_prep.sources.documents import Documents
from data_prep.target.served import ServedTarget
from data_prep.target.target import Target


def estimate(recipe: CaptureSections) -> None:
    """Print bytes and hours of a capture: the source is tokenised, and the rate measured on a few of its own batches.

    Called by one process, or by all that share the target (`capture.spread=tp`): each tokenises for itself, and reads
    the same batches.
    """
    sharing = world_size() if recipe.capture.spread == "tp" else 1
    with tempfile.TemporaryDirectory(dir=existing(Path(recipe.cache.dir).absolute().parent)) as folder:  # /tmp may be small
        path = Path(folder) / DOCUMENTS
        manifest = plan(recipe, tokenise(recipe, path, sharing))
        size = describe(manifest) if rank() == 0 else 0
        documents = Documents(path)
        with target_of(recipe) as target:
            rate = _rate(target, documents, manifest, recipe.capture.batch_tokens)
            where = "at the server" if target.server else f"on {target.device}"
    if rank() != 0:
        return
    hours = manifest.source["tokens"] / rate / 3600
    free = shutil.disk_usage(existing(Path(recipe.cache.dir))).free
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
