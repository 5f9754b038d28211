"""A command behind a terminal of its own, as a person sees it."""

import os
import pty
import re
import select
import signal
import sys
import termios
import time

GREEN = "38;2;42;157;111"  # #2a9d6f, the report's colour of accepted tokens


class Terminal:
    """The command behind a terminal of its own."""

    def __init__(self, *words, cwd, **env):
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # who starts tests in the background has it ignored, which is inherited
            os.chdir(cwd)
            modes = termios.tcgetattr(0)
            modes[3] |= termios.NOFLSH  # else Ctrl-C throws away what the program says next, if it is quick
            termios.tcsetattr(0, termios.TCSANOW, modes)
            fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
            unset = {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
            kept = {name: value for name, value in os.environ.items() if name not in unset}
            os.execve(sys.executable, [sys.executable, *map(str, words)], kept | fixed | env)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What came up to the first place where `pattern` matches, which is taken."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.handle], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern} in {self.seen[-500:]}"
            try:
                self.seen += os.read(self.handle, 65536).decode(errors="replace")
            except OSError:  # the other end is gone
                raise AssertionError(f"it ended without {pattern}: {self.seen[-500:]}") from None
        taken, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return taken

    def type(self, text: str) -> None:
        """Keys pressed."""
        os.write(self.handle, text.encode())

    def rest(self) -> str:
        """All that comes up until the command ends."""
        try:
            while data := os.read(self.handle, 65536):
                self.seen += data.decode(errors="replace")
        except OSError:
            pass
        return self.seen

    def code(self) -> int:
        """Its exit code, once it has ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
