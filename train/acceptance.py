"""Counting acceptance. The training log, checkpoint selection and `eval mode=score` all count here.

joint_j = P(slots 1..j are all accepted), cond_j = joint_j / joint_{j−1}, tau = 1 + sum_j joint_j (tokens per verify step,
the bonus token included). Teacher-forced: slots are judged on the text, not on a decoded continuation.

Shapes: N anchors, J slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.objectives import Outcome


def counts(outcome: Outcome) -> Tensor:
    """float64 [3, J]: over the anchors whose slot j counts, the sum of the chance that slots 1..j are all accepted at
    temperature 1 (product of overlaps), the same at temperature 0 (product of matches), and their number."""
    valid = outcome.valid.double()
    return torch.stack(
        [(outcome.overlap.double().cumprod(1) * valid).sum(0), (outcome.match.double().cumprod(1) * valid).sum(0), valid.sum(0)]
    )


@dataclass(frozen=True)
class Acceptance:
    """Joint and conditional acceptance per slot, and tau, at one temperature."""

    joint: list[float]
    conditional: list[float]
    tau: float

    @staticmethod
    def of(accepted: list[float], rounds: list[float]) -> "Acceptance":
        """`accepted[j]` of `rounds[j]` rounds had slots 1..j+1 accepted. A slot that no round reached counts as 0."""
        joint = [a / n if n else 0.0 for a, n in zip(accepted, rounds)]
        conditional = [j / before if before else 0.0 for j, before in zip(joint, [1.0, *joint])]
        return Acceptance(joint, conditional, 1.0 + sum(joint))


def summarise(total_3J: Tensor) -> dict[str, Acceptance]:
    """{"sampled": temperature 1, "greedy": temperature 0} from summed `counts`."""
    sampled, greedy, rounds = total_3J.tolist()
    return {"sampled": Acceptance.of(sampled, rounds), "greedy": Acceptance.of(greedy, rounds)}
