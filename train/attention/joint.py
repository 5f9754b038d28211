"""A row's few draft keys beside what FlashAttention made of its memory: one softmax over both, and its gradients.

`flash.reference_join` in Triton, function by function: one program a row and key/value head, which reads the draft keys once,
and the memory's results at the places where FlashAttention left them.

Shapes: Q draft rows, P memory positions, J steps, H query heads, G key/value heads, S = H / G, D head size. `place_Q`: where a
row stands among the memory's positions; P: it sees no memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# What differs from pack to pack and from step to step. Triton would compile a kernel anew, in the middle of a training, when one
# of them is 1 or a multiple of 16 for the first time.
VARY = ["rows", "places", "steps"]


@triton.jit
def _put_kernel(source, target, row_P, size, BLOCK: tl.constexpr):
    """Each place gets its row, or zeros: one pass that writes everything, instead of zeros first and rows over them."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(row_P + place).to(tl.int64)
    end = tl.where(row >= 0, size, 0)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + row * size + at, mask=at < end, other=0.0)
        tl.store(target + place * size + at, value, mask=at < size)


@triton.jit(do_not_specialize=VARY)
def _join_kernel(
    # Queries [Q, H, D], draft keys and values [J, Q, G, D], what FlashAttention made of the memory ([P, H, D], [H, P]), places.
    q, k, v, memory, memory_lse, place_Q,
    # Results: [Q, H, D], [Q, H], and the joint log-sum-exp where the rows stand, [H, P].
    out, lse, lse_whole,
    rows, places, steps, scale,
    # Sizes, and S and D filled up to powers of two: Triton's ranges are no others.
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, S2: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # offsets outgrow 32 bits: rows x heads x head size
    g = tl.program_id(1)
    place = tl.load(place_Q + row).to(tl.int64)
    s = tl.arange(0, S2)
    d = tl.arange(0, D2)
    head = g * S + s
    # A row without memory has its place behind the last: for it no head reads or writes there.
    seeing = tl.where(place < places, S, 0)
    inside_SD = (s < S)[:, None] & (d < D)[None, :]
    seeing_SD = (s < seeing)[:, None] & (d < D)[None, :]
    at_SD = head[:, None] * D + d[None, :]
    q_SD = tl.load(q + row * (G * S * D) + at_SD, mask=inside_SD, other=0.0).to(tl.float32)
    top_S = tl.load(memory_lse + head * places + place, mask=s < seeing, other=float("-inf"))
    out_SD = tl.load(memory + place * (G * S * D) + at_SD, mask=seeing_SD, other=0.0).to(tl.float32)
    # The memory's output is a softmax already: of weight one at its log-sum-exp, or of weight zero. Each draft key is then merged
    # as in an online softmax: the sum so far is scaled down when a larger score comes.
    sum_S = tl.where(top_S == float("-inf"), 0.0, 1.0)
    for step in range(steps):
        key = (step * rows + row) * (G * D) + g * D + d  # of this row's own draft key: no other row sees it
        k_D = tl.load(k + key, mask=d < D, other=0.0).to(tl.float32)
        v_D = tl.load(v + key, mask=d < D, other=0.0).to(tl.float32)
        score_S = tl.sum(q_SD * k_D[None, :], 1) * scale
        new_S = tl.maximum(top_S, score_S)
        old_S = tl.exp(top_S - new_S)
        weight_S = tl.exp(score_S - new_S)
        out_SD = out_SD * old_S[:, None] + weight_S[:, None] * v_D[None, :]
        sum_S = sum_S * old_S + weight_S
        top_S = new_S
    lse_S = top_S + tl.log(sum_S)
    tl.store(out + row * (G * S * D) + at_SD, (out_SD / sum_S[:, None]).to(out.dtype.element_ty), mask=inside_SD)
    tl.store(lse + row * (G * S) + head, lse_S, mask=s < S)
    tl.store(lse_whole + head * places + place, lse_S, mask=s < seeing)


@triton.jit(do_not_specialize=VARY)
def _join_backward_kernel(
    # What the forward was given and made; what the memory adds to the gradient of q, [P, H, D].
    grad, q, k, v, out, lse, dq_memory, place_Q,
    # Results.
    dq, dk, dv,
    rows, places, steps, scale,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, S2: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # offsets outgrow 32 bits: rows x heads x head size
    g = tl.program_id(1)
    place = tl.load(place_Q + row).to(tl.int64)
    s = tl.arange(0, S2)
    d = tl.arange(0, D2)
    head = g * S + s
    # A row without memory has its place behind the last: for it no head reads or writes there.
    seeing = tl.where(place < places, S, 0)
    inside_SD = (s < S)[:, None] & (d < D)[None, :]
    seeing_SD = (s < seeing)[:, None] & (d < D)[None, :]
    at_SD = head[:, None] * D + d[None, :]
    own_SD = row * (G * S * D) + at_SD
    q_SD = tl.load(q + own_SD, mask=inside_SD, other=0.0).to(tl.float32)
    grad_SD = tl.load(grad + own_SD, mask=inside_SD, other=0.0).to(tl.float32)
    out_SD = tl.load(out + own_SD, mask=inside_SD, other=0.0).to(tl.float32)
    lse_S = tl.load(lse + row * (G * S) + head, mask=s < S, other=float("inf"))  # heads that are none get the probability zero
    dq_SD = tl.load(dq_memory + place * (G * S * D) + at_SD, mask=seeing_SD, other=0.0).to(tl.float32)
    # sum_k p_k dp_k of the joint softmax is the gradient times the output, so that no key has to be read twice.
    delta_S = tl.sum(grad_SD * out_SD, 1)
    for step in range(steps):
        key = (step * rows + row) * (G * D) + g * D + d
        k_D = tl.load(k + key, mask=d < D, other=0.0).to(tl.float32)
        v_D = tl.load(v + key, mask=d < D, other=0.0).to(tl.float32)
        p_S = tl.exp(tl.sum(q_SD * k_D[None, :], 1) * scale - lse_S)
        ds_S = p_S * (tl.sum(grad_SD * v_D[None, :], 1) - delta_S) * scale
        dq_SD += ds_S[:, None] * k_D[None, :]
        # A draft key is seen by its own row alone: its gradient is summed over the S heads here, and nothing has to be added up
        # between programs.
        tl.store(dk + key, tl.sum(ds_S[:, None] * q_SD, 0).to(dk.dtype.element_ty), mask=d < D)
        tl.store(dv + key, tl.sum(p_S[:, None] * grad_SD, 0).to(dv.dtype.element_ty), mask=d < D)
    tl.store(dq + own_SD, dq_SD.to(dq.dtype.element_ty), mask=inside_SD)


def _sizes(k_JQGD: Tensor, q_QHD: Tensor) -> dict[str, int]:
    groups, size = k_JQGD.shape[2:]
    share = q_QHD.shape[1] // groups
    return {"G": groups, "S": share, "D": size, "S2": triton.next_power_of_2(share), "D2": triton.next_power_of_2(size)}


# What follows has the signatures of `flash.reference_join`. num_warps=1: a program has S x D numbers and a few keys; more warps
# would wait for each other at every sum.


def put(place_Q: Tensor, places: int, *tensors_QHD: Tensor) -> list[Tensor]:
    # One place more than there are takes the rows that see no memory; it is never read.
    order_Q = torch.arange(len(place_Q), device=place_Q.device)
    row_P = torch.full((places + 1,), -1, device=place_Q.device).index_copy(0, place_Q, order_Q)
    found = [t.new_empty(places, *t.shape[1:]) for t in tensors_QHD]
    for rows_QHD, out_PHD in zip(tensors_QHD, found):
        _put_kernel[(places,)](rows_QHD.contiguous(), out_PHD, row_P, out_PHD[0].numel(), BLOCK=1024)
    return found


def join(q_QHD, k_JQGD, v_JQGD, memory_PHD, memory_lse_HP, place_Q) -> tuple[Tensor, Tensor, Tensor]:
    steps, rows = k_JQGD.shape[:2]
    places = len(memory_PHD)
    scale = q_QHD.shape[-1] ** -0.5
    out_QHD = torch.empty_like(q_QHD)
    lse_QH = torch.empty(q_QHD.shape[:2], dtype=torch.float32, device=q_QHD.device)
    memory_PHD = memory_PHD.contiguous()
    memory_lse_HP = memory_lse_HP.contiguous()
    # Read and written by different programs: places without a row keep the memory's own.
    lse_HP = memory_lse_HP.clone()
    _join_kernel[(rows, k_JQGD.shape[2])](
        q_QHD, k_JQGD, v_JQGD, memory_PHD, memory_lse_HP, place_Q, out_QHD, lse_QH, lse_HP, rows, places, steps, scale,
        **_sizes(k_JQGD, q_QHD), num_warps=1,
    )  # fmt: skip
    return out_QHD, lse_QH, lse_HP


def join_backward(grad_QHD, q_QHD, k_JQGD, v_JQGD, out_QHD, lse_QH, dq_memory_PHD, place_Q) -> tuple[Tensor, Tensor, Tensor]:
    steps, rows = k_JQGD.shape[:2]
    places = len(dq_memory_PHD)
    scale = q_QHD.shape[-1] ** -0.5
    found = [torch.empty_like(t) for t in (q_QHD, k_JQGD, v_JQGD)]
    grad_QHD = grad_QHD.contiguous()
    dq_memory_PHD = dq_memory_PHD.contiguous()
    _join_backward_kernel[(rows, k_JQGD.shape[2])](
        grad_QHD, q_QHD, k_JQGD, v_JQGD, out_QHD, lse_QH, dq_memory_PHD, place_Q, *found, rows, places, steps, scale,
        **_sizes(k_JQGD, q_QHD), num_warps=1,
    )  # fmt: skip
    return tuple(found)
