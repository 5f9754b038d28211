"""Records: an id and fields. `heldout` records are never captured; evaluation prompts come only from them."""

import hashlib
import json
import sysconfig
import tokenize
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_prep.errors import UserError
from data_prep.recipe import DataRecipe

VALIDATION = "validation/"  # begins the ids of documents that are joined from records on that side of training's split


class Record(NamedTuple):
    """`fields` holds what the source has: text, messages or conversations, input_ids and loss_mask, and anything else."""

    id: str
    fields: dict


def stable_hash(text: str) -> int:
    """64 bits that are the same on every machine and in every process; all splits and seeds come from it."""
    return xxhash.xxh3_64_intdigest(text.encode())


def is_validation(id: str) -> bool:
    """Whether joined documents judge a training by this record (one in twenty, by hash) instead of training on it."""
    return stable_hash(VALIDATION + id) % 20 == 0


def check(data: DataRecipe) -> None:
    """Raises UserError when the source cannot be there."""
    if data.source == "jsonl" and not (data.path and Path(data.path).is_file()):
        raise UserError(f"data.path={data.path} is not a file; it must name a file of one JSON object a line")
    if data.source == "hub" and not data.name:
        raise UserError("data=hub needs data.name, the data set as datasets.load_dataset takes it")


def records(data: DataRecipe, heldout: bool | None) -> Iterator[Record]:
    """The records of one side of the split (None: both). A limit on tokens, and evaluation, take them in an order that
    is a function of their ids alone: a sample of the source, not its first lines (a stream keeps its own order).

    Raises:
        UserError: the source is missing, or a record of it is malformed or has another's id.
    """
    return {"stdlib": _stdlib, "jsonl": _jsonl, "hub": _hub}[data.source](data, heldout)


def _is_heldout(id: str) -> bool:
    return stable_hash(id) % 50 == 0


def _stdlib(data: DataRecipe, heldout: bool | None) -> Iterator[Record]:
    """The interpreter's own standard library. The embedded target has never seen a module whose file name f has
    md5(f) % 8 == 0 (targets/tiny/README.md): those are held out."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for path in root.rglob("*.py"):
        if {"site-packages", "__pycache__"} & set(path.relative_to(root).parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library's tests of bad encodings are not readable text
        if heldout in (None, int(hashlib.md5(path.name.encode()).hexdigest(), 16) % 8 == 0):
            found.append(Record(path.relative_to(root).as_posix(), {"text": text}))
    return iter(sorted(found, key=lambda r: stable_hash(r.id)))


def _jsonl(data: DataRecipe, heldout: bool | None) -> Iterator[Record]:
    """One JSON object a line. Two passes: the first looks at every line and keeps its place, eight bytes each."""
    check(data)
    keys, places = array("Q"), array("Q")
    with open(data.path, "rb") as file:
        place = number = 0
        while line := file.readline():
            number += 1
            if line.strip():
                try:
                    fields = json.loads(line)
                    id = _id(fields, data, len(places))
                except (ValueError, AttributeError) as error:
                    raise UserError(f"{data.path}, line {number}: not a JSON object in valid Unicode") from error
                keys.append(stable_hash(id))
                places.append(place)
            place += len(line)
        order = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable") if keys else []
        ranked = np.frombuffer(keys, dtype=np.uint64)[order] if keys else np.empty(0)
        if len(repeated := np.flatnonzero(ranked[1:] == ranked[:-1])):
            file.seek(places[order[repeated[0] + 1]])
            again = _id(json.loads(file.readline()), data, -1)
            raise UserError(f"{data.path}: the id '{again}' stands twice; make ids unique, or number the lines with data.id=null")
        if data.max_tokens is None and heldout is False:
            order = range(len(places))  # everything is read: from front to back is fastest
        for index in order:
            file.seek(places[index])
            fields = json.loads(file.readline())
            id = _id(fields, data, int(index))
            if heldout in (None, _is_heldout(id)):
                yield Record(id, fields)


def load_hub(name: str, config: str | None, split: str, files=None, streaming: bool = False, key: str = "data"):
    """Whatever `datasets.load_dataset` loads. Raises UserError, naming the settings of section `key`."""
    import datasets  # seconds to import, and only this source needs it

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, data_files=files, streaming=streaming)
    except Exception as error:  # the library raises whatever its builders and its network raise
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}.name={name}, {key}.split={split}: datasets cannot load it ({what[:300]})") from error


def _hub(data: DataRecipe, heldout: bool | None) -> Iterator[Record]:
    dataset = load_hub(data.name, data.config, data.split, data.files, data.streaming)
    numbered = iter(enumerate(dataset))
    if not data.streaming:
        named = dataset[data.id] if data.id in dataset.column_names else [None] * len(dataset)
        ids = [_id({data.id: name}, data, number) for number, name in enumerate(named)]
        numbered = ((i, dataset[i]) for i in sorted(range(len(ids)), key=lambda i: stable_hash(ids[i])))
    seen: set[int] = set()
    while True:
        try:
            number, fields = next(numbered)
        except StopIteration:
            return
        except Exception as error:  # as above: the network, or a file that is not what its first rows promised
            raise UserError(f"data.name={data.name} cannot be read to its end ({' '.join(str(error).split())[:300]})") from error
        id = _id(fields, data, number)
        if (key := stable_hash(id)) in seen:
            raise UserError(f"data.name={data.name}: the id '{id}' stands twice; number the rows with data.id=null")
        seen.add(key)
        if heldout in (None, _is_heldout(id)):
            yield Record(id, fields)


def _id(fields: dict, data: DataRecipe, number: int) -> str:
    named = fields.get(data.id) if data.id else None
    id = str(number if named is None else named)
    id.encode()  # JSON can spell half a character, which nothing can store; a ValueError
    return id
