"""What training reads from: a finished cache, one that is captured on first use, or the target itself."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from common.errors import UserError
from common.ranks import rank, world_size
from common.rules import refuse
from data_prep import rules
from data_prep.cache.codec import SCALE
from data_prep.cache.manifest import DOCUMENTS, FILES, Manifest, each_document
from data_prep.cache.reader import CacheReader, crop
from data_prep.capture import build
from data_prep.capture import plan as planning
from data_prep.capture.capture import Batch, batches
from data_prep.capture.first_batch import check_first_batch
from data_prep.recipe import CaptureSections
from data_prep.sources.documents import Documents
from data_prep.sources.sides import refuse_too_few
from data_prep.target.loading import load_target


class LiveReader:
    """The interface of `CacheReader` with nothing stored: the target runs whenever a document is read.

    States pass through the cache's codec, so that what is read is what a cache would have held. They stay on the target's
    device; `input_ids` and `loss_mask` on the host.
    """

    def __init__(self, recipe: CaptureSections):
        self.folder = Path(recipe.cache.dir)
        with tempfile.TemporaryDirectory() as folder:  # the mapping outlives the file's name
            source = build.tokenise(recipe, Path(folder) / DOCUMENTS, processes=world_size())  # every process for itself
            self._documents = Documents(Path(folder) / DOCUMENTS)
        advice = build.advice(recipe, source)
        refuse_too_few(self._documents.ids, f"data={recipe.data.source} gives", advice, world_size())
        order = pc.sort_indices(self._documents.ids)  # a cache's index is in the order of ids too
        self._order = order.to_numpy()
        self.ids = self._documents.ids.take(order).combine_chunks()
        self.lengths = self._documents.lengths[self._order]
        self._batch_tokens = recipe.capture.batch_tokens
        self._target = load_target(recipe.target, recipe.capture)
        self.manifest = planning.completed(planning.plan(recipe, source), self._target)
        self._target.capture(self.manifest.hidden_layers, self.manifest.kv_layers, self.manifest.query_layers)
        self._has_run = False

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, index: int) -> str:
        return self.ids[int(index)].as_py()

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """(input_ids, loss_mask) of one document."""
        document = self._documents[self._order[index]]
        return torch.from_numpy(document.input_ids), torch.from_numpy(document.loss_mask)

    def read_many(self, indices: Sequence[int], names: list[str], spans: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Their tensors as `CacheReader.read` gives them, from forwards of at most `capture.batch_tokens` tokens."""
        # Stable, so that documents of one length keep their order and a batch is the same on every run.
        longest_first = np.argsort(-self.lengths[np.asarray(indices)], kind="stable")
        found: dict[int, dict[str, Tensor]] = {}
        for group in batches(longest_first, self.lengths[np.asarray(indices)], self._batch_tokens, self._target.packs):
            found |= zip(group.tolist(), self._forward([self._order[indices[i]] for i in group], names))
        return [crop(found[i], *span) for i, span in enumerate(spans)]

    def _forward(self, documents: Sequence[int], names: list[str]) -> list[dict[str, Tensor]]:
        batch = Batch([self._documents[i] for i in documents])
        manifest = self.manifest.model_copy(update={"last_hidden": "supervised"})
        states = batch.forward(self._target)
        if not self._has_run:
            check_first_batch(self._target, batch, states)
            self._has_run = True
        tensors = batch.tensors(states, manifest)
        tensors = {name: t for name, t in tensors.items() if name.removesuffix(SCALE) in {*names, "loss_mask"}}
        return [document for *_, document in each_document(tensors, batch.lengths, manifest.last_hidden)]


def missing(recipe: CaptureSections) -> bool:
    """Whether there is no finished cache and `cache.on_missing` has another answer to that than to fail."""
    return recipe.cache.on_missing != "fail" and not (Path(recipe.cache.dir) / FILES).exists()


def manifest_of(recipe: CaptureSections) -> Manifest:
    """The manifest that `open_cache` will read, as far as it can be known before anything runs.

    Raises:
        UserError: there is no cache and there cannot be one, or the cache is not the one that is described.
    """
    if missing(recipe):
        planning.check_capture(recipe)
        refuse(rules.LIVE, recipe)
        return planning.plan(recipe, {})
    reader = CacheReader(recipe.cache.dir)
    if recipe.cache.on_missing != "fail":
        if fields := contradicted(recipe, reader.manifest):
            raise UserError(
                f"{recipe.cache.dir} holds another cache than cache.on_missing={recipe.cache.on_missing} would make; these "
                f"differ: {', '.join(fields)}. Choose another cache.dir, or cache.on_missing=fail to use it as it is"
            )
    refuse_too_few(reader.ids, f"{recipe.cache.dir} holds", ranks=world_size())
    return reader.manifest


# What in a manifest follows from which words of the line. Of the target the weights speak for themselves, once it is loaded.
SAID_BY = {
    "codec": ("cache.codec",),
    "last_hidden": ("cache.last_hidden",),
    **dict.fromkeys(("hidden_layers", "kv_layers", "query_layers"), ("cache.kinds", "cache.layers")),
    "target.revision": ("target.revision",),
    **dict.fromkeys(("data", "max_length", "chat_template_hash"), ("data",)),
}


def contradicted(recipe: CaptureSections, manifest: Manifest) -> list[str]:
    """Fields in which a finished cache is not what the line says. What the line does not name follows the cache."""
    said = {field for field, keys in SAID_BY.items() if recipe.names(*keys)}
    if not recipe.names("cache.kinds"):  # a target need not yield all that the group `cache` asks for
        kinds = [kind for kind in ("hidden", "kv", "query") if getattr(manifest, f"{kind}_layers")]
        recipe = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"kinds": kinds})})
    if "cache" in recipe.named:  # cache=fp8: the files of that group differ in nothing else
        said.add("codec")
    fields = planning.differences(planning.plan(recipe, {}), manifest)
    theirs = manifest.source.get("recipe", {})
    if any(theirs.get(key) != value for key, value in recipe.data.model_dump().items() if f"data.{key}" not in recipe.chosen):
        fields.append("data")
    return [field for field in fields if field in said]


def open_cache(recipe: CaptureSections, barrier: Callable[[], None]) -> CacheReader | LiveReader:
    """The cache to train from. Called by all processes.

    Raises:
        UserError: there is none (`on_missing=fail`), or it cannot be made.
    """
    wanted = missing(recipe)
    barrier()  # all have looked before one of them makes it
    # Every rank runs the target on the documents that it reads itself: nothing is shared, and nothing is waited for.
    if wanted and recipe.cache.on_missing == "live":
        return LiveReader(recipe)
    if wanted:
        if rank() == 0:
            print(f"no finished cache at {recipe.cache.dir}: it is captured first (cache.on_missing=capture)", flush=True)
        build.build(recipe, barrier, for_training=True)
    return CacheReader(recipe.cache.dir)
