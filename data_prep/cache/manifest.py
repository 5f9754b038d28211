"""The cache's manifest, its file names and the few bytes-on-disk rules that writer and reader share."""

import importlib.metadata
import json
import os
from pathlib import Path

import torch
import xxhash
from pydantic import BaseModel, ConfigDict

from data_prep.errors import UserError

FORMAT_VERSION = 1
MANIFEST, INDEX, FILES = "manifest.json", "index.parquet", "files.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Manifest(BaseModel):
    """Everything that decides what the bytes mean. Two captures with equal manifests (software aside) are the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    target: dict  # id, revision, weights_hash, and the sizes of target.Architecture
    tokenizer_hash: str
    chat_template_hash: str
    hidden_layers: list[int]
    kv_layers: list[int]
    codec: str
    max_length: int
    source: dict  # name, hash, documents, tokens
    software: dict

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape of one row) of every tensor of a shard; rows are tokens, or teachers for last_hidden."""
        dtype, sizes = DTYPES[self.codec], self.target["architecture"]
        state, head = (sizes["hidden_size"],), (sizes["kv_heads"], sizes["head_dim"])
        return {
            "input_ids": (torch.int32, ()),
            "loss_mask": (torch.uint8, ()),
            "last_hidden": (dtype, state),
            **{f"hidden.{layer}": (dtype, state) for layer in self.hidden_layers},
            **{f"{kind}.{layer}": (dtype, head) for layer in self.kv_layers for kind in ("key", "value")},
        }

    def bytes_of(self, tokens: int, supervised: int) -> int:
        """Bytes of the tensors of so many tokens, of which so many predictions are supervised."""

        def row(dtype, shape):
            return dtype.itemsize * torch.Size(shape).numel()

        return sum(row(*spec) * (supervised if name == "last_hidden" else tokens) for name, spec in self.tensors().items())

    def differs(self, other: "Manifest") -> list[str]:
        """Dotted names of the fields that differ; software versions are recorded, not compared."""
        mine, theirs = (flatten(m.model_dump(exclude={"software"})) for m in (self, other))
        return sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))

    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(canonical(self.model_dump(exclude={"software"})).encode())


def software_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "pyarrow")}


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError when there is none or it cannot be understood."""
    try:
        fields = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} is not a cache: it has no {MANIFEST}; capture one with data_prep/main.py cache.dir={folder}"
        ) from error
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is not readable JSON; capture the cache again") from error
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: format version {fields.get('format_version') if isinstance(fields, dict) else fields}"
            f" is not {FORMAT_VERSION}, which this release reads"
        )
    try:
        return Manifest.model_validate(fields)
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from error


def canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def flatten(value, prefix: str = "") -> dict:
    """Nested dicts as {dotted name: leaf}."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {name: leaf for key, inner in value.items() for name, leaf in flatten(inner, f"{prefix}{key}.").items()}


def publish(temporary: Path, final: Path) -> None:
    """Make a finished file appear under its name, durably: fsync, rename, fsync the folder."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
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


def file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
