"""Attention over preallocated caches, of which each request has filled as much as it has: no sizes change, nothing is copied.

Shapes: B requests, T rows of each, Q = B x T rows, L places of a cache, W places of it that rows with a window span, R draft rows
as keys, H query heads, G key/value heads, D head size, S query heads of a KV head. A part is (output [B, T, H, D], log-sum-exp of
its scores [B, T, H]); parts over different keys are merged by the latter.
"""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_prep.decoding.torch_private import attention_with_lse

Part = tuple[Tensor, Tensor]

PIECE = 256  # rows whose scores exist at a time, where they read through a window


class Reading(NamedTuple):
    """How a layer reads keys, where it is not the usual way.

    `scale`: what scores are multiplied by; None: D ** -0.5. `window`: how many places a row reads at most, the last one its own;
    None: all before it. `sinks_H`: a logit of each head that takes part in the softmax and has no value (gpt-oss).
    """

    scale: float | None = None
    window: int | None = None
    sinks_H: Tensor | None = None


PLAIN = Reading()


def over_cache(
    q_BTHD: Tensor,
    k_BLGD: Tensor,
    v_BLGD: Tensor,
    count_B: Tensor,
    growing: bool,
    reading: Reading = PLAIN,
    place_BT: Tensor | None = None,
) -> Part:
    """Every row reads the first `count_B` keys of its request; `growing`: row t reads t more (a causal chain whose own keys are
    in the cache). Rows that read nothing give zeros, and minus infinity. On a GPU flash-attn where it is installed and takes
    heads of this size, else `dense`; on a CPU PyTorch's fused kernel.

    Args:
        reading: its scale and window. Sinks are not counted here, since a row that reads several parts has them once (`sunk`).
        place_BT: the places of the rows, which a window is counted from; None: growing rows stand on the last key they read.
    """
    if q_BTHD.device.type == "cpu":
        return _filled(q_BTHD, k_BLGD, v_BLGD, count_B, growing, reading, place_BT)
    # flash-attn's windows are counted from the last key that a row reads.
    if has_flash(q_BTHD) and (reading.window is None or (growing and place_BT is None)):
        return _flash(q_BTHD, k_BLGD, v_BLGD, count_B, growing, reading)
    if reading.window is None:
        return dense(q_BTHD, k_BLGD, v_BLGD, count_B, growing, reading)
    count_BT = _counts(count_B, growing, q_BTHD.shape[1])
    return over_span(q_BTHD, k_BLGD, v_BLGD, _first(reading.window, count_BT, place_BT), count_BT, reading)


def over_span(
    q_BTHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, first_BT: Tensor, count_BT: Tensor, reading: Reading
) -> Part:
    """Rows that read through a window: row t of a request reads the places from `first_BT` (below 0: from 0) to `count_BT` - 1,
    a window of them at most. From a row to the next both grow by one at most. Places that no row reads are not touched."""
    if q_BTHD.shape[1] > PIECE:
        pieces = zip(*(t.split(PIECE, dim=1) for t in (q_BTHD, first_BT, count_BT)))
        found = [over_span(q, k_BLGD, v_BLGD, first, count, reading) for q, first, count in pieces]
        return tuple(torch.cat(part, dim=1) for part in zip(*found))
    # How many places the rows span together is a number that the host knows, so that a CUDA graph can hold this.
    span = min(reading.window + q_BTHD.shape[1], k_BLGD.shape[1])
    begin_B1 = first_BT[:, :1].clamp(min=0, max=k_BLGD.shape[1] - span)
    place_BW = begin_B1 + torch.arange(span, device=q_BTHD.device)
    row_B1 = torch.arange(len(place_BW), device=q_BTHD.device)[:, None]
    place_B1W = place_BW[:, None]
    hidden_BTW = (place_B1W < first_BT[..., None]) | (place_B1W >= count_BT[..., None])
    return _attend(q_BTHD, k_BLGD[row_B1, place_BW], v_BLGD[row_B1, place_BW], hidden_BTW, reading.scale)


