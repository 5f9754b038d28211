"""safetensors files that are written piece by piece, and hashed while they are written."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import torch
import xxhash
from torch import Tensor

# The format's names of the dtypes that are written here.
SAFETENSORS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    # NumPy has neither bf16 nor fp8, but it can hold their bytes.
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_safetensors(path: Path, tensors: dict[str, list[Tensor]]) -> str:
    """Write each name's pieces, joined along the first axis, and return the file's xxh3.

    The library's own `save_file` would need them joined in memory first and copies every byte once more: three to ten times
    slower (docs/research/log.md).
    """
    shapes = {name: (t[0].dtype, (sum(map(len, t)), *t[0].shape[1:])) for name, t in tensors.items()}
    return stream_safetensors(path, shapes, tensors.__getitem__)


def stream_safetensors(
    path: Path, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], pieces: Callable[[str], Iterable[Tensor]], **metadata: str
) -> str:
    """The same for tensors that need not exist at once: `pieces`(name) yields the rows of one of `shapes`, in their order.

    Widest dtype first, as the library does, so that every tensor is aligned.
    """
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    names = sorted(shapes, key=lambda n: (-shapes[n][0].itemsize, n))
    place = 0
    for name in names:
        dtype, shape = shapes[name]
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    # The format: eight bytes with the header's length, the header as JSON, then the tensors. Blanks fill the header up to a
    # multiple of eight bytes, so that what follows is aligned.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = itertools.chain([len(text).to_bytes(8, "little"), text], (raw(t) for name in names for t in pieces(name)))
    # Hashed on the way, because reading a shard of gigabytes once more would take as long as writing it.
    digest = xxhash.xxh3_128()
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            part = memoryview(part)
            while part:  # one call writes at most 2 GiB
                part = part[file.write(part) :]
    return digest.hexdigest()


def offsets_of(file: IO[bytes], shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, int]:
    """Where in an open file each tensor of `shapes` (dtype, shape of a row) begins, in bytes.

    Read, where the library would map the file into memory: a look behind the end of a mapped file that was cut kills the process.

    Raises:
        ValueError: the file is shorter than its header says, or one of the tensors is not there or is something else.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("it ends within its header")
    header = json.loads(file.read(length))
    found = {}
    for name, (dtype, row) in shapes.items():
        try:
            entry = header[name]
            start, stop = entry["data_offsets"]
            rows, *others = entry["shape"]
            fits = (entry["dtype"], tuple(others)) == (SAFETENSORS[dtype], row)
            fits = fits and stop - start == rows * math.prod(row) * dtype.itemsize and 0 <= start <= stop
        except (LookupError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"it lacks {name}, or has another one")
        if 8 + length + stop > size:
            raise ValueError(f"it ends within {name}")
        found[name] = 8 + length + start
    return found
