"""What the log says of optimizer steps: sums over packs and ranks, and the figures that are made of them.

Shapes: T terms of the loss (`train/objectives/objective.py`), V views, N anchors, J drafted slots. The 4 of `counts_V4J` is
explained in `train/measure/acceptance.py`.
"""

import functools
import operator
import resource
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.data.pack import Pack
from train.measure import acceptance
from train.objectives.objective import TERMS, Outcome
from train.recipe import TrainRecipe


class Sums(NamedTuple):
    """What one step or more adds up, over packs and ranks; float64 on the device."""

    share: Tensor  # of the step's loss: the shares of all packs add up to the loss
    tokens: Tensor  # positions of the packs
    terms_T: Tensor  # each term of the loss, not yet divided
    weight_T: Tensor  # what each term is divided by
    overlap_VJ: Tensor  # each view's overlap with the teacher, over the anchors whose slot j counts
    valid_J: Tensor  # how many anchors that are; none where acceptance was not counted
    counts_V4J: Tensor  # of acceptance
    asked: Tensor  # ranks that were asked to stop

    @staticmethod
    def of(outcome: Outcome, pack: Pack) -> "Sums":
        """Of one pack. `weight_T` and `asked` are left at zero: they are known for the whole step only."""
        counted = outcome.overlap is not None
        nothing_VJ = outcome.loss.new_zeros(outcome.loss.shape[::2], dtype=torch.float64)
        share = outcome.share.detach().double()
        terms_T = outcome.terms_T.double()
        return Sums(
            share=share,
            tokens=share.new_tensor(len(pack.ids_P)),
            terms_T=terms_T,
            weight_T=torch.zeros_like(terms_T),
            overlap_VJ=(outcome.overlap.double() * outcome.valid).sum(1) if counted else nothing_VJ,
            valid_J=outcome.valid.double().sum(0) * counted,
            counts_V4J=acceptance.counts(outcome) if counted else torch.stack([nothing_VJ] * 4, dim=1),
            asked=torch.zeros_like(share),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other)))

    def reduced(self) -> "Sums":
        """Over all ranks. They are laid end to end, so that there is one collective and not eight."""
        flat = torch.cat([part.flatten() for part in self])
        dist.all_reduce(flat)
        parts = flat.split([part.numel() for part in self])
        return Sums(*(part.view(mine.shape) for part, mine in zip(parts, self)))


class Window:
    """The optimizer steps since the last line of the log, and how long they took."""

    def __init__(self):
        self.steps: list[Sums] = []
        self.waited = 0.0  # seconds in which the host had no packs to work on
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def state(self) -> dict:
        """As JSON, for a run that stops in it and goes on."""
        steps = [[part.tolist() for part in one] for one in self.steps]
        return {"steps": steps, "seconds": self.seconds, "waited": self.waited}

    @staticmethod
    def of(state: dict, device: torch.device) -> "Window":
        window = Window()
        for one in state["steps"]:
            window.steps.append(Sums(*(torch.tensor(part, dtype=torch.float64, device=device) for part in one)))
        window.waited = state["waited"]
        window._since -= state["seconds"]
        return window

    def total(self) -> Sums:
        return functools.reduce(operator.add, self.steps)


class Measured(NamedTuple):
    """What of a window is no sum."""

    seconds: float
    waited: float
    lr: float
    grad_norm: float  # of the window's last step
    peak_gib: float


def window_figures(total: Sums, measured: Measured, recipe: TrainRecipe) -> dict:
    """What is logged of a window, by name. Means are over all slots that count in the window, not over its steps."""
    parts = (total.terms_T / total.weight_T.clamp(min=1e-9)).tolist()
    several = sum(part != 0 for part in parts) > 1
    counts_V4J = total.counts_V4J.cpu()
    counted = bool(total.valid_J.sum() > 0)  # whether acceptance was, in some step
    found = acceptance.summarise(counts_V4J[0]) if counted else {}
    return {
        "loss": sum(parts),
        **({"terms": dict(zip(TERMS, parts))} if several else {}),
        "lr": measured.lr,
        "grad_norm": measured.grad_norm,
        "tokens_per_s": float(total.tokens) / measured.seconds,
        "data_wait_share": measured.waited / measured.seconds,
        "peak_gib": measured.peak_gib,
        **{kind: vars(one) for kind, one in found.items()},
        **(_sparse(counts_V4J, recipe) if counted else {}),
    }


def _sparse(counts_V4J: Tensor, recipe: TrainRecipe) -> dict:
    """Acceptance under all views but the full one, which is the first where there is one."""
    if recipe.view_sampler is None:
        return {}
    first = int(recipe.view_sampler.full > 0)
    found = acceptance.summarise(counts_V4J[first:].sum(0))
    return {"sparse": {kind: vars(one) for kind, one in found.items()}}


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: the GPU's where there is one, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
