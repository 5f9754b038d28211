"""Drafters as checkpoints that servers load (`mode=export`), or as we release them (`format=drafter`: our own format, in bf16).

Servers' formats hold a drafter over hidden states alone; embedding and LM head are the target's unless the drafter has its
own. `names.method_of` tells four kinds apart:

    eagle3   ttt over pairs (token, feature): layers as Llama's, or with norms of queries and keys as Qwen3's
    peagle   the same layers filling a block at once (reuse.pairs=true)
    dflash   same-slot blocks: layers as Qwen3's, whose keys and values also project fc's normed output
    dspark   shifted blocks, or blocks with a Markov head; the head's correction stands as two tables of the vocabulary's size

`format=eagle3|dflash|dspark` writes the configuration that vLLM and SGLang read beside the target's; `format=speculators` writes,
for all four, the one of the speculators package, which names target and method, so that `vllm serve DRAFTER` needs nothing else.

`format=gemma4_assistant` holds an assistant of Gemma 4 (served_assistant.py), and nothing else does but format=drafter.

The features' layers are written in ascending order, as servers concatenate them. Each key of a configuration counts its own way:

    eagle_aux_hidden_state_layer_ids, aux_hidden_state_layer_ids    vLLM, speculators: a layer's *input*, our number plus one
    eagle_config.eagle_aux_hidden_state_layer_ids                   SGLang: the layer's output
    dflash_config.target_layer_ids, target_layer_ids                both: the layer's output

A format is a row of `FORMATS` below. docs/extend/format.md shows how to add one.

What the tests run: eagle3, peagle, dflash and gemma4_assistant in vLLM 0.32 on a CPU, and the four kinds over hidden states in
speculators 0.9.0. SGLang 0.5.23 and vLLM's DSpark, which needs a GPU, were read and not run. docs/guide/serving.md has the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common.errors import UserError
from data_prep.target.described import Described
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig
from train.drafter.formats.names import method_of
from train.drafter.formats.served import save_served, unfit_for_servers
from train.drafter.formats.served_assistant import save_assistant, unfit_for_assistants

METHODS = ("eagle3", "peagle", "dflash", "dspark")


def _nothing(config: DrafterConfig) -> dict[str, bool]:
    return {}


@dataclass(frozen=True)
class Format:
    """How drafters are written.

    Args:
        kinds: which drafters it holds, by `names.method_of`: over hidden states, or assistants; None: any drafter at all.
        save: writes a drafter, with what it needs of its target, into a folder. Returns what whoever loads it does otherwise, a
            sentence each.
        unfit: why a drafter of these kinds cannot be written all the same: {reason: whether it holds}.
    """

    kinds: tuple[str, ...] | None
    save: Callable[[Drafter, Described, Path], list[str]]
    unfit: Callable[[DrafterConfig], dict[str, bool]] = _nothing


def _save_native(drafter: Drafter, target: Described, folder: Path) -> list[str]:
    """Our own format. In bf16 it has half the bytes."""
    drafter.to(torch.bfloat16).save_pretrained(folder)
    return []


# The choices of `format=`, in the order in which refusals name them.
FORMATS = {
    "eagle3": Format(("eagle3",), partial(save_served, format="eagle3"), unfit_for_servers),
    "dflash": Format(("dflash",), partial(save_served, format="dflash"), unfit_for_servers),
    "dspark": Format(("dspark",), partial(save_served, format="dspark"), unfit_for_servers),
    "speculators": Format(METHODS, partial(save_served, format="speculators"), unfit_for_servers),
    "gemma4_assistant": Format(("gemma4_assistant",), save_assistant, unfit_for_assistants),
    "drafter": Format(None, _save_native),
}


def check_export(config: DrafterConfig, format: str) -> None:
    """Raises UserError when no server could load the drafter as a checkpoint of this format."""
    kinds = FORMATS[format].kinds
    reasons = {} if kinds is None else _unfit_for_hidden(config)
    if kinds is not None and not any(reasons.values()):
        # Only a drafter over hidden states, or an assistant, has a method.
        reasons = _unfit_for_kinds(config, kinds)
    if not any(reasons.values()):
        reasons = FORMATS[format].unfit(config)
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(f"the drafter cannot be exported as format={format}: {reason}")


def _unfit_for_hidden(config: DrafterConfig) -> dict[str, bool]:
    """Why a drafter is none over hidden states alone."""
    if config.is_assistant:
        return {}
    return {
        "it is a language model of its own (drafter.lm), and the format holds a head over the target's states": bool(config.lm),
        "reuse=none reads no hidden states, of which the format is made": config.reuse == "none",
        "reuse.own_kv=false asks the target's K/V with queries alone, which no server does but for assistants of Gemma 4 "
        "(drafter.kind=gemma4_assistant); format=drafter writes it for our own engine": not config.own_kv,
        f"reuse={config.reuse} reads K/V, which vLLM 0.32 and SGLang 0.5.23 do not hand to such a drafter; format=drafter writes "
        "it for our own engine": config.uses_kv,
    }


def _unfit_for_kinds(config: DrafterConfig, kinds: tuple[str, ...]) -> dict[str, bool]:
    method = method_of(config)
    suited = " or ".join(f"format={name}" for name, format in FORMATS.items() if method in (format.kinds or ()))
    return {f"it is for {' and '.join(kinds)}, and this is {method}: {suited}": method not in kinds}


def server_format(config: DrafterConfig) -> str:
    """The format in which vLLM is handed a drafter by `mode=served`."""
    return "gemma4_assistant" if config.is_assistant else "speculators"


@torch.no_grad()
def save_export(drafter: Drafter, target: Described, folder: Path, format: str) -> list[str]:
    """Write the drafter into `folder` as a checkpoint of this format.

    Returns:
        what a server will do otherwise, a sentence each. Drafts then differ; what is verified, and so the output, does not.

    Raises:
        UserError: no server could load it.
    """
    check_export(drafter.config, format)
    return FORMATS[format].save(drafter, target, folder)
