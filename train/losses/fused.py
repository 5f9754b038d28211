"""What `reference.reference_loss` does between a chunk's logits and their gradient, as Triton kernels: one program per row, which
reads the drafter's logits three times (twice where no term needs a sum first) and overwrites them with the gradient.

With log_q = z - lse(z), a loss of gradient g_v in log_q_v has the gradient g_v - q_v sum_u g_u in z_v. Of the terms:

    kl           q - p~                       p~: p renormalised over the draft vocabulary
    reverse_kl   q (log q - log p - KL(q||p))
    ce           q - [v = label]              ce_greedy: the label is p's most likely token
    overlap      q (t - A)                    t = [q < p], A = sum_v q t; tv = 1 - overlap, lk_alpha = -log overlap

Shapes: C rows, T teachers, V target vocabulary, D draft vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.errors import UserError
from train.losses import terms
from train.losses.types import Chunk, RowStatistics

BLOCK = 4096  # tokens of a row that are looked at together
# 256 threads hold 16 tokens each, and about ten running values for each token, in registers. A row has as many as 50,000 tokens
# and more, so that one program has enough to do, and a chunk has rows enough to fill a GPU.
WARPS = 8


@triton.jit
def _row_softmax(logits, row, size, BLOCK: tl.constexpr):
    """(log-sum-exp, the first of the largest logits) of one row.

    Each lane keeps the largest logit that it met and the sum of exp(z - largest), which is scaled down whenever a larger one
    comes: one read of the row instead of two. The lanes are merged at the end by the same rule.
    """
    lane = tl.arange(0, BLOCK)
    top_B = tl.full([BLOCK], float("-inf"), tl.float32)
    where_B = tl.zeros([BLOCK], tl.int32)
    sum_B = tl.zeros([BLOCK], tl.float32)
    nan_B = tl.zeros([BLOCK], tl.float32)  # a GPU's maxima pass over NaN: kept apart, and added to the result
    for start in range(0, size, BLOCK):
        at = start + lane
        z = tl.load(logits + row * size + at, mask=at < size, other=float("-inf")).to(tl.float32)
        nan_B += tl.where(z == z, 0.0, z)
        top = tl.maximum(top_B, z)
        where_B = tl.where(z > top_B, at, where_B)
        # A lane that has met nothing yet is at minus infinity, from which nothing may be subtracted.
        sum_B = tl.where(top == float("-inf"), 0.0, sum_B * tl.exp(top_B - top) + tl.exp(z - top))
        top_B = top
    # Merge the lanes. One that met nothing (a row shorter than a block) adds nothing.
    top = tl.max(top_B, 0)
    total = tl.sum(tl.where(top_B == float("-inf"), 0.0, sum_B * tl.exp(top_B - top)), 0)
    # Of equal logits the first counts, as in `argmax`.
    where = tl.min(tl.where(top_B == top, where_B, size), 0)
    return top + tl.log(total) + tl.sum(nan_B, 0), where


@triton.jit
def _softmax_kernel(logits, lse, best, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # a chunk of rows times the vocabulary outgrows 32 bits
    found, where = _row_softmax(logits, row, size, BLOCK)
    tl.store(lse + row, found)
    tl.store(best + row, where)


@triton.jit
def _loss_kernel(
    # Logits [C, D] and [T, D]; each row's teacher [C]; of the teachers [T] the log-sum-exp over the target's vocabulary, over the
    # draft vocabulary, and the most likely token of the latter.
    draft, target, teacher, lse_whole, lse_kept, best_kept,
    # Of the rows [C]: the text's token, lk_lambda's lambda, what the loss and what the overlap counts.
    label, mix, weight, overlap_weight,
    # Results, and D.
    found, best, size,
    # The weight of each term, and what is asked for. Constants: code of terms without a weight is not compiled.
    KL: tl.constexpr, REVERSE_KL: tl.constexpr, CE: tl.constexpr, CE_GREEDY: tl.constexpr, TV: tl.constexpr,
    LK_ALPHA: tl.constexpr, LK_LAMBDA: tl.constexpr, OVERLAP: tl.constexpr, TEACHER: tl.constexpr, LEARNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """found [3, C]: loss, overlap, q(label); best [C]: the drafter's most likely token. `draft` becomes the gradient.

    Three reads of a row's logits: the log-sum-exp; then the loss and the sums that a slope needs over the whole row; then the
    gradient, in place. Where no term needs such a sum, the second read writes the gradient at once.
    """
    SUMS: tl.constexpr = REVERSE_KL + TV + LK_ALPHA + LK_LAMBDA > 0 or OVERLAP
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mine = draft + row * size
    lse_p = 0.0
    greedy = 0
    if TEACHER:
        served_by = tl.load(teacher + row).to(tl.int64)
        theirs = target + served_by * size
        # p is normalised over the target's vocabulary, r over the draft vocabulary: KL alone reads r.
        lse_p = tl.load(lse_whole + served_by)
        lse_r = tl.load(lse_kept + served_by)
        greedy = tl.load(best_kept + served_by)
    token = tl.load(label + row)
    mix_here = tl.load(mix + row).to(tl.float32)
    weight_here = tl.load(weight + row).to(tl.float32)
    # Read before the reductions below, which all warps wait for: later the gradient may stand there.
    z_label = tl.load(mine + tl.maximum(token, 0)).to(tl.float32)
    z_greedy = tl.load(mine + greedy).to(tl.float32)
    # First read.
    lse_q, best_q = _row_softmax(draft, row, size, BLOCK)
    ce_here = CE * (token >= 0).to(tl.float32)  # a label outside the draft vocabulary teaches nothing
    kl_here = KL + LK_LAMBDA * mix_here
    kl_B = tl.zeros([BLOCK], tl.float32)
    reverse_B = tl.zeros([BLOCK], tl.float32)
    alpha_B = tl.zeros([BLOCK], tl.float32)
    below_B = tl.zeros([BLOCK], tl.float32)
    least_top_B = tl.full([BLOCK], float("-inf"), tl.float32)
    least_sum_B = tl.zeros([BLOCK], tl.float32)
    least_below_B = tl.zeros([BLOCK], tl.float32)
    # Second read. Sums are kept by lane and added up once, behind the loop.
    for start in range(0, size, BLOCK):
        at = start + lane
        inside = at < size
        log_q = tl.load(mine + at, mask=inside, other=float("-inf")).to(tl.float32) - lse_q
        q = tl.exp(log_q)
        if TEACHER:
            p_logit = tl.load(theirs + at, mask=inside, other=float("-inf")).to(tl.float32)
            log_p = p_logit - lse_p
            log_r = p_logit - lse_r
            least = tl.minimum(log_q, log_p)
            # Behind the row's end logits are minus infinity: exp makes them zero. Where infinities would meet, a mask does.
            alpha_B += tl.exp(least)
        if KL + LK_LAMBDA > 0:
            kl_B += tl.where(inside, tl.exp(log_r) * (log_r - log_q), 0.0)
        if REVERSE_KL > 0:
            reverse_B += tl.where(inside, q * (log_q - log_p), 0.0)
        if SUMS:
            # Half where they are equal, as PyTorch's gradient of a minimum: a perfect drafter gets none.
            t = tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0))
            below_B += q * t
        if LK_ALPHA > 0:  # overlap and A by log-sum-exp: they underflow for distributions that hardly meet
            top = tl.maximum(least_top_B, least)
            met = top > float("-inf")
            old = tl.exp(least_top_B - top)
            new = tl.exp(least - top)
            least_sum_B = tl.where(met, least_sum_B * old + new, 0.0)
            least_below_B = tl.where(met, least_below_B * old + new * t, 0.0)
            least_top_B = top
        if LEARNS and not SUMS:
            slope = (kl_here + ce_here + CE_GREEDY) * q
            if KL > 0:
                slope -= kl_here * tl.exp(log_r)
            slope -= tl.where(at == token, ce_here, 0.0) + tl.where(at == greedy, CE_GREEDY, 0.0)
            tl.store(mine + at, (weight_here * slope).to(draft.dtype.element_ty), mask=inside)
    # The loss.
    kl = tl.sum(kl_B, 0)
    reverse = tl.sum(reverse_B, 0)
    alpha = tl.sum(alpha_B, 0)
    below = tl.sum(below_B, 0)
    nan_q = lse_q - lse_q  # zero, or NaN
    nan_p = lse_p - lse_p  # likewise; zero without a teacher
    alpha += nan_q + nan_p
    loss = nan_q + kl_here * kl + REVERSE_KL * reverse
    if KL + REVERSE_KL + TV + LK_ALPHA + LK_LAMBDA > 0:  # what reads p; minima pass over NaN too
        loss += nan_p
    if TV + LK_LAMBDA > 0:
        loss += (TV + LK_LAMBDA * (1 - mix_here)) * (1 - alpha)
    loss += ce_here * (lse_q - z_label) + CE_GREEDY * (lse_q - z_greedy)
    if LK_ALPHA > 0:
        top = tl.max(least_top_B, 0)
        scale_B = tl.exp(least_top_B - top)
        least_sum = tl.sum(least_sum_B * scale_B, 0)
        log_alpha = top + tl.log(least_sum)
        below_of_alpha = tl.sum(least_below_B * scale_B, 0) / least_sum
        loss -= LK_ALPHA * log_alpha
    rows = tl.num_programs(0)
    tl.store(found + row, loss)
    tl.store(found + rows + row, alpha)
    tl.store(found + 2 * rows + row, nan_q + tl.where(token < 0, 0.0, tl.exp(z_label - lse_q)))
    tl.store(best + row, best_q)
    # Third read: the gradient, which needs the sums.
    if LEARNS and SUMS:
        overlap_here = -weight_here * (TV + LK_LAMBDA * (1 - mix_here))
        if OVERLAP:
            overlap_here += tl.load(overlap_weight + row).to(tl.float32)
        for start in range(0, size, BLOCK):
            at = start + lane
            inside = at < size
            log_q = tl.load(mine + at, mask=inside, other=float("-inf")).to(tl.float32) - lse_q
            p_logit = tl.load(theirs + at, mask=inside, other=float("-inf")).to(tl.float32)
            log_p = p_logit - lse_p
            q = tl.exp(log_q)
            t = tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0))
            slope = (kl_here + ce_here + CE_GREEDY) * q
            if KL + LK_LAMBDA > 0:
                slope -= kl_here * tl.exp(p_logit - lse_r)
            slope -= tl.where(at == token, ce_here, 0.0) + tl.where(at == greedy, CE_GREEDY, 0.0)
            if REVERSE_KL > 0:
                slope += REVERSE_KL * q * (log_q - log_p - reverse)
            if LK_ALPHA > 0:
                slope -= LK_ALPHA * (tl.exp(tl.minimum(log_q - log_alpha, 0.0)) * t - q * below_of_alpha)
            slope = weight_here * slope + overlap_here * q * (t - below)
            tl.store(mine + at, slope.to(draft.dtype.element_ty), mask=inside)


def fused(loss: dict[str, float], chunk: Chunk, learns: bool) -> tuple[RowStatistics, Tensor | None]:
    """`reference_loss`; the gradient takes the place of the drafter's logits.

    Raises:
        UserError: a term has a weight that the kernel lacks. It would train at zero.
    """
    if missing := terms.without_kernel(loss):
        raise UserError(f"loss.{missing[0]} is no part of the fused kernel (train/losses/fused.py); docs/extend/loss.md")
    count, size = chunk.draft_CD.shape
    device = chunk.draft_CD.device
    found_3C = torch.empty(3, count, dtype=torch.float32, device=device)
    best_C = torch.empty(count, dtype=torch.int32, device=device)
    # A kernel takes a pointer in any case: another one, which TEACHER=False and OVERLAP=False never read.
    target = chunk.draft_CD
    lse_whole_T = lse_kept_T = chunk.weight_C
    best_whole_T = best_kept_T = best_C
    if chunk.target_TV is not None:
        target = chunk.target_TV
        lse_kept_T, best_kept_T = lse_whole_T, best_whole_T = _softmax(target)
        if chunk.kept_D is not None:
            target = target[:, chunk.kept_D]
            lse_kept_T, best_kept_T = _softmax(target)
    overlap_weight_C = chunk.weight_C if chunk.overlap_weight_C is None else chunk.overlap_weight_C
    _loss_kernel[(count,)](
        chunk.draft_CD, target, chunk.teacher_C, lse_whole_T, lse_kept_T, best_kept_T, chunk.label_C, chunk.mix_C, chunk.weight_C,
        overlap_weight_C, found_3C, best_C, size, **{name.upper(): float(loss.get(name, 0)) for name in terms.in_kernel()},
        OVERLAP=chunk.overlap_weight_C is not None, TEACHER=chunk.target_TV is not None, LEARNS=learns, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    match_C = torch.zeros_like(found_3C[0])
    if chunk.target_TV is not None:
        best_q_C = best_C.long() if chunk.kept_D is None else chunk.kept_D[best_C]
        match_C = (best_whole_T[chunk.teacher_C] == best_q_C).float()
    return RowStatistics(found_3C[0], found_3C[1], match_C, found_3C[2]), chunk.draft_CD if learns else None


def _softmax(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    count, size = logits_TV.shape
    lse_T = torch.empty(count, dtype=torch.float32, device=logits_TV.device)
    best_T = torch.empty(count, dtype=torch.int32, device=logits_TV.device)
    _softmax_kernel[(count,)](logits_TV, lse_T, best_T, size, BLOCK=BLOCK, num_warps=WARPS)
    return lse_T, best_T
