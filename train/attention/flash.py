"""The rule of autoregressive drafting by FlashAttention: memory by its kernel, the few draft keys of a row beside it, joined by
their log-sum-exp.

At every step of ttt a row is of another anchor and sees the memory before it: a causal pattern, with a query at each position
that has an anchor. Its draft keys are its own rows of this step and of those before. The backward is exact, and needs no second
pass: FlashAttention's own takes the joint output and log-sum-exp, and so makes the gradients of the joint softmax.

flash-attn where it is installed, PyTorch's own copy elsewhere on a GPU, PyTorch's CPU kernel on a CPU; the draft keys by Triton
(`train/attention/joint.py`), or on a CPU by `reference_join` here, their definition.

Shapes: Q draft rows, P memory positions, J steps, K = P + J x Q keys, H query heads, G key/value heads, S = H / G, D head size.
"""

import torch
from torch import Tensor

from train.attention import torch_private
from train.attention.backend import Keys, backend
from train.attention.visibility import Visibility


@backend(takes_parts=True)
def flash(q_QHD: Tensor, k_KGD: Keys, v_KGD: Keys, visibility: Visibility) -> Tensor:
    """Softmax attention of the visible keys, [Q, H, D]. For rows of ttt under no view and no window; the keys of its steps come
    in order."""
    assert visibility.selection is None and visibility.window is None
    # 1. Where each row stands among the memory: at the last key that it sees. Causal attention then shows it exactly its own.
    memory = visibility.memory
    rows = visibility.queries
    begin_Q = memory.bounds[rows.document]
    end_Q = memory.bounds[rows.document + 1]
    count_Q = torch.minimum(rows.anchor - memory.position[begin_Q], end_Q - begin_Q)  # of memory keys that a row sees
    # A row that sees none has no place among the keys: it is sent to one behind them.
    place_Q = torch.where(count_Q > 0, begin_Q + count_Q - 1, len(memory.position))
    # 2. Keys in parts, whichever way they came.
    steps = len(visibility.drafts.slot) // len(q_QHD)
    sizes = [len(memory.position), *[len(q_QHD)] * steps]
    (k_PGD, *k_steps), (v_PGD, *v_steps) = (t.split(sizes) if isinstance(t, Tensor) else t for t in (k_KGD, v_KGD))
    if not steps:
        return _Memory.apply(q_QHD, k_PGD, v_PGD, place_Q, memory.bounds)
    return _Joint.apply(q_QHD, k_PGD, v_PGD, place_Q, memory.bounds, *k_steps, *v_steps)


class _Memory(torch.autograd.Function):
    """Rows that have no keys of their own: memory is all that they see."""

    @staticmethod
    def forward(ctx, q_QHD, k_PGD, v_PGD, place_Q, bounds):
        forward, _ = kernel(q_QHD.is_cuda)
        k_PGD = k_PGD.contiguous()
        v_PGD = v_PGD.contiguous()
        (q_PHD,) = drafts(q_QHD.is_cuda).put(place_Q, len(k_PGD), q_QHD.contiguous())
        out_PHD, lse_HP, extra = forward(q_PHD, k_PGD, v_PGD, bounds)
        ctx.save_for_backward(q_PHD, k_PGD, v_PGD, out_PHD, lse_HP, place_Q, bounds, *extra)
        return _at(out_PHD, place_Q)

    @staticmethod
    def backward(ctx, grad_QHD):
        q_PHD, k_PGD, v_PGD, out_PHD, lse_HP, place_Q, bounds, *extra = ctx.saved_tensors
        _, backward = kernel(grad_QHD.is_cuda)
        (grad_PHD,) = drafts(grad_QHD.is_cuda).put(place_Q, len(k_PGD), grad_QHD.contiguous())
        dq_PHD, dk_PGD, dv_PGD = backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_HP, bounds, tuple(extra))
        return _at(dq_PHD, place_Q), dk_PGD, dv_PGD, None, None


class Taken(torch.autograd.Function):
    """Rows [Q, ...] of t [P, ...] at places of which none comes twice. A place behind the last gives the last's, and teaches it
    nothing."""

    @staticmethod
    def forward(ctx, t_P, place_Q):
        ctx.places = len(t_P)
        ctx.save_for_backward(place_Q)
        return t_P[place_Q.clamp(max=len(t_P) - 1)]

    @staticmethod
    def backward(ctx, grad_Q):
        # PyTorch's own gradient of an index sorts, since rows may be the same.
        (place_Q,) = ctx.saved_tensors
        return drafts(grad_Q.is_cuda).put(place_Q.clamp(max=ctx.places), ctx.places, grad_Q)[0], None


