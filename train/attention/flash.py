"""The rule of autoregressive drafting by FlashAttention: memory by its kernel, the few draft keys of a row beside it, joined by
their log-sum-exp.

At every step of ttt a row is of another anchor and sees the memory before it: a causal pattern, with a query at each position
that has an anchor. Its draft keys are its own rows of this step and of those before. The backward is exact, and needs no second
pass: FlashAttention's own takes the joint output and log-sum-exp, and so makes the gradients of the joint softmax.

flash-attn where it is installed, PyTorch's copy of it elsewhere on a GPU, PyTorch's CPU kernel on a CPU.

Shapes: Q draft rows, P memory positions, J steps, K = P + J x Q keys, H query heads, G key/value heads, S = H / G, D head size.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from train.attention.visibility import Visibility


def flash(q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, visibility: Visibility) -> Tensor:
    """Softmax attention of the visible keys, [Q, H, D]. For rows of ttt under no view; the keys of its steps come in order."""
    assert visibility.shown is None and (len(k_KGD) - len(visibility.memory.position)) % len(q_QHD) == 0
    memory, rows = visibility.memory, visibility.queries
    begin_Q, end_Q = memory.bounds[rows.document], memory.bounds[rows.document + 1]
    count_Q = torch.minimum(rows.anchor - memory.position[begin_Q], end_Q - begin_Q)  # of memory keys that a row sees
    # A row that sees none has no place among the keys: it is sent to one behind them.
    place_Q = torch.where(count_Q > 0, begin_Q + count_Q - 1, len(memory.position))
    split = [len(memory.position), len(k_KGD) - len(memory.position)]
    (k_PGD, k_RGD), (v_PGD, v_RGD) = k_KGD.split(split), v_KGD.split(split)
    k_JQGD, v_JQGD = (t.unflatten(0, (-1, len(q_QHD))) for t in (k_RGD, v_RGD))
    return _Joint.apply(q_QHD, k_PGD, v_PGD, k_JQGD, v_JQGD, place_Q, memory.bounds)


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_QHD, k_PGD, v_PGD, k_JQGD, v_JQGD, place_Q, bounds):
        forward, _ = kernel(q_QHD.is_cuda)
        places = len(k_PGD)
        q_PHD = _put(q_QHD, place_Q, places)
        out_PHD, lse_PH, extra = forward(q_PHD, k_PGD.contiguous(), v_PGD.contiguous(), bounds)
        at_Q = place_Q.clamp(max=places - 1)
        lse_QH = torch.where((place_Q < places)[:, None], lse_PH[at_Q], -torch.inf)
        out_QHD, lse_QH = _compiled(_join, q_QHD.is_cuda)(q_QHD, k_JQGD, v_JQGD, out_PHD[at_Q], lse_QH)
        # Where no row stands, no gradient comes from; the kernel's own number there is as good as any.
        lse_PH = torch.cat([lse_PH, lse_PH[:1]]).index_copy(0, place_Q, lse_QH)[:places]
        ctx.save_for_backward(q_QHD, k_PGD, v_PGD, k_JQGD, v_JQGD, out_QHD, lse_QH, lse_PH, place_Q, bounds, *extra)
        return out_QHD

    @staticmethod
    def backward(ctx, grad_QHD):
        q_QHD, k_PGD, v_PGD, k_JQGD, v_JQGD, out_QHD, lse_QH, lse_PH, place_Q, bounds, *extra = ctx.saved_tensors
        _, backward = kernel(q_QHD.is_cuda)
        dq_QHD, dk_JQGD, dv_JQGD = _compiled(_join_backward, q_QHD.is_cuda)(grad_QHD, q_QHD, k_JQGD, v_JQGD, out_QHD, lse_QH)
        put = [_put(t, place_Q, len(k_PGD)) for t in (grad_QHD, q_QHD, out_QHD)]
        dq_PHD, dk_PGD, dv_PGD = backward(*put, k_PGD.contiguous(), v_PGD.contiguous(), lse_PH, bounds, extra)
        seen_Q = (place_Q < len(k_PGD))[:, None, None]
        dq_QHD = dq_QHD + torch.where(seen_Q, dq_PHD[place_Q.clamp(max=len(k_PGD) - 1)], 0)
        return dq_QHD, dk_PGD, dv_PGD, dk_JQGD, dv_JQGD, None, None


def _put(rows_QHD: Tensor, place_Q: Tensor, places: int) -> Tensor:
    """Rows at their places, zero elsewhere, [P, H, D]."""
    return rows_QHD.new_zeros(places + 1, *rows_QHD.shape[1:]).index_copy(0, place_Q, rows_QHD)[:places]


def _scores(q_QGSD: Tensor, k_JQGD: Tensor) -> Tensor:
    return (q_QGSD * k_JQGD[:, :, :, None].to(q_QGSD.dtype)).sum(-1) * q_QGSD.shape[-1] ** -0.5


def _grouped(t_QHD: Tensor, groups: int) -> Tensor:
    """[Q, G, S, D] in float32, or float64."""
    return t_QHD.unflatten(1, (groups, -1)).to(torch.promote_types(t_QHD.dtype, torch.float32))


def _join(q_QHD: Tensor, k_JQGD: Tensor, v_JQGD: Tensor, memory_QHD: Tensor, memory_lse_QH: Tensor) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) over the memory's part and the draft keys."""
    groups = k_JQGD.shape[2]
    q_QGSD, memory_QGSD = _grouped(q_QHD, groups), _grouped(memory_QHD, groups)
    score_JQGS, memory_lse_QGS = _scores(q_QGSD, k_JQGD), memory_lse_QH.unflatten(1, (groups, -1))
    lse_QGS = torch.logaddexp(score_JQGS.logsumexp(0), memory_lse_QGS)
    drafts_QGSD = ((score_JQGS - lse_QGS).exp()[..., None] * v_JQGD[:, :, :, None]).sum(0)
    out_QGSD = drafts_QGSD + (memory_lse_QGS - lse_QGS).exp()[..., None] * memory_QGSD
    return out_QGSD.flatten(1, 2).to(q_QHD.dtype), lse_QGS.flatten(1)


