"""How much each slot of a round counts. The sum of the weights is divided out, so only their ratios matter."""

import torch
from torch import Tensor


def exponential(slots: int, decay: float) -> Tensor:
    """exp(-(j - 1) / decay) for slots j = 1 .. `slots` (DFlash; decay 7, 5, 4 for blocks of 16, 10, 8)."""
    return torch.exp(-torch.arange(slots) / decay)


def geometric(slots: int, ratio: float) -> Tensor:
    """ratio^(j - 1) for steps j = 1 .. `slots` (EAGLE-3: 0.8)."""
    return ratio ** torch.arange(slots).float()
