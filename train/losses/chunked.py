"""The LM head and the loss on it, without ever holding the logits of all rows: neither the drafter's nor the teacher's.

Rows are taken in the order of their teachers, a chunk at a time, so that every teacher's logits are computed once however many
rows it serves (twice where a chunk ends between them). A chunk's gradient is taken at once, in the forward, and only that is
kept for the backward. What happens between a chunk's logits and their gradient is written twice: `train/losses/reference.py`, in
plain PyTorch, is the definition; `train/losses/fused.py` is a Triton kernel that a GPU runs.

Shapes: M rows of the drafter, R of them that count, L teachers, C rows of a chunk, T teachers of a chunk, V target vocabulary,
D draft vocabulary, E hidden size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from train.losses.choose import loss_kernel
from train.losses.types import Chunk, HeadInput, Heads, LossKernel, RowStatistics, Teachers


def by_teacher(teacher_R: Tensor, chunk: int) -> Teachers:
    """The order in which rows meet the head. The host has to know between which teachers each chunk lies, and waits for it:
    whoever calls this before the drafter runs lets the GPU run on."""
    order_R = teacher_R.argsort(stable=True)
    used_L, teacher_R = teacher_R[order_R].unique_consecutive(return_inverse=True)
    ends = [(part[0], part[-1] + 1) for part in teacher_R.split(chunk)] if len(teacher_R) else []
    bounds = torch.tensor([]) if not ends else torch.stack([torch.stack(pair) for pair in ends]).cpu()
    return Teachers(order_R, used_L, teacher_R, [tuple(pair) for pair in bounds.tolist()])


def chunked_loss(
    rows: HeadInput,
    heads: Heads,
    loss: dict[str, float],
    weight_R: Tensor,
    chunk: int,
    overlap_weight_R: Tensor | None = None,
    kernel: LossKernel | None = None,
) -> tuple[Tensor, RowStatistics]:
    """sum_r weight_r loss_r + overlap_weight_r overlap_r (differentiable in the drafter's output and in its head, not in the
    weights), and the rows' statistics (not differentiable).

    Args:
        loss: the weight of each per-slot term.
        chunk: rows whose logits exist at a time.
        kernel: `reference_loss` or `fused`; None: as `choose.loss_kernel` says.
    """
    if not len(rows.index_R):
        empty = (rows.draft_ME.new_zeros(0, dtype=torch.float32) for _ in RowStatistics._fields)
        return rows.draft_ME[rows.index_R].sum() + 0 * heads.draft_DE.sum(), RowStatistics(*empty)
    if kernel is None:
        kernel = loss_kernel(loss, rows.draft_ME.device, rows.draft_ME.dtype)
    draft_ME = rows.draft_ME
    head_DE = heads.draft_DE
    if not torch.is_grad_enabled():  # a Function sees only that its inputs could have gradients
        draft_ME = draft_ME.detach()
        head_DE = head_DE.detach()
    total, *statistics = _ChunkedLoss.apply(draft_ME, head_DE, rows, heads, loss, weight_R, overlap_weight_R, chunk, kernel)
    return total, RowStatistics(*statistics)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft_ME, head_DE, rows, heads, loss, weight_R, overlap_weight_R, chunk, kernel):
        # 1. What is to be found.
        wide = torch.promote_types(draft_ME.dtype, torch.float32)
        count = len(rows.index_R)
        draft_ME = draft_ME.detach()
        head_DE = head_DE.detach()
        learns_rows, learns_head = ctx.needs_input_grad[:2]
        gradient_ME = torch.zeros_like(draft_ME) if learns_rows else None
        gradient_DE = torch.zeros_like(head_DE, dtype=wide) if learns_head else None  # many chunks add up
        found_R4 = torch.empty(count, 4, dtype=wide, device=draft_ME.device)
        # 2. A chunk at a time: logits, loss, gradient. The logits are gone when the next chunk's come.
        order_R, used_L, teacher_R, bounds = rows.teachers or by_teacher(rows.teacher_R, chunk)
        for part, teacher_C, (low, high) in zip(order_R.split(chunk), teacher_R.split(chunk), bounds):
            row = rows.index_R[part]
            draft_CE = draft_ME[row]
            target_TV = None
            if heads.target_VE is not None:
                target_TV = F.linear(rows.teacher_LE[used_L[low:high]].to(draft_ME.dtype), heads.target_VE)
                target_TV = target_TV if heads.finish is None else heads.finish(target_TV)
            logits = Chunk(
                F.linear(draft_CE, head_DE) if heads.narrow is None else heads.narrow.linear(draft_CE),
                target_TV,
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
        # Not by `save_for_backward`, which would forbid to scale them in place.
        ctx.gradients = (gradient_ME, gradient_DE)
        ctx.head_dtype = head_DE.dtype
        statistics = RowStatistics(*(t.contiguous() for t in found_R4.unbind(1)))
        total = (statistics.loss * weight_R).sum()
        if overlap_weight_R is not None:
            total = total + (statistics.overlap * overlap_weight_R).sum()
        ctx.mark_non_differentiable(*statistics)
        return total, *statistics

    @staticmethod
    def backward(ctx, grad_total, *_):
        assert ctx.gradients is not None, "a loss can be differentiated once"
        gradient_ME, gradient_DE = ctx.gradients
        ctx.gradients = None
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
