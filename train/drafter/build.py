"""A configuration or a folder -> the drafter. The one module that knows every kind of drafter and every format."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from common.errors import UserError
from common.recipe import what_is_wrong
from data_prep.target.architecture import Architecture, Sizes
from train.drafter.assistant import Assistant
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig, folder_of, is_foreign, read_fields, refuse_changed
from train.drafter.formats.imported import imported_config
from train.drafter.formats.imported_weights import imported_weights
from train.drafter.layered import LayeredDrafter
from train.drafter.standalone import Standalone
from train.schedules.registry import OBJECTIVES

TYPED = TypeAdapter(DrafterConfig)


def new_drafter(config: DrafterConfig) -> Drafter:
    """A drafter of this configuration, its weights still to be chosen."""
    if config.lm is not None:
        return Standalone(config)
    return Assistant(config) if config.is_assistant else LayeredDrafter(config)


def load_config(folder: str | Path, beside: Callable[[], Sizes | Architecture] | None = None) -> DrafterConfig:
    """Raises UserError when `folder`, a path or the name of a released drafter, holds none.

    Args:
        beside: gives the sizes of the target, of which a checkpoint in another format (formats/imported.py) does not
            say all. Asked for such a one alone.
    """
    fields = read_fields(folder)
    if is_foreign(fields):
        try:
            return imported_config(folder_of(folder), fields, beside)
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:  # a number where others have a list
            raise UserError(f"{folder}/config.json is of no checkpoint that is known: {error}") from error
    try:
        config = TYPED.validate_json(json.dumps(fields))  # in Python's own objects strictness would look for a DrafterConfig
    except ValidationError as error:
        raise UserError(f"{folder}/config.json is not the configuration of a drafter: {what_is_wrong(error)}") from error
    if config.objective not in OBJECTIVES:
        raise UserError(f"{folder}/config.json: objective={config.objective!r} is none of {', '.join(OBJECTIVES)}")
    for part, names in (("target", ("id", "weights_hash", "tokenizer_hash")), ("lm", ("path", "layers", "positions", "config"))):
        said = getattr(config, part)
        if said is not None and (missing := [name for name in names if name not in said]):
            raise UserError(f"{folder}/config.json is not the configuration of a drafter: {part}.{missing[0]} is missing")
    return config


def load_drafter(folder: str | Path, beside: Callable[[], Sizes | Architecture] | None = None) -> Drafter:
    """The drafter in `folder`: a path or the name of a released drafter, or a checkpoint in another format (to which the target
    still has to give its part: `imported_weights.bind`). `beside` as in `load_config`. Raises UserError when it holds no drafter
    or its weights do not fit its configuration."""
    config = load_config(folder, beside)
    try:
        # Without memory first: sizes that are not the weights' might ask for more than there is.
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in new_drafter(config).weights().items()}
        if is_foreign(read_fields(folder)):
            weights = imported_weights(folder_of(folder), config)
            for name, shape in shapes.items():
                # Still to come from the target, and felt if it does not.
                if name.startswith(("mask.", "sequential.", "target_norm")):
                    weights[name] = torch.full(shape, torch.nan)
        else:
            path = folder_of(folder) / "model.safetensors"
            refuse_changed(path)
            weights = load_file(path)
        if wrong := [name for name, shape in shapes.items() if name in weights and weights[name].shape != shape]:
            raise ValueError(f"{wrong[0]} is of {list(weights[wrong[0]].shape)} numbers, not of {list(shapes[wrong[0]])}")
        drafter = new_drafter(config)
        absent, foreign = drafter.load_state_dict(weights, strict=False)
        if wrong := [*foreign, *(name for name in absent if name in drafter.weights())]:
            raise KeyError(f"{len(wrong)} weights, such as {wrong[0]}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: the drafter's weights are missing or do not fit its config.json ({str(error).splitlines()[0]})"
        ) from error
    return drafter
