"""What the first batch of a capture tells of its target: whether its states are numbers, and whether it predicts at all.

Shapes: P tokens of a batch, documents back to back; R of them whose predictions are looked at; E hidden size; V vocabulary.
"""

import math

import torch
from torch import nn

from common.errors import UserError
from common.ranks import rank
from data_prep.target.states import States

ROWS = 512  # predictions that are looked at
LIKE_RANDOM = 0.7  # share of log V: weights that were read wrongly lie above it, and texts that a model knows far below


def check_first_batch(target, batch, states: States) -> None:
    """Raises UserError where the target's weights are why states are not finite; prints a warning where it predicts
    no better than random weights would. Every process that computes a part of the target calls it."""
    if target.server:
        return
    if not all(t.isfinite().all() for t in states.tensors()):
        weights = ((name, p) for name, p in target.model.named_parameters() if p.is_floating_point() and p.itemsize > 1)
        if ill := next((name for name, p in weights if not p.isfinite().all()), None):
            raise UserError(f"target {target.path}: {ill} has numbers that are not finite: its weights are damaged")
        return  # the document, which is named where it would be written
    last_P = torch.zeros(len(batch.ids_P), dtype=torch.bool)
    last_P[torch.tensor(batch.lengths).cumsum(0) - 1] = True
    rows_R = (~last_P).nonzero().squeeze(1)
    rows_R = rows_R[:: max(1, len(rows_R) // ROWS)][:ROWS]
    if not len(rows_R):
        return
    hidden_RE = states.last_hidden[rows_R.to(states.last_hidden.device)]
    logits_RV = target.logits(hidden_RE if target.spread_by_tensors else hidden_RE.to(target.frozen_head.head_VE.device))
    loss = float(nn.functional.cross_entropy(logits_RV.float(), batch.ids_P[rows_R + 1].long().to(logits_RV.device)))
    random = math.log(logits_RV.shape[-1])
    if loss > LIKE_RANDOM * random and rank() == 0:
        print(
            f"WARNING: the target's own loss on {len(rows_R)} tokens of the first documents is {loss:.2f}; random weights would "
            f"have about {random:.2f}: are these its weights, its tokenizer and texts that it knows?",
            flush=True,
        )
