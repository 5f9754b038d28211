"""Training-time test (EAGLE-3): K autoregressive steps from every anchor, each step on the drafter's own features.

Step j of anchor a reads token x_{a+j−1} at position a + j − 1 and proposes x_{a+j}. With hidden states its feature is
fc(f_{a−1}) at step 1 and the drafter's own residual stream after it; without them there is no feature (KVShot, kv only).

Shapes: N anchors, K steps, E hidden size.
"""

import torch
from torch import Tensor

from data_prep.target.frozen_head import FrozenHead
from train.attention.visibility import Anchors, DraftRows
from train.data.pack import Pack
from train.drafter.memory import Memory
from train.drafter.model import Drafter


def draft(drafter: Drafter, head: FrozenHead, pack: Pack, anchors: Anchors, memory: Memory, attend) -> Tensor:
    """What the LM head reads for each drafted token, [N, K, E]."""
    index, document, position = anchors
    group = torch.arange(len(index), device=index.device)
    feature = memory.feature[(index - 1).clamp(min=0)] if memory.feature is not None else None
    earlier, past, outputs = None, None, []
    for j in range(1, drafter.config.slots + 1):
        # Past a document's end the token is another's: such slots never count (Pack.valid).
        token = drafter.embed(pack.ids_P[(index + j - 1).clamp(max=len(pack.ids_P) - 1)], head)
        rows = DraftRows(document, position, group, torch.full_like(group, j), position + j - 1)
        output, feature, past = drafter.step(token, feature, rows, earlier, memory, past, attend)
        earlier = rows if earlier is None else earlier + rows
        outputs.append(output)
    return torch.stack(outputs, dim=1)
