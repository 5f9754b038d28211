"""Targets that are one GGUF file: from a file's name to the folder that is made of it, once, and found ever after.

What the file says is read in data_prep/target/gguf_contents.py and gguf_tokenizer.py.
"""

import fcntl
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from transformers.utils import cached_file

from common.errors import UserError, first_line
from common.files import write_text
from common.hashing import file_hash
from common.tensor_files import stream_safetensors
from data_prep.target.gguf_contents import INTERLEAVED, config_of, dtype_of, generation_of, pieces, read, tensors_of
from data_prep.target.gguf_tokenizer import tokenizer_of

FORMAT = 1  # of the folders that are made: raise it when the same file becomes another folder
SEAL = "understudy.json"  # written last: a folder without it, or with files of other sizes, counts for nothing


def plain(path: str | os.PathLike, revision: str | None = None) -> str:
    """`path` itself; or, where it names a GGUF file, the folder that is made of it, once, in a cache of the user's: config.json,
    tokenizer, generation_config.json and model.safetensors.

    `path` ends in .gguf: a file, or ORGANISATION/REPOSITORY/NAME.gguf of the hub. Processes that ask for the same file at once,
    on one host or on several that share the cache, wait for the first of them.

    Raises:
        UserError: there is no such file; it is cut, of an architecture that is not known, or lacks what a target needs; the cache
            cannot be written.
    """
    path = os.fspath(path)
    if not path.endswith(".gguf"):
        _refuse_unnamed(path)
        return path
    file = _find(path, revision)
    try:
        now = file.stat()
        folder = cache_folder() / f"{file.stem}-{_hash_of(str(file), now.st_size, now.st_mtime_ns)[:16]}"
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    if not is_whole(folder):
        with _alone(folder.with_name(folder.name + ".lock")):
            if not is_whole(folder):  # another process may have made it meanwhile
                _make(folder, file)
    return str(folder)


def tensor_types(path: str, revision: str | None = None) -> dict[str, int]:
    """How many tensors of a GGUF file are of each type (Q4_K, F32); empty for a folder that was made before these were noted.
    Raises UserError as `plain` does."""
    # Not from the file itself: to read it takes seconds.
    return json.loads((Path(plain(path, revision)) / SEAL).read_text()).get("tensors", {})


def cache_folder() -> Path:
    """Where folders are made: in HF_HOME, else in XDG_CACHE_HOME, else in ~/.cache."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "understudy" / "gguf"


def is_whole(folder: Path) -> bool:
    """Whether `folder` was finished by this format, and every file has the size that it was written with."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        return seal["format"] == FORMAT and all((folder / n).stat().st_size == size for n, size in seal["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


@lru_cache
def _hash_of(file: str, size: int, changed: int) -> str:
    """xxh3 of the file's bytes, read once a process unless the file changes."""
    return file_hash(Path(file))


def _refuse_unnamed(path: str) -> None:
    """Raises UserError for a folder that has GGUF files and no configuration."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists() and (names := _names(folder)):
        raise UserError(f"target.path={path}: there is no config.json; to use a GGUF file say target.gguf=NAME: {names}")


def _names(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.glob("*.gguf")))


def _find(path: str, revision: str | None) -> Path:
    file = Path(path)
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name):
        raise UserError(f"target.path={path}: a GGUF in several parts is not read; join them first (llama-gguf-split --merge)")
    if file.is_file():
        return file
    if file.parent.is_dir():
        raise UserError(f"target.path={path}: there is no such file; that folder has {_names(file.parent) or 'no GGUF file'}")
    repository = "/".join(file.parts[:2])
    name = "/".join(file.parts[2:])
    if file.is_absolute() or not name:
        raise UserError(f"target.path={path}: there is no such file")
    try:
        return Path(cached_file(repository, name, revision=revision))
    except OSError as error:
        raise UserError(f"target.path={path}: no file here, and none of the hub ({first_line(error)})") from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold `lock`; who dies lets go of it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        raise _unwritable(error) from error
    try:
        yield
    finally:
        os.close(handle)


def _unwritable(error: OSError) -> UserError:
    return UserError(f"{cache_folder()}: {error.strerror or error}; HF_HOME=FOLDER chooses another place for dequantised targets")


def _make(folder: Path, file: Path) -> None:
    """Write `folder` aside, durably, and rename it. Nothing is written before the whole file has been looked at."""
    reader = read(file)
    config = config_of(reader, file)
    tensors = tensors_of(reader, config, file)
    tokenizer = tokenizer_of(reader, file)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{file}: the tokenizer has {len(tokenizer)} tokens, the embedding {config.vocab_size} rows")
    shapes = {name: (dtype_of(tensor), tuple(map(int, reversed(tensor.shape)))) for name, tensor in tensors.items()}
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())
    aside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        free = shutil.disk_usage(folder.parent).free
        if free < size + (64 << 20):
            raise UserError(
                f"{folder.parent}: {file.name} takes {size / 1e9:.2f} GB there once it is dequantised, and {free / 1e9:.2f} GB "
                "are free; HF_HOME=FOLDER chooses another place"
            )
        print(f"target: {file.name} is dequantised, once, to {folder} ({size / 1e9:.2f} GB)", flush=True)
        aside.mkdir()
        config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        generation_of(reader).save_pretrained(aside)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        turned = heads if config.model_type in INTERLEAVED else {}
        stream_safetensors(aside / "model.safetensors", shapes, lambda name: pieces(tensors[name], turned), format="pt")
        _seal(aside, Counter(tensor.tensor_type.name for tensor in reader.tensors))
        os.replace(aside, folder)
        _sync(folder.parent)
    except OSError as error:
        raise _unwritable(error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _seal(folder: Path, types: Counter) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    for name in sizes:
        _sync(folder / name)
    write_text(folder / SEAL, json.dumps({"format": FORMAT, "bytes": sizes, "tensors": dict(sorted(types.items()))}, indent=2))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
