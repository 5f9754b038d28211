"""The loss of a chunk of rows in plain PyTorch: the definition of what `train/losses/fused.py` computes, and what a CPU trains
with.

Shapes: C rows of a chunk, T teachers of a chunk, V target vocabulary, D draft vocabulary, R rows.
"""

import torch
from torch import Tensor

from train.losses.divergences import overlap
from train.losses.terms import TERMS
from train.losses.types import Chunk, RowStatistics


def mixture(weights: dict[str, float], log_q: Tensor, log_p: Tensor, label: Tensor, mix_R: Tensor) -> Tensor:
    """Weighted sum of per-slot losses, [R]. `mix_R` is lk_lambda's lambda: how much of each row is KL, the rest being TV."""
    total = torch.zeros_like(mix_R)
    for name, weight in weights.items():
        total = total + weight * TERMS[name].definition(log_q, log_p, label, mix_R)
    return total


def reference_loss(loss: dict[str, float], chunk: Chunk, learns: bool) -> tuple[RowStatistics, Tensor | None]:
    """See `LossKernel`."""
    wide = torch.promote_types(chunk.draft_CD.dtype, torch.float32)
    # 1. The teachers: each is normalised once, over the whole vocabulary. Only then are the tokens taken that the drafter knows.
    log_p = None
    if chunk.target_TV is not None:
        log_p_TV = chunk.target_TV.to(wide).log_softmax(-1)
        best_p = log_p_TV.argmax(-1)[chunk.teacher_C]
        log_p = (log_p_TV if chunk.kept_D is None else log_p_TV[:, chunk.kept_D])[chunk.teacher_C]
    # 2. Loss and gradient. The caller is an autograd.Function, within which no graph is recorded unless it is asked for.
    with torch.enable_grad():
        logits = chunk.draft_CD.detach().requires_grad_(learns)
        log_q = logits.to(wide).log_softmax(-1)
        row_loss = mixture(loss, log_q, log_p, chunk.label_C, chunk.mix_C)
        alpha = torch.zeros_like(row_loss) if log_p is None else overlap(log_q, log_p)
        gradient = None
        if learns:
            total = (row_loss * chunk.weight_C).sum()
            if chunk.overlap_weight_C is not None:
                total = total + (alpha * chunk.overlap_weight_C).sum()
            (gradient,) = torch.autograd.grad(total, logits)
    # 3. Statistics.
    log_q = log_q.detach()
    match = torch.zeros_like(alpha)
    if log_p is not None:
        best_q = log_q.argmax(-1) if chunk.kept_D is None else chunk.kept_D[log_q.argmax(-1)]
        match = (best_p == best_q).to(wide)
    label = chunk.label_C.clamp(min=0)[:, None]
    said = torch.where(chunk.label_C < 0, 0.0, log_q.gather(1, label).squeeze(1).exp())
    return RowStatistics(row_loss.detach(), alpha.detach(), match.detach(), said), gradient
