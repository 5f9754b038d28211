"""Checkpoints that vLLM, SGLang and the speculators package load: refusals, weights, files, and what servers do otherwise.

Shapes: V vocabulary, D draft vocabulary, E hidden size, R rank of a Markov head.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import publish, write_text
from data_prep.target.architecture import Architecture
from data_prep.target.described import Described
from data_prep.target.frozen_head import FrozenHead
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig
from train.drafter.formats.names import MASK_FILE, method_of, served_names
from train.drafter.formats.served_config import plain_config, speculators_config


def unfit_for_servers(config: DrafterConfig) -> dict[str, bool]:
    """{why servers could not run a drafter over hidden states: whether that holds}."""
    method = method_of(config)
    return {
        "its projections have biases, and the layers of vLLM 0.32 and SGLang 0.5.23 have others or none": (
            config.architecture.qkv_bias
        ),
        f"drafter.rope_factor={config.rope_factor:g} on top of the target's own scaling has no name in a configuration": (
            config.rope_factor != 1 and not _plain(config.architecture)
        ),
        "vLLM 0.32 and SGLang 0.5.23 run no GRU that corrects what the LM head reads (drafter.sequential=gru)": (
            config.sequential == "gru"
        ),
        "DFlash and DSpark norm queries and keys (train with drafter.qk_norm=true)": (
            method in ("dflash", "dspark") and not config.normed
        ),
        "servers embed MASK as a token, and target.mask_token_id was null": (
            not config.schedule.token_by_token and config.mask_token_id is None
        ),
    }


def save_served(drafter: Drafter, target: Described, folder: Path, format: str) -> list[str]:
    """`config.json` and `model.safetensors` as servers read them (and a learned MASK of DFlash beside them).

    Returns:
        what a server will do otherwise, a sentence each.

    Raises:
        UserError: the drafter's rotary embedding is not the target's, which servers use.
    """
    # 1. What is written, all of it before the first file is touched.
    if "inv_freq" not in drafter.config.own_sizes:
        _check_rotary(drafter.config.architecture, target.architecture, format)
    described = speculators_config if format == "speculators" else plain_config
    config = described(drafter.config, target, str(drafter.dtype).removeprefix("torch."))
    tensors = exported_weights(drafter, target, format)

    # 2. The files.
    begun(folder)
    if _mask_goes_beside(drafter, target):
        mask = {"mask_token_id": drafter.config.mask_token_id, "embedding": drafter.mask.weight[0].detach().cpu().clone()}
        torch.save(mask, folder / f"{MASK_FILE}.tmp")
        publish(folder / f"{MASK_FILE}.tmp", folder / MASK_FILE)
    finished(folder, tensors, config)
    return _notes(drafter, target, format)


def begun(folder: Path) -> None:
    """What was there goes, config.json first: a folder without it is no checkpoint, also if we are interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / MASK_FILE).unlink(missing_ok=True)


