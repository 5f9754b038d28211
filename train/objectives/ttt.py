"""Training-time test (EAGLE-3): K autoregressive steps from every anchor, each step on the drafter's own features.

Step j of anchor a reads token x_{a+j−1} at position a + j − 1 and proposes x_{a+j}. With hidden states its feature is
fc(f_{a−1}) at step 1 and the drafter's own residual stream after it; without them there is no feature (KVShot, kv only).

Shapes: N anchors, K steps, E hidden size.
"""

import torch
from torch import Tensor

from data_prep.target import FrozenHead
from train.attention.visibility import Rows
from train.batches import Pack
from train.drafter.memory import Memory
from train.drafter.model import Drafter


def draft(drafter: Drafter, head: FrozenHead, pack: Pack, memory: Memory, attend) -> Tensor:
    """What the LM head reads for each drafted token, [N, K, E]."""
    anchor, places = pack.anchor_N, pack.places
    group = torch.arange(len(anchor), device=anchor.device)
    feature = memory.feature[(anchor - 1).clamp(min=0)] if memory.feature is not None else None
    earlier, past, outputs = None, None, []
    for j in range(1, drafter.config.slots + 1):
        # Past a document's end the token is another's: such slots never count (Pack.valid).
        token = head.embed(pack.ids_P[(anchor + j - 1).clamp(max=len(pack.ids_P) - 1)])
        rows = Rows(
            places.document[anchor], places.position[anchor], group, torch.full_like(group, j), places.position[anchor] + j - 1
        )
        output, feature, past = drafter.step(token, feature, rows, earlier, memory, past, attend)
        earlier = rows if earlier is None else earlier + rows
        outputs.append(output)
    return torch.stack(outputs, dim=1)
