"""Thousands of mutations of what a user hands to our commands. Each is refused in one line, or harmless.

    python -m tests.fuzz mutations=10000 seed=0
    python -m tests.fuzz kinds=[caches] seed=0 first=1234 mutations=1    # the one with this number, alone

Prints every fault, then for each kind and each door through which it is read a JSON line of outcomes. Exit code 1: there were
faults.
"""

import json
import os
import resource
import sys
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

import torch

from tests.benchmarks import options
from tests.fuzz.kinds import KINDS, tried

MORE = 8 * 2**30  # bytes beyond what the imports took: what asks for more fails, instead of taking the machine with it


def main() -> None:
    o = options(mutations=10_000, seed=0, first=0, kinds=list(KINDS))
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE, used + MORE))
    faults = 0
    for name in o.kinds:
        counts: dict[str, Counter] = defaultdict(Counter)
        with TemporaryDirectory(prefix="understudy-fuzz-") as folder:
            os.chdir(folder)
            kind = KINDS[name](Path(folder))
            for number in range(o.first, o.first + o.mutations // len(o.kinds)):
                said, found = tried(kind, o.seed, number)
                for door, outcome in found.items():
                    counts[door][outcome.partition(":")[0]] += 1
                    if outcome.startswith("fault"):
                        faults += 1
                        print(f"kinds=[{name}] seed={o.seed} first={number} mutations=1: {said}: {door}: {outcome}", flush=True)
            os.chdir("/")
        for door, outcomes in counts.items():
            print(json.dumps({"name": "fuzz", "kind": name, "door": door, "seed": o.seed, **outcomes}), flush=True)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
