"""The cache's manifest, its file names and the few bytes-on-disk rules that writer and reader share."""

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator

from common.errors import UserError
from common.files import read_json
from common.recipe import what_is_wrong
from data_prep.cache.codec import SCALE, stored

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
INDEX = "index.parquet"
FILES = "files.json"
UNHASHED = ("recipe", "records", "kept")  # of the source: no part of a manifest's identity
DOCUMENTS = "documents.arrow"  # the tokenised source, in the cache's folder while it is being captured


class Manifest(BaseModel):
    """Everything that decides what the bytes mean. Two captures with equal manifests (software aside) are the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    # id, revision, weights_hash, the sizes of target.architecture.Architecture; `quantisation` where the weights are quantised,
    # `server` where one computed the states.
    target: dict
    tokenizer_hash: str
    chat_template_hash: str
    hidden_layers: list[int]
    kv_layers: list[int]
    query_layers: list[int] = []
    codec: str  # fp8, bf16 or fp32
    last_hidden: Literal["supervised", "all"]  # one row a supervised token; one row a token
    max_length: int
    before_texts: list[int] = []  # what the tokenizer puts before each text that is no chat (BOS)
    source: dict  # name, recipe, hash (documents.Digest), documents, tokens, supervised; records, left_out, kept: sources.counts
    # Not part of the identity: another release of PyTorch may go on with a capture.
    software: dict

    @model_serializer(mode="wrap")
    def _without_empty(self, dump) -> dict:
        """A cache without queries, or of a tokenizer that puts nothing before a text, is written and hashed as it was before
        there were any."""
        return {name: value for name, value in dump(self).items() if name not in ("query_layers", "before_texts") or value}

    @model_validator(mode="after")
    def _says_what_is_stored(self):
        try:
            rows = self.tensors()
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"codec and target.architecture do not say what is stored ({error!r})") from error
        if wrong := [name for name, (_, shape) in rows.items() if not all(isinstance(size, int) and size > 0 for size in shape)]:
            raise ValueError(f"target.architecture has sizes of which there is no {wrong[0]}")
        return self

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of one row of every state that is stored; rows are tokens, or teachers (`is_teacher`)."""
        sizes = self.target["architecture"]
        state = (sizes["hidden_size"],)

        def of(layer: int, heads: str) -> tuple[int, int]:
            """(heads, head size) of a layer; where layers differ, the target's record says how."""
            own = sizes | self.target.get("kv_shapes", {}).get(str(layer), {})
            return own[heads], own["head_dim"]

        return {
            "last_hidden": state,
            **{f"hidden.{layer}": state for layer in self.hidden_layers},
            **{f"{kind}.{layer}": of(layer, "kv_heads") for layer in self.kv_layers for kind in ("key", "value")},
            **{f"query.{layer}": of(layer, "heads") for layer in self.query_layers},
        }

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape of one row) of every tensor of a shard, the scales of fp8 included."""
        # Every vocabulary fits into 32 bits, and a mask is one byte: beside the states both cost next to nothing.
        rows = {"input_ids": (torch.int32, ()), "loss_mask": (torch.uint8, ())}
        for name, shape in self.states.items():
            rows |= stored(name, shape, self.codec)
        return rows

    def bytes_of(self, tokens: int, supervised: int) -> int:
        """Bytes of the tensors of `tokens` tokens with `supervised` supervised predictions."""
        teachers = tokens if self.last_hidden == "all" else supervised

        def row(dtype, shape):
            return dtype.itemsize * torch.Size(shape).numel()

        return sum(row(*spec) * (teachers if is_teacher(name) else tokens) for name, spec in self.tensors().items())

    def differs(self, other: "Manifest") -> list[str]:
        """Dotted names of the fields of `identity` that differ."""
        mine, theirs = (flatten(m.identity()) for m in (self, other))
        return sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))

    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(canonical(self.identity()).encode())

    def identity(self) -> dict:
        """What two captures of the same thing share: not by which software and server they were made, nor how the data were
        named or which of them were not captured."""
        fields = self.model_dump(exclude={"software"})
        fields["target"] = {key: value for key, value in self.target.items() if key != "server"}
        # Caches of GGUF files were captured before a manifest named quantisations; their weights' hash tells them apart.
        if self.target.get("quantisation", {}).get("method") == "gguf":
            del fields["target"]["quantisation"]
        return fields | {"source": {key: value for key, value in self.source.items() if key not in UNHASHED}}


def is_teacher(name: str) -> bool:
    """Whether a tensor has a row a teacher instead of a row a token."""
    return name.removesuffix(SCALE) == "last_hidden" or name.startswith("query.")


def each_document(
    tensors: dict[str, torch.Tensor], lengths: Iterable[int], last_hidden: str
) -> Iterator[tuple[int, int, int, dict[str, torch.Tensor]]]:
    """(first token, first teacher, supervised tokens, tensors) of every document of tensors that hold `lengths` back to
    back."""
    place = teacher = 0
    for length in lengths:
        supervised = int(tensors["loss_mask"][place : place + length].sum())
        teachers = length if last_hidden == "all" else supervised
        rows = {True: slice(teacher, teacher + teachers), False: slice(place, place + length)}
        yield place, teacher, supervised, {name: t[rows[is_teacher(name)]] for name, t in tensors.items()}
        place += length
        teacher += teachers


def software_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "pyarrow")}


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError when there is none or it cannot be understood."""
    try:
        fields = read_json(folder / MANIFEST, "capture the cache again")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} is not a cache: it has no {MANIFEST}; capture one with data_prep/main.py cache.dir={folder}"
        ) from error
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: format version {fields.get('format_version') if isinstance(fields, dict) else fields}"
            f" is not {FORMAT_VERSION}, which this release reads"
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({what_is_wrong(error)}); capture the cache again") from error


# Sorted keys and no blanks: equal values have equal bytes, so that hashes and whole files can be compared.
def canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def flatten(value, prefix: str = "") -> dict:
    """Nested dicts as {dotted name: leaf}."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {name: leaf for key, inner in value.items() for name, leaf in flatten(inner, f"{prefix}{key}.").items()}
