"""Command lines: odd values, misspelt keys and misspelt choices, through all that the three programs check before they load
anything."""

import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest import mock

from pydantic import BaseModel

from common import cli
from common.overrides import points
from common.recipe import ROOT, keys_at
from data_prep.main import check_data_prep
from data_prep.recipe import DataPrepRecipe
from eval.check import check_evaluation
from eval.recipe import EvalRecipe
from eval.reports.report import write_json
from tests.fuzz import Silent
from tests.support.reports import made
from tests.support.tiny_drafter import save_tiny_drafter
from train.build import check_training
from train.recipe import TrainRecipe
from train.run.deepspeed_private import refuse_unknown

VALUES = ["null", "''", "x", "true", "-1", "0", "1", "3", "0.5", "1e-320", "inf", "-inf", "nan", "1e20", "1e308", "2147483648"]
VALUES += ["1099511627776", "9223372036854775807", "9223372036854775808", "-99999999999999999999", "1_000", "0x10", "1,2"]
VALUES += ["[]", "[1,2]", "[-1]", "[0,0]", "[1e999]", "[[1],[null]]", "['a',{}]", "{}", "{a: 1}", "{1: {b: null}}", "[null]"]
VALUES += ["/", ".", "..", "~", "/etc/passwd", "/no/such/place", "a/b", "a/" * 200, "a" * 300, "a=b", "http://127.0.0.1:9/v1"]
VALUES += ["\u00e9\u6f22\U0001f600", "'\ud800'", "'a\0b'", "'a\nb'", "'a b'", "{", "[1,", "'", '"', "\\"]
VALUES += ["${x}", "${target.path}", "${oc.env:X}", "'{user}'", "'{'", "'%s'", "???", "!!python/object:x", "*a", "auto", "none"]
# What passes for a value of a key's type, so that more than the type is looked at.
TYPED = {
    int: ["0", "1", "2", "3", "7", "64", "100000", "2147483648", "1099511627776", "9223372036854775807"],
    float: ["0", "1e-320", "0.3", "1", "2.5", "1e6", "1e308"],
    bool: ["true", "false"],
    str: ["x", ".", "a/b", "/no/such/place", "/etc/passwd", "a" * 300, "http://127.0.0.1:9/v1", "\u00e9", "''"],
    list: ["[]", "[0]", "[5,0,5]", "[1,2]", "[x,y]"],
    dict: ["{}", "{a: 1}", "{1: 0.5}", "{stage: 2}"],
    type(None): ["null"],
}


def train(recipe: TrainRecipe) -> None:
    check_training(recipe)
    refuse_unknown(recipe.deepspeed.zero_optimization)


PROGRAMS = {
    "data_prep": (DataPrepRecipe, check_data_prep),
    "train": (TrainRecipe, train),
    "eval": (EvalRecipe, check_evaluation),
}
GROUPS = {path.name: [one.stem for one in path.glob("[!_]*.yaml")] for path in (ROOT / "conf").iterdir() if path.is_dir()}


def leaves(recipe: type[BaseModel], section: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Every key, dotted, and the words that it may be."""
    for name, field in keys_at(recipe, section).items():
        if keys_at(recipe, (*section, name)):
            yield from leaves(recipe, (*section, name))
        else:
            yield ".".join((*section, name)), list(_words(field.annotation))


def _words(kind) -> Iterator[str]:
    if typing.get_origin(kind) is typing.Literal:
        yield from map(str, typing.get_args(kind))
    elif (plain := typing.get_origin(kind) or kind) in TYPED:
        yield from TYPED[plain]
    else:
        yield from (word for part in typing.get_args(kind) for word in _words(part))


def misspelt(word: str, random: Random) -> str:
    at = random.randrange(len(word))
    return random.choice([word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word + "s", word.upper(), f"x{word}"])


class Configurations:
    def __init__(self, folder: Path):
        self.doors = {"composed and checked": self.check}
        drafter = save_tiny_drafter(folder / "drafter")
        for name in "ab":
            write_json(folder / name, made(context=64))
        lines = [("train", [f"experiment={name}"]) for name in ("quickstart", "dflash", "peagle", "budgetdraft")]
        judge = [f"drafter={drafter}", "format=drafter"]
        lines += [("eval", [*judge, f"mode={mode}"]) for mode in ("decode", "decode", "export", "chat", "demo")]
        lines += [("eval", ["mode=compare", "runs=[a,b]"]), ("eval", ["mode=served", "server.url=http://127.0.0.1:9/v1"])]
        lines += [("data_prep", [f"mode={mode}"]) for mode in ("capture", "capture", "estimate")]
        lines += [("data_prep", ["mode=synthesize", "synthesize.out=o", "synthesize.count=3"])]
        lines += [("data_prep", ["mode=regenerate", "regenerate.out=o", "data=chat", "data.path=i"])]
        (folder / "i").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
        self.lines = lines
        self.keys = {name: dict(leaves(recipe)) for name, (recipe, _) in PROGRAMS.items()}

    def mutate(self, random: Random) -> str:
        self.program, base = random.choice(self.lines)
        odd = [self._odd(random) for _ in range(random.choice([1, 1, 2]))]
        self.words = [*base, *(word for word, _ in odd)]
        self.must_fail = any(wrong for _, wrong in odd)
        return f"{self.program}/main.py {' '.join(map(repr, self.words))}"

    def _odd(self, random: Random) -> tuple[str, bool]:
        """A word, and whether it must be refused."""
        keys = self.keys[self.program]
        key = random.choice(list(keys))
        group = random.choice([name for name in GROUPS if name in PROGRAMS[self.program][0].model_fields])
        value = random.choice(VALUES)
        match random.choice(["value"] * 4 + ["typed"] * 8 + ["misspelt key", "misspelt choice", "group", "prefix", "nested"]):
            case "typed":
                return f"{key}={random.choice(keys[key] or [value])}", False
            case "misspelt key":
                wrong = misspelt(key, random)
                return f"{wrong}={random.choice(['1', value])}", wrong not in keys and "." in wrong.strip(".")
            case "misspelt choice":
                wrong = misspelt(random.choice(GROUPS[group]), random)
                return f"{group}={wrong}", wrong not in GROUPS[group]
            case "group":
                return f"{group}={random.choice([value, random.choice(GROUPS[group])])}", False
            case "prefix":
                words = [f"~{key}", f"+{key}={value}", f"++{key}={value}", f"~{key}={value}", key, f"{group}@x=y"]
                return random.choice(words), False
            case "nested":
                return f"{key}.x={value}", False
        return f"{key}={value}", False

    def check(self) -> str:
        recipe, check = PROGRAMS[self.program]
        with mock.patch.object(sys, "argv", ["main.py", *self.words]):
            found = cli.arguments()
            for job in points(found.overrides, found.multirun):
                check(cli.compose(self.program, recipe, job))
            cli.for_hydra(self.program, found)
        if self.must_fail:
            raise Silent("a misspelt word was taken")
        return "accepted"
