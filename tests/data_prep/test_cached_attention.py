"""Attention over preallocated caches equals its definition, `dense`, which is computed from all scores."""

import pytest
import torch

from data_prep.decoding import attention
from data_prep.decoding.attention import dense, over_cache

COUNTS = {"equal": [7, 7, 7], "ragged": [7, 1, 12], "one": [9], "first": [1, 1], "some read nothing": [0, 5], "empty": [0, 0]}


# A growing row reads itself at least.
CASES = [(name, growing) for name, counts in COUNTS.items() for growing in (True, False) if not (growing and 0 in counts)]


def inputs(counts, rows, heads, kv_heads, dtype, room=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    key, value = draw(2, len(counts), room, kv_heads, 8)
    key[:, 13:], value[:, 13:] = torch.nan, torch.nan  # behind what any row may read: garbage of earlier requests
    return draw(len(counts), rows, heads, 8), key, value, torch.tensor(counts)


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
