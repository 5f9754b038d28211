"""A file of JSON lines that several processes append to while a long command runs, so that the same command can go on.

A kill leaves whole lines and at most one that was cut, which does not count and is removed before the next is written.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

FLUSH_S = 1.0  # what a kill can lose; a line that is synced by itself would cost each conversation a write of the disk


class Journal:
    """`lock` and `repair` are one process's business, before the others call `share`."""

    def __init__(self, path: Path):
        self._path = path
        # O_APPEND: each write goes to the end that the file has at that moment, whoever wrote there last.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[str] = []
        self._flushed = time.monotonic()

    def lock(self) -> None:
        """One command at a time. Raises UserError when another one holds it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self._path} is being written by another process") from error
        if not self._path.exists() or self._path.stat().st_ino != os.fstat(self._file).st_ino:  # finished and removed meanwhile
            raise UserError(f"{self._path} was just finished by another process; run the same command again")

    def share(self) -> None:
        """Held by all processes of one command; none of another can `lock` meanwhile."""
        # Rank 0 gives up its exclusive lock by this; the others wait for that here.
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def repair(self) -> None:
        """Remove a last line that a kill cut short. Only for a file that is seen to be ours."""
        os.ftruncate(self._file, self._path.read_bytes().rfind(b"\n") + 1)

    def append(self, record: dict) -> None:
        """On the disk within a second of the next calls, or after `flush`."""
        self._waiting.append(json.dumps(record, ensure_ascii=False) + "\n")
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Whole lines, on the disk before this returns, or nothing; processes take turns. Raises UserError for a full disk."""
        lines = "".join(self._waiting).encode()
        self._waiting = []
        self._flushed = time.monotonic()
        if not lines:
            return
        # Two kinds of lock, which do not see each other: `flock` is held by a command for as long as it runs, `lockf` by one
        # process while it writes.
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # another process was killed on its line
                self.repair()
                size = os.fstat(self._file).st_size
            try:
                while lines:
                    lines = lines[os.write(self._file, lines) :]
                os.fsync(self._file)
            except OSError as error:
                # The disk may have taken half a line. It goes, so that the file ends as it did before.
                os.ftruncate(self._file, size)
                what = f"{self._path} cannot be written ({error.strerror})"
                raise UserError(f"{what}; make room, then run the same command again") from error
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(where it begins, the line) of every whole line."""
        place = 0
        with open(self._path, "rb") as file:
            for line in file:
                # A line that is just being written, or that a kill cut short.
                if not line.endswith(b"\n"):
                    return
                yield place, line
                place += len(line)

    def close(self) -> None:
        os.close(self._file)
