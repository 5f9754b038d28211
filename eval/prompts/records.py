"""A suite's records in their own order, from a file or a data set, each with the words that say where it stands."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow
import pyarrow.parquet

from common.errors import UserError
from data_prep.sources.json_file import json_objects
from data_prep.sources.records import load_hub


@lru_cache(maxsize=1)
def numbered_rows(path: str | None, name: str | None, config: str | None, split: str) -> list[tuple[str, dict]]:
    """Every record, with its place in words. Raises UserError for a source that cannot be read or is empty."""
    found = list(_file(Path(path)) if path else _data_set(name, config, split))
    if not found:
        raise UserError(f"{path or name}: no record is in it")
    return found


def _data_set(name: str, config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    try:
        rows = load_hub(name, config, split, key="suite")
    except UserError as error:
        raise UserError(f"{error}; give suite.path=FILE") from error
    try:
        yield from ((f"{name}, record {number}", fields) for number, fields in enumerate(rows, start=1))
    except Exception as error:  # the library passes on all errors of its decoders
        what = " ".join(str(error).split())[:300]
        raise UserError(f"suite.name={name} cannot be read to its end ({what}); give suite.path=FILE") from error


def _file(path: Path) -> Iterator[tuple[str, dict]]:
    if path.suffix not in (".jsonl", ".json", ".parquet", ".txt"):
        raise UserError(f"suite.path={path}: a suite's file is .jsonl, .json, .parquet or .txt")
    if not path.is_file():
        raise UserError(f"suite.path={path} is not a file")
    if path.suffix in (".jsonl", ".json"):
        yield from ((where, fields) for where, _, fields in json_objects(path))
        return
    try:
        if path.suffix == ".parquet":
            found = pyarrow.parquet.read_table(path).to_pylist()
        else:
            lines = path.read_text("utf-8-sig").split("\n")  # with or without a byte order mark
            found = [{"text": line, "prompt": line} if line.strip() else None for line in lines]
    except (ValueError, TypeError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not {'Parquet' if path.suffix == '.parquet' else 'text in UTF-8'}") from error
    unit = "record" if path.suffix == ".parquet" else "line"
    yield from ((f"{path}, {unit} {number}", fields) for number, fields in enumerate(found, start=1) if fields is not None)