def has_flash(q: Tensor) -> bool:
    """Whether flash-attn attends in this dtype, with heads of this size."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _installed() and _takes(q.shape[-1], q.dtype)


@cache
def _installed() -> bool:
    return find_spec("flash_attn") is not None


@cache
def _takes(size: int, dtype: torch.dtype) -> bool:
    """The kernel has heads of 256 numbers at most, and which of the smaller sizes depends on how it was built: it is asked."""
    from flash_attn import flash_attn_with_kvcache

    one_BTHD = torch.zeros(1, 1, 1, size, dtype=dtype, device="cuda")
    try:
        flash_attn_with_kvcache(one_BTHD, one_BTHD, one_BTHD)
    except RuntimeError:
        return False
    return True


def dense(
    q_BTHD: Tensor,
    k_BLGD: Tensor,
    v_BLGD: Tensor,
    count_B: Tensor,
    growing: bool,
    reading: Reading = PLAIN,
    place_BT: Tensor | None = None,
) -> Part:
    """The oracle: all scores, those of hidden keys thrown away."""
    count_BT = _counts(count_B, growing, q_BTHD.shape[1])
    place_L = torch.arange(k_BLGD.shape[1], device=q_BTHD.device)
    hidden_BTL = place_L >= count_BT[..., None]
    if reading.window is not None:
        hidden_BTL = hidden_BTL | (place_L < _first(reading.window, count_BT, place_BT)[..., None])
    return _attend(q_BTHD, k_BLGD, v_BLGD, hidden_BTL, reading.scale)


def _counts(count_B: Tensor, growing: bool, rows: int) -> Tensor:
    """How many keys each row reads where no window hides some, [B, T]."""
    return count_B[:, None] + growing * torch.arange(rows, device=count_B.device)


def _first(window: int, count_BT: Tensor, place_BT: Tensor | None) -> Tensor:
    """The first place in the window of each row, [B, T]; negative where the window reaches beyond the first key."""
    return (count_BT - 1 if place_BT is None else place_BT) - window + 1


def among_rows(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, reading: Reading = PLAIN) -> Tensor:
    """Causal attention of rows among themselves, behind nothing, [B, T, H, D]."""
    if reading.window is None and reading.sinks_H is None:
        q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTGD, v_BTGD))
        grouped = q.shape[1] != k.shape[1]
        out_BHTD = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=grouped, scale=reading.scale
        )
        return out_BHTD.transpose(1, 2)
    # The rows' own keys as a cache, of which the first row reads one.
    one_B = torch.ones(len(q_BTHD), dtype=torch.long, device=q_BTHD.device)
    return sunk(over_cache(q_BTHD, k_BTGD, v_BTGD, one_B, growing=True, reading=reading), reading.sinks_H)


def over_rows(q_BTHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, seen_BTR: Tensor, scale: float | None = None) -> Part:
    """Rows over draft rows of all requests: a few keys, so that a mask says whose they are."""
    return _attend(q_BTHD, k_RGD[None], v_RGD[None], ~seen_BTR, scale)


def sunk(part: Part, sinks_H: Tensor | None) -> Tensor:
    """The part's output, when sinks take their share of the softmax, [B, T, H, D]. None: there are none."""
    out, lse = part
    if sinks_H is None:
        return out
    # exp(lse) / (exp(lse) + exp(sink)), without the overflow.
    return (out * torch.sigmoid(lse - sinks_H.to(lse.dtype))[..., None]).to(out.dtype)


def joined(one: Part, other: Part) -> Part:
    """The part over both parts' keys."""
    return merge(one, other), torch.logaddexp(one[1], other[1])


def merge(one: Part, other: Part) -> Tensor:
    """Softmax attention over both parts' keys, [B, T, H, D]."""
    a, a_lse = one
    b, b_lse = other
    # exp(b) / (exp(a) + exp(b)), without the overflow. At least one of the parts has to see a key: of two minus infinities the
    # difference is no number.
    share = torch.sigmoid(b_lse - a_lse)[..., None]
    return (a + share * (b - a)).to(a.dtype)


