"""Weights from other drafters, ours and public checkpoints (`drafter.warm_start`)."""

import re
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from data_prep.target.frozen_head import FrozenHead
from train.drafter.base import Drafter
from train.drafter.build import load_config
from train.drafter.config import DrafterConfig, folder_of, is_foreign, known_names, read_fields
from train.drafter.formats.claims import is_assistant
from train.drafter.formats.imported import Beside
from train.drafter.formats.imported_weights import imported_weights, left_to_target


def check_warm_start(folder: str, config: DrafterConfig, beside: Beside | None = None) -> None:
    """Raises UserError when nothing of `folder` can start a drafter of this configuration.

    Args:
        beside: gives the target's sizes, of which a drafter's configuration does not say all that an assistant in servers' format
            needs; None: what it does say.
    """
    where = f"drafter.warm_start={folder}"
    other = _config(folder, config, beside)
    mine = config.architecture
    theirs = other.architecture
    if other.imported and not config.uses_hidden:
        raise UserError(f"{where} is a checkpoint of {other.imported}; reuse={config.reuse} has nothing to take from it")
    if other.kind != config.kind:
        raise UserError(f"{where} is a drafter of drafter.kind={other.kind}, not of {config.kind}")
    sizes = ("hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim")
    if wrong := [size for size in sizes if getattr(mine, size) != getattr(theirs, size)]:
        here = getattr(mine, wrong[0])
        there = getattr(theirs, wrong[0])
        raise UserError(f"{where} has draft layers of {wrong[0]} {there}, and this drafter's have {here}")
    known = other.target.get("weights_hash")
    if known != config.target.get("weights_hash") and not (other.imported and known is None):
        raise UserError(f"{where} is a drafter of another target ({other.target.get('id')})")
    if other.uses_hidden and config.uses_hidden and other.hidden_layers != config.hidden_layers:
        raise UserError(f"{where} reads hidden states of layers {other.hidden_layers}, not of {config.hidden_layers}")
    if other.normed != config.normed and not {f".branches.{name}." for name in other.branches} <= set(_foreign(other, config)):
        if other.imported and not other.normed:
            raise UserError(
                f"{where}: {other.imported} norms no queries, so that they would be other functions; drafter.qk_norm=false"
            )
        raise UserError(f"{where} differs in drafter.qk_norm, so that its queries would be other functions")
    if other.norm_before_residual != config.norm_before_residual:
        said = str(other.norm_before_residual).lower()
        raise UserError(f"{where} was trained with drafter.norm_before_residual={said}")
    if len(other.target_layers) != len(config.target_layers):
        raise UserError(f"{where} has {len(other.target_layers)} layer(s), drafter.layers={len(config.target_layers)}")


def _foreign(other: DrafterConfig, config: DrafterConfig) -> list[str]:
    """Parts of the names of weights that mean something else in `config` than in `other`."""
    kv = (other.source, other.kv_layers) == (config.source, config.kv_layers)
    heads = (other.draft_vocab, other.own_head) == (config.draft_vocab, config.own_head)
    foreign = {"target_kv.": kv, ".branches.kv.": kv, "sequential.": other.sequential == config.sequential, "head.": heads}
    foreign["fc."] = other.fc_norm == config.fc_norm
    return [part for part, same in foreign.items() if not same]


@torch.no_grad()
def warm_start(
    drafter: Drafter, folder: str, head: FrozenHead, beside: Beside | None = None
) -> tuple[list[str], list[str]]:
    """Replace every weight of which the checkpoint has a counterpart; (names taken, names left as they were).

    The counterpart has the same name and means the same: K/V from the same layers in the same way, the same kind of sequential
    head, a vocabulary and its head together. Between block-wise and ttt the inputs of the first layer's projections differ: a
    projection of the stream becomes half a projection of the token and half of the feature, and back their sum.

    Args:
        head: the target's, of which a checkpoint in another format takes its part.
        beside: as in `check_warm_start`.

    Raises:
        UserError: nothing fits.
    """
    theirs = _weights(folder, drafter.config, head, beside)
    if drafter.config.is_assistant:
        # The target's own, which servers' formats leave out.
        theirs.setdefault("target_norm", drafter.target_norm)
    taken: list[str] = []
    left: list[str] = []
    for name, tensor in drafter.state_dict().items():
        # A drafter that reads pairs norms its tokens apart from its features; one that reads tokens alone has one norm.
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


def other_positions(folder: str, config: DrafterConfig, beside: Beside | None = None) -> bool:
    """Whether the checkpoint turned its queries and keys by other angles than the drafter will."""
    other = _config(folder, config, beside)
    mine = _rotation(config)
    theirs = _rotation(other)
    return len(mine) != len(theirs) or any(abs(a - b) > 1e-4 * abs(a) for a, b in zip(mine, theirs))


def _rotation(config: DrafterConfig) -> list[float]:
    """The scale of a drafter's rotary embedding, and its frequencies."""
    return [config.architecture.rope_scale, *(f / config.rope_factor for f in config.architecture.inv_freq)]


def loses_clusters(folder: str, config: DrafterConfig, beside: Beside | None = None) -> bool:
    """Whether the checkpoint scores clusters of tokens, which no drafter does that is trained here."""
    return _config(folder, config, beside).centroids is not None


def _config(folder: str, config: DrafterConfig, beside: Beside | None = None) -> DrafterConfig:
    path = folder_of(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"drafter.warm_start={folder} holds no checkpoint (config.json and model.safetensors); {known_names()}")
    if is_assistant(read_fields(folder)) and not config.is_assistant:
        raise UserError(f"drafter.warm_start={folder} is a drafter of drafter.kind=gemma4_assistant, not of {config.kind}")
    return load_config(folder, beside or (lambda: replace(config.architecture, hidden_size=config.state_size)))


def _weights(
    folder: str, config: DrafterConfig, head: FrozenHead, beside: Beside | None = None
) -> dict[str, Tensor]:
    """The checkpoint's weights under our names, without those that mean something else here."""
    other = _config(folder, config, beside)
    if is_foreign(read_fields(folder)):
        theirs = imported_weights(folder_of(folder), other) | left_to_target(folder_of(folder), other, head)
    else:
        try:
            theirs = load_file(folder_of(folder) / "model.safetensors")
        except Exception as error:  # safetensors raises several kinds of errors for a file that is cut
            raise UserError(f"drafter.warm_start={folder}: its weights cannot be read ({error})") from error
    foreign = _foreign(other, config)
    return {name: t for name, t in theirs.items() if not any(part in name for part in foreign)}
