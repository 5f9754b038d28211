"""A training that is asked to stop ends its step, writes a checkpoint and leaves with exit code `AGAIN`.

Slurm, Kubernetes, launchers and Ctrl-C ask by a signal, of one rank or of all. Ranks agree in `Sums.asked`.
"""

import os
import signal
import subprocess
import threading
import time

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, say the same command again
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_S = 3.0  # a launcher passes on what its ranks were sent too, more than once


class Asked:
    """While it is entered, a first signal makes `yes` true and a second one ends the process at once.

    Python runs a handler between two of its own instructions, so not while a collective waits. The number of a signal is
    therefore written to a pipe, which Python does at once, and a thread reads it.
    """

    def __init__(self, same_s: float = 0.0):
        """`same_s`: a signal that comes so soon after the first one is still that one."""
        self.yes = False
        self._same_s = same_s

    def __enter__(self) -> "Asked":
        heard = [one for one in ASKING if signal.getsignal(one) != signal.SIG_IGN]  # a shell's background job ignores Ctrl-C
        self._usual = {one: signal.signal(one, lambda *_: None) or signal.SIG_DFL for one in heard}
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._usual_fd = signal.set_wakeup_fd(self._writes)
        threading.Thread(target=self._listen, args=(reads,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._usual_fd)
        for one, handler in self._usual.items():
            signal.signal(one, handler)
        os.close(self._writes)

    def _listen(self, reads: int) -> None:
        since = 0.0
        while byte := os.read(reads, 1):
            if byte[0] not in ASKING:
                continue
            if self.yes and time.monotonic() - since > self._same_s:
                os._exit(128 + byte[0])
            if not self.yes:
                since = time.monotonic()
                self.yes = True
        os.close(reads)

    def answered(self) -> None:
        """The checkpoint is written: nothing may end this process on its last steps with another code."""
        self._usual = dict.fromkeys(self._usual, signal.SIG_IGN)
        for one in self._usual:
            signal.signal(one, signal.SIG_IGN)


def run_passing_on(command: list[str], env: dict[str, str]) -> int:
    """The exit code of `command`. While it runs, the signals that ask to stop are passed on to it."""
    process = subprocess.Popen(command, env=env)
    usual = {one: signal.signal(one, lambda number, _: process.send_signal(number)) or signal.SIG_DFL for one in ASKING}
    try:
        return process.wait()
    finally:
        for one, handler in usual.items():
            signal.signal(one, handler)
