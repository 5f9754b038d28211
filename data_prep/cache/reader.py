"""Shards -> documents: a read touches only the layers asked for, and of a cropped document only the positions shown."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from common.errors import UserError
from common.files import read_json
from common.hashing import file_hash
from common.tensor_files import offsets_of
from data_prep.cache.codec import SCALE, finite
from data_prep.cache.manifest import FILES, INDEX, MANIFEST, canonical, is_teacher, read_manifest
from data_prep.cache.writer import document_hash, tensor_hash
from data_prep.sources.documents import Digest
from data_prep.sources.tokens import TokenDocument


class Shard(NamedTuple):
    """A shard's file as it was when the cache was opened."""

    path: Path
    offsets: dict[str, int]  # of each tensor's first row, in bytes
    state: tuple[int, int]  # size, time of the last change


class CacheReader:
    """A finished cache: `ids`, `lengths`, `supervised` per document, in the order of ids, and their tensors by index.

    The index is held once a process, in Arrow and NumPy arrays: threads share it, and a fork does not copy it.

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
        table = pq.read_table(self.folder / INDEX).combine_chunks()
        # An empty table has no chunk to combine.
        self.ids = table["id"].combine_chunks() if len(table) else pa.array([], pa.string())
        self.lengths, self.supervised, self._offset, self._teacher_offset = (
            table[name].to_numpy() for name in ("length", "supervised", "offset", "teacher_offset")
        )
        self._xxh3 = table["xxh3"]
        # A number for each document instead of a name: an index of millions of documents stays small.
        shards = table["shard"].combine_chunks().dictionary_encode()
        self._shard_names = shards.dictionary.to_pylist()
        self._shard = shards.indices.to_numpy()
        self._rows = self.manifest.tensors()  # name -> (dtype, shape of a row)
        # [documents, tensors in the order of their names]: each one's checksum, and whether it need not be looked at (again).
        self._place = {name: place for place, name in enumerate(sorted(self._rows))}
        self._sums = np.zeros((len(self), len(self._rows)), np.uint64)
        self._checked = np.ones(self._sums.shape, bool)
        if "sums" in table.column_names and len(table):  # else it is a cache of an earlier release
            sums = table["sums"].combine_chunks()
            known = sums.is_valid().to_numpy(zero_copy_only=False)
            values = sums.flatten().to_numpy()
            if len(values) == known.sum() * len(self._rows):  # as every capture makes them
                self._sums[known] = values.reshape(-1, len(self._rows))
                self._checked[known] = False
        self._shards = [self._open(name) for name in self._shard_names]

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, index: int) -> str:
        return self.ids[int(index)].as_py()

    def read(self, index: int, names: list[str], span: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Tensors of one document, [T, ...] each (last_hidden and queries: one row a supervised token, in order), and
        `name.scale` beside each fp8 tensor.

        `span`: of positions [start, stop) alone, with the rows of teachers that still teach a token: its first token is
        predicted from what lies before it, so that it is not supervised.

        A tensor is held against its checksum the first time that this process reads it whole; of a crop none is known.

        Raises:
            UserError: the shard is not as it was when the cache was opened, or what is read is not what was written.
        """
        offset = int(self._offset[index])
        length = int(self.lengths[index])
        teacher = int(self._teacher_offset[index])
        supervised = int(self.supervised[index])
        start, stop = span or (0, length)
        names = [*names, *(name + SCALE for name in names if name + SCALE in self._rows)]
        tensors = {}
        with self._file(index) as rows:
            # The whole mask is read, also for a crop: the supervised tokens before the crop say where its first teacher lies.
            # In a cache without sums, that their count is the index's is a cheap look at whether these are the document's bytes.
            mask = rows("loss_mask", offset, length)
            self._check(index, "loss_mask", mask)
            mask = mask.bool()
            if int(mask.sum()) != supervised:
                raise self._damaged(index, "loss_mask")
            first, last = _taught(mask, start, stop)
            for name in names:
                taught = is_teacher(name)
                if taught and self.manifest.last_hidden != "all":
                    tensors[name] = rows(name, teacher + first, last - first)
                else:
                    tensors[name] = rows(name, offset + start, stop - start)
                if (start, stop) == (0, length):
                    self._check(index, name, tensors[name])
                if taught and self.manifest.last_hidden == "all":
                    tensors[name] = _picked(tensors[name][:-1], mask[start + 1 : stop])
        if span and "loss_mask" in tensors:
            tensors["loss_mask"][0] = 0
        return tensors

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """(input_ids, loss_mask) of one document."""
        tensors = self.read(index, ["input_ids", "loss_mask"])
        return tensors["input_ids"], tensors["loss_mask"]

    def read_many(self, indices: list[int], names: list[str], spans: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        return [self.read(index, names, span) for index, span in zip(indices, spans)]

    def problems(self) -> Iterator[str]:
        """What `mode=verify` finds: every byte of every file is read, every document's numbers are looked at, and all
        documents together must be the source that the manifest names."""
        recorded = self._recorded()
        present = {p.name for p in self.folder.iterdir()} - {FILES}
        yield from (f"{name}: missing" for name in sorted(recorded.keys() - present))
        yield from (f"{name}: not part of the capture" for name in sorted(present - recorded.keys()))
        for name in sorted(recorded.keys() & present):
            if self._hash(name) != recorded[name]:
                yield f"{name}: checksum differs"
        digest = Digest()
        for index in range(len(self)):
            id = self.id(index)
            where = f"{self._shard_names[self._shard[index]]}: document {self.id(index)}"
            tensors = self._stored(index)
            if document_hash(tensors) != self._xxh3[index].as_py():
                yield f"{where}: checksum differs"
            mask = tensors["loss_mask"]
            if int(mask.sum()) != self.supervised[index] or mask[0] or self.lengths[index] > self.manifest.max_length:
                yield f"{where}: its length or loss mask is not what the index and the manifest say"
            if bad := [name for name, t in tensors.items() if not finite(t)]:
                yield f"{where}: NaN or Inf in {', '.join(bad)}"
            digest.add(TokenDocument(id, tensors["input_ids"].numpy(), mask.numpy()))
        source = self.manifest.source
        documents = source.get("documents")
        if "hash" in source and (digest.hex(), len(self)) != (source["hash"], documents):
            yield f"{INDEX}: {len(self)} documents are not the {documents} of the manifest's source (a gap or a change)"

    def _check(self, index: int, name: str, stored: Tensor) -> None:
        """Hold all that is stored of a tensor of a document against its checksum, once. Raises UserError when it differs."""
        place = index, self._place[name]
        if not self._checked[place]:
            if self._sums[place] != tensor_hash(stored):
                raise self._damaged(index, name)
            self._checked[place] = True

    def _damaged(self, index: int, name: str) -> UserError:
        path = self._shards[self._shard[index]].path
        return UserError(
            f"{path}: {name} of document {self.id(index)} is damaged; run the same data_prep command again, which captures that "
            "shard anew (mode=verify looks at every document)"
        )

    def _stored(self, index: int) -> dict[str, Tensor]:
        """All that is stored of a document, and where the index says so."""
        everything = (int(self._offset[index]), int(self.lengths[index]))
        taught = (int(self._teacher_offset[index]), int(self.supervised[index]))
        if self.manifest.last_hidden == "all":
            taught = everything
        with self._file(index) as rows:
            return {name: rows(name, *(taught if is_teacher(name) else everything)) for name in self._rows}

    @contextmanager
    def _file(self, index: int) -> Iterator[Callable[[str, int, int], Tensor]]:
        """The shard of a document, open: (name of a tensor, first row, count) -> those rows.

        Raises:
            UserError: it is not as it was when the cache was opened, or cannot be read.
        """
        path, offsets, state = self._shards[self._shard[index]]

        def rows(name: str, first: int, count: int) -> Tensor:
            dtype, row = self._rows[name]
            tensor = torch.empty((count, *row), dtype=dtype)
            at = offsets[name] + first * math.prod(row) * dtype.itemsize
            left = tensor.flatten().view(torch.uint8).numpy()
            # One call reads at most 2 GiB, and nothing at all behind the end of a file that was cut.
            while len(left):
                if not (got := os.preadv(file.fileno(), [left], at)):
                    raise EOFError
                at += got
                left = left[got:]
            return tensor

        try:
            # Opened anew for each read. A handle that stayed open would go on reading a file that was removed or replaced, and a
            # cache may have more shards than a process may have open files.
            with open(path, "rb", buffering=0) as file:
                if _state(file) != state:
                    raise EOFError
                yield rows
        except (FileNotFoundError, EOFError) as error:
            raise UserError(
                f"{path} was removed, cut or replaced since it was opened; run data_prep again, which captures anew what is "
                "missing, then the same command again"
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def _recorded(self) -> dict[str, str]:
        """File name -> checksum, as the writer left them when it finished."""
        path = self.folder / FILES
        advice = "remove it, then run data_prep again"
        try:
            recorded = read_json(path, advice)
        except FileNotFoundError as error:
            raise UserError(f"{self.folder}: the capture has not finished; run the same data_prep command again") from error
        if not isinstance(recorded, dict) or canonical(recorded) != path.read_text():
            raise UserError(f"{path} is damaged; {advice}")
        return recorded

    def _hash(self, name: str) -> str:
        path = self.folder / name
        return file_hash(path) if path.is_file() else "missing"

    def _open(self, name: str) -> Shard:
        path = self.folder / f"{name}.safetensors"
        try:
            with open(path, "rb") as file:
                return Shard(path, offsets_of(file, self._rows), _state(file))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is missing or truncated ({error}); run data_prep again, which captures that shard anew"
            ) from error


def _state(file: IO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    # A shard that is captured again has another time of change, even where it has the same size.
    return found.st_size, found.st_mtime_ns


def _picked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Its rows where the mask is 1; torch cannot index fp8."""
    return tensor.view(torch.uint8)[mask].view(tensor.dtype) if tensor.itemsize == 1 else tensor[mask]


def _taught(mask: Tensor, start: int, stop: int) -> tuple[int, int]:
    """Rows [first, last) of the teachers of positions [start, stop), of which the first is not taught."""
    return int(mask[: start + 1].sum()), int(mask[:stop].sum())


def crop(tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """What `CacheReader.read` gives of a span, from a whole document's tensors."""
    mask = tensors["loss_mask"]
    teachers = slice(*_taught(mask, start, stop))
    out = {name: t[teachers] if is_teacher(name) else t[start:stop] for name, t in tensors.items()}
    # The slice above shares its memory with the whole document, which may be cropped again elsewhere.
    out["loss_mask"] = out["loss_mask"].clone()
    out["loss_mask"][:1] = 0
    return out
