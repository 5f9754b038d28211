"""The LM head and the loss on it, without ever holding the logits of all rows: neither the drafter's nor the teacher's.

Rows are taken in the order of their teachers, a chunk at a time, so that every teacher's logits are computed once however many
rows it serves (twice where a chunk ends between them). A chunk's gradient is taken at once, in the forward, and only that is
kept for the backward. What happens between a chunk's logits and their gradient is written twice: `reference_loss`, in plain
PyTorch, is the definition; `train/losses/fused.py` is a Triton kernel that a GPU runs.

Shapes: M rows of the drafter, R of them that count, L teachers, C rows of a chunk, T teachers of a chunk, V target vocabulary,
D draft vocabulary, E hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.divergences import mixture, overlap
from train.precision.fp8 import Frozen


class Heads(NamedTuple):
    """`draft_DE` reads the drafter, `target_VE` the target; `kept_D`: the draft vocabulary's target ids (None: all of them);
    `narrow`: a frozen `draft_DE` in fp8, with which its products are made instead. The teacher's are not."""

    draft_DE: Tensor
    target_VE: Tensor
    kept_D: Tensor | None = None
    narrow: Frozen | None = None


class HeadInput(NamedTuple):
    """What is known before the head is applied: the drafter's output and, of its rows that count, which they are, each one's
    teacher, the text's token (in the draft vocabulary, -1 outside it) and lk_lambda's lambda."""

    draft_ME: Tensor
    index_R: Tensor
    teacher_LE: Tensor  # the target's last hidden states
    teacher_R: Tensor
    label_R: Tensor
    mix_R: Tensor


class RowStatistics(NamedTuple):
    """For each row [R]: its unweighted loss, the overlap sum_v min(p, q) (the chance that a token drawn from q is accepted
    at temperature 1), whether both distributions have the same most likely token (accepted at temperature 0; a token that
    the drafter cannot say never is), and q of the text's token."""

    loss: Tensor
    overlap: Tensor
    match: Tensor
    label_probability: Tensor


class Chunk(NamedTuple):
    """Logits of some rows and of their teachers, and what else their loss depends on."""

    draft_CD: Tensor
    target_TV: Tensor
    teacher_C: Tensor  # among the T
    kept_D: Tensor | None
    label_C: Tensor
    mix_C: Tensor
    weight_C: Tensor
    overlap_weight_C: Tensor | None


def reference_loss(loss: dict[str, float], chunk: Chunk, learns: bool) -> tuple[RowStatistics, Tensor | None]:
    """(statistics, gradient [C, D] of sum_c weight_c loss_c + overlap_weight_c overlap_c in the drafter's logits)."""
    wide = torch.promote_types(chunk.draft_CD.dtype, torch.float32)
    log_p_TV = chunk.target_TV.to(wide).log_softmax(-1)
    best_p = log_p_TV.argmax(-1)[chunk.teacher_C]
    log_p = (log_p_TV if chunk.kept_D is None else log_p_TV[:, chunk.kept_D])[chunk.teacher_C]
    with torch.enable_grad():
        logits = chunk.draft_CD.detach().requires_grad_(learns)
        log_q = logits.to(wide).log_softmax(-1)
        row_loss = mixture(loss, log_q, log_p, chunk.label_C, chunk.mix_C)
        alpha = overlap(log_q, log_p)
        gradient = None
        if learns:
            total = (row_loss * chunk.weight_C).sum()
            if chunk.overlap_weight_C is not None:
                total = total + (alpha * chunk.overlap_weight_C).sum()
            (gradient,) = torch.autograd.grad(total, logits)
    log_q = log_q.detach()
    best_q = log_q.argmax(-1) if chunk.kept_D is None else chunk.kept_D[log_q.argmax(-1)]
    label = chunk.label_C.clamp(min=0)[:, None]
    said = torch.where(chunk.label_C < 0, 0.0, log_q.gather(1, label).squeeze(1).exp())
    return RowStatistics(row_loss.detach(), alpha.detach(), (best_p == best_q).to(wide), said), gradient


