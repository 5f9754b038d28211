"""A process of a capture that stops without closing a connection, as on a host that is cut off: real processes, and SIGSTOP."""

import json
import socket

from common import cli
from data_prep.cache.reader import CacheReader
from data_prep.recipe import DataPrepRecipe
from tests.support.commands import command

# A capture with seconds for minutes, and with something that befalls one of its processes once that has sealed a shard.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from common import pulse
from data_prep import main
from data_prep.cache.writer import CacheWriter
from data_prep.recipe import DataPrepRecipe

befalls = {
    "freezes": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "leaves": lambda: os._exit(0),
    "is slow": lambda: time.sleep(2 * pulse.SILENT_S),
}
signal.alarm(60)  # a wait without end fails the test
pulse.BEAT_S, pulse.SILENT_S = 0.1, 2
seal = CacheWriter._seal

def sealed(self, *words):
    seal(self, *words)
    if str(self.rank) == sys.argv[3]:
        befalls.pop(sys.argv[2], lambda: None)()

CacheWriter._seal = sealed
main.run(DataPrepRecipe.model_validate_json(Path(sys.argv[1]).read_text()))
"""


def test_a_capture_ends_when_a_rank_is_lost_waits_for_a_slow_one_and_goes_on(tmp_path):
    program, recipe, texts, cache = (tmp_path / name for name in ("program.py", "recipe", "texts.jsonl", "cache"))
    program.write_text(PROGRAM)
    texts.write_text("".join(json.dumps({"text": f"{n}: " + 5 * "a few words, "}) + "\n" for n in range(48)))
    words = ["data=jsonl", f"data.path={texts}", f"cache.dir={cache}", "cache.shard_bytes=50000", "capture.batch_tokens=32"]
    recipe.write_text(cli.compose("data_prep", DataPrepRecipe, words).model_dump_json())

    shards = 0
    for befalls, victim in (("freezes", 1), ("leaves", 1), ("freezes", 0), ("is slow", 0)):
        done = command(program, recipe, befalls, victim, ranks=2)
        errors = done.stderr.splitlines()
        before, shards = shards, len(list(cache.glob("shard-*.parquet")))
        assert shards > before, "nothing was left to do"
        if befalls == "is slow":
            assert (done.returncode, errors) == (0, [])
            break
        assert done.returncode == 1 and len(errors) == 1 and "the same command goes on" in errors[0], errors
        if befalls == "freezes":
            assert errors[0].startswith(f"error: not heard of for 2 s: rank {victim} ({socket.gethostname()}); ")
    reader = CacheReader(cache)
    assert list(reader.problems()) == [] and len(reader) == reader.manifest.source["documents"] > 40
