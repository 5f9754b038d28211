"""Documents -> shards. A shard is complete or absent; a run that was killed goes on by document id."""

import fcntl
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from data_prep.cache.manifest import FILES, INDEX, MANIFEST, Manifest, canonical, file_hash, publish, read_manifest, write_text
from data_prep.errors import UserError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("teacher_offset", pa.int64()),
        ("supervised", pa.int64()),
        ("xxh3", pa.string()),
    ]
)


def document_hash(tensors: dict[str, Tensor]) -> str:
    """xxh3 of one document's bytes: every tensor, in name order."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CacheWriter:
    """Collects documents and writes a shard whenever `shard_bytes` have come together.

    The Parquet file is a shard's seal: it is renamed after the tensors, so tensors without it never count.

    Raises:
        UserError: the folder holds a cache of another manifest (the differing fields are named), or another process
            is writing it.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, shard_bytes: int):
        self.folder, self.manifest, self.shard_bytes = Path(folder), manifest, shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)  # a folder can be locked: no lock file is left in the cache
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.folder} is being written by another process") from error
        try:
            self._refuse_another_cache()
        except UserError:
            os.close(self._lock)
            raise
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        if not (self.folder / MANIFEST).exists():
            write_text(self.folder / MANIFEST, manifest.model_dump_json(indent=1))
        sealed = sorted(self.folder.glob("shard-*.parquet"))
        self.done = {row for path in sealed for row in _ids(path)}
        self._next = 1 + max((int(path.stem.removeprefix("shard-")) for path in sealed), default=-1)
        self._documents: list[tuple[str, dict[str, Tensor]]] = []
        self._bytes = 0

    def _refuse_another_cache(self) -> None:
        if (self.folder / MANIFEST).exists():
            if fields := self.manifest.differs(read_manifest(self.folder)):
                raise UserError(
                    f"{self.folder} holds another cache; these differ: {', '.join(fields)}. "
                    "Choose another cache.dir or remove that folder"
                )
        elif any(p.suffix != ".tmp" for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and holds no cache; choose another cache.dir")

    def add(self, id: str, tensors: dict[str, Tensor]) -> None:
        """One document: the tensors of `Manifest.tensors()`, on the CPU, T rows each (last_hidden: one a teacher)."""
        self._documents.append((id, tensors))
        self._bytes += sum(t.nbytes for t in tensors.values())
        if self._bytes >= self.shard_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is left, merge the shards' tables into one index and record every file's checksum."""
        self._flush()
        parts = sorted(self.folder.glob("shard-*.parquet"))
        tables = {p: pq.read_table(p) for p in parts}
        index = [t.append_column("shard", pa.array([p.stem] * t.num_rows)).replace_schema_metadata() for p, t in tables.items()]
        self._write_table(pa.concat_tables(index), INDEX)
        sums = {name: file_hash(self.folder / name) for name in (MANIFEST, INDEX, *(p.name for p in parts))}
        # A shard's checksum is the one it was written with: what was damaged since must not be recorded as good.
        sums |= {f"{p.stem}.safetensors": t.schema.metadata[b"xxh3"].decode() for p, t in tables.items()}
        write_text(self.folder / FILES, canonical(sums))
        os.close(self._lock)

    def _flush(self) -> None:
        if not self._documents:
            return
        (self.folder / FILES).unlink(missing_ok=True)  # from here on the capture is unfinished again
        rows, offset, teacher_offset = [], 0, 0
        for id, tensors in self._documents:
            length, teachers = len(tensors["input_ids"]), len(tensors["last_hidden"])
            rows.append((id, offset, length, teacher_offset, teachers, document_hash(tensors)))
            offset, teacher_offset = offset + length, teacher_offset + teachers
        name = f"shard-{self._next:05d}"
        temporary = self.folder / f"{name}.safetensors.tmp"
        save_file({key: torch.cat([t[key] for _, t in self._documents]) for key in self.manifest.tensors()}, temporary)
        checksum = {"xxh3": file_hash(temporary)}
        publish(temporary, self.folder / f"{name}.safetensors")
        columns = dict(zip(SCHEMA.names, map(list, zip(*rows))))
        self._write_table(pa.table(columns, SCHEMA).replace_schema_metadata(checksum), f"{name}.parquet")
        self._next, self._documents, self._bytes = self._next + 1, [], 0

    def _write_table(self, table: pa.Table, name: str) -> None:
        pq.write_table(table, self.folder / f"{name}.tmp")
        publish(self.folder / f"{name}.tmp", self.folder / name)


def _ids(seal: Path) -> list[str]:
    try:
        return pq.read_table(seal, columns=["id"])["id"].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{seal} is damaged; remove it and the .safetensors beside it, then run data_prep again") from error