def chunked_loss(
    rows: HeadInput,
    heads: Heads,
    loss: dict[str, float],
    weight_R: Tensor,
    chunk: int,
    overlap_weight_R: Tensor | None = None,
    kernel=None,
) -> tuple[Tensor, RowStatistics]:
    """sum_r weight_r loss_r + overlap_weight_r overlap_r (differentiable in the drafter's output and in its head, not in the
    weights), and the rows' statistics (not differentiable).

    Args:
        loss: the weight of each per-slot term.
        chunk: rows whose logits exist at a time.
        kernel: `reference_loss` or `fused`; None: fused on a GPU.
    """
    if not len(rows.index_R):
        empty = (rows.draft_ME.new_zeros(0, dtype=torch.float32) for _ in RowStatistics._fields)
        return rows.draft_ME[rows.index_R].sum() + 0 * heads.draft_DE.sum(), RowStatistics(*empty)
    if kernel is None:
        kernel = reference_loss
        if rows.draft_ME.is_cuda and rows.draft_ME.dtype != torch.float64:
            from train.losses.fused import fused as kernel
    draft_ME, head_DE = rows.draft_ME, heads.draft_DE
    if not torch.is_grad_enabled():  # a Function sees only that its inputs could have gradients
        draft_ME, head_DE = draft_ME.detach(), head_DE.detach()
    total, *statistics = _ChunkedLoss.apply(draft_ME, head_DE, rows, heads, loss, weight_R, overlap_weight_R, chunk, kernel)
    return total, RowStatistics(*statistics)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft_ME, head_DE, rows, heads, loss, weight_R, overlap_weight_R, chunk, kernel):
        wide, count = torch.promote_types(draft_ME.dtype, torch.float32), len(rows.index_R)
        draft_ME, head_DE = draft_ME.detach(), head_DE.detach()
        learns_rows, learns_head = ctx.needs_input_grad[:2]
        gradient_ME = torch.zeros_like(draft_ME) if learns_rows else None
        gradient_DE = torch.zeros_like(head_DE, dtype=wide) if learns_head else None  # many chunks add up
        found_R4 = torch.empty(count, 4, dtype=wide, device=draft_ME.device)
        order_R = rows.teacher_R.argsort(stable=True)
        used_L, teacher_R = rows.teacher_R[order_R].unique_consecutive(return_inverse=True)
        bounds = [[int(t[0]), int(t[-1]) + 1] for t in teacher_R.cpu().split(chunk)]
        for part, teacher_C, (low, high) in zip(order_R.split(chunk), teacher_R.split(chunk), bounds):
            row = rows.index_R[part]
            draft_CE = draft_ME[row]
            logits = Chunk(
                F.linear(draft_CE, head_DE) if heads.narrow is None else heads.narrow.linear(draft_CE),
                F.linear(rows.teacher_LE[used_L[low:high]].to(draft_ME.dtype), heads.target_VE),
                teacher_C - low,
                heads.kept_D,
                rows.label_R[part],
                rows.mix_R[part],
                weight_R[part],
                None if overlap_weight_R is None else overlap_weight_R[part],
            )
            statistics, gradient_CD = kernel(loss, logits, learns_rows or learns_head)
            found_R4[part] = torch.stack(statistics, dim=1)
            if learns_rows:
                gradient_ME[row] = gradient_CD @ head_DE if heads.narrow is None else heads.narrow.backward(gradient_CD)
            if learns_head:
                _add_product(gradient_DE, gradient_CD.T, draft_CE)
        ctx.gradients, ctx.head_dtype = (gradient_ME, gradient_DE), head_DE.dtype
        statistics = RowStatistics(*(t.contiguous() for t in found_R4.unbind(1)))
        total = (statistics.loss * weight_R).sum()
        if overlap_weight_R is not None:
            total = total + (statistics.overlap * overlap_weight_R).sum()
        ctx.mark_non_differentiable(*statistics)
        return total, *statistics

    @staticmethod
    def backward(ctx, grad_total, *_):
        assert ctx.gradients is not None, "a loss can be differentiated once"
        (gradient_ME, gradient_DE), ctx.gradients = ctx.gradients, None
        # In place: all activations of the step are still there, and this is its peak.
        return (
            None if gradient_ME is None else gradient_ME.mul_(grad_total),
            None if gradient_DE is None else gradient_DE.mul_(grad_total).to(ctx.head_dtype),
            *[None] * 7,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the total's own precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
