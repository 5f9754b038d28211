"""Documents -> shards. A shard is complete or absent; a capture that was killed goes on by document id, with any number of
processes, each of which writes shards of its own."""

import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from torch import Tensor

from common.errors import UserError
from common.files import publish, write_text
from common.hashing import file_hash
from common.tensor_files import raw, write_safetensors
from data_prep.cache.codec import SCALE, finite
from data_prep.cache.manifest import DOCUMENTS, FILES, INDEX, MANIFEST, Manifest, canonical, each_document, read_manifest

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("teacher_offset", pa.int64()),
        ("supervised", pa.int64()),
        ("xxh3", pa.string()),
        ("sums", pa.list_(pa.uint64())),
    ]
)


def document_hash(tensors: dict[str, Tensor]) -> str:
    """xxh3 of one document's bytes: every tensor, in name order."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(raw(tensors[name]))
    return digest.hexdigest()


def tensor_hash(tensor: Tensor) -> int:
    """xxh3 of the bytes of one tensor of a document: what a reader can check that reads only some of them."""
    return xxhash.xxh3_64_intdigest(raw(tensor))


class CacheWriter:
    """Collects documents and writes a shard whenever `shard_bytes` have come together.

    The Parquet file is a shard's seal: it is renamed after the tensors, so tensors without it never count. Shards that were
    there before are read again first: one that was cut or changed since is removed, and its documents are captured anew.

    `rank`, `world` and `barrier` (a function that returns when all processes have called it) tell the processes of one
    capture apart; every one of them makes a writer and calls `finish`. Rank 0 brings the manifest and, where it has it
    already, the folder's lock (`claimed`).

    Raises:
        UserError: the folder holds a cache of another manifest (the differing fields are named), another capture is
            writing it, or the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest | None,
        shard_bytes: int,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
        claimed: int | None = None,
    ):
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.rank = rank
        self.world = world
        self.barrier = barrier
        # Of the shard that is being collected: pieces by tensor, rows of its table, and how much there is.
        self._parts: dict[str, list[Tensor]] = {}
        self._rows: list[tuple] = []
        self._bytes = self._tokens = self._teachers = 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future | None = None  # the shard that the thread is sealing
        # Only rank 0 may make the folder and write the manifest; the others wait until both are there.
        if rank == 0:
            self._open_folder(manifest, claimed)
        barrier()
        self.manifest = read_manifest(self.folder)
        if rank != 0:
            # A shared lock on the folder, like rank 0's by now: it ends with the process, however that ends.
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        self.removed = [name for path in self._seals()[rank::world] if (name := self._remove_damaged(path))]
        # What each process found damaged is gone.
        barrier()
        seals = self._seals()
        tables = [pq.read_table(path, columns=["id"])["id"] for path in seals]
        self.done: pa.Array = pa.concat_arrays([c for t in tables for c in t.chunks] or [pa.array([], pa.string())])
        self._next = 1 + rank + max((int(path.stem.removeprefix("shard-")) for path in seals), default=-1)
        # All have read the same seals before one of them writes another.
        barrier()

    def add(self, id: str, tensors: dict[str, Tensor]) -> None:
        """One document: the tensors of `Manifest.tensors()`, on the CPU, T rows each (last_hidden and queries: one a teacher)."""
        self.add_batch([id], [len(tensors["input_ids"])], tensors)

    def add_batch(self, ids: Sequence[str], lengths: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """Documents back to back, not copied. Nothing may change the tensors afterwards. Raises UserError for a number that is
        not finite: no shard is sealed with one."""
        # A row of fp8 is as its scale is.
        looked_at = {name: t for name, t in tensors.items() if name + SCALE not in tensors}
        if not all(map(finite, looked_at.values())):
            documents = each_document({"loss_mask": tensors["loss_mask"]} | looked_at, lengths, self.manifest.last_hidden)
            for id, (*_, one) in zip(ids, documents):
                if bad := [name.removesuffix(SCALE) for name, t in one.items() if not finite(t)]:
                    raise UserError(
                        f"{self.folder}: the target's states of document {id} are not finite ({', '.join(bad)}); "
                        "target.dtype=float32 tells whether bf16 or float16 cannot hold them, or data leave it out"
                    )
        documents = each_document(tensors, lengths, self.manifest.last_hidden)
        for id, length, (place, teacher, supervised, one) in zip(ids, lengths, documents):
            offsets = self._tokens + place, self._teachers + teacher
            # The hash is taken while the bytes are in memory. `mode=verify` compares it with what is on the disk later.
            sums = [tensor_hash(one[name]) for name in sorted(one)]
            self._rows.append((id, offsets[0], length, offsets[1], supervised, document_hash(one), sums))
        self._tokens += len(tensors["input_ids"])
        self._teachers += len(tensors["last_hidden"])
        for name, tensor in tensors.items():
            self._parts.setdefault(name, []).append(tensor)
            self._bytes += tensor.nbytes
        if self._bytes >= self.shard_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is left. When all processes have: merge the tables into one index and record every file's checksum.

        Raises:
            UserError: a document of the source is missing or stands twice.
        """
        self._flush()
        self._wait()
        self._thread.shutdown()
        self.barrier()
        if self.rank == 0:
            # Every shard of every process is sealed: the tokenised source is needed no more.
            (self.folder / DOCUMENTS).unlink(missing_ok=True)
            seal(self.folder, self.manifest)
        self.barrier()
        os.close(self._lock)

    def _open_folder(self, manifest: Manifest, claimed: int | None) -> None:
        """Rank 0 alone: own the folder, compare or write the manifest, and let the others in."""
        self._lock = claim(self.folder) if claimed is None else claimed
        try:
            if not (self.folder / MANIFEST).exists():
                write_text(self.folder / MANIFEST, manifest.model_dump_json(indent=1))
            elif fields := manifest.differs(read_manifest(self.folder)):
                raise another_cache(self.folder, fields)
        except UserError:
            os.close(self._lock)
            raise
        # Every process of this capture shares the lock until it ends. From exclusive to shared is not one operation: another
        # capture could take it in between, and is then the owner.
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.folder} is being written by another process") from error

    def _seals(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.parquet"))

    def _remove_damaged(self, path: Path) -> str | None:
        """Read a shard again. One that is not as it was written is removed; returns its name then."""
        tensors = path.with_suffix(".safetensors")
        try:
            if tensors.is_file() and file_hash(tensors) == read_seal(path).schema.metadata[b"xxh3"].decode():
                return None
        except UserError:
            pass
        # In this order a kill in between leaves tensors without a seal, which do not count, and never a seal without tensors.
        (self.folder / FILES).unlink(missing_ok=True)
        path.unlink()
        tensors.unlink(missing_ok=True)
        return tensors.name

    def _flush(self) -> None:
        if not self._rows:
            return
        # Each process numbers its shards in steps of `world`, from its own rank on: no two processes ever write one file.
        name = f"shard-{self._next:05d}"
        with self._naming(name):
            # From here on the capture is unfinished again: readers must not find checksums of other files.
            (self.folder / FILES).unlink(missing_ok=True)
            tensors = {key: self._parts[key] for key in self.manifest.tensors()}
            checksum = write_safetensors(self.folder / f"{name}.safetensors.tmp", tensors)
        # One shard at most waits for the disk: memory holds two.
        self._wait()
        self._pending = self._thread.submit(self._seal, name, self._rows, checksum)
        self._next += self.world  # numbers between are those of the other processes
        self._parts = {}
        self._rows = []
        self._bytes = self._tokens = self._teachers = 0

    def _seal(self, name: str, rows: list[tuple], checksum: str) -> None:
        """On a thread: fsync takes longer than writing, and the next shard can be written meanwhile."""
        with self._naming(name):
            publish(self.folder / f"{name}.safetensors.tmp", self.folder / f"{name}.safetensors")
            write_seal(self.folder / f"{name}.parquet", rows, checksum)

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()

    @contextmanager
    def _naming(self, name: str):
        """An error of the disk becomes a line that names the shard; its half-written files go."""
        try:
            yield
        except OSError as error:
            for leftover in self.folder.glob(f"{name}.*.tmp"):
                leftover.unlink()
            raise UserError(
                f"{self.folder}: {name} cannot be written ({error.strerror}); make room, then run the same command again"
            ) from error


def another_cache(folder: Path, fields: list[str]) -> UserError:
    return UserError(
        f"{folder} holds another cache; these differ: {', '.join(fields)}. Choose another cache.dir or remove that folder"
    )


def claim(folder: Path) -> int:
    """Make the folder and own it until the handle that is returned is closed. Half-written files and unsealed shards are removed.

    Raises:
        UserError: another capture is writing it, or it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A folder can be locked: no lock file is left in the cache, and the kernel frees it when the process dies.
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"{folder} is being written by another process") from error
    # What a capture leaves when it is killed before there is a manifest: its half-written files and the tokenised source.
    # Anything else is somebody else's.
    if not (folder / MANIFEST).exists() and any(p.suffix != ".tmp" and p.name != DOCUMENTS for p in folder.iterdir()):
        os.close(lock)
        raise UserError(f"{folder} is not empty and holds no cache; choose another cache.dir")
    unsealed = [p for p in folder.glob("shard-*.safetensors") if not p.with_suffix(".parquet").exists()]
    for leftover in [*folder.glob("*.tmp"), *unsealed]:
        leftover.unlink()
    return lock


