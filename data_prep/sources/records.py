"""Where documents come from: each source gives records, an id and fields, of the sides that are asked for (sides.py).

A new source is a function and an entry of `SOURCES` (docs/extend/source.md).
"""

import sysconfig
import tokenize
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.hashing import stable_hash
from data_prep.recipe import DataRecipe
from data_prep.sources.json_file import json_objects, object_at
from data_prep.sources.messages import MARK_LIKE
from data_prep.sources.sides import is_heldout, is_heldout_module

CONTENTS = ("text", "messages", "conversations", "input_ids")  # fields, of which a record has one or another


class Record(NamedTuple):
    """`fields` holds what the source has: one of CONTENTS, and anything else. `heldout`: its side; sources leave it alone."""

    id: str
    fields: dict
    heldout: bool = False


def check_source(data: DataRecipe) -> None:
    """Raises UserError when the source cannot be there."""
    SOURCES[data.source].check(data)


def records(data: DataRecipe, heldout: bool | None, whole: bool = False) -> Iterator[Record]:
    """The records of one side of the split (None: both), in an order that is a function of their ids alone: a sample of the
    source, not its first lines (a stream keeps its own order). `whole`: all will be read, and the order may be the fastest.

    Raises:
        UserError: the source is missing, or a record of it is malformed or has another's id.
    """
    source = SOURCES[data.source]
    for record in source.read(data, whole):
        side = source.heldout(record.id)
        if heldout in (None, side):
            yield record._replace(heldout=side)


def _stdlib(data: DataRecipe, whole: bool) -> Iterator[Record]:
    """The interpreter's own standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        if {"site-packages", "__pycache__"} & set(path.relative_to(root).parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library's tests of bad encodings are not readable text
        found.append(Record(path.relative_to(root).as_posix(), {"text": text}))
    # By hash, so that a limit on tokens takes a sample of the whole library instead of its first folders.
    return iter(sorted(found, key=lambda r: stable_hash(r.id)))


class Lines:
    """The records of a file of JSON lines, or of one JSON array, by their number. Each is looked at once, and its place is kept
    with the hash of its id: 16 bytes a record. Blank lines do not count."""

    def __init__(self, path: str, id_field: str | None, hint: str):
        """`hint`: what else a message about an id that stands twice proposes. Raises UserError for that, and for a line that is
        no record."""
        self._id_field = id_field
        keys = array("Q")
        places = array("Q")
        for where, place, fields in json_objects(Path(path)):
            try:
                keys.append(stable_hash(_id(fields, id_field, len(places))))
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            places.append(place)
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
        behind = self._places[number + 1] if number + 1 < len(self._places) else None
        fields = object_at(self._file, self._places[number], behind)
        return Record(_id(fields, self._id_field, int(number)), fields)


def _check_jsonl(data: DataRecipe) -> None:
    if not (data.path and Path(data.path).is_file()):
        raise UserError(f"data.path={data.path} is not a file; it must name a file of one JSON object a line")


def _jsonl(data: DataRecipe, whole: bool) -> Iterator[Record]:
    """One JSON object a line, or one array of them."""
    check_source(data)
    lines = Lines(data.path, data.id, ", or number the lines with data.id=null")
    # Where all is read, from front to back is fastest.
    return (lines[number] for number in (range(len(lines)) if whole else lines.by_hash))


def load_hub(name: str, config: str | None, split: str, files=None, streaming: bool = False, key: str = "data"):
    """Whatever `datasets.load_dataset` loads. Raises UserError, naming the settings of section `key`."""
    import datasets  # seconds to import, and only this source needs it

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, data_files=files, streaming=streaming)
    except Exception as error:  # the library passes on all errors of its builders and of the network
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}.name={name}, {key}.split={split}: datasets cannot load it ({what[:300]})") from error


def _check_hub(data: DataRecipe) -> None:
    if not data.name:
        raise UserError("data=hub needs data.name, the data set as datasets.load_dataset takes it")


def _hub(data: DataRecipe, whole: bool) -> Iterator[Record]:
    dataset = load_hub(data.name, data.config, data.split, data.files, data.streaming)
    if not hasattr(dataset, "column_names"):
        raise UserError(f"data.name={data.name}: data.split={data.split} names several splits; give one")
    if names := dataset.column_names:  # a stream need not know
        if not set(CONTENTS) & set(names):
            raise UserError(f"data.name={data.name} has none of the columns {', '.join(CONTENTS)}; it has {', '.join(names)}")
        # Other columns (images, times) are not even decoded.
        needed = {data.id, *CONTENTS, "tools", "finish"}
        dataset = dataset.select_columns([name for name in names if name in needed or MARK_LIKE.search(name)])
    numbered = iter(enumerate(dataset))
    if not data.streaming:
        named = dataset[data.id] if data.id in dataset.column_names else [None] * len(dataset)
        # Of the ids alone: a data set that is on the disk is not read to be put in order.
        ids = [_hub_id(data, {data.id: name}, number) for number, name in enumerate(named)]
        numbered = ((i, dataset[i]) for i in sorted(range(len(ids)), key=lambda i: stable_hash(ids[i])))
    seen: set[int] = set()
    while True:
        try:
            number, fields = next(numbered)
        except StopIteration:
            return
        except Exception as error:  # as above: the network, or a file that is not what its first rows promised
            raise UserError(f"data.name={data.name} cannot be read to its end ({' '.join(str(error).split())[:300]})") from error
        id = _hub_id(data, fields, number)
        if (key := stable_hash(id)) in seen:
            raise UserError(f"data.name={data.name}: the id '{id}' stands twice; number the rows with data.id=null")
        seen.add(key)
        yield Record(id, fields)


def _hub_id(data: DataRecipe, fields: dict, number: int) -> str:
    try:
        return _id(fields, data.id, number)
    except ValueError as error:
        raise UserError(f"data.name={data.name}, row {number}: {error}; number the rows with data.id=null") from error


def _id(fields: dict, field: str | None, number: int) -> str:
    """Raises ValueError for what is no name."""
    named = fields.get(field) if field else None
    if isinstance(named, list | dict | bytes):
        raise ValueError(f"'{field}' is to name it and is neither text nor a number")
    try:
        id = str(number if named is None else named)
        id.encode()  # JSON can spell half a character, which nothing can store
    except ValueError as error:
        raise ValueError(f"its '{field}' is not valid Unicode, or a number without end") from error
    return id


def _nothing_to_check(data: DataRecipe) -> None:
    pass


class Source(NamedTuple):
    """A kind of source: `read`(data, whole) gives all records, each id once, in an order that is a function of ids alone unless
    they are read as a `whole`; `check`(data) raises UserError, before anything is loaded, when the source cannot be there;
    `heldout`(id) says a record's side."""

    read: Callable[[DataRecipe, bool], Iterator[Record]]
    check: Callable[[DataRecipe], None] = _nothing_to_check
    heldout: Callable[[str], bool] = is_heldout


# By the value of `data.source`, which `DataRecipe` lists as well.
SOURCES = {
    "stdlib": Source(_stdlib, heldout=lambda id: is_heldout_module(PurePosixPath(id).name)),
    "jsonl": Source(_jsonl, _check_jsonl),
    "hub": Source(_hub, _check_hub),
}
