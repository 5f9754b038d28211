"""Documents: an id and a text. `heldout` documents are never captured; evaluation prompts come only from them."""

import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_prep.errors import UserError
from data_prep.recipe import DataRecipe


class Document(NamedTuple):
    id: str
    text: str


def stable_hash(text: str) -> int:
    """64 bits that are the same on every machine and in every process; all splits and seeds come from it."""
    return xxhash.xxh3_64_intdigest(text.encode())


def documents(data: DataRecipe, heldout: bool) -> Iterator[Document]:
    """The documents of one side of the split, in an order that is a function of their ids alone.

    Raises:
        UserError: the source is missing or a line of it is not a document.
    """
    read = {"stdlib": _stdlib, "jsonl": _jsonl}[data.source]
    # Hashed order: a limit on tokens then takes a sample of the source, not its first folder.
    return iter(sorted((d for d, out in read(data) if out == heldout), key=lambda d: stable_hash(d.id)))


def _stdlib(data: DataRecipe) -> Iterator[tuple[Document, bool]]:
    """The interpreter's own standard library. The embedded target has never seen a module whose file name f has
    md5(f) % 8 == 0 (targets/tiny/README.md): those are held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "__pycache__"} & set(path.relative_to(root).parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library's tests of bad encodings are not readable text
        heldout = int(hashlib.md5(path.name.encode()).hexdigest(), 16) % 8 == 0
        yield Document(path.relative_to(root).as_posix(), text), heldout


def _jsonl(data: DataRecipe) -> Iterator[tuple[Document, bool]]:
    """Lines of {"text": ..., "id": optional}; one id in 50, by hash, is held out."""
    if not data.path or not Path(data.path).is_file():
        raise UserError(f"data.path={data.path} is not a file; data=jsonl reads one JSON object with a 'text' a line")
    seen = set()
    with open(data.path, "rb") as file:
        for number, line in enumerate(file):
            try:
                record = json.loads(line)
                document = Document(str(record.get("id", number)), record["text"])
                document.text.encode()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{data.path}, line {number + 1}: not a JSON object with a 'text'") from error
            if document.id in seen:
                raise UserError(f"{data.path}, line {number + 1}: the id '{document.id}' stands twice")
            seen.add(document.id)
            yield document, stable_hash(document.id) % 50 == 0