def _at(t_PHD: Tensor, place_Q: Tensor) -> Tensor:
    """What stands at the rows' places; zero for rows without one."""
    return torch.cat([t_PHD, torch.zeros_like(t_PHD[:1])])[place_Q]


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_QHD, k_PGD, v_PGD, place_Q, bounds, *steps):
        own = drafts(q_QHD.is_cuda)
        forward, _ = kernel(q_QHD.is_cuda)
        q_QHD = q_QHD.contiguous()
        k_JQGD, v_JQGD = _stacked(steps)
        memory_PHD, lse_HP, extra = forward(*own.put(place_Q, len(k_PGD), q_QHD), k_PGD.contiguous(), v_PGD.contiguous(), bounds)
        # Where no row stands, no gradient comes from; the kernel's own log-sum-exp there is as good as any.
        out_QHD, lse_QH, lse_HP = own.join(q_QHD, k_JQGD, v_JQGD, memory_PHD, lse_HP, place_Q)
        ctx.steps = len(steps)
        # Not the stacks: these steps' tensors are shared with all later steps, a stack would be this step's own.
        ctx.save_for_backward(q_QHD, k_PGD, v_PGD, out_QHD, lse_QH, lse_HP, place_Q, bounds, *steps, *extra)
        return out_QHD

    @staticmethod
    def backward(ctx, grad_QHD):
        q_QHD, k_PGD, v_PGD, out_QHD, lse_QH, lse_HP, place_Q, bounds, *rest = ctx.saved_tensors
        k_JQGD, v_JQGD = _stacked(rest[: ctx.steps])
        extra = rest[ctx.steps :]
        own = drafts(q_QHD.is_cuda)
        _, backward = kernel(q_QHD.is_cuda)
        # Given the joint output and log-sum-exp, FlashAttention's backward makes the gradients of the joint softmax.
        put = own.put(place_Q, len(k_PGD), grad_QHD, q_QHD, out_QHD)
        dq_PHD, dk_PGD, dv_PGD = backward(*put, k_PGD.contiguous(), v_PGD.contiguous(), lse_HP, bounds, extra)
        dq_QHD, dk_JQGD, dv_JQGD = own.join_backward(grad_QHD, q_QHD, k_JQGD, v_JQGD, out_QHD, lse_QH, dq_PHD, place_Q)
        return dq_QHD, dk_PGD, dv_PGD, None, None, *dk_JQGD.unbind(), *dv_JQGD.unbind()


def _stacked(steps) -> tuple[Tensor, Tensor]:
    """Keys and values [J, Q, G, D]: made when they are needed, since each step has those of all before it."""
    half = len(steps) // 2
    return torch.stack(list(steps[:half])), torch.stack(list(steps[half:]))


class reference_join:
    """The draft keys' part in plain PyTorch: the definition, and what a CPU runs. `train/attention/joint.py` is the same as
    kernels."""

    @staticmethod
    def put(place_Q: Tensor, places: int, *tensors_QHD: Tensor) -> list[Tensor]:
        """Each tensor's rows at their places, zero elsewhere, [P, H, D]."""
        return [t.new_zeros(places + 1, *t.shape[1:]).index_copy(0, place_Q, t)[:places] for t in tensors_QHD]

    @staticmethod
    def join(q_QHD, k_JQGD, v_JQGD, memory_PHD, memory_lse_HP, place_Q) -> tuple[Tensor, Tensor, Tensor]:
        """(output, log-sum-exp) of the rows over memory and draft keys, and the latter [H, P] where the rows stand."""
        groups = k_JQGD.shape[2]
        at_Q = place_Q.clamp(max=len(memory_PHD) - 1)
        none_Q = place_Q >= len(memory_PHD)
        score_JQGS = _scores(_grouped(q_QHD, groups), k_JQGD)
        memory_lse_QH = memory_lse_HP.T[at_Q].masked_fill(none_Q[:, None], -torch.inf)
        memory_lse_QGS = memory_lse_QH.unflatten(1, (groups, -1))
        memory_QGSD = _grouped(memory_PHD[at_Q], groups)
        # Two softmaxes are joined by their shares of the sum of exponentials.
        lse_QGS = torch.logaddexp(score_JQGS.logsumexp(0), memory_lse_QGS)
        drafts_QGSD = ((score_JQGS - lse_QGS).exp()[..., None] * v_JQGD[:, :, :, None]).sum(0)
        out_QGSD = drafts_QGSD + (memory_lse_QGS - lse_QGS).exp()[..., None] * memory_QGSD
        lse_QH = lse_QGS.flatten(1)
        lse_PH = torch.cat([memory_lse_HP.T, lse_QH[:1]]).index_copy(0, place_Q, lse_QH)[: len(memory_PHD)]
        return out_QGSD.flatten(1, 2).to(q_QHD.dtype), lse_QH, lse_PH.T

    @staticmethod
    def join_backward(grad_QHD, q_QHD, k_JQGD, v_JQGD, out_QHD, lse_QH, dq_memory_PHD, place_Q) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k_JQGD and v_JQGD in the joint softmax; `dq_memory_PHD`: what the memory adds to q's."""
        groups = k_JQGD.shape[2]
        scale = q_QHD.shape[-1] ** -0.5
        grad, q, out = (_grouped(t, groups) for t in (grad_QHD, q_QHD, out_QHD))
        p_JQGS = (_scores(q, k_JQGD) - lse_QH.unflatten(1, (groups, -1))).exp()
        dp_JQGS = (grad * v_JQGD[:, :, :, None].to(grad.dtype)).sum(-1)
        ds_JQGS1 = (p_JQGS * (dp_JQGS - (grad * out).sum(-1)) * scale)[..., None]
        dq_QHD = (ds_JQGS1 * k_JQGD[:, :, :, None]).sum(0).flatten(1, 2)
        dq_QHD = dq_QHD + _at(dq_memory_PHD, place_Q)
        dk_JQGD = (ds_JQGS1 * q).sum(3)
        dv_JQGD = (p_JQGS[..., None] * grad).sum(3)
        return dq_QHD.to(q_QHD.dtype), dk_JQGD.to(k_JQGD.dtype), dv_JQGD.to(v_JQGD.dtype)


