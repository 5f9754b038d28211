"""Attention over preallocated caches equals its definition, `dense`, which is computed from all scores."""

from importlib.util import find_spec

import pytest
import torch

from data_prep.decoding import attention
from data_prep.decoding.attention import Reading, among_rows, dense, has_flash, joined, over_cache, sunk

COUNTS = {"equal": [7, 7, 7], "ragged": [7, 1, 12], "one": [9], "first": [1, 1], "some read nothing": [0, 5], "empty": [0, 0]}


# A growing row reads itself at least.
CASES = [(name, growing) for name, counts in COUNTS.items() for growing in (True, False) if not (growing and 0 in counts)]


def inputs(counts, rows, heads, kv_heads, dtype, room=16, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    key, value = draw(2, len(counts), room, kv_heads, size)
    key[:, 13:], value[:, 13:] = torch.nan, torch.nan  # behind what any row may read: garbage of earlier requests
    return draw(len(counts), rows, heads, size), key, value, torch.tensor(counts)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("named, growing", CASES)
def test_it_reads_only_the_filled_part_of_a_cache_and_equals_dense_attention(named, heads, rows, growing):
    q, key, value, count_B = inputs(COUNTS[named], rows, *heads, torch.float64)
    out, lse = over_cache(q, key, value, count_B, growing)
    clean = [t.nan_to_num(0) for t in (key, value)]
    expected, expected_lse = dense(q, *clean, count_B, growing)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_equals_dense_attention_in_half_and_single_precision(dtype, error):
    q, key, value, count_B = inputs([5, 11], 2, 6, 2, dtype)
    out, lse = over_cache(q, key, value, count_B, growing=True)
    expected, expected_lse = dense(q, key.nan_to_num(0), value.nan_to_num(0), count_B, growing=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=error, atol=error)
    torch.testing.assert_close(lse, expected_lse, rtol=error, atol=error, check_dtype=False)


def test_reading_one_key_too_many_changes_the_result():
    """Negative control: the comparison above fails for a kernel that reads one key more than is filled."""
    q, key, value, count_B = inputs([5, 11], 1, 4, 2, torch.float64)
    off_by_one, _ = attention._filled(q, key, value, count_B + 1, growing=True)
    expected, _ = dense(q, key.nan_to_num(0), value.nan_to_num(0), count_B, growing=True)
    assert (off_by_one - expected).abs().max() > 1e-3


# (counts, growing, places of the rows or None): windows of 4 hide nothing, some keys or all of them.
WINDOWED = {
    "one row each": ([9, 9], True, None, 1),
    "one row, ragged": ([9, 2], True, None, 1),
    "a chain": ([9, 9, 9], True, None, 3),
    "a ragged chain": ([9, 1, 3], True, None, 3),
    "a chain inside its window": ([1, 1], True, None, 3),
    "rows behind their memory": ([9, 9], False, [[9, 10, 10], [9, 10, 11]], 3),
    "rows far behind it": ([9, 5], False, [[12, 20, 11], [5, 8, 9]], 3),
    "one row far behind it": ([5, 5], False, [[20], [20]], 1),
}


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_windows_and_scales_equal_attention_written_out(name, scale):
    """Of `over_cache` and of `dense`, row by row, head by head."""
    counts, growing, places, rows = WINDOWED[name]
    q, key, value, count_B = inputs(counts, rows, 6, 2, torch.float64)
    place_BT = None if places is None else torch.tensor(places)
    reading = Reading(scale, window=4)
    out, lse = over_cache(q, key, value, count_B, growing, reading, place_BT)
    of_dense = dense(q, key.nan_to_num(0), value.nan_to_num(0), count_B, growing, reading, place_BT)
    for b, count in enumerate(counts):
        for t in range(rows):
            end = count + growing * t
            own = end - 1 if places is None else places[b][t]
            seen = [place for place in range(end) if own - 4 < place <= own]
            for h in range(6):
                scores = key[b, seen, h // 3] @ q[b, t, h] * (8**-0.5 if scale is None else scale)
                expected = scores.softmax(0) @ value[b, seen, h // 3]
                for found, found_lse in ((out, lse), of_dense):
                    torch.testing.assert_close(found[b, t, h], expected, rtol=1e-12, atol=1e-12)
                    torch.testing.assert_close(found_lse[b, t, h], scores.logsumexp(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_are_one_more_score_of_the_softmax(window):
    """Of rows among themselves; and of two parts, which have the sinks once."""
    q, key, value, count_B = inputs([1, 1], 6, 4, 2, torch.float64)
    sinks_H = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    out = among_rows(q, key[:, :6], value[:, :6], Reading(window=window, sinks_H=sinks_H))
    for b in range(2):
        for t in range(6):
            first = 0 if window is None else max(0, t - window + 1)
            for h in range(4):
                scores = key[b, first : t + 1, h // 2] @ q[b, t, h] * 8**-0.5
                weights = torch.cat([scores, sinks_H[h : h + 1]]).softmax(0)[:-1]
                torch.testing.assert_close(out[b, t, h], weights @ value[b, first : t + 1, h // 2], rtol=1e-12, atol=1e-12)
    near = over_cache(q, key[:, :2], value[:, :2], count_B + 1, growing=False)
    far = over_cache(q, key[:, 2:9], value[:, 2:9], count_B + 6, growing=False)
    both = over_cache(q, key, value, count_B + 8, growing=False)
    torch.testing.assert_close(sunk(joined(near, far), sinks_H), sunk(both, sinks_H), rtol=1e-12, atol=1e-12)
    assert (sunk(both, sinks_H) - both[0]).abs().max() > 1e-2


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="flash-attn runs on a GPU")
@pytest.mark.parametrize("counts", [[9, 9], [9, 1, 3]])
@pytest.mark.parametrize("rows", [1, 3])
def test_flash_attn_s_windows_and_scales_equal_dense_attention(counts, rows):
    q, key, value, count_B = (t.cuda() for t in inputs(counts, rows, 6, 2, torch.bfloat16, size=64))
    for reading in (Reading(0.2), Reading(window=4), Reading(0.2, window=4)):
        out, lse = over_cache(q, key, value, count_B, True, reading)
        expected, expected_lse = dense(q, key.nan_to_num(0), value.nan_to_num(0), count_B, True, reading)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected_lse, rtol=2e-2, atol=2e-2, check_dtype=False)


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="flash-attn runs on a GPU")
@pytest.mark.parametrize("size", [16, 64, 256, 512])
def test_heads_that_flash_attn_refuses_are_read_by_the_dense_kernel(size):
    q, key, value, count_B = (t.cuda() for t in inputs([9, 1], 3, 6, 2, torch.bfloat16, size=size))
    assert not has_flash(q) or size <= 256
    clean = [t.nan_to_num(0) for t in (key, value)]
    out, lse = over_cache(q, *clean, count_B, growing=True)
    expected, expected_lse = dense(q, *clean, count_B, True)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-2, atol=2e-2, check_dtype=False)
