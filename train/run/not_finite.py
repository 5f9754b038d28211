"""Numbers that are not finite end a run before anything is written from them. The advice names only what can be the cause.

Every rank calls these functions at the same time, and all of them raise or none does.
"""

import math
from typing import NoReturn

import torch
import torch.distributed as dist

from common.errors import UserError
from train.data.pack import Pack
from train.data.stream import PackStream
from train.run import deepspeed_private

STATES = "the cache's states are not: look at it with data_prep/main.py mode=verify"


def refuse_loss(step: int, engine, culprit: Pack | None) -> NoReturn:
    """`culprit`: a pack of this rank's whose loss is not finite. Ranks tell one another whose it was, and what else is not."""
    weights, _ = deepspeed_private.finite(engine)
    culprits: list = [None] * dist.get_world_size()
    dist.all_gather_object(culprits, culprit and (culprit.names, culprit.finite()))
    who, (names, states) = next((r, one) for r, one in enumerate(culprits) if one)
    if not states:
        advice = STATES
    elif not weights:
        advice = "the drafter's weights no longer are: lower train.lr" if step > 1 else "the drafter's first weights are not"
    else:
        advice = _lower(step)
    more = " and more" if len(names) > 4 else ""
    raise UserError(f"the loss of step {step} is not finite, in rank {who}'s pack of {', '.join(names[:4])}{more}; {advice}")


def refuse_gradient(step: int) -> NoReturn:
    raise UserError(f"the gradient of step {step} is not finite though its loss is; {_lower(step)}")


def refuse_to_keep(step: int, engine, found: list[dict], validation: PackStream, device: torch.device) -> None:
    """Raises UserError where weights, moments or held-out figures (`validate`'s) are not finite after a step whose loss and
    gradient were."""
    weights, moments = deepspeed_private.finite(engine)
    if not moments:
        raise UserError(f"AdamW's moments are not finite after step {step}: its gradients are too large; set train.clip=1")
    if not weights:
        raise UserError(f"the drafter's weights are not finite after step {step}; lower train.lr")
    if all(math.isfinite(x) for view in found for x in (view["loss"], view["sampled"].tau, view["greedy"].tau)):
        return
    packs = validation.passes(0)
    states = all(validation.read(pack).to(device).finite() for pack in packs)
    raise UserError(f"the loss on held-out documents is not finite after step {step}; {_lower(2) if states else STATES}")


def _lower(step: int) -> str:
    """Before the first step no rate has been used."""
    return "lower " + "train.lr, or " * (step > 1) + "the weights of loss.* and objective.*"