def _attend(q_BTHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, hidden_BTL: Tensor, scale: float | None) -> Part:
    # At least float32: this is the definition that the kernels are held against.
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    q_BTGSD = q_BTHD.to(wide).unflatten(2, (k_BLGD.shape[2], -1))
    k, v = (t.to(wide).expand(len(q_BTHD), -1, -1, -1) for t in (k_BLGD, v_BLGD))
    scores = torch.einsum("btgsd,blgd->btgsl", q_BTGSD, k) * (scale or q_BTHD.shape[-1] ** -0.5)
    scores = scores.masked_fill(hidden_BTL[:, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    # A row that sees nothing has minus infinity everywhere, and the difference of two of these is no number. Zero in its place
    # gives weights of zero.
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    out = torch.einsum("btgsl,blgd->btgsd", weights, v)
    return out.flatten(2, 3).to(q_BTHD.dtype), lse.flatten(2, 3)


def _filled(
    q_BTHD: Tensor,
    k_BLGD: Tensor,
    v_BLGD: Tensor,
    count_B: Tensor,
    growing: bool,
    reading: Reading = PLAIN,
    place_BT: Tensor | None = None,
) -> Part:
    """A CPU can ask how much of the cache is filled, and reads no more than that.

    Where all requests have as many keys and no window hides any, no mask is needed: rows read all keys before the first row, and
    of the rows' own keys those up to themselves, which is the kernel's causal case. One row of each request needs none either.
    Otherwise a mask says where each row's keys begin and end.
    """
    rows = q_BTHD.shape[1]
    scale = reading.scale
    # On a CPU this costs next to nothing. On a GPU it would make the host wait for the device.
    counts = count_B.tolist()
    count = counts[0]
    first_BT = None
    nearest = farthest = 0
    if reading.window is not None:
        first_BT = _first(reading.window, _counts(count_B, growing, rows), place_BT).clamp(min=0)
        nearest = int(first_BT.max())
        farthest = int(first_BT.min())
    # The last condition: a row that reads no key is for the mask.
    if min(counts) == max(counts) and nearest == farthest < count and (nearest == 0 or rows == 1):
        if rows == 1 or not growing:
            return _fused(q_BTHD, k_BLGD[:, nearest:count], v_BLGD[:, nearest:count], scale)
        before = count - 1
        own = _fused(q_BTHD, k_BLGD[:, before : before + rows], v_BLGD[:, before : before + rows], scale, causal=True)
        if before == 0:
            return own
        return joined(_fused(q_BTHD, k_BLGD[:, :before], v_BLGD[:, :before], scale), own)

    most = max(counts) + growing * (rows - 1)
    start = max(min(farthest, most - 1), 0)
    most = max(most, start + 1)  # the kernel takes one key at least
    count_BT = _counts(count_B, growing, rows)
    place_L = torch.arange(start, most)
    hidden_BTL = place_L >= count_BT[..., None]
    if first_BT is not None:
        hidden_BTL |= place_L < first_BT[..., None]
    # The kernel adds its mask to the scores.
    mask = torch.zeros(hidden_BTL.shape, dtype=q_BTHD.dtype).masked_fill_(hidden_BTL, -torch.inf)[:, None]
    out, lse = _fused(q_BTHD, k_BLGD[:, start:most], v_BLGD[:, start:most], scale, mask=mask)
    none_BT1 = hidden_BTL.all(-1, keepdim=True)  # what the kernel says of such a row is not defined
    return out.masked_fill(none_BT1[..., None], 0), lse.masked_fill(none_BT1, -torch.inf)


def _fused(
    q_BTHD: Tensor,
    k_BLGD: Tensor,
    v_BLGD: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Part:
    """The kernel behind `scaled_dot_product_attention` on a CPU; that function does not hand out the log-sum-exp."""
    _, rows, query_heads, size = q_BTHD.shape
    heads = k_BLGD.shape[2]
    sharing = query_heads // heads
    k, v = (t.transpose(1, 2) for t in (k_BLGD, v_BLGD))
    if causal:
        out_BHTD, lse_BHT = attention_with_lse(q_BTHD.transpose(1, 2), k, v, causal=True, scale=scale)
        return out_BHTD.transpose(1, 2), lse_BHT.transpose(1, 2)
    # Query heads that share a KV head stand beside each other as rows: a key is then read once for all of them.
    q_BGRD = q_BTHD.unflatten(2, (heads, sharing)).transpose(1, 2).reshape(len(q_BTHD), heads, rows * sharing, size)
    mask = mask if mask is None else mask.repeat_interleave(sharing, dim=2)
    out_BGRD, lse_BGR = attention_with_lse(q_BGRD, k, v, mask, scale=scale)
    out_BTHD = out_BGRD.unflatten(2, (rows, sharing)).transpose(1, 2).flatten(2, 3)
    return out_BTHD, lse_BGR.unflatten(2, (rows, sharing)).transpose(1, 2).flatten(2, 3)


def _flash(q_BTHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, count_B: Tensor, growing: bool, reading: Reading) -> Part:
    """A window is that of growing rows."""
    from flash_attn import flash_attn_with_kvcache

    rows = q_BTHD.shape[1]
    seen_B = (count_B + growing * (rows - 1)).int()  # flash-attn lines the last row up with the last key
    # num_splits=0 leaves to the kernel over how many blocks it spreads the keys. With few requests and many keys one block for
    # each head would leave most of the GPU idle.
    out, lse_BHT = flash_attn_with_kvcache(
        q_BTHD,
        k_BLGD,
        v_BLGD,
        cache_seqlens=seen_B,
        softmax_scale=reading.scale,
        causal=growing,
        window_size=(-1, -1) if reading.window is None else (reading.window - 1, 0),
        return_softmax_lse=True,
        num_splits=0,
    )
    none_BT1 = (_counts(count_B, growing, rows) <= 0)[..., None]  # such a row's log-sum-exp is plus infinity or garbage there
    return out.masked_fill(none_BT1[..., None], 0), lse_BHT.transpose(1, 2).masked_fill(none_BT1, -torch.inf)
