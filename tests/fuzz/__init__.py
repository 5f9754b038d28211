"""Damage to what our commands read, and what becomes of it: see `python -m tests.fuzz`."""

import io
import json
import math
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from common.errors import UserError
from common.files import said_in_one_line

# What nobody meant to write in the place of a value.
ODD = [None, True, False, 0, 1, -1, 3, 0.5, 1e308, math.inf, math.nan, 2**31, 2**40, 10**30, "", "x", "3", "\u00e9\n", "\ud800"]
ODD += [[], [None], [[1]], ["x", 2], {}, {"x": 1}, {"": None}]
TEXTS = [b"", b"null", b"[]", b'"x"', b"3", b"NaN", b"{", b"[" * 100_000, b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b'{"a": 1}{"a": 2}']
LINE = 2000  # characters: more is no line that anybody reads


class Silent(Exception):
    """Something else than what was written came out, and nobody said so."""


def outcome(door: Callable[[], str]) -> str:
    """What became of a mutation behind one of the doors through which it is read: what the door says (`harmless`, `accepted`), or
    `refused`. Anything that begins with `fault` is one."""
    try:
        with redirect_stdout(io.StringIO()), said_in_one_line("a path"):
            return door()
    except UserError as error:
        text = str(error)
        is_line = len(text.splitlines()) == 1 and len(text) <= LINE
        return "refused" if is_line else f"fault: not one line: {text[:LINE]!r}"
    except Silent as error:
        return f"fault: silent: {error}"
    except Exception:
        return f"fault: {traceback.format_exc()}"


def damaged(folder: Path, random: Random) -> str:
    """Change one file under `folder`, in one of the ways in which files come to harm; what was done, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = random.choice(files)
    ways = [_flip, _overwrite, _cut, _grow, _remove, _become_folder, _swap]
    if path.suffix in (".json", ".jsonl"):
        ways += [_json, _json, _json, _json, _text]  # most of what can be read all the same
    return f"{path.relative_to(folder)}: {random.choice(ways)(path, random, files)}"


def _flip(path: Path, random: Random, _) -> str:
    content = bytearray(path.read_bytes())
    at, bit = random.randrange(len(content)), random.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} flipped"


def _overwrite(path: Path, random: Random, _) -> str:
    content = bytearray(path.read_bytes())
    at, count = random.randrange(len(content)), random.choice([1, 8, 300])
    content[at : at + count] = random.choice([bytes, random.randbytes])(len(content[at : at + count]))
    path.write_bytes(content)
    return f"{count} bytes from {at} on overwritten"


def _cut(path: Path, random: Random, _) -> str:
    size = random.choice([0, random.randrange(path.stat().st_size), path.stat().st_size - 1])
    path.write_bytes(path.read_bytes()[:size])
    return f"cut after {size} bytes"


def _grow(path: Path, random: Random, _) -> str:
    more = random.choice([b"\0", b"\n", b"x", path.read_bytes(), random.randbytes(100)])
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes added"


def _remove(path: Path, *_) -> str:
    path.unlink()
    return "removed"


def _become_folder(path: Path, *_) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _swap(path: Path, random: Random, files: list[Path]) -> str:
    other = random.choice(files)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.name}"


def _text(path: Path, random: Random, _) -> str:
    text = random.choice(TEXTS)
    path.write_bytes(text)
    return f"{text[:20]} in its place"


def _json(path: Path, random: Random, _) -> str:
    lines = path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_text()]
    number = random.randrange(len(lines))
    value, said = changed(json.loads(lines[number]), random)
    lines[number] = json.dumps(value, indent=None if path.suffix == ".jsonl" else 1) + "\n" * (path.suffix == ".jsonl")
    path.write_text("".join(lines))
    return said


def changed(value: Any, random: Random) -> tuple[Any, str]:
    """A JSON value of which one place is another; where, and how."""
    value = deepcopy(value)
    path = random.choice(list(_places(value)))
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    where, key = ".".join(map(str, path)), path[-1]
    match random.choice(["set", "set", "set", "set", "remove", "rename"]):
        case "remove":
            del inside[key]
            return value, f"{where} removed"
        case "rename" if isinstance(inside, dict):
            inside[f"{key}x"] = inside.pop(key)
            return value, f"{where} renamed"
    inside[key] = random.choice([*ODD, _like(inside[key], random)])
    return value, f"{where} = {inside[key]!r}"


def _like(value: Any, random: Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice([-value, value + 1, value * 2, value * 1000])
    return value * 2 if isinstance(value, str | list) else value


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Of lists the first and the last item alone: long ones would be all that is changed."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    elif isinstance(value, list) and value:
        for at in sorted({0, len(value) - 1}):
            yield from _places(value[at], (*path, at))


def copied(base: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(base, to, symlinks=True)