def finished(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """The weights, and config.json last."""
    # safetensors takes contiguous tensors alone, and refuses two that share memory.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    publish(folder / "model.safetensors.tmp", folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps(config, indent=1))


def _check_rotary(drafter: Architecture, target: Architecture, format: str) -> None:
    mine = torch.tensor([drafter.rope_scale, *drafter.inv_freq])
    theirs = torch.tensor([target.rope_scale, *target.inv_freq])
    if len(mine) != len(theirs) or not torch.allclose(mine, theirs, rtol=1e-4, atol=0):
        raise UserError(f"format={format} has the target's rotary embedding; this drafter, which was imported, has another")


def exported_weights(drafter: Drafter, target: Described, format: str) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, under its servers' name."""
    config = drafter.config
    method = method_of(config)
    ours = _ascending(drafter)
    first_layer = "midlayer" if format == "eagle3" and config.depth == 1 else "layers.0"
    # The layers, fc and the norms.
    tensors = {theirs: ours[name] for name, theirs in served_names(config, first_layer).items()}
    if format == "eagle3":  # SGLang norms the stream of later layers under this name
        for index in range(1, config.depth):
            tensors[f"layers.{index}.hidden_norm.weight"] = ours[f"layers.{index}.input_norm.weight"].clone()
    # The heads.
    tensors |= _head(drafter, target)
    if method == "dspark":
        tensors |= _markov_head(drafter, target)
    # MASK: what stands in the place of a hidden state, and of a token, that are not known yet.
    if method == "peagle":
        tensors["mask_hidden"] = ours["mask_hidden.weight"][None]
    if _has_table(drafter, target):
        table_VE = _table(drafter, target)
        if not config.schedule.token_by_token:
            table_VE[config.mask_token_id] = drafter.mask.weight[0]
        tensors["embed_tokens.weight"] = table_VE
    return tensors


def _has_table(drafter: Drafter, target: Described) -> bool:
    """Whether the checkpoint holds a table of embeddings. Servers' drafts have no projection around layers of another size, no
    scale of the target's embeddings (Gemma's), and no other place for a learned MASK of DSpark and P-EAGLE."""
    learned = method_of(drafter.config) in ("dspark", "peagle") and not _mask_is_a_token(drafter, target)
    return bool(drafter.config.target_hidden) or target.frozen_head.embed_scale != 1 or learned


def _table(drafter: Drafter, target: Described) -> Tensor:
    """What the drafter reads of every token, [V, E]."""
    embedding_VE = target.frozen_head.embedding_VE
    token_V = torch.arange(len(embedding_VE), device=embedding_VE.device)
    # A part at a time: the target's own embeddings of a whole vocabulary would be copied otherwise.
    return torch.cat([_embedded(drafter, target, token) for token in token_V.split(8192)])


def _embedded(drafter: Drafter, target: Described, token: Tensor) -> Tensor:
    """What the drafter reads of tokens, in its own precision."""
    head = target.frozen_head
    part = FrozenHead(head.embedding_VE[token].to(drafter.dtype), head.head_VE[:0], head.embed_scale)
    return drafter.embed(torch.arange(len(token), device=token.device), part)


def _ascending(drafter: Drafter) -> dict[str, Tensor]:
    """The drafter's weights under its own names; what belongs to a layer of the target stands by ascending layer."""
    weights = dict(drafter.state_dict())
    layers = drafter.config.hidden_layers
    # Ours may list layers in any order, and servers concatenate the features by ascending layer.
    order = sorted(range(len(layers)), key=lambda i: layers[i])
    for name in {"fc.weight", "mask_hidden.weight"} & weights.keys():
        chunks = weights[name].chunk(len(layers), dim=1)
        weights[name] = torch.cat([chunks[i] for i in order], dim=1)
    if drafter.config.fc_norm:
        norms = [weights[f"fc_norm.{i}.weight"] for i in order]
        weights |= {f"fc_norm.{place}.weight": norm for place, norm in enumerate(norms)}
    return weights


def _head(drafter: Drafter, target: Described) -> dict[str, Tensor]:
    """The LM head [D, E], unless it is the target's whole one. A reduced vocabulary has `d2t` [D], draft token i being target
    token i + d2t[i], and `t2d` [V], what can be said; vLLM refuses the two beside a whole one."""
    config = drafter.config
    kept_D = drafter.head.kept_D
    if not (config.own_head or config.draft_vocab or config.target_hidden):
        return {}
    draft_DE = drafter.head.heads(target.frozen_head).draft_DE
    if config.target_hidden:
        draft_DE = draft_DE.to(drafter.dtype) @ drafter.to_target.weight
    tensors = {"lm_head.weight": draft_DE}
    if kept_D is not None:
        # Offsets, not ids: servers add the draft token to them.
        tensors["d2t"] = kept_D - torch.arange(len(kept_D), device=kept_D.device)
        sayable_V = torch.zeros(config.architecture.vocab_size, dtype=torch.bool, device=kept_D.device)
        tensors["t2d"] = sayable_V.index_fill_(0, kept_D, True)
    return tensors


def _markov_head(drafter: Drafter, target: Described) -> dict[str, Tensor]:
    """W1 [V, r] and W2 [D, r], so that W2 W1[x] is what our head adds to the logits: head up down e(x). Without one, zeros of
    rank one: SGLang 0.5.23 refuses rank 0."""
    head = target.frozen_head
    draft_DE = drafter.head.heads(head).draft_DE.to(drafter.dtype)
    if drafter.sequential is None:
        previous_VR = draft_DE.new_zeros(len(head.embedding_VE), 1)
        next_DR = draft_DE.new_zeros(len(draft_DE), 1)
    else:
        previous_VR = _table(drafter, target) @ drafter.sequential.down.weight.T
        next_DR = draft_DE @ drafter.sequential.up.weight
    return {"markov_head.markov_w1.weight": previous_VR, "markov_head.markov_w2.weight": next_DR}


def _notes(drafter: Drafter, target: Described, format: str) -> list[str]:
    """What servers do with it otherwise than we do."""
    config = drafter.config
    method = method_of(config)
    learned = not config.schedule.token_by_token and not _mask_is_a_token(drafter, target)
    beside = _mask_goes_beside(drafter, target)
    own = bool(config.target_hidden)
    table_mib = len(target.frozen_head.embedding_VE) * config.architecture.hidden_size * drafter.norm.weight.itemsize / 2**20
    head_mib = table_mib * (config.draft_vocab or config.architecture.vocab_size) / config.architecture.vocab_size
    notes = {
        "vLLM 0.32 runs DSpark on GPUs only": method == "dspark",
        "vLLM 0.32 on a CPU norms the keys of all DFlash layers with the first layer's weight, so that less is accepted there": (
            method == "dflash" and config.depth > 1
        ),
        f"the learned MASK makes the checkpoint {table_mib:,.0f} MiB larger: it holds the target's embeddings with MASK's row": (
            learned and not beside and not own
        ),
        f"drafter.hidden_size makes the checkpoint {table_mib + head_mib:,.0f} MiB larger: it holds an embedding and an LM head, "
        "into which the projections are multiplied": own,
    }
    if format == "speculators":
        notes["SGLang 0.5.23 does not read format=speculators"] = method != "peagle"
        notes |= {
            f"the learned MASK is in {MASK_FILE}, which vLLM reads and the speculators package does not": beside,
            "the speculators package 0.9.0 has no draft layers of another hidden size than the target's; vLLM has": own,
        }
    else:
        notes |= _sglang_notes(config, learned)
    return [note for note, holds in notes.items() if holds]


def _sglang_notes(config: DrafterConfig, learned: bool) -> dict[str, bool]:
    """What SGLang 0.5.23 does with a checkpoint of a format that it reads."""
    method = method_of(config)
    if config.target_hidden and method != "eagle3":
        return {"SGLang 0.5.23 has no blocks of another hidden size than the target's, and refuses it": True}
    last = config.architecture.num_layers - 1
    token = config.mask_token_id
    reduced = bool(config.draft_vocab)
    dspark = method == "dspark"
    return {
        f"SGLang 0.5.23 hands out no hidden state of the target's last layer, {last}, which is read": (
            max(config.hidden_layers) == last
        ),
        "SGLang 0.5.23 has no class for EAGLE-3 with norms of queries and keys, and refuses it": (
            method == "eagle3" and config.normed
        ),
        "SGLang 0.5.23 does not know drafter.norm_before_residual, so that less is accepted there": config.norm_before_residual,
        "SGLang 0.5.23 leaves out fc where one hidden state alone is read, so that less is accepted there": (
            method == "eagle3" and len(config.hidden_layers) == 1
        ),
        "SGLang 0.5.23 does not load DSpark with a reduced vocabulary": dspark and reduced,
        "SGLang 0.5.23 drafts with the target's LM head instead of the drafter's own": (
            (method == "dflash" and (reduced or config.own_head)) or (dspark and config.own_head and not reduced)
        ),
        f"SGLang 0.5.23 writes the learned MASK over the target's own embedding of token {token}, which no text should hold": (
            method == "dflash" and learned
        ),
        f"SGLang 0.5.23 passes over the learned MASK and embeds token {token}": dspark and learned,
    }


def _mask_is_a_token(drafter: Drafter, target: Described) -> bool:
    """Whether MASK is what servers make of it: the target's embedding of `mask_token_id`."""
    token_1 = torch.tensor([drafter.config.mask_token_id], device=target.frozen_head.embedding_VE.device)
    return torch.equal(drafter.mask.weight, _embedded(drafter, target, token_1))


def _mask_goes_beside(drafter: Drafter, target: Described) -> bool:
    """Whether the checkpoint needs vLLM's file of one embedding: DFlash's readers know no other small place for it."""
    learned = method_of(drafter.config) == "dflash" and not _mask_is_a_token(drafter, target)
    return learned and not _has_table(drafter, target)


def _plain(a: Architecture) -> bool:
    """Whether the target's RoPE is unscaled: a geometric series from 1 on."""
    inv_freq = torch.tensor(a.inv_freq, dtype=torch.float64)
    ratio = inv_freq[-1] ** (1 / max(1, len(inv_freq) - 1))
    return a.rope_scale == 1 and torch.allclose(inv_freq, ratio ** torch.arange(len(inv_freq)), rtol=1e-4)
