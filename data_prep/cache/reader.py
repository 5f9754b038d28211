"""Shards -> documents, memory-mapped: a read touches only the layers asked for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.cache.manifest import FILES, INDEX, MANIFEST, canonical, file_hash, read_manifest
from data_prep.cache.writer import document_hash
from data_prep.errors import UserError


class CacheReader:
    """A finished cache: `ids`, `lengths`, `supervised` per document, and their tensors by index.

    Raises:
        UserError: the capture is unfinished, the manifest or the index is not as written, or a shard is missing or
            shorter than its header says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        recorded = self._recorded()
        # The manifest and the index say what the other bytes mean, so they are looked at before they are believed.
        if self._hash(MANIFEST) != recorded.get(MANIFEST):
            raise UserError(f"{self.folder / MANIFEST} is damaged; remove {self.folder} and capture again")
        if self._hash(INDEX) != recorded.get(INDEX):
            raise UserError(f"{self.folder / INDEX} is missing or damaged; remove it and {FILES}, then run data_prep again")
        table = pq.read_table(self.folder / INDEX)
        self.ids, self.lengths, self.supervised, self._offset, self._teacher_offset, self._xxh3, self._shard = (
            table[name].to_pylist() for name in ("id", "length", "supervised", "offset", "teacher_offset", "xxh3", "shard")
        )
        self._shards = {name: self._open(name) for name in sorted(set(self._shard))}

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int, names: list[str]) -> dict[str, Tensor]:
        """Tensors of one document, [T, ...] each (last_hidden: one row a supervised token, in order)."""
        shard, tensors = self._shards[self._shard[index]], {}
        for name in names:
            start = (self._teacher_offset if name == "last_hidden" else self._offset)[index]
            count = (self.supervised if name == "last_hidden" else self.lengths)[index]
            tensors[name] = shard.get_slice(name)[start : start + count]
        return tensors

    def problems(self) -> Iterator[str]:
        """What `mode=verify` finds: every byte of every file is read, and every document's numbers are looked at."""
        recorded = self._recorded()
        present = {p.name for p in self.folder.iterdir()} - {FILES}
        yield from (f"{name}: missing" for name in sorted(recorded.keys() - present))
        yield from (f"{name}: not part of the capture" for name in sorted(present - recorded.keys()))
        for name in sorted(recorded.keys() & present):
            if self._hash(name) != recorded[name]:
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

    def _recorded(self) -> dict[str, str]:
        """File name -> checksum, as the writer left them when it finished."""
        path = self.folder / FILES
        try:
            text = path.read_text()
            recorded = json.loads(text)
        except FileNotFoundError as error:
            raise UserError(f"{self.folder}: the capture has not finished; run the same data_prep command again") from error
        except ValueError:
            recorded = None
        if not isinstance(recorded, dict) or canonical(recorded) != text:
            raise UserError(f"{path} is damaged; remove it, then run data_prep again")
        return recorded

    def _hash(self, name: str) -> str:
        path = self.folder / name
        return file_hash(path) if path.is_file() else "missing"

    def _open(self, name: str):
        path = self.folder / f"{name}.safetensors"
        try:
            shard = safe_open(path, framework="pt")
            if missing := self.manifest.tensors().keys() - set(shard.keys()):
                raise UserError(
                    f"{path} lacks {', '.join(sorted(missing))}; remove it and its .parquet, then run data_prep again"
                )
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is missing or truncated ({error}); remove it, its .parquet and {FILES}, then run data_prep again"
            ) from error
        return shard
