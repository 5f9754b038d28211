"""A target without its weights: what it is like, and the few of its modules whose weights are read by name."""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from common.errors import UserError, first_line
from data_prep.target import transformers_private as private
from data_prep.target.architecture import no_causal_lm
from data_prep.target.families import check_decoder
from data_prep.target.proof import KVFound
from data_prep.target.target import Target

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Unloaded(Target):
    """A `Target` whose parameters take no memory and have no values. It has an architecture, and no states."""

    def _load(self, attention: str | None, spreading: dict, device: torch.device) -> PreTrainedModel:
        try:
            config = AutoConfig.from_pretrained(self.folder, revision=self.revision)
            with _without_memory():
                model = AutoModelForCausalLM.from_config(config).eval()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise no_causal_lm(self.path, error) from error
        check_decoder(self.path, config)
        return model.requires_grad_(False)

    def _prove(self) -> dict[int, KVFound]:
        return {}  # nothing can be computed

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer, with its weights, on the CPU. Raises UserError when the files do not have them."""
        try:
            norm = private.final_norm(self.model)
        except ValueError as error:
            raise no_causal_lm(self.path, error) from error
        name = next(name for name, module in self.model.named_modules() if module is norm)
        loaded = copy.deepcopy(norm).to_empty(device="cpu")
        for part, parameter in loaded.named_parameters():
            parameter.data = _stored(self.folder, self.revision, f"{name}.{part}")
        return loaded


@contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters that modules make inside have shapes alone. Buffers keep their values: a rotary embedding has its frequencies in
    one, and no file does."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        hollow = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, hollow)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _stored(folder: str, revision: str | None, name: str) -> torch.Tensor:
    """One tensor of a model's files, by the name of its parameter. Raises UserError where they do not have it."""
    try:
        index = cached_file(folder, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
        if index:
            files = json.loads(Path(index).read_text())["weight_map"]
        else:
            with safe_open(cached_file(folder, SINGLE, revision=revision), framework="pt") as tensors:
                files = dict.fromkeys(tensors.keys(), SINGLE)
        stored = _name_in(files, name)
        if stored is None:
            raise UserError(f"target {folder}: its safetensors files have no {name}")
        with safe_open(cached_file(folder, files[stored], revision=revision), framework="pt") as tensors:
            return tensors.get_tensor(stored)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"target {folder}: {name} cannot be read from its safetensors files ({first_line(error)})") from error


def _name_in(names: Iterable[str], name: str) -> str | None:
    """Under which of `names` a parameter that belongs to no layer stands. Files of models that read pictures too, and those that
    are read as their language part alone, name it in several ways: the end is alike."""
    if name in names:
        return name
    end = name.split(".")[-2:]
    found = [one for one in names if one.split(".")[-2:] == end and not any(part.isdecimal() for part in one.split("."))]
    of_text = [one for one in found if "language_model" in one] or found
    return of_text[0] if len(of_text) == 1 else None
