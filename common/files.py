"""Files that are whole or absent, whenever the process ends."""

import os
from pathlib import Path


def publish(temporary: Path, final: Path) -> None:
    """Make a finished file appear under its name, durably: fsync, rename, fsync the folder."""
    # A rename can reach the disk before the bytes do. After a power cut an empty file would then stand under the final name.
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    # The rename is a change of the folder, which has to reach the disk as well.
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    publish(temporary, path)
