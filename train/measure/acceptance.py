"""Counting acceptance. The training log, checkpoint selection and `eval mode=score` all count here.

joint_j = P(slots 1..j are all accepted), cond_j = joint_j / joint_{j−1}, tau = 1 + sum_j joint_j (tokens per round,
the bonus token included). Teacher-forced: slots are judged on the text, not on a decoded continuation.

Shapes: V views, N anchors, J slots.
"""

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from train.objectives.objective import Outcome


def counts(outcome: Outcome) -> Tensor:
    """float64 [V, 4, J], for each view sums over the anchors whose slot j counts: the chance that slots 1..j are all accepted at
    temperature 1 (product of overlaps), the chance that slots 1..j-1 are, and both at temperature 0 (of matches)."""
    valid = outcome.valid.double()

    def both(accepted: Tensor) -> list[Tensor]:
        through = accepted.double().cumprod(-1)
        before = torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1)
        return [(through * valid).sum(1), (before * valid).sum(1)]

    return torch.stack(both(outcome.overlap) + both(outcome.match), dim=1)


@dataclass(frozen=True)
class Acceptance:
    """Joint and conditional acceptance per slot, and tau, at one temperature."""

    joint: list[float]
    conditional: list[float]
    tau: float

    @staticmethod
    def of(through: list[float], before: list[float]) -> "Acceptance":
        """Slot j + 1 was reached `before[j]` times and accepted `through[j]` times, over rounds in which it counts: the
        conditional acceptance compares the same rounds, and the joint is its product. Never reached counts as 0."""
        conditional = [t / b if b else 0.0 for t, b in zip(through, before)]
        joint = list(accumulate(conditional, mul))
        return Acceptance(joint, conditional, 1.0 + sum(joint))


def summarise(total_4J: Tensor) -> dict[str, Acceptance]:
    """{"sampled": temperature 1, "greedy": temperature 0} from summed `counts`."""
    sampled, sampled_before, greedy, greedy_before = total_4J.tolist()
    return {"sampled": Acceptance.of(sampled, sampled_before), "greedy": Acceptance.of(greedy, greedy_before)}
