"""Where stdout is no terminal a command still says by the clock how far it is; on one, a bar."""

import os
import pty
import re
import subprocess
import sys
import time

from common.progress import Heartbeat, Progress, counted
from tests.support.commands import ROOT

SLOW = """
import time
from common.progress import Progress
with Progress("tokens", every_s=0.2) as progress:
    task = progress.add_task("capture", total=3000)
    progress.update(task, advance=1000, tau=1.5)
    time.sleep(0.7)  # one step that takes long
    progress.advance(task, 2000)
"""


def test_a_long_step_prints_lines_of_progress(capsys):
    exec(SLOW)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    for line in lines[:-1]:
        assert re.fullmatch(r"capture: 1,000 of 3,000 tokens, tau 1.50, [\d,]+ tokens/s, 0:0\d left", line), line
    assert re.fullmatch(r"capture: 3,000 of 3,000 tokens, tau 1.50, [\d,]+ tokens/s, 0:0\d elapsed", lines[-1])


def test_silent_progress_and_heartbeats_print_nothing(capsys):
    with Progress("tokens", silent=True, every_s=0.01) as progress:
        progress.add_task("capture", total=1)
        time.sleep(0.1)
    with Heartbeat(lambda: "working", silent=True, every_s=0.01) as heart:
        time.sleep(0.1)
        heart.say("done")
    assert capsys.readouterr().out == ""


def test_progress_on_a_terminal_is_a_bar():
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", SLOW], cwd=ROOT, stdout=theirs, env={**os.environ, "TERM": "xterm"})
    shown = os.read(ours, 1 << 16).decode()
    assert done.returncode == 0 and "━" in shown and "3,000 of 3,000 tokens" in shown


def test_a_heartbeat_prints_only_after_silence(capsys):
    with Heartbeat(lambda: "working", every_s=1) as heart:
        for _ in range(6):
            time.sleep(0.2)
            heart.say("step")
        time.sleep(1.5)
    time.sleep(1.2)  # it is over: no line after it
    assert capsys.readouterr().out.splitlines() == ["step"] * 6 + ["working"]


def test_counted_items_print_at_most_once_per_interval(capsys):
    assert list(counted(range(3), lambda number: f"{number} read", every_s=0)) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == ["0 read", "1 read", "2 read"]
    list(counted(range(3), lambda number: f"{number} read", every_s=60))
    assert capsys.readouterr().out == ""
