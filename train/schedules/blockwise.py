"""Block-wise multi-step prediction: one forward fills a block of B slots after every anchor.

Slot 0 carries x_a at position a, slot s > 0 carries MASK at position a + s. Same-slot (DFlash): slot s proposes
x_{a+s}, and slot 0 nothing. Shifted (DSpark): slot s proposes x_{a+s+1}. With pairs (P-EAGLE, shifted and causal) slot 0 is also
given fc(f_{a-1}), and the others fc of a learned vector.

Shapes: N anchors, S = B slots, T tokens of a block that are given, J drafted slots (B - 1 or B), E hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.attention.visibility import DraftRows
from train.losses import weights
from train.schedules.schedule import Schedule, Source, Start

if TYPE_CHECKING:
    from train.drafter.base import Drafter
    from train.drafter.config import DrafterConfig


def block_rows(document_N: Tensor, anchor_N: Tensor, slots: int) -> DraftRows:
    """The rows of N blocks, slot by slot within an anchor; `anchor_N` counts from the document's start."""
    count = len(anchor_N)
    device = anchor_N.device
    slot = torch.arange(slots, device=device).repeat(count)
    anchor = anchor_N.repeat_interleave(slots)
    return DraftRows(
        document_N.repeat_interleave(slots),
        anchor,
        torch.arange(count, device=device).repeat_interleave(slots),
        slot,
        anchor + slot,
    )


class Blockwise(Schedule):
    token_by_token = False
    first_row = 0

    def causal(self, config: DrafterConfig) -> bool:
        return config.causal

    def first_slot(self, config: DrafterConfig) -> int:
        return 0 if config.shifted else 1

    def reads_pairs(self, config: DrafterConfig) -> bool:
        return config.pairs

    def slot_weights(self, slots: int, decay: float) -> Tensor:
        return weights.exponential(slots, decay)

    def draft(self, drafter: Drafter, start: Start, source: Source) -> None:
        # 1. The block: its given tokens, and MASK.
        slots = drafter.config.slots
        rows = block_rows(start.document_N, start.anchor_N, slots)
        given = 1 if source.prefix_N is None else slots
        token_NTE = torch.stack([source.token(slot) for slot in range(given)], dim=1)
        output_NJE = drafter.block(token_NTE, rows, start.memory, source.attend, source.prefix_N, start.feature_NE)
        # 2. All slots are filled at once, so that a shorter draft is the same block's beginning.
        output_NJE = output_NJE[:, : source.length]
        if drafter.sequential is None:
            source.drafted_at_once(output_NJE)
            return
        # 3. Each slot is corrected by the token before it.
        state = None
        for slot, output_NE in enumerate(output_NJE.unbind(1)):
            corrected_NE, state = drafter.sequential.step(output_NE, source.token(slot), state)
            source.drafted(corrected_NE)
