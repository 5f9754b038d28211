"""Training-time test (EAGLE-3): K autoregressive passes from every anchor, each on the drafter's own features.

Pass j of anchor a reads token x_{a+j−1} at position a + j − 1 and proposes x_{a+j}. With hidden states its feature is
fc(f_{a−1}) in the first pass and the drafter's own residual stream after it; without them there is no feature (KVShot, kv only).
With constant positions (Gemma 4's assistants) every pass sits at a − 1, the last position that the target has processed.

Shapes: N anchors (in a tree: nodes of one depth).
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


class TrainingTimeTest(Schedule):
    token_by_token = True
    first_row = 1

    def causal(self, config: DrafterConfig) -> bool:
        return True

    def first_slot(self, config: DrafterConfig) -> int:
        return 0

    def reads_pairs(self, config: DrafterConfig) -> bool:
        return True

    def slot_weights(self, slots: int, decay: float) -> Tensor:
        return weights.geometric(slots, decay)

    def draft(self, drafter: Drafter, start: Start, source: Source) -> None:
        memory, document_N, anchor_N, feature_NE = start
        group_N = torch.arange(len(anchor_N), device=anchor_N.device)
        earlier = None
        past = None
        for j in range(1, source.length + 1):
            position_N = drafter.config.row_position(anchor_N, j - 1)
            rows = DraftRows(document_N, anchor_N, group_N, torch.full_like(group_N, j), position_N)
            output_NE, feature_NE, past = drafter.step(
                source.token(j - 1), feature_NE, rows, earlier, memory, past, source.attend
            )
            earlier = rows if earlier is None else earlier + rows
            parent_N = source.drafted(output_NE)
            if parent_N is not None:
                # A tree: the next depth has rows of its own, each with the feature that its parent's row left.
                document_N, anchor_N, group_N = (t[parent_N] for t in (document_N, anchor_N, group_N))
                feature_NE = None if feature_NE is None else feature_NE[parent_N]
