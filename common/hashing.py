"""One hash for every split and seed."""

import xxhash


def stable_hash(text: str) -> int:
    """64 bits that are the same on every machine and in every process; all splits and seeds come from it."""
    return xxhash.xxh3_64_intdigest(text.encode())
