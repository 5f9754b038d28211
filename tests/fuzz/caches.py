"""A small finished cache: read whole, verified, and captured again where it was harmed."""

import json
from pathlib import Path
from random import Random

import torch

from data_prep.cache.manifest import MANIFEST
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import CacheWriter
from data_prep.sources.documents import Digest
from data_prep.sources.tokens import TokenDocument
from tests.fuzz import Silent, changed, copied, damaged
from tests.support.caches import bits, document, manifest_of, rewrite, write

SHARD_BYTES = 2500  # two documents


class Caches:
    def __init__(self, folder: Path):
        self.doors = {"read and verified": self.read, "captured again": self.capture}
        self.base, self.work = folder / "whole", folder / "cache"
        made = manifest_of()
        masks = {"a#0": [0, 1, 1, 0, 1], "b#0": [0] * 4 + [1] * 9, "c#0": [0, 1], "d#0": [0, 0, 1, 0, 1, 1, 1]}
        self.documents = {id: document(made, mask, seed) for seed, (id, mask) in enumerate(masks.items())}
        digest = Digest()
        for id, tensors in self.documents.items():
            digest.add(TokenDocument(id, tensors["input_ids"].numpy(), tensors["loss_mask"].numpy()))
        source = {"name": "s", "hash": digest.hex(), "documents": len(masks), "tokens": 27, "supervised": 17}
        self.manifest = manifest_of(source=source)
        write(self.base, self.manifest, self.documents, SHARD_BYTES)

    def mutate(self, random: Random) -> str:
        copied(self.base, self.work)
        if random.random() < 0.2:
            manifest, said = changed(json.loads((self.work / MANIFEST).read_text()), random)
            rewrite(self.work, manifest)
            return f"{MANIFEST}, sealed again: {said}"
        return damaged(self.work, random)

    def read(self) -> str:
        reader = CacheReader(self.work)
        names = ["input_ids", "loss_mask", *reader.manifest.states]
        if reader.ids.to_pylist() != sorted(self.documents):
            raise Silent("other documents")
        for index, id in enumerate(sorted(self.documents)):
            found = reader.read(index, names)
            if any(not torch.equal(bits(tensor), bits(self.documents[id][name])) for name, tensor in found.items()):
                raise Silent(f"other bytes of document {id}")
        return "noticed" if list(reader.problems()) else "harmless"

    def capture(self) -> str:
        """The same capture once more: what was harmed is captured anew, or the folder is refused."""
        writer = CacheWriter(self.work, self.manifest, SHARD_BYTES)
        done = set(writer.done.to_pylist())
        for id, tensors in self.documents.items():
            if id not in done:
                writer.add(id, tensors)
        writer.finish()
        if self.read() != "harmless":
            raise Silent("the capture ended and the cache is not whole")
        return "mended"
