"""What the engine trains: a pack -> sums of loss and weight, and what became of every slot.

Shapes: N anchors, J drafted slots, P positions of a pack, E hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_prep.target import FrozenHead
from train.batches import Pack
from train.drafter.model import Drafter
from train.losses.chunked import chunked_loss
from train.objectives import blockwise, ttt

OBJECTIVES = {"ttt": ttt.draft, "blockwise": blockwise.draft}


class Outcome(NamedTuple):
    """`loss_sum` is differentiable; overlap, match and loss are float [N, J], zero where `valid` is False."""

    loss_sum: Tensor
    loss: Tensor
    overlap: Tensor
    match: Tensor
    valid: Tensor


class Objective(nn.Module):
    """One drafter under one objective and loss.

    Args:
        head: the target's frozen embedding and LM head; held outside the module tree, so that no engine shards it.
        weight_J: what each slot counts.
        chunk: rows whose logits exist at a time.
    """

    def __init__(self, drafter: Drafter, head: FrozenHead, loss: str, weight_J: Tensor, attend, chunk: int):
        super().__init__()
        self.drafter, self._head, self._loss, self._attend, self._chunk = drafter, head, loss, attend, chunk
        self._weight_J = weight_J

    def weight_sum(self, pack: Pack) -> Tensor:
        """Sum of the weights of the slots that count; known before the forward, as DESIGN's normalisation needs."""
        return (pack.valid(len(self._weight_J)) * self._weight_J.to(pack.anchor_N.device)).sum()

    def forward(self, pack: Pack) -> Outcome:
        output_NJE = self.outputs(pack)
        valid = pack.valid(len(self._weight_J))
        # Only rows that count meet the LM head: its product is the largest of the step.
        anchor, slot = valid.nonzero(as_tuple=True)
        position = pack.anchor_N[anchor] + slot  # of the teacher of slot j = slot + 1: a + j − 1
        loss_sum, rows = chunked_loss(
            output_NJE[anchor, slot],
            pack.last_hidden_RE[pack.teacher_P[position]].to(output_NJE.dtype),
            pack.ids_P[(position + 1).clamp(max=len(pack.ids_P) - 1)],
            self._weight_J.to(slot.device)[slot],
            self._head.head_VE,
            self._loss,
            self._chunk,
        )

        def spread(values):
            return torch.zeros(valid.shape, dtype=values.dtype, device=valid.device).masked_scatter_(valid, values)

        return Outcome(loss_sum, *map(spread, rows), valid)

    def outputs(self, pack: Pack) -> Tensor:
        """The drafter's output of every slot of every anchor, [N, J, E]: what decoding must reproduce."""
        drafter = self.drafter
        next_token_PE = self._head.embed(torch.roll(pack.ids_P, -1))
        memory = drafter.remember(pack.states, next_token_PE, pack.places, self._attend)
        return OBJECTIVES[drafter.config.objective](drafter, self._head, pack, memory, self._attend)
