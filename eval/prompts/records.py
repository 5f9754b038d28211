"""A suite's records in their own order, from a file or a data set, each with the words that say where it stands."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow
import pyarrow.parquet

from common.errors import UserError
from data_prep.sources.records import load_hub


@lru_cache(maxsize=1)
def numbered_rows(path: str | None, name: str | None, config: str | None, split: str) -> list[tuple[str, dict]]:
    """Every record, with its place in words. Raises UserError for a source that cannot be read or is empty."""
    try:
        found = list(_file(Path(path)) if path else enumerate(load_hub(name, config, split, key="suite"), start=1))
    except UserError as error:
        raise error if path else UserError(f"{error}; give suite.path=FILE") from error
    if not found:
        raise UserError(f"{path or name}: no record is in it")
    unit = "line" if path and Path(path).suffix in (".jsonl", ".txt") else "record"
    return [(f"{path or name}, {unit} {number}", fields) for number, fields in found]


def _file(path: Path) -> Iterator[tuple[int, dict]]:
    """Records by number, from 1; a line that is blank has none."""
    if path.suffix not in (".jsonl", ".json", ".parquet", ".txt"):
        raise UserError(f"suite.path={path}: a suite's file is .jsonl, .json, .parquet or .txt")
    if not path.is_file():
        raise UserError(f"suite.path={path} is not a file")
    if path.suffix == ".jsonl":
        # As bytes: lines of text also end at characters such as U+2028, which JSON may hold inside a string.
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if line.strip():
                try:
                    yield number, _object(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: not a JSON object in valid Unicode") from error
        return
    try:
        if path.suffix == ".parquet":
            found = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".json":
            found = list(map(_object, json.loads(path.read_bytes())))
        else:
            found = [{"text": line, "prompt": line} if line.strip() else None for line in path.read_text("utf-8").split("\n")]
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        what = {".parquet": "Parquet", ".json": "a list of JSON objects", ".txt": "text in UTF-8"}[path.suffix]
        raise UserError(f"{path}: not {what}") from error
    yield from ((number, fields) for number, fields in enumerate(found, start=1) if fields is not None)


def _object(value) -> dict:
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    return value
