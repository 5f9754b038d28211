"""What every configuration has in common: where the repository is, and how strictly a group of keys is read."""

import math
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

SURROGATES = re.compile("[\ud800-\udfff]")
ROOT = Path(__file__).resolve().parents[1]


class Section(BaseModel):
    """A group of keys. Unknown keys are refused; nothing changes after composition."""

    # The string below a key is its description: docs/reference/generate.py writes tables and YAML comments from it.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_value_that_nothing_can_use(cls, value: Any, info: ValidationInfo) -> Any:
        if _models(cls.model_fields[info.field_name].annotation):
            return value  # each key of it is looked at by itself
        for one in _leaves(value):
            if isinstance(one, float) and not math.isfinite(one):
                raise ValueError("a number must be finite")
            if isinstance(one, int) and not -(2**63) <= one < 2**63:
                raise ValueError("an integer must fit 64 bits")
            if isinstance(one, str) and ("\0" in one or SURROGATES.search(one)):
                raise ValueError("text must be valid UTF-8 without null bytes")
        return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_leaves(key), *_leaves(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def what_is_wrong(error: ValidationError) -> str:
    """What pydantic says of a file's content, as a part of one line: the first places, and what is wrong with each."""
    said = (f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()[:3])
    return " ".join("; ".join(said).removeprefix(": ").split())[:300]


def keys_at(recipe: type[BaseModel], section: Sequence[int | str]) -> dict[str, FieldInfo]:
    """The keys of a section, of all its kinds where it has several."""
    models = [recipe]
    for name in section:
        kinds = [model.model_fields[name].annotation for model in models if name in model.model_fields]
        models = [one for kind in kinds for one in _models(kind)]
    return {name: field for model in models for name, field in model.model_fields.items() if not field.exclude}


def _models(kind: Any) -> list[type[BaseModel]]:
    """The recipes in an annotation such as `Recipe | None`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [one for part in typing.get_args(kind) for one in _models(part)]
