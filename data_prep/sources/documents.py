"""A whole source tokenised, by all cores, into a memory-mapped Arrow file: no process ever holds it."""

import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.ranks import killed_with_parent
from data_prep.recipe import DataRecipe
from data_prep.sources.counts import CAPTURED, HELD_OUT, Counts
from data_prep.sources.records import Record
from data_prep.sources.tokens import LeftOut, Part, TokenDocument, encode, joined, pieces, unusable

CHUNK = 64  # records that a worker takes at a time
SCHEMA = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8()))])


def tokenized(
    source: Iterable[Record], tokenizer: PreTrainedTokenizerBase, data: DataRecipe, counts: Counts, workers: int = 1
) -> Iterator[TokenDocument]:
    """Every document of `source`, in its order, until there are `data.max_tokens` tokens (the last one is cut there). Records of
    the held-out side give none. What becomes of each record is counted in `counts`."""
    left = float("inf") if data.max_tokens is None else data.max_tokens
    parts = _parts(iter(source), tokenizer, data, counts, workers)
    if data.long == "join":
        parts = joined(parts, data.max_length, tokenizer.eos_token_id)
    for part in parts:
        wrong = []
        captured = False
        for document in pieces(part, data):
            if isinstance(document, str):
                wrong.append(document)
                continue
            if cut := len(document.input_ids) > left:
                document = TokenDocument(document.id, *(tokens[: int(left)] for tokens in document[1:]))
                if unusable(document):
                    return
                counts.kept["kept, but cut at data.max_tokens"] += 1
            left -= len(document.input_ids)
            captured = True
            counts.end(part.records, CAPTURED)
            yield document
            if cut:
                return
        for reason in wrong:
            if captured:
                counts.kept[f"kept, but {reason if reason.startswith('cut') else f'a piece of it has {reason}'}"] += 1
            else:
                counts.end(part.records, reason)


def _parts(source: Iterator[Record], tokenizer, data, counts: Counts, workers: int) -> Iterator[Part]:
    for record, encoded in _encoded(source, tokenizer, data, workers):
        # Counted here and not where it is read: workers read ahead of what data.max_tokens lets through.
        number = counts.read()
        if isinstance(encoded, str):
            counts.end([number], encoded)
            continue
        ids, mask, remarks = encoded
        counts.kept.update(remarks)
        yield Part(record.id, ids, mask, [number])


def _encoded(source: Iterator[Record], tokenizer, data, workers: int):
    """Every record with what it was encoded to, in the order of `source`."""
    chunks = iter(lambda: list(islice(source, CHUNK)), [])
    if workers == 1:
        for records in chunks:
            yield from zip(records, _encode_chunk(records, tokenizer, data))
        return
    with _started(workers, tokenizer, data) as idle:
        ahead: deque[_Chunk] = deque()  # read and not given out yet, in the order of `source`
        at_work: dict[connection.Connection, _Chunk] = {}
        while True:
            while idle and len(ahead) < 4 * workers and (records := next(chunks, None)):  # what is read ahead is bounded
                worker = idle.pop()
                at_work[worker] = chunk = _Chunk(records)
                ahead.append(chunk)
                with _or_lost():
                    worker.send(records)
            if not ahead:
                return
            if first_is_done := ahead[0].encoded is not None:
                chunk = ahead.popleft()
                yield from zip(chunk.records, chunk.encoded)
            for worker in connection.wait(at_work, timeout=0 if first_is_done else None):
                with _or_lost():
                    answer = worker.recv()
                if isinstance(answer, Exception):
                    raise answer
                at_work.pop(worker).encoded = answer
                idle.append(worker)


@dataclass
class _Chunk:
    records: list[Record]
    encoded: list | None = None  # None: a worker has not answered yet


