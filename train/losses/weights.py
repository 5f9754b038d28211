"""How much each slot of a round counts. The sum of the weights is divided out, so only their ratios matter."""

import torch
from torch import Tensor


def exponential(slots: int, decay: float) -> Tensor:
    """exp(-(j - 1) / decay) for slots j = 1 .. `slots` (DFlash; decay 7, 5, 4 for blocks of 16, 10, 8)."""
    return torch.exp(-torch.arange(slots) / decay)


def geometric(slots: int, ratio: float) -> Tensor:
    """ratio^(j - 1) for steps j = 1 .. `slots` (EAGLE-3: 0.8)."""
    return ratio ** torch.arange(slots).float()


def dpace(label_probability_NJ: Tensor, valid_NJ: Tensor, smoothing: float = 0.5) -> Tensor:
    """D-PACE: w_j = sum_{m >= j} prod_{i <= m} c_i with c = (1 - smoothing) q(label) + smoothing: how much of the expected
    length rests on slot j. Constant in the drafter; zero where a slot does not count (slots before the first that does were
    given to the drafter: c = 1)."""
    c = torch.where(valid_NJ, (1 - smoothing) * label_probability_NJ.detach() + smoothing, 1.0)
    reached = c.cumprod(1) * valid_NJ
    return reached.flip(1).cumsum(1).flip(1) * valid_NJ
