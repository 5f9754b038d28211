"""Folders of reports: set side by side, gathered into a sweep, and written over."""

import json
from pathlib import Path
from random import Random

from common import cli
from eval.check import check_folder
from eval.main import gather, run
from eval.recipe import EvalRecipe
from eval.reports.report import write_json
from tests.fuzz import copied, damaged
from tests.support.reports import made, scored

# What is harmed, and who reads it then.
PLACES = [("a", "compare"), ("b", "compare"), ("a", "gather"), ("s", "gather"), ("others", "write_over")]


class Reports:
    def __init__(self, folder: Path):
        self.base, self.work = folder / "whole", folder / "work"
        by_category = {"qa": {"requests": 9, "tokens": 56, "tau": 1.5, "speedup": 1.25}}
        for name, tau in (("a", 1.9), ("b", 2.4)):
            report = made(tau, context=64)
            report["temperatures"] = {"1": report["temperatures"]["1"] | {"by_category": by_category}}
            report["temperatures"]["1"] |= {"ties": {"dtype": "bf16", "replayed": True}}
            write_json(self.base / name, report)
        write_json(self.base / "s", scored(), "score.json")
        drafter = made()["drafter"]
        for name in ("diagnostics.json", "served.json", "demo.json"):
            write_json(self.base / "others", {"drafter": drafter["path"] if name[:2] == "di" else drafter}, name)
        (self.base / "others/answers.jsonl").write_text(json.dumps({"drafter": drafter}) + '\n{"id": "1"}\n')
        words = ["mode=compare", f"runs=[{self.work / 'a'},{self.work / 'b'}]", f"out={folder / 'out'}"]
        self.comparison = cli.compose("eval", EvalRecipe, words)
        line = [f"drafter={drafter['path']}", "out=x"]
        self.judging = cli.compose("eval", EvalRecipe, line)

    def mutate(self, random: Random) -> str:
        copied(self.base, self.work)
        place, door = random.choice(PLACES)
        self.doors = {door: getattr(self, door)}
        return f"{place}: {damaged(self.work / place, random)}"

    def compare(self) -> str:
        run(self.comparison)
        return "accepted"

    def gather(self) -> str:
        gather(self.work)
        return "accepted"

    def write_over(self) -> str:
        for place in sorted(self.work.iterdir()):
            check_folder(self.judging.model_copy(update={"out": str(place)}))
        return "accepted"