@contextmanager
def _started(workers: int, tokenizer, data) -> Iterator[list[connection.Connection]]:
    """A pipe to each of `workers` new processes: records go in, what they were encoded to comes out.

    A pipe ends when its process does, also within an answer. `ProcessPoolExecutor` has one pipe for the answers of all processes,
    and waits without end where one of them is killed while it writes.
    """
    fork = multiprocessing.get_context("fork")  # so that the tokenizer is not loaded in every worker again
    processes, pipes = [], []
    try:
        for _ in range(workers):
            ours, theirs = fork.Pipe()
            pipes.append(ours)
            process = fork.Process(target=_work, args=(theirs, tokenizer, data, os.getpid()), daemon=True)
            with theirs:  # closed here: no other process has this end, not even the workers that are started next
                process.start()
            processes.append(process)
        yield list(pipes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def _work(pipe: connection.Connection, tokenizer, data, parent: int) -> None:
    """What a worker does until the parent ends it."""
    # The processes are the parallelism: threads of the tokenizer in each of them would compete for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    killed_with_parent()  # it would hold the cache's lock
    if os.getppid() != parent:  # which may have died before the kernel was told: then no signal comes any more
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal, and the parent ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler is for the parent alone
    while True:
        records = pipe.recv()
        try:
            answer = _encode_chunk(records, tokenizer, data)
        except UserError as error:
            answer = error
        except BaseException:  # the tokenizers' Rust code raises some that are no Exception; not all of them can be sent
            answer = RuntimeError(f"a process that tokenises failed:\n{traceback.format_exc()}")
        pipe.send(answer)


@contextmanager
def _or_lost() -> Iterator[None]:
    """For what is sent to a worker or received from it: one line where that process is gone."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise UserError("a process that tokenises was killed (too little memory?); run the same command again") from error


def _encode_chunk(records: list[Record], tokenizer, data) -> list[tuple[list[int], list[int], set[str]] | str]:
    """(ids, mask, remarks), or why there are none."""

    def one(record: Record):
        if record.heldout:
            return HELD_OUT
        remarks: set[str] = set()
        try:
            return *encode(record, tokenizer, data, remarks), remarks
        except LeftOut as reason:
            return str(reason)

    return [one(record) for record in records]


class Digest:
    """A hash of documents that does not depend on their order: the sum of their xxh3 hashes. Digests of disjoint sets
    add up to the digest of both."""

    def __init__(self):
        self.total = 0

    def add(self, document: TokenDocument) -> None:
        one = xxhash.xxh3_128()
        for part in (document.id.encode(), document.input_ids.tobytes(), document.loss_mask.tobytes()):
            # The length goes before each part: without it a byte could move from one part to the next unnoticed.
            one.update(len(part).to_bytes(8, "little") + part)
        # A sum is the same in any order, so that processes and merged caches agree. An exclusive or would not see a document that
        # stands twice.
        self.total += one.intdigest()

    def hex(self) -> str:
        return f"{self.total % 2**128:032x}"

    @staticmethod
    def joined(digests: Iterable[str]) -> str:
        return f"{sum(int(d, 16) for d in digests) % 2**128:032x}"


def write_documents(path: Path, documents: Iterable[TokenDocument], counts: Counts) -> dict:
    """Write the Arrow file at `path`. Returns what a manifest says of its source: hash, sizes, what became of the records.

    Raises:
        UserError: not one document is left.
    """
    documents = iter(documents)
    digest = Digest()
    sizes = Counter(documents=0, tokens=0, supervised=0)
    temporary = path.with_name(path.name + ".tmp")
    with pa.ipc.new_file(temporary, SCHEMA) as file:
        while some := list(islice(documents, 1024)):
            for document in some:
                digest.add(document)
                sizes.update(documents=1, tokens=len(document.input_ids), supervised=int(np.count_nonzero(document.loss_mask)))
            file.write_batch(pa.record_batch([pa.array(list(c), t) for c, t in zip(zip(*some), SCHEMA.types)], schema=SCHEMA))
    if not sizes["documents"]:
        temporary.unlink()
        said = counts.said()
        lost = Counter({"held out for evaluation": said["records"]["held_out"]} | said["left_out"])
        why = "; ".join(f"{n} x {reason}" for reason, n in lost.most_common() if n) or "the source is empty"
        raise UserError(f"the data source gives no document to capture: {why}")
    # Not synced: every capture tokenises anew.
    os.replace(temporary, path)
    return {"hash": digest.hex(), **sizes, **counts.said()}


class Documents:
    """What `write_documents` wrote: `ids`, `lengths` [N], `supervised` [N], and a `TokenDocument` by index."""

    def __init__(self, path: Path):
        # Mapped into memory: the pages that are read belong to the system's cache and not to this process.
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.ids = self._table["id"]
        self.lengths = pc.list_value_length(self._table["input_ids"]).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> TokenDocument:
        row = [self._table[name][int(index)] for name in SCHEMA.names]
        return TokenDocument(row[0].as_py(), *(np.array(column.values) for column in row[1:]))

    def by_length(self, among: np.ndarray | None = None) -> np.ndarray:
        """Indices (of `among`, or all), longest first; ties in the order of ids."""
        among = np.arange(len(self)) if among is None else among
        keys = pa.table({"length": self.lengths[among], "id": self.ids.take(pa.array(among))})
        return among[pc.sort_indices(keys, [("length", "descending"), ("id", "ascending")]).to_numpy()]

    def missing(self, done: pa.Array) -> np.ndarray:
        """Indices of the documents whose ids are not in `done`, longest first."""
        return self.by_length(np.flatnonzero(~pc.is_in(self.ids, value_set=done).to_numpy()))
