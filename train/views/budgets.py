"""BudgetDraft (arXiv 2606.00144): L = L_full + lambda L_sparse, both against one teacher that saw everything.

The published method draws one budget per step and runs the drafter twice. Here the two are views of one memory in one
forward: every anchor stands there once for each view, and one teacher serves all of its rows.
"""

import math
from typing import NamedTuple

import numpy as np

from common.hashing import stable_hash
from train.views.recipe import FULL

PAPER = {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}


class ViewSampler(NamedTuple):
    """Loss weights of the full view and of the sparse ones (lambda), and where sparse budgets come from: `paper` (one for all
    documents of a step, with the published chances), `sandwich` (for each document the smallest, and `draws` more, log-uniform
    up to the largest) or `fixed` (the smallest)."""

    full: float
    sparse: float
    sampler: str
    smallest: int
    largest: int
    draws: int
    seed: int

    def budgets(self, step: int, id: str) -> list[int]:
        """Of each view, the full one first if there is one; a function of (seed, step, document)."""
        rng = np.random.default_rng(stable_hash(f"budgets/{self.seed}/{step}" + f"/{id}" * (self.sampler == "sandwich")))
        if self.sampler == "paper":
            sparse = [int(rng.choice(list(PAPER), p=list(PAPER.values())))]
        elif self.sampler == "sandwich":
            drawn = rng.uniform(math.log(self.smallest), math.log(self.largest), self.draws)
            sparse = [self.smallest, *(round(math.exp(x)) for x in drawn)]
        else:
            sparse = [self.smallest]
        return [FULL] * (self.full > 0) + sparse

    @property
    def weights(self) -> list[float]:
        """What each view's loss counts."""
        sparse = 1 + self.draws * (self.sampler == "sandwich")
        return [self.full] * (self.full > 0) + [self.sparse / sparse] * sparse

    @property
    def judged(self) -> list[int]:
        """Budgets at which a checkpoint is judged, the full view first."""
        if self.sampler == "fixed":
            return [FULL, self.smallest]
        if self.sampler == "paper":
            return [FULL, *PAPER]
        return [FULL, *sorted({round(b) for b in np.geomspace(self.smallest, self.largest, 4)})]
