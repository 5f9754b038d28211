"""Block-wise multi-step prediction: one forward fills a block of B slots after every anchor.

Slot 0 carries x_a at position a, slot s > 0 carries MASK at position a + s. Same-slot (DFlash): slot s proposes
x_{a+s}, and slot 0 nothing. Shifted (DSpark): slot s proposes x_{a+s+1}. With pairs (P-EAGLE, shifted and causal) slot 0 is also
given fc(f_{a-1}), and the others fc of a learned vector.

Shapes: N anchors, S = B slots, J drafted slots (B - 1 or B), E hidden size.
"""

import torch
from torch import Tensor

from data_prep.target.frozen_head import FrozenHead
from train.attention.visibility import Anchors, DraftRows
from train.data.pack import Pack
from train.drafter.memory import Memory
from train.drafter.model import Drafter


def block_rows(document_N: Tensor, anchor_N: Tensor, slots: int) -> DraftRows:
    """The rows of N blocks, slot by slot within an anchor; `anchor_N` counts from the document's start."""
    count, device = len(anchor_N), anchor_N.device
    slot = torch.arange(slots, device=device).repeat(count)
    anchor = anchor_N.repeat_interleave(slots)
    return DraftRows(
        document_N.repeat_interleave(slots),
        anchor,
        torch.arange(count, device=device).repeat_interleave(slots),
        slot,
        anchor + slot,
    )


def draft(drafter: Drafter, head: FrozenHead, pack: Pack, anchors: Anchors, memory: Memory, attend) -> Tensor:
    """What the LM head reads for each drafted token, [N, J, E]."""
    config = drafter.config
    rows = block_rows(anchors.document, anchors.position, config.slots)
    views = len(anchors.index) // len(pack.anchor_N)
    # Past a document's end a token is another's: such slots never count (Pack.valid).
    index_NS = pack.row_index(config.slots)[0].repeat(views, 1)
    known, prefix_N = (1, None) if pack.prefix_N is None else (config.slots, pack.prefix_N.repeat(views))
    token_NTE = drafter.embed(pack.ids_P[index_NS[:, :known]], head)
    feature_NE = None if memory.feature is None else memory.feature[(anchors.index - 1).clamp(min=0)]
    output_NJE = drafter.block(token_NTE, rows, memory, attend, prefix_N, feature_NE)
    if drafter.sequential is None:
        return output_NJE
    return drafter.sequential(output_NJE, drafter.embed(pack.ids_P[index_NS[:, : config.draft_length]], head))
