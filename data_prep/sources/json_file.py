"""A file of JSON objects: one a line, or all in one array. Both are recognised by their first character, whatever the file's name
and whether or not a byte order mark stands before it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
# First bytes -> what such a file is, and what makes lines of it.
NOT_LINES = {
    b"\xff\xfe": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8"),
    b"\x1f\x8b": ("compressed by gzip", "gunzip -c"),
    b"\xfd7zXZ": ("compressed by xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -dc"),
    b"PK\x03\x04": ("a zip archive", "unzip -p"),
    b"PAR1": ("Parquet", None),
}
BETWEEN = re.compile(r"[ \t\n\r,]*")  # what JSON calls blank, and commas
DECODER = json.JSONDecoder()


def json_objects(path: Path) -> Iterator[tuple[str, int, dict]]:
    """(where in words, place of its first byte, object) of each. Raises UserError for a file that holds anything else."""
    with open(path, "rb") as file:
        head = file.read(4096)
        for begin, (what, command) in NOT_LINES.items():
            if head.startswith(begin):
                advice = f"{command} {path} > LINES.jsonl" if command else f"data=hub data.name=parquet data.files={path}"
                raise UserError(f"{path} is {what} and not JSON lines: {advice}")
        if head.removeprefix(MARK).lstrip().startswith(b"["):
            yield from _elements(path)
            return
        file.seek(0)
        place = 0
        for number, line in enumerate(file, start=1):
            if line.removeprefix(MARK).strip():
                where = f"{path}, line {number}"
                with _named(where):
                    value = json.loads(line)
                yield where, place, _object(where, value)
            place += len(line)


def _elements(path: Path) -> Iterator[tuple[str, int, dict]]:
    """Of an array, which is read as a whole: only its end says that it is one."""
    raw = path.read_bytes()
    try:
        text = raw.removeprefix(MARK).decode()
    except ValueError as error:
        raise UserError(f"{path}: not valid UTF-8") from error
    at = text.index("[") + 1
    place = len(raw.removesuffix(text[at:].encode()))
    number = 0
    while True:
        begin = BETWEEN.match(text, at).end()
        place += begin - at  # blanks and commas are a byte each
        if text[begin : begin + 1] == "]":
            break
        number += 1
        where = f"{path}, record {number}"
        with _named(where):
            value, end = DECODER.raw_decode(text, begin)
        yield where, place, _object(where, value)
        place += len(text[begin:end].encode())
        at = end
    if text[begin + 1 :].strip():
        raise UserError(f"{path}: more than one JSON array, or text behind it")


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object in valid Unicode") from error


def _object(where: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object")
    return value


def object_at(file: BinaryIO, place: int, behind: int | None) -> dict:
    """The object that begins at `place`; `behind`: where the next one does, None: it is the last."""
    file.seek(place)
    raw = file.read() if behind is None else file.read(behind - place)
    text = raw.removeprefix(MARK).decode("utf-8", "surrogatepass").lstrip()  # as json.loads decodes
    return DECODER.raw_decode(text)[0]
