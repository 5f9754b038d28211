"""Weights from other drafters and from EAGLE-3 checkpoints (`drafter.warm_start`)."""

import json
import re

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import UserError
from train.drafter.config import DrafterConfig, folder_of, known_names
from train.drafter.export import EAGLE3
from train.drafter.model import Drafter


def check_warm_start(folder: str, config: DrafterConfig) -> None:
    """Raises UserError when nothing of `folder` can start a drafter of this configuration."""
    theirs, where = _config(folder), f"drafter.warm_start={folder}"
    if _is_eagle3(theirs):
        if not config.uses_hidden:
            raise UserError(f"{where} is an EAGLE-3 checkpoint; reuse={config.reuse} has nothing to take from it")
        mine = config.architecture
        if [theirs.get(k) for k in ("hidden_size", "intermediate_size")] != [mine.hidden_size, mine.intermediate_size]:
            raise UserError(f"{where} is of another target: its sizes are not this target's")
        read = [layer - 1 for layer in theirs.get("eagle_aux_hidden_state_layer_ids") or []]  # counted as inputs, as vLLM does
        if read and read != config.hidden_layers:
            raise UserError(f"{where} reads hidden states of layers {read}, not of {config.hidden_layers}")
        if config.normed and "hidden" in config.branches:
            raise UserError(f"{where}: EAGLE-3 norms no queries, so that they would be other functions; drafter.qk_norm=false")
        return
    other = DrafterConfig.load(folder)
    if other.target.get("weights_hash") != config.target.get("weights_hash"):
        raise UserError(f"{where} is a drafter of another target ({other.target.get('id')})")
    if len(other.target_layers) != len(config.target_layers):
        raise UserError(f"{where} has {len(other.target_layers)} layer(s), drafter.layers={len(config.target_layers)}")
    if other.uses_hidden and config.uses_hidden and other.hidden_layers != config.hidden_layers:
        raise UserError(f"{where} reads hidden states of layers {other.hidden_layers}, not of {config.hidden_layers}")
    if other.normed != config.normed and not {f".branches.{name}." for name in other.branches} <= set(_foreign(other, config)):
        raise UserError(f"{where} differs in drafter.qk_norm, so that its queries would be other functions")


def _foreign(other: DrafterConfig, config: DrafterConfig) -> list[str]:
    """Parts of the names of weights that mean something else in `config` than in `other`."""
    kv = (other.source, other.kv_layers) == (config.source, config.kv_layers)
    heads = (other.draft_vocab, other.own_head) == (config.draft_vocab, config.own_head)
    foreign = {"target_kv.": kv, ".branches.kv.": kv, "sequential.": other.sequential == config.sequential, "head.": heads}
    foreign["fc."] = other.fc_norm == config.fc_norm
    return [part for part, same in foreign.items() if not same]


@torch.no_grad()
def warm_start(drafter: Drafter, folder: str) -> tuple[list[str], list[str]]:
    """Replace every weight of which the checkpoint has a counterpart; (names taken, names left as they were).

    The counterpart has the same name and means the same: K/V from the same layers in the same way, the same kind of sequential
    head, a vocabulary and its head together. Between block-wise and ttt the inputs of the first layer's projections differ: a
    projection of the stream becomes half a projection of the token and half of the feature, and back their sum.

    Raises:
        UserError: nothing fits.
    """
    theirs, taken, left = _weights(folder, drafter.config), [], []
    for name, tensor in drafter.state_dict().items():
        other = theirs.get(name, theirs.get(name.replace("token_norm", "input_norm")))
        if other is not None and PAIRED.fullmatch(name):
            if tensor.shape == (other.shape[0], 2 * other.shape[1]):
                other = torch.cat([other, other], dim=1) / 2
            elif other.shape == (tensor.shape[0], 2 * tensor.shape[1]):
                other = sum(other.chunk(2, dim=1))
        if other is None or other.shape != tensor.shape:
            left.append(name)
        else:
            tensor.copy_(other)
            taken.append(name)
    if not taken:
        raise UserError(f"drafter.warm_start={folder}: none of its weights fits this drafter")
    return taken, left


PAIRED = re.compile(r"layers\.0\.branches\.\w+\.[qkv]\.weight")  # what reads [token; feature] under ttt


def _config(folder: str) -> dict:
    path = folder_of(folder) / "config.json"
    if not path.is_file() or not path.with_name("model.safetensors").is_file():
        raise UserError(f"drafter.warm_start={folder} holds no checkpoint (config.json and model.safetensors); {known_names()}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"drafter.warm_start: {path} is not readable JSON") from error


def _weights(folder: str, config: DrafterConfig) -> dict[str, Tensor]:
    """The checkpoint's weights under our names, without those that mean something else here."""
    try:
        theirs = load_file(folder_of(folder) / "model.safetensors")
    except Exception as error:  # whatever safetensors raises for a file that is cut
        raise UserError(f"drafter.warm_start={folder}: its weights cannot be read ({error})") from error
    if _is_eagle3(_config(folder)):
        theirs = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in theirs.items()}  # vLLM takes both
        theirs = {mine: theirs[name] for mine, name in EAGLE3.items() if name in theirs}
        size = len(theirs["head.weight"])
        same = (None if size == config.architecture.vocab_size else size, True) == (config.draft_vocab, config.own_head)
        foreign = [] if same else ["head."]
    else:
        foreign = _foreign(DrafterConfig.load(folder), config)
    return {name: t for name, t in theirs.items() if not any(part in name for part in foreign)}


def _is_eagle3(config: dict) -> bool:
    return any("Eagle3" in name for name in config.get("architectures") or [])
