"""What a command says while it works: a bar on a terminal, and lines by the clock where stdout is a file or a pipe."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as RichProgress
from rich.text import Text

EVERY_S = 10


class Heartbeat:
    """While it is entered, a thread prints `status()` whenever nothing was said for `every_s` seconds: a step that takes
    minutes is heard of too. `silent`: nothing is printed, as on every rank but the first."""

    def __init__(self, status: Callable[[], str], silent: bool = False, every_s: float = EVERY_S):
        self._status = status
        self._silent = silent
        self._every_s = every_s
        self._said = time.monotonic()
        self._over = threading.Event()

    def say(self, text: str) -> None:
        self._said = time.monotonic()
        if not self._silent:
            print(text, flush=True)

    def __enter__(self) -> "Heartbeat":
        self._said = time.monotonic()
        if not self._silent:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def _watch(self) -> None:
        # Whoever prints puts the next line off: the thread wakes up when the silence is `every_s` old, and looks whether it still
        # is.
        while not self._over.wait(max(0.01, self._said + self._every_s - time.monotonic())):
            if time.monotonic() - self._said >= self._every_s:
                self.say(self._status())


def described(task: Task, unit: str) -> str:
    """'1,200 of 6,000 tokens, 310 tokens/s, 0:15 left', and the task's own fields. Rates are means since the beginning."""
    elapsed = task.elapsed or 0.0
    done = f"{task.completed:,.0f}"
    parts = [f"{done} of {task.total:,.0f} {unit}" if task.total is not None else f"{done} {unit}"]
    parts += [f"{name} {value:.2f}" for name, value in task.fields.items() if value is not None]
    if task.completed and elapsed:
        rate = task.completed / elapsed
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")
        if task.total is not None:
            parts.append(f"{_clock((task.total - task.completed) / rate)} left")
    if task.finished or not task.completed:
        parts = [part for part in parts if not part.endswith(" left")] + [f"{_clock(elapsed)} elapsed"]
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Described(ProgressColumn):
    def __init__(self, unit: str):
        self._unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(described(task, self._unit))


class Progress(RichProgress):
    """rich's, counting `unit`s. On a terminal it is a bar; elsewhere the last task is a line every `every_s` seconds and one
    at its end. Numbers given as fields (`update(task, tau=1.9)`) are shown by their names."""

    def __init__(self, unit: str, silent: bool = False, every_s: float = EVERY_S):
        super().__init__("{task.description}", BarColumn(), _Described(unit))
        self._unit = unit
        self._lines = None if silent or self.console.is_terminal else Heartbeat(self._line, every_s=every_s)
        # rich redraws its bar with control characters, which would fill a log file.
        self.disable = silent or self._lines is not None

    def start(self) -> None:
        super().start()
        if self._lines:
            self._lines.__enter__()

    def stop(self) -> None:
        super().stop()
        if self._lines:
            self._lines.__exit__()
            if self.tasks:
                self._lines.say(self._line())

    def _line(self) -> str:
        if not self.tasks:
            return f"0 {self._unit}"
        return f"{self.tasks[-1].description}: {described(self.tasks[-1], self._unit)}"


def counted(items: Iterable, text: Callable[[int], str], every_s: float = EVERY_S) -> Iterator:
    """`items`, and every `every_s` seconds a line of `text`(how many there were). Without a thread, for work that forks."""
    said = time.monotonic()
    # A fork copies the calling thread alone. A lock that another thread holds at that moment, such as stdout's, would stay locked
    # in the child for ever. So the lines come from here, between two items.
    for number, item in enumerate(items):
        if time.monotonic() - said >= every_s:
            print(text(number), flush=True)
            said = time.monotonic()
        yield item
