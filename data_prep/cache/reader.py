"""Shards -> documents, memory-mapped: a read touches only the layers asked for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.cache.manifest import FILES, INDEX, canonical, file_hash, read_manifest
from data_prep.cache.writer import document_hash
from data_prep.errors import UserError


class CacheReader:
    """A finished cache: `ids`, `lengths`, `supervised` per document, and their tensors by index.

    Raises:
        UserError: the capture is unfinished, or a shard is missing or shorter than its header says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not (self.folder / FILES).exists():
            raise UserError(f"{self.folder}: the capture has not finished; run the same data_prep command again")
        try:
            table = pq.read_table(self.folder / INDEX)
        except Exception as error:
            raise UserError(f"{self.folder / INDEX} is missing or damaged; remove it and {FILES}, then run data_prep again") from error
        self.ids, self.lengths, self.supervised, self._offset, self._teacher_offset, self._xxh3, self._shard = (
            table[name].to_pylist() for name in ("id", "length", "supervised", "offset", "teacher_offset", "xxh3", "shard"))
        self._shards = {name: self._open(name) for name in sorted(set(self._shard))}

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int, names: list[str]) -> dict[str, Tensor]:
        """Tensors of one document, [T, ...] each (last_hidden: one row a supervised token, in order)."""
        shard, tensors = self._shards[self._shard[index]], {}
        for name in names:
            start = (self._teacher_offset if name == "last_hidden" else self._offset)[index]
            count = (self.supervised if name == "last_hidden" else self.lengths)[index]
            tensors[name] = shard.get_slice(name)[start:start + count]
        return tensors

    def problems(self) -> Iterator[str]:
        """What `mode=verify` finds: every byte of every file is read, and every document's numbers are looked at."""
        text = (self.folder / FILES).read_text()
        try:
            recorded = json.loads(text)
            assert canonical(recorded) == text and isinstance(recorded, dict)
        except (ValueError, AssertionError):
            yield f"{FILES} is damaged"
            return
        present = {p.name for p in self.folder.iterdir()} - {FILES}
        yield from (f"{name}: missing" for name in sorted(recorded.keys() - present))
        yield from (f"{name}: not part of the capture" for name in sorted(present - recorded.keys()))
        for name in sorted(recorded.keys() & present):
            if file_hash(self.folder / name) != recorded[name]:
                yield f"{name}: checksum differs"
        if len(set(self.ids)) != len(self.ids):
            yield f"{INDEX}: a document id stands twice"
        names = list(self.manifest.tensors())
        for index, id in enumerate(self.ids):
            tensors = self.read(index, names)
            if document_hash(tensors) != self._xxh3[index]:
                yield f"{self._shard[index]}: document {id}: checksum differs"
            if bad := [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
                yield f"{self._shard[index]}: document {id}: NaN or Inf in {', '.join(bad)}"

    def _open(self, name: str):
        path = self.folder / f"{name}.safetensors"
        try:
            shard = safe_open(path, framework="pt")
            if missing := self.manifest.tensors().keys() - set(shard.keys()):
                raise UserError(f"{path} lacks {', '.join(sorted(missing))}; remove it and its .parquet, then run data_prep again")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or truncated ({error}); remove it, its .parquet and {FILES}, "
                            "then run data_prep again") from error
        return shard
