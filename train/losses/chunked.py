"""Head and loss over chunks of rows: no [rows, vocabulary] tensor outlives its chunk, and nothing is computed twice.

The loss needs a few numbers a row, and its gradient has the size of the hidden states (and of the head, where the drafter
trains its own), so each chunk's gradient is taken at once, in the forward, and only that is kept for the backward.

Shapes: R rows, L teachers, C rows of a chunk, V target vocabulary, D draft vocabulary, E hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.divergences import overlap

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (log_q [C, D], log_p [C, D], label [C], mix [C]) -> [C]


class Heads(NamedTuple):
    """`draft_DE` reads the drafter, `target_VE` the target; `kept_D`: the draft vocabulary's target ids (None: all of them)."""

    draft_DE: Tensor
    target_VE: Tensor
    kept_D: Tensor | None = None

    def log_p(self, teacher_CE: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """(the target's log-probabilities of the draft vocabulary [C, D], its most likely token [C])."""
        log_p = F.linear(teacher_CE, self.target_VE).to(wide).log_softmax(-1)
        return log_p if self.kept_D is None else log_p[:, self.kept_D], log_p.argmax(-1)


class Rows(NamedTuple):
    """What is known of each row before the head is applied: the drafter's output and lk_lambda's lambda; and of each teacher,
    which serves the rows of V views: the target's last hidden state, and the text's token (in the draft vocabulary, -1 outside
    it). The rows of one view stand after those of another, R = V x L."""

    draft_RE: Tensor
    teacher_LE: Tensor
    label_L: Tensor
    mix_R: Tensor


class RowStatistics(NamedTuple):
    """For each row: its unweighted loss, the overlap sum_v min(p, q) (the chance that a token drawn from q is accepted
    at temperature 1), whether both distributions have the same most likely token (accepted at temperature 0; a token that
    the drafter cannot say never is), and q of the text's token."""

    loss: Tensor
    overlap: Tensor
    match: Tensor
    label_probability: Tensor


def chunked_loss(
    rows: Rows, heads: Heads, loss: Loss, weight_R: Tensor, chunk: int, overlap_weight_R: Tensor | None = None
) -> tuple[Tensor, RowStatistics]:
    """sum_r weight_r loss_r + overlap_weight_r overlap_r (differentiable in the drafter's output and in its head, not in the
    weights), and the rows' statistics (not differentiable).

    Args:
        chunk: rows whose logits exist at a time.
    """
    assert len(rows.draft_RE) % max(1, len(rows.teacher_LE)) == 0
    if not len(rows.draft_RE):
        empty = (rows.draft_RE.new_zeros(0, dtype=torch.float32) for _ in RowStatistics._fields)
        return rows.draft_RE.sum() + 0 * heads.draft_DE.sum(), RowStatistics(*empty)
    draft_RE, head_DE = rows.draft_RE, heads.draft_DE
    if not torch.is_grad_enabled():  # a Function sees only that its inputs could have gradients
        draft_RE, head_DE = draft_RE.detach(), head_DE.detach()
    total, *statistics = _ChunkedLoss.apply(draft_RE, head_DE, rows, heads, loss, weight_R, overlap_weight_R, chunk)
    return total, RowStatistics(*statistics)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft_RE, head_DE, rows, heads, loss, weight_R, overlap_weight_R, chunk):
        wide, teachers = torch.promote_types(draft_RE.dtype, torch.float32), len(rows.teacher_LE)
        views = len(draft_RE) // teachers
        total, columns = torch.zeros((), dtype=wide, device=draft_RE.device), []
        learns_rows, learns_head = ctx.needs_input_grad[:2]
        gradient_RE = torch.zeros_like(draft_RE) if learns_rows else None
        gradient_DE = torch.zeros_like(head_DE, dtype=wide) if learns_head else None  # many chunks add up
        step = max(1, chunk // views)
        for start in range(0, teachers, step):
            part = slice(start, start + step)
            of = lambda t: t.unflatten(0, (views, teachers))[:, part].flatten(0, 1)  # the rows of these teachers
            shared = lambda t: t.expand(views, *t.shape).flatten(0, 1)  # one teacher for all views
            log_p, best_p = map(shared, heads.log_p(rows.teacher_LE[part], wide))
            label = shared(rows.label_L[part])
            with torch.enable_grad():
                logits = F.linear(of(draft_RE).detach(), head_DE.detach()).requires_grad_(learns_rows or learns_head)
                log_q = logits.to(wide).log_softmax(-1)
                row_loss = loss(log_q, log_p, label, of(rows.mix_R))
                part_total = (row_loss * of(weight_R)).sum()
                if overlap_weight_R is not None:
                    part_total = part_total + (overlap(log_q, log_p) * of(overlap_weight_R)).sum()
                if learns_rows or learns_head:
                    (gradient_CD,) = torch.autograd.grad(part_total, logits)
            if learns_rows:
                gradient_RE.unflatten(0, (views, teachers))[:, part] = (gradient_CD @ head_DE.detach()).unflatten(0, (views, -1))
            if learns_head:
                gradient_DE += gradient_CD.T @ of(draft_RE).detach()
            total += part_total.detach()
            log_q = log_q.detach()
            best_q = log_q.argmax(-1)
            best_q = best_q if heads.kept_D is None else heads.kept_D[best_q]
            said = torch.where(label < 0, 0.0, log_q.gather(1, label.clamp(min=0)[:, None]).squeeze(1).exp())
            found = (row_loss.detach(), overlap(log_q, log_p), (best_p == best_q).to(wide), said)
            columns.append([t.unflatten(0, (views, -1)) for t in found])
        ctx.save_for_backward(gradient_RE, gradient_DE)
        ctx.head_dtype = head_DE.dtype
        statistics = tuple(torch.cat(column, dim=1).flatten() for column in zip(*columns))
        ctx.mark_non_differentiable(*statistics)
        return total, *statistics

    @staticmethod
    def backward(ctx, grad_total, *_):
        gradient_RE, gradient_DE = ctx.saved_tensors
        return (
            None if gradient_RE is None else gradient_RE * grad_total,
            None if gradient_DE is None else (gradient_DE * grad_total).to(ctx.head_dtype),
            *[None] * 6,
        )
