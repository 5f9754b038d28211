"""Files that are whole or absent, whenever the process ends, and places that are proved writable before the work begins."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import UserError

PROBE = 64 * 1024  # bytes: what a full disk does not take
# What a disk says of itself. Any other error of the system, such as a file that is not there, may be a fault of the code.
OF_DISKS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENODEV", "ENXIO", "ENAMETOOLONG")
OF_DISKS += ("EISDIR", "ENOTDIR")  # what only a place that was rearranged by hand says of our files


def refuse_unwritable(key: str, path: str, is_file: bool = False) -> None:
    """Prove that the folder `path` (or the file) can be written, by a file without a name in the nearest folder that is there: a
    refused command leaves nothing behind.

    Raises:
        UserError: it cannot, and why: a read-only or full disk, no permission, a file where a folder should be.
    """
    place = Path(path)
    try:
        if is_file and place.is_dir():
            raise UserError(f"{key}={path} is a folder; it must name a file")
        if is_file and place.exists():
            with open(place, "ab"):
                pass
        folder = place.parent if is_file else place
        folder = next(one for one in (folder, *folder.parents) if _is_there(one))
        if not folder.is_dir():
            raise UserError(f"{key}={path}: {folder} is a file; it must be a folder")
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE))
            probe.flush()
            os.fsync(probe.fileno())
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        said = getattr(error, "strerror", None) or error
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        advice = "Make room, then run the same command again" if full else "choose another, or mend that and run it again"
        raise UserError(f"{key}={path} cannot be written ({said}); {advice}") from error


def _is_there(place: Path) -> bool:
    # Unlike `Path.exists`, which takes a name that no file can have for one that is not there yet.
    try:
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def said_in_one_line(place: str) -> Iterator[None]:
    """An error of the disk, wherever it happens, becomes a UserError with the file's name, or `place`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (said := disk_says(error)) is None:
            raise
        raise UserError(f"{getattr(error, 'filename', None) or place}: {said}") from error


def disk_says(error: Exception) -> str | None:
    """What is wrong with the disk; None: the error is of another kind."""
    number = getattr(error, "errno", None)
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors says it in words alone
        number = int(found[1])
    return os.strerror(number) if errno.errorcode.get(number) in OF_DISKS else None


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


def parsed_json(text: str) -> Any:
    """Raises ValueError where `text` is no JSON, or holds half a character ("\\ud800"), with which no file can be written."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    json.dumps(found, ensure_ascii=False).encode()
    return found


def read_json(path: Path, advice: str, first_line: bool = False) -> Any:
    """What a JSON file holds, or its first line. `advice`: what to do where it cannot be read, for the end of the message.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UserError: it cannot be read, or holds no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parsed_json(file.readline() if first_line else file.read())
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON; {advice}") from error
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {advice}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    publish(temporary, path)
