"""What `reuse.gate` does to the gates of hybrid drafters (g and W_delta of docs/design.md): the one place that reads its keys."""

import torch

from train.drafter.base import Drafter
from train.recipe import TrainRecipe


def gate_floor(recipe: TrainRecipe) -> float:
    """What the gate never falls below. It is part of the drafter's own function, so that decoding applies it too."""
    return recipe.reuse.gate.floor


def start_gates(drafter: Drafter, recipe: TrainRecipe) -> None:
    """`zero_delta`: W_delta begins at zero, and with it the drafter as its hidden-state branch alone."""
    if recipe.reuse.gate.zero_delta:
        for fusion in drafter.fusions:
            torch.nn.init.zeros_(fusion.delta.weight)


def hold_gates(drafter: Drafter, recipe: TrainRecipe, step: int) -> None:
    """`hold_steps`: g is 0.5 in the first optimizer steps. `held` is a buffer, filled anew at each step: nothing about it has to
    survive a resume."""
    for fusion in drafter.fusions:
        fusion.held.fill_(step <= recipe.reuse.gate.hold_steps)


def parameter_groups(drafter: Drafter, recipe: TrainRecipe) -> list[dict]:
    """All parameters for the optimizer; the gates' in a group of their own where they learn at another rate (`lr_ratio`)."""
    ratio = recipe.reuse.gate.lr_ratio
    if ratio == 1:
        return [{"params": list(drafter.parameters())}]
    gates = [parameter for fusion in drafter.fusions for parameter in fusion.parameters()]
    of_gates = {id(parameter) for parameter in gates}  # `in` would compare tensors by value
    others = [parameter for parameter in drafter.parameters() if id(parameter) not in of_gates]
    return [{"params": others}, {"params": gates, "lr": ratio * recipe.train.lr}]
