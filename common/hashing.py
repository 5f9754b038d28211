"""One hash for every split and seed, and one for the bytes of a file."""

from pathlib import Path

import xxhash


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
