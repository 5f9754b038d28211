"""One hash for every split and seed, and one for the bytes of a file, which lies beside it in `files.json`."""

import json
from pathlib import Path

import xxhash

from common.files import parsed_json, write_text

SUMS = "files.json"  # {name: file_hash} of the files beside it


def stable_hash(text: str) -> int:
    """64 bits that are the same on every machine and in every process; all splits and seeds come from it."""
    # Python's own `hash` of a string is another one in every process.
    return xxhash.xxh3_64_intdigest(text.encode())


def file_hash(path: Path) -> str:
    """xxh3 of a file's bytes, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    write_text(folder / SUMS, json.dumps(sums, indent=1, sort_keys=True))


def read_sums(folder: Path) -> dict[str, str]:
    """Nothing where nothing was recorded, as by an earlier release. Raises ValueError where that cannot be read."""
    path = folder / SUMS
    if not path.exists():
        return {}
    sums = parsed_json(path.read_text())
    if not isinstance(sums, dict):
        raise ValueError(f"{SUMS} is not an object of names")
    return sums


def is_changed(path: Path) -> bool:
    """Whether the file is not what the checksum beside it says. Raises OSError where it cannot be read."""
    try:
        expected = read_sums(path.parent).get(path.name)
    except ValueError:
        return True
    return expected is not None and file_hash(path) != expected