def _scores(q_QGSD: Tensor, k_JQGD: Tensor) -> Tensor:
    return (q_QGSD * k_JQGD[:, :, :, None].to(q_QGSD.dtype)).sum(-1) * q_QGSD.shape[-1] ** -0.5


def _grouped(t_QHD: Tensor, groups: int) -> Tensor:
    """[Q, G, S, D] in float32, or float64."""
    return t_QHD.unflatten(1, (groups, -1)).to(torch.promote_types(t_QHD.dtype, torch.float32))


def drafts(on_gpu: bool):
    """What handles the draft keys."""
    if not on_gpu:
        return reference_join
    from train.attention import joint

    return joint


def kernel(on_gpu: bool, own: bool = False):
    """(forward, backward) of causal attention within documents; both log-sum-exps are [H, P]. `own`: PyTorch's, in any case."""
    if not on_gpu:
        return _cpu_forward, _cpu_backward
    if own or not torch_private.has_flash_attn():
        return torch_private.own_forward, torch_private.own_backward
    return _package_forward, _package_backward


def _package_forward(q_PHD, k_PGD, v_PGD, bounds):
    return *torch_private.package_forward(q_PHD, k_PGD, v_PGD, bounds), ()


def _package_backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_HP, bounds, extra):
    return torch_private.package_backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_HP, bounds)


def _documents(tensors: tuple[Tensor, ...], bounds: Tensor, heads: int):
    """Of each document [1, H, L, D]; the CPU kernel wants a key head for every query head."""
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        parts = (t[begin:end] for t in tensors)
        yield slice(begin, end), [t.repeat_interleave(heads // t.shape[1], 1).transpose(0, 1)[None] for t in parts]


def _cpu_forward(q_PHD, k_PGD, v_PGD, bounds):
    documents = _documents((q_PHD, k_PGD, v_PGD), bounds, q_PHD.shape[1])
    found = [torch_private.cpu_forward(*document) for _, document in documents]
    out_HPD, lse_HP = (torch.cat([t[0] for t in column], dim=1) for column in zip(*found))
    return out_HPD.transpose(0, 1), lse_HP, ()


def _cpu_backward(grad_PHD, q_PHD, out_PHD, k_PGD, v_PGD, lse_HP, bounds, extra):
    found = []
    for part, document in _documents((grad_PHD, q_PHD, k_PGD, v_PGD, out_PHD), bounds, q_PHD.shape[1]):
        found.append(torch_private.cpu_backward(*document, lse_HP[None, :, part].contiguous()))
    dq, dk, dv = (torch.cat([t[0].transpose(0, 1) for t in column]) for column in zip(*found))
    # The kernel had a key head for each query head: the gradients of those that are the same head add up.
    return dq, *(t.unflatten(1, (k_PGD.shape[1], -1)).sum(2) for t in (dk, dv))
