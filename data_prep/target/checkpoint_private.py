"""What `transformers` makes of a checkpoint's tensors, one parameter at a time: it promises only to load all of them.

Names in files differ from a model's: prefixes of models that read pictures, experts that files keep apart and models in one
tensor. `transformers` says what becomes of what in a mapping, which is read here as its own loader reads it.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class Origin(NamedTuple):
    """What a parameter is made of: tensors of the files, each with the pattern that it was found by, and who joins them (None:
    there is one tensor, which is the parameter)."""

    tensors: list[tuple[str | None, str]]
    converter: object | None


def skeleton(config: PretrainedConfig, dtype: torch.dtype, kind: type) -> PreTrainedModel:
    """A model of transformers' class `kind` whose parameters have names and shapes, and take no memory."""
    with _hollow():
        return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)


@contextmanager
def _hollow() -> Iterator[None]:
    """Parameters of modules are on the meta device. Buffers are real: a rotary embedding's frequencies are in no file."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is hollow already is tied to this module, and has to stay the same.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def origins(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Origin]:
    """Of which of the tensors `stored` each parameter of a model is made. One that is not named is tied to another, made together
    with another, or absent. Raises ImportError, AttributeError or TypeError where another release does this otherwise."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    own = model.state_dict()
    found: dict[str, Origin] = {}
    for name in sorted(stored, key=dot_natural_key):
        mine, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if mine not in own and name in own:
            mine, pattern = rename_source_key(name, [], [], model.base_model_prefix, own)
        if mine in own:
            origin = found.setdefault(mine, Origin([], None if pattern is None else by_pattern[pattern]))
            origin.tensors.append((pattern, name))
    return found


def made(model: PreTrainedModel, name: str, origin: Origin, read: Callable[[str], Tensor]) -> Tensor:
    """The value of a parameter. Raises KeyError where this origin makes no such parameter."""
    if origin.converter is None:
        return read(origin.tensors[-1][1])
    converter = deepcopy(origin.converter)
    for pattern, stored in origin.tensors:
        converter.add_tensor(name, stored, pattern, read(stored))
    value = converter.convert(name, model=model, config=model.config)[name]
    return value[0] if isinstance(value, list) else value


def passed_over(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's class says of a tensor that it does without."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
