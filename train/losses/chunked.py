"""Head and loss over chunks of rows: no [rows, vocabulary] tensor outlives its chunk, and nothing is computed twice.

The loss needs one number a row and its gradient has the size of the hidden states, so each chunk's gradient is taken at
once, in the forward, and only that is kept for the backward.

Shapes: R rows, C rows of a chunk, V vocabulary, E hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.divergences import LOSSES


class RowStatistics(NamedTuple):
    """For each row: its unweighted loss, the overlap sum_v min(p, q) (the chance that a token drawn from q is accepted
    at temperature 1), and whether both distributions have the same most likely token (accepted at temperature 0)."""

    loss: Tensor
    overlap: Tensor
    match: Tensor


def chunked_loss(
    draft_RE: Tensor, teacher_RE: Tensor, label_R: Tensor, weight_R: Tensor, head_VE: Tensor, loss: str, chunk: int
) -> tuple[Tensor, RowStatistics]:
    """Weighted sum of per-row losses (differentiable in `draft_RE`), and the rows' statistics (not).

    Args:
        draft_RE, teacher_RE: what the LM head reads: the drafter's output and the target's `last_hidden`.
        label_R: the text's token that each row predicts.
        head_VE: the frozen LM head of both.
        chunk: rows whose logits exist at a time.
    """
    if not len(draft_RE):
        return draft_RE.sum(), RowStatistics(*(draft_RE.new_zeros(0, dtype=torch.float32) for _ in range(3)))
    total, *statistics = _ChunkedLoss.apply(draft_RE, teacher_RE, label_R, weight_R, head_VE, LOSSES[loss], chunk)
    return total, RowStatistics(*statistics)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft_RE, teacher_RE, label_R, weight_R, head_VE, loss, chunk):
        wide = torch.promote_types(draft_RE.dtype, torch.float32)
        gradient_RE, rows, total = torch.zeros_like(draft_RE), [], torch.zeros((), dtype=wide, device=draft_RE.device)
        for start in range(0, len(draft_RE), chunk):
            part = slice(start, start + chunk)
            log_p = F.linear(teacher_RE[part], head_VE).to(wide).log_softmax(-1)
            with torch.enable_grad():
                hidden = draft_RE[part].detach().requires_grad_()
                log_q = F.linear(hidden, head_VE).to(wide).log_softmax(-1)
                row_loss = loss(log_q, log_p, label_R[part])
                chunk_total = (row_loss * weight_R[part]).sum()
                if ctx.needs_input_grad[0]:
                    (gradient_RE[part],) = torch.autograd.grad(chunk_total, hidden)
            total += chunk_total.detach()
            log_q = log_q.detach()
            rows.append(
                (row_loss.detach(), torch.minimum(log_p, log_q).exp().sum(-1), (log_p.argmax(-1) == log_q.argmax(-1)).to(wide))
            )
        ctx.save_for_backward(gradient_RE)
        statistics = tuple(torch.cat(column) for column in zip(*rows))
        ctx.mark_non_differentiable(*statistics)
        return total, *statistics

    @staticmethod
    def backward(ctx, grad_total, *_):
        return ctx.saved_tensors[0] * grad_total, *[None] * 6
