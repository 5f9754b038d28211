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

from common.errors import UserError
from common.hashing import stable_hash
from data_prep.recipe import DataRecipe

VALIDATION = "validation/"  # begins the ids of documents that are joined from records on that side of training's split


class Record(NamedTuple):
    """`fields` holds what the source has: text, messages or conversations, input_ids and loss_mask, and anything else."""

    id: str
    fields: dict


def is_validation(id: str) -> bool:
    """Whether joined documents judge a training by this record (one in twenty, by hash) instead of training on it."""
    return stable_hash(VALIDATION + id) % 20 == 0


def check_source(data: DataRecipe) -> None:
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


def is_heldout(id: str) -> bool:
    """Whether a record is kept for evaluation (one in fifty, by hash) and never captured."""
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


class Lines:
    """The records of a JSONL file by their number. Every line is looked at once, and its place is kept with the hash of its id:
    16 bytes a line. Blank lines do not count."""

    def __init__(self, path: str, id_field: str | None, hint: str):
        """`hint`: what else a message about an id that stands twice proposes. Raises UserError for that, and for a line that is
        no record."""
        self._id_field = id_field
        keys, places = array("Q"), array("Q")
        with open(path, "rb") as file:
            place = number = 0
            while line := file.readline():
                number += 1
                if line.strip():
                    try:
                        id = _id(json.loads(line), id_field, len(places))
                    except (ValueError, AttributeError) as error:
                        raise UserError(f"{path}, line {number}: not a JSON object in valid Unicode") from error
                    keys.append(stable_hash(id))
                    places.append(place)
                place += len(line)
        self._file = open(path, "rb")
        self._places = places
        self.keys = np.frombuffer(keys, dtype=np.uint64) if keys else np.empty(0, dtype=np.uint64)  # stable_hash of the ids
        self.by_hash = np.argsort(self.keys, kind="stable")
        ranked = self.keys[self.by_hash]
        if len(repeated := np.flatnonzero(ranked[1:] == ranked[:-1])):
            again = self[self.by_hash[repeated[0] + 1]].id
            raise UserError(f"{path}: the id '{again}' stands twice; make ids unique{hint}")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Record:
        self._file.seek(self._places[number])
        fields = json.loads(self._file.readline())
        return Record(_id(fields, self._id_field, int(number)), fields)


def _jsonl(data: DataRecipe, heldout: bool | None) -> Iterator[Record]:
    """One JSON object a line."""
    check_source(data)
    lines = Lines(data.path, data.id, ", or number the lines with data.id=null")
    # Everything is read: from front to back is fastest.
    order = range(len(lines)) if data.max_tokens is None and heldout is False else lines.by_hash
    for number in order:
        record = lines[number]
        if heldout in (None, is_heldout(record.id)):
            yield record


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
        ids = [_id({data.id: name}, data.id, number) for number, name in enumerate(named)]
        numbered = ((i, dataset[i]) for i in sorted(range(len(ids)), key=lambda i: stable_hash(ids[i])))
    seen: set[int] = set()
    while True:
        try:
            number, fields = next(numbered)
        except StopIteration:
            return
        except Exception as error:  # as above: the network, or a file that is not what its first rows promised
            raise UserError(f"data.name={data.name} cannot be read to its end ({' '.join(str(error).split())[:300]})") from error
        id = _id(fields, data.id, number)
        if (key := stable_hash(id)) in seen:
            raise UserError(f"data.name={data.name}: the id '{id}' stands twice; number the rows with data.id=null")
        seen.add(key)
        if heldout in (None, is_heldout(id)):
            yield Record(id, fields)


def _id(fields: dict, field: str | None, number: int) -> str:
    named = fields.get(field) if field else None
    id = str(number if named is None else named)
    id.encode()  # JSON can spell half a character, which nothing can store; a ValueError
    return id
