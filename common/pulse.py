"""Whether the other processes are still there: each counts, in the store through which all found one another, and looks at the
others' counts.

A host that is cut off or frozen closes no connection, and ranks that exchange through shared memory have none. The others would
wait without end.
"""

import atexit
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

BEAT_S = 5
# A thread counts, so a forward or a write may take hours. What keeps Python's lock stops it: a page of a mapped file, for the
# minutes that a network disk is away.
SILENT_S = 600


class Pulse:
    """This process's count, from `start` on until it ends, and what it hears of the others'. Made by all of `world` processes;
    started once all have made theirs."""

    def __init__(self, rank: int, world: int):
        from torch.distributed import TCPStore

        self.rank = rank
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own, for a call that never ends keeps all others of its connection waiting.
        self._store = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(days=1))
        with socket.create_connection(place) as probe:
            self._address = probe.getpeername()[:2]  # a name server that fails later changes nothing
        self._keys = [f"pulse/{other}" for other in range(world)]
        self._limit = math.inf
        self._over = threading.Event()
        self._count(0)

    def start(self) -> None:
        self._heard = self._store.multi_get(self._keys)
        beat = threading.Thread(target=self._beat, daemon=True)
        beat.start()
        threading.Thread(target=self._judge, daemon=True).start()
        atexit.register(beat.join, 1)  # the interpreter must not end while the thread is in the store's code
        atexit.register(self._over.set)  # called first

    @contextmanager
    def watched(self, silent_s: float | None = None) -> Iterator[None]:
        """Meanwhile this process ends, with one line and exit code 1, when another has not counted for `silent_s` seconds
        (`SILENT_S`, if none are named)."""
        before = self._limit
        self._limit = SILENT_S if silent_s is None else max(silent_s, 3 * BEAT_S)  # a beat may be late
        try:
            yield
        finally:
            self._limit = before

    def left_to_speak(self) -> None:
        """Returns, if this process is not about to end because another was lost: then a line says so, and one is enough."""
        if self._over.is_set():
            time.sleep(60)

    def _count(self, number: int) -> None:
        self._store.set(self._keys[self.rank], f"{number} {socket.gethostname()}")

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(BEAT_S):
            number += 1
            try:
                # Where nobody listens any more the store's code would print a page.
                socket.create_connection(self._address, timeout=SILENT_S).close()
                if self._over.is_set():
                    return
                self._count(number)
                self._heard = self._store.multi_get(self._keys)
            except OSError:
                continue  # the network may come back
            except RuntimeError:
                return  # whoever kept the store has ended: nobody is heard of any more

    def _judge(self) -> None:
        last = self._heard
        still = [0] * len(last)
        # Counted and not timed: a process that was stopped itself and goes on has not waited meanwhile.
        while not self._over.wait(BEAT_S):
            heard = self._heard
            still = [n + 1 if now == before else 0 for n, now, before in zip(still, heard, last, strict=True)]
            last = heard
            limit = self._limit
            if silent := [other for other, n in enumerate(still) if n * BEAT_S >= limit]:
                # Who does not even hear itself has lost the store, and rank 0 with it.
                self._end([0] if self.rank in silent else silent, limit)

    def _end(self, silent: list[int], limit: float) -> None:
        """The first that is left speaks, and leaves a little later: by then the others know too, and ask its store nothing more.
        A launcher then ends them; without one they end by themselves."""
        self._over.set()
        if any(other not in silent for other in range(self.rank)):
            time.sleep(4 * BEAT_S)
            os._exit(1)
        who = ", ".join(f"rank {other} ({self._heard[other].decode().split()[1]})" for other in silent)
        print(
            f"error: not heard of for {limit:g} s: {who}; is that host cut off or frozen? What is on disk stays: mend the host "
            "or leave it out, and the same command goes on",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(2 * BEAT_S)
        os._exit(1)  # the main thread is in a collective, or in a forward
