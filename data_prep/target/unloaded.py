"""A target without its weights: what it is like, and the few of its modules whose weights are read by name."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
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
    """One tensor of a model's files, by the name of its parameter."""
    try:
        index = cached_file(folder, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
        files = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {SINGLE}
        for file in sorted(files):
            with safe_open(cached_file(folder, file, revision=revision), framework="pt") as tensors:
                # Files of some families name the language part otherwise: what follows it is alike.
                found = [key for key in tensors.keys() if key == name or key.endswith(f".{name}")]
                if found:
                    return tensors.get_tensor(found[0])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"target {folder}: {name} cannot be read from its safetensors files ({first_line(error)})") from error
    raise UserError(f"target {folder}: its safetensors files have no {name}")