def write_seal(path: Path, rows: list[tuple], shard_xxh3: str) -> None:
    table = pa.table([pa.array(c, f.type) for c, f in zip(zip(*rows), SCHEMA)], SCHEMA)
    own = xxhash.xxh3_128_hexdigest(canonical(table.to_pylist()).encode())
    _write_table(table.replace_schema_metadata({"xxh3": shard_xxh3, "rows": own}), path)


def read_seal(path: Path) -> pa.Table:
    """A shard's rows. Raises UserError when they are not as they were written."""
    try:
        table = pq.read_table(path)
        own = xxhash.xxh3_128_hexdigest(canonical(table.to_pylist()).encode())
        sums = {key: value.decode() for key, value in table.schema.metadata.items()}
        if sums.get(b"rows") == own and b"xxh3" in sums:
            return table
    except (OSError, pa.ArrowException, AttributeError, TypeError, ValueError):  # no table, or one of other columns
        pass
    raise UserError(f"{path} is damaged; run data_prep again, which captures that shard anew")


def seal(folder: Path, manifest: Manifest) -> None:
    """Every shard is there: write the index, in the order of ids, and every file's checksum.

    Raises:
        UserError: documents are missing or stand twice, as counted by the manifest.
    """
    parts = sorted(folder.glob("shard-*.parquet"))
    tables = {path: read_seal(path) for path in parts}
    index = pa.concat_tables(
        [t.append_column("shard", pa.array([p.stem] * t.num_rows)).replace_schema_metadata() for p, t in tables.items()],
        promote_options="default",  # shards of an earlier release have no `sums`
    ).sort_by("id")
    expected = manifest.source.get("documents", index.num_rows)
    unique = pc.count_distinct(index["id"]).as_py()
    if not index.num_rows == unique == expected:
        raise UserError(
            f"{folder} holds {index.num_rows} documents, {unique} of them distinct, of a source of {expected}; "
            "remove it and capture again"
        )
    # In the order of ids, so that the index, and training with it, does not depend on which process wrote which shard.
    _write_table(index, folder / INDEX)
    sums = {name: file_hash(folder / name) for name in (MANIFEST, INDEX, *(p.name for p in parts))}
    # The index is whole before FILES is written: a reader takes a folder with FILES for finished.
    # A shard's checksum is the one it was written with: what was damaged since must not be recorded as good.
    sums |= {f"{p.stem}.safetensors": t.schema.metadata[b"xxh3"].decode() for p, t in tables.items()}
    write_text(folder / FILES, canonical(sums))


def _write_table(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary)
    publish(temporary, path)