def _join_backward(grad_QHD: Tensor, q_QHD: Tensor, k_JQGD: Tensor, v_JQGD: Tensor, out_QHD: Tensor, lse_QH: Tensor):
    """Gradients (q's from the draft keys alone, k_JQGD's, v_JQGD's) of the joint softmax."""
    groups, scale = k_JQGD.shape[2], q_QHD.shape[-1] ** -0.5
    grad, q, out = (_grouped(t, groups) for t in (grad_QHD, q_QHD, out_QHD))
    p_JQGS = (_scores(q, k_JQGD) - lse_QH.unflatten(1, (groups, -1))).exp()
    dp_JQGS = (grad * v_JQGD[:, :, :, None].to(grad.dtype)).sum(-1)
    ds_JQGS1 = (p_JQGS * (dp_JQGS - (grad * out).sum(-1)) * scale)[..., None]
    dq = (ds_JQGS1 * k_JQGD[:, :, :, None]).sum(0).flatten(1, 2)
    return dq.to(q_QHD.dtype), (ds_JQGS1 * q).sum(3).to(k_JQGD.dtype), (p_JQGS[..., None] * grad).sum(3).to(v_JQGD.dtype)


@cache
def _compiled(function, on_gpu: bool):
    return torch.compile(function, dynamic=True) if on_gpu else function


@cache
def kernel(on_gpu: bool, own: bool = False):
    """(forward, backward) of causal attention within documents; both log-sum-exps are [P, H]. `own`: PyTorch's, in any case."""
    if not on_gpu:
        return _cpu_forward, _cpu_backward
    if own or importlib.util.find_spec("flash_attn") is None:
        return _torch_forward, _torch_backward
    return _package_forward, _package_backward


def _package_forward(q_PHD, k_PGD, v_PGD, bounds):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    lengths, scale = (len(q_PHD), len(k_PGD)), q_PHD.shape[-1] ** -0.5
    out_PHD, lse_HP, *_ = _flash_attn_varlen_forward(q_PHD, k_PGD, v_PGD, bounds, bounds, *lengths, 0.0, scale, causal=True)
    return out_PHD, lse_HP.T, ()


def _package_backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_PH, bounds, extra):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    lengths, found = (len(q_PHD), len(k_PGD)), [torch.empty_like(t) for t in (q_PHD, k_PGD, v_PGD)]
    _flash_attn_varlen_backward(
        grad_PHD, q_PHD, k_PGD, v_PGD, out_PHD, lse_PH.T.contiguous(), *found, bounds, bounds, *lengths, 0.0,
        q_PHD.shape[-1] ** -0.5, True, -1, -1, 0.0, None, False,
    )  # fmt: skip
    return found


def _torch_forward(q_PHD, k_PGD, v_PGD, bounds):
    lengths = (len(q_PHD), len(k_PGD))
    out_PHD, lse_HP, *extra, _ = torch.ops.aten._flash_attention_forward(
        q_PHD, k_PGD, v_PGD, bounds, bounds, *lengths, 0.0, True, False
    )
    return out_PHD, lse_HP.T, extra


def _torch_backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_PH, bounds, extra):
    lengths = (len(q_PHD), len(k_PGD))
    return torch.ops.aten._flash_attention_backward(
        grad_PHD, q_PHD, k_PGD, v_PGD, out_PHD, lse_PH.T.contiguous(), bounds, bounds, *lengths, 0.0, True, *extra
    )


def _documents(tensors: tuple[Tensor, ...], bounds: Tensor, heads: int):
    """Of each document [1, H, L, D] (or [1, H, L]); the CPU kernel wants a key head for every query head."""
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        parts = (t[begin:end] for t in tensors)
        yield [t.repeat_interleave(heads // t.shape[1], 1).transpose(0, 1)[None] for t in parts]


def _cpu_forward(q_PHD, k_PGD, v_PGD, bounds):
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = [attend(*document, 0.0, True) for document in _documents((q_PHD, k_PGD, v_PGD), bounds, q_PHD.shape[1])]
    return *(torch.cat([t[0].transpose(0, 1) for t in column]) for column in zip(*found)), ()


def _cpu_backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_PH, bounds, extra):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    documents = _documents((grad_PHD, q_PHD, k_PGD, v_PGD, out_PHD, lse_PH), bounds, q_PHD.shape[1])
    dq, dk, dv = (
        torch.cat([t[0].transpose(0, 1) for t in column]) for column in zip(*(backward(*d, 0.0, True) for d in documents))
    )
    return dq, *(t.unflatten(1, (k_PGD.shape[1], -1)).sum(2) for t in (dk, dv))
