"""The visibility rule, drawn cell by cell, and every backend against the reference."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError
from common.recipe import ROOT
from tests.support.definitions import softmax_by_hand
from train.attention.choose import BACKENDS, attention_backend
from train.attention.visibility import TILE, DraftRows, Places, Visibility
from train.schedules.blockwise import block_rows


def drawn(visibility: Visibility) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in visibility.dense.tolist()]


def places(*lengths: int, shift: int = 0) -> Places:
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Places(document, torch.cat([torch.arange(n) for n in lengths]) + shift)


def test_block_visibility_equals_a_table_drawn_by_hand():
    """Two packed documents of 4 and 3 positions, blocks of 2 slots after anchors 2 of the first and 1 of the second."""
    rows = block_rows(torch.tensor([0, 1]), torch.tensor([2, 1]), slots=2)
    assert drawn(Visibility(rows, places(4, 3), rows, causal=False)) == [
        # memory   blocks
        "xx.....xx..",
        "xx.....xx..",
        "....x....xx",
        "....x....xx",
    ]
    assert drawn(Visibility(rows, places(4, 3), rows, causal=True)) == [
        "xx.....x...",
        "xx.....xx..",
        "....x....x.",
        "....x....xx",
    ]


def ttt_rows(document, anchor, slot) -> DraftRows:
    document, anchor = torch.tensor(document), torch.tensor(anchor)
    group = torch.arange(len(anchor))
    return DraftRows(document, anchor, group, torch.full_like(group, slot), anchor + slot - 1)


def test_visibility_of_the_second_ttt_step_equals_a_table_drawn_by_hand():
    """Step 2 of anchors 1 and 3 of one document: memory before the anchor, and the anchor's own steps 1 and 2 (EAGLE-3's
    diagonal). Pairs (x_{i+1}, f_i) sit at i + 1: the pair that is step 1's own input is not seen a second time."""
    first, second = ttt_rows([0, 0], [1, 3], 1), ttt_rows([0, 0], [1, 3], 2)
    assert second.position.tolist() == [2, 4]
    assert drawn(Visibility(second, places(4), first + second, causal=True)) == ["x...x.x.", "xxx..x.x"]
    assert drawn(Visibility(second, places(4, shift=1), first + second, causal=True)) == ["....x.x.", "xx...x.x"]


def test_visibility_of_the_third_ttt_step_in_a_pack_equals_a_table_drawn_by_hand():
    """Step 3 of anchors 2 of the first document and 1 of the second: each sees its own document's memory before its anchor and
    its own three steps, of which later anchors and the other document see nothing. Steps 1 and 2 come first among the keys."""
    steps = [ttt_rows([0, 1], [2, 1], j) for j in (1, 2, 3)]
    drafts = steps[0] + steps[1] + steps[2]
    assert drawn(Visibility(steps[2], places(4, 3), drafts, causal=True)) == ["xx.....x.x.x.", "....x...x.x.x"]
    # A row of step 2 does not see step 3, wherever it stands among the keys.
    assert drawn(Visibility(steps[1], places(4, 3), drafts, causal=True)) == ["xx.....x.x...", "....x...x.x.."]


def test_same_slot_and_shifted_blocks_have_the_same_rows():
    """They differ in which slot proposes x_{a+1}, not in who sees what: slot s sits at a + s in both."""
    rows = block_rows(torch.tensor([0, 0]), torch.tensor([1, 3]), slots=3)
    assert rows.position.tolist() == [1, 2, 3, 3, 4, 5] and rows.slot.tolist() == [0, 1, 2, 0, 1, 2]
    assert drawn(Visibility(rows, places(5), rows, causal=False)) == ["x....xxx..."] * 3 + ["xxx.....xxx"] * 3


def packed_case(heads=4, kv_heads=2, size=16):
    g = torch.Generator().manual_seed(0)
    memory = places(70, 50, 30)
    anchors = torch.tensor([5, 40, 69, 1, 49, 20])
    rows = block_rows(torch.tensor([0, 0, 0, 1, 1, 2]), anchors, slots=5)
    keys = memory.position.numel() + rows.slot.numel()
    q, k, v = (torch.randn(n, h, size, generator=g) for n, h in ((len(rows.slot), heads), (keys, kv_heads), (keys, kv_heads)))
    return q, k, v, rows, memory


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_softmax_over_visible_keys(causal):
    q, k, v, rows, memory = packed_case()
    visibility = Visibility(rows, memory, rows, causal)
    expected = softmax_by_hand(q, k, v, visibility.dense)
    torch.testing.assert_close(BACKENDS["reference"](q, k, v, visibility).double(), expected, rtol=1e-5, atol=1e-5)


def test_flex_forward_equals_reference_on_packed_documents():
    q, k, v, rows, memory = packed_case()
    visibility = Visibility(rows, memory, rows, causal=True)
    expected = BACKENDS["reference"](q, k, v, visibility)
    with torch.no_grad():
        torch.testing.assert_close(BACKENDS["flex"](q, k, v, visibility), expected, rtol=1e-4, atol=1e-5)
    blind = Visibility(rows, Places(torch.zeros_like(memory.document), memory.position), rows, causal=True)
    assert (BACKENDS["reference"](q, k, v, blind) - expected).abs().max() > 1e-2  # the mask is noticed when dropped


def test_flex_block_mask_is_the_dense_mask():
    _, _, _, rows, memory = packed_case()
    for causal in (False, True):
        visibility = Visibility(rows, memory, rows, causal)
        rule = visibility.block_mask(2).mask_mod
        q, k = torch.meshgrid(torch.arange(visibility.dense.shape[0]), torch.arange(visibility.dense.shape[1]), indexing="ij")
        assert torch.equal(rule(0, 0, q, k), visibility.dense)


def test_flex_training_on_a_cpu_is_refused():
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="attention=flex cannot train on a CPU"):
        attention_backend("flex", cpu)
    assert attention_backend("auto", cpu, flash=True, dense=True) is BACKENDS["reference"]
    gpu = torch.device("cuda")
    assert attention_backend("auto", gpu) is attention_backend("auto", gpu, flash=True) is BACKENDS["flex"]
    assert attention_backend("auto", gpu, flash=True, dense=True) is BACKENDS["flash"]
    with pytest.raises(UserError, match="attention=flash is for objective=ttt without views"):
        attention_backend("flash", gpu, flash=False)


def ttt_case(steps: int, shift: int, size=16, heads=4, kv_heads=2):
    """Step `steps` of anchors of three packed documents, in no order; with `shift` the first anchor sees no memory."""
    g = torch.Generator().manual_seed(0)
    memory = places(70, 50, 30, shift=shift)
    rows = [ttt_rows([0, 0, 2, 0, 1, 1, 2], [1, 40, 29, 69, 1, 49, 2], j) for j in range(1, steps + 1)]
    drafts = sum(rows[1:], rows[0])
    keys = len(memory.position) + len(drafts.slot)
    q, k, v = (torch.randn(n, h, size, generator=g) for n, h in ((7, heads), (keys, kv_heads), (keys, kv_heads)))
    return q, k, v, Visibility(rows[-1], memory, drafts, causal=True)


def through(attend, visibility, *tensors):
    """(output, gradients of q, k and v)."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    out = attend(*leaves, visibility)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("shift", [0, 1], ids=["kv", "pairs"])
@pytest.mark.parametrize("steps", [1, 3])
def test_flash_equals_reference_forward_and_backward(steps, shift):
    *tensors, visibility = ttt_case(steps, shift)
    tensors = [t.double() for t in tensors]
    expected = through(BACKENDS["reference"], visibility, *tensors)
    for mine, theirs in zip(through(BACKENDS["flash"], visibility, *tensors), expected):
        torch.testing.assert_close(mine, theirs)
    # Masks that must be noticed when dropped: the documents' borders, and the anchor's own position.
    blind = Places(torch.zeros_like(visibility.memory.document), torch.arange(150) + shift)
    for memory, later in ((blind, 0), (visibility.memory, 1)):
        r = visibility.queries
        moved = DraftRows(r.document * (memory is not blind), r.anchor + later, r.group, r.slot, r.position)
        wrong = Visibility(moved, memory, visibility.drafts, causal=True)
        for mine, theirs in zip(through(BACKENDS["flash"], wrong, *tensors), expected):
            assert (mine - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("steps,shift", [(1, 1), (3, 0)])
def test_kernels_of_draft_keys_equal_their_definition(steps, shift, monkeypatch):
    """In Triton's interpreter where there is no GPU; float32. Three query heads of a key head, and a head size of 24: no power
    of two."""
    joint = pytest.importorskip("train.attention.joint", exc_type=ImportError)
    module = sys.modules["train.attention.flash"]
    *tensors, visibility = ttt_case(steps, shift, size=24, heads=6)
    expected = through(BACKENDS["flash"], visibility, *tensors)
    if torch.cuda.is_available():
        monkeypatch.setattr(module, "kernel", lambda on_gpu: (_on_cpu(module._cpu_forward), _on_cpu(module._cpu_backward)))
        tensors = [t.cuda() for t in tensors]
        visibility = on_gpu(visibility)
    monkeypatch.setattr(module, "drafts", lambda on_gpu: joint)
    for mine, theirs in zip(through(BACKENDS["flash"], visibility, *tensors), expected):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-5)


def memory_case(rows, shift: int = 0, size=16, heads=4, kv_heads=2):
    """Rows without keys of their own, of (document, anchor) each, over three packed documents of 70, 50 and 30 positions."""
    g = torch.Generator().manual_seed(0)
    memory = places(70, 50, 30, shift=shift)
    queries = ttt_rows(*(list(column) for column in zip(*rows)), 1)
    count = len(memory.position)
    q, k, v = (torch.randn(n, h, size, generator=g) for n, h in ((len(rows), heads), (count, kv_heads), (count, kv_heads)))
    return q, k, v, Visibility(queries, memory, queries.none, causal=True)


FEW = [(0, 1), (2, 29), (0, 69), (1, 30)]
MANY = [(document, a) for document, length in enumerate((70, 50, 30)) for a in range(1, length)]


def test_rows_without_keys_drawn_by_hand():
    """They see the memory before their anchor and nothing else, wherever they sit: not themselves, no other step, no other
    document."""
    for slot in (1, 3):
        rows = ttt_rows([0, 1], [2, 1], slot)
        assert drawn(Visibility(rows, places(4, 3), rows.none, causal=True)) == ["xx.....", "....x.."]
    rows = replace(rows, position=rows.anchor - 1)
    assert drawn(Visibility(rows, places(4, 3), rows.none, causal=True, window=1)) == [".x.....", "....x.."]


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_rows_without_keys_see_memory_alone(rows):
    """The reference is the softmax; flash equals it forward and backward. Masks that must be noticed when dropped: the documents'
    borders, and the anchor's own position."""
    *tensors, visibility = memory_case(rows)
    tensors = [t.double() for t in tensors]
    expected = through(BACKENDS["reference"], visibility, *tensors)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
    close(expected[0], softmax_by_hand(*tensors, visibility.dense))
    for mine, theirs in zip(through(BACKENDS["flash"], visibility, *tensors), expected):
        close(mine, theirs)
    one = Places(torch.zeros_like(visibility.memory.document), torch.arange(150))
    for memory, later in ((one, 0), (visibility.memory, 1)):
        r = visibility.queries
        moved = replace(r, document=r.document * (memory is not one), anchor=r.anchor + later)
        # Of many anchors some would share a place in one document, which no row of flash may.
        for backend in ("reference", "flash") if rows is FEW or later else ("reference",):
            wrong = through(BACKENDS[backend], replace(visibility, queries=moved, memory=memory), *tensors)
            assert all((mine - theirs).abs().max() > 1e-2 for mine, theirs in zip(wrong, expected))


@pytest.mark.parametrize("name", ["reference", "flash"])
def test_a_row_that_sees_nothing_gives_zero_and_learns_nothing(name):
    """Anchors whose memory begins at them. Others beside them, one behind the last key of all, are as they would be alone."""
    blind = [(0, 1), (1, 1)]
    seeing = [(0, 40), (2, 31)]
    q, k, v, visibility = memory_case(blind + seeing, shift=1)
    assert visibility.dense.any(1).tolist() == [False, False, True, True]
    out, *gradients = through(BACKENDS[name], visibility, q, k, v)
    assert (out[:2] == 0).all() and (out[2:] != 0).all()
    assert all(t.isfinite().all() for t in gradients) and (gradients[0][:2] == 0).all()
    leaves = [t.clone().requires_grad_() for t in (q[2:], k, v)]
    alone = BACKENDS["reference"](*leaves, replace(visibility, queries=ttt_rows([0, 2], [40, 31], 1)))
    torch.testing.assert_close(out[2:], alone.detach())
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))[2:]
    for mine, theirs in zip(gradients[1:], torch.autograd.grad(alone, leaves, upstream)[1:]):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("window", [None, 9])
def test_flex_s_mask_of_rows_without_keys_is_the_dense_mask(window):
    """Memory that fills its last tile, and memory that does not."""
    for length in (TILE, TILE + 22):
        memory = places(70, length - 70)
        rows = ttt_rows([0, 0, 1, 1], [1, 69, 1, length - 71], 1)
        visibility = Visibility(rows, memory, rows.none, causal=True, window=window)
        rule = visibility.block_mask(2).mask_mod
        at = torch.meshgrid(*(torch.arange(n) for n in visibility.dense.shape), indexing="ij")
        assert torch.equal(rule(0, 0, *at), visibility.dense)
        some_XY, every_XY = visibility._tiles()
        assert some_XY.any() and not every_XY.any()


@pytest.mark.slow
def test_flex_forward_of_rows_without_keys_equals_reference():
    q, k, v, visibility = memory_case([(0, 1), (1, 1), (0, 40), (2, 2)], shift=1)
    with torch.no_grad():
        found = BACKENDS["flex"](q, k, v, visibility)
    torch.testing.assert_close(found, BACKENDS["reference"](q, k, v, visibility), rtol=1e-4, atol=1e-5)
    assert (found[:2] == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention and FlexAttention's backward run on a GPU")
@pytest.mark.parametrize("rows", [FEW, MANY, [(0, 1), (1, 1), (0, 40), (2, 2)]], ids=["few", "many", "blind"])
@pytest.mark.parametrize("name", ["flash", "flash, PyTorch's", "flex", "reference"])
def test_rows_without_keys_on_a_gpu(name, rows, monkeypatch):
    """bf16 against float64 of the same bf16 inputs."""
    name, own = name.split(",")[0], "," in name
    module = sys.modules["train.attention.flash"]
    chosen = module.kernel(True, own)
    monkeypatch.setattr(module, "kernel", lambda on_gpu: chosen)
    shift = int(rows is not FEW and rows is not MANY)
    *tensors, visibility = memory_case(rows, shift, size=128, heads=8)
    wide = [t.to(torch.bfloat16).double() for t in tensors]
    expected = through(BACKENDS["reference"], visibility, *wide)
    found = through(BACKENDS[name], on_gpu(visibility), *(t.to("cuda", torch.bfloat16) for t in tensors))
    for mine, theirs in zip(found, expected):
        assert (mine.cpu().double() - theirs).norm() / theirs.norm() < 1e-2
    if shift:
        assert (found[0][:2] == 0).all() and (found[1][:2] == 0).all()


def _on_cpu(function):
    """The kernel of the memory's part for float32, which FlashAttention does not know."""

    def run(*arguments):
        found = function(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments))
        return [t.cuda().contiguous() if isinstance(t, torch.Tensor) else t for t in found]

    return run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention runs on a GPU")
@pytest.mark.parametrize("own", [False, True], ids=["flash-attn", "PyTorch's"])
@pytest.mark.parametrize("steps,shift", [(1, 1), (3, 0), (3, 1)])
def test_flash_equals_reference_on_a_gpu(steps, shift, own, monkeypatch):
    """bf16 against float64 of the same bf16 inputs: 2^-8 of a result's size, and twice that for what passes two roundings."""
    module = sys.modules["train.attention.flash"]  # the package's name for the function hides it
    chosen = module.kernel(True, own)
    monkeypatch.setattr(module, "kernel", lambda on_gpu: chosen)
    *tensors, visibility = ttt_case(steps, shift, size=128, heads=8)
    tensors = [t.to("cuda", torch.bfloat16) for t in tensors]
    visibility = on_gpu(visibility)
    expected = through(BACKENDS["reference"], visibility, *(t.double() for t in tensors))
    for mine, theirs in zip(through(BACKENDS["flash"], visibility, *tensors), expected):
        assert (mine.double() - theirs).norm() / theirs.norm() < 1e-2


def test_kernels_are_compiled_once_for_packs_of_all_sizes():
    """For a GPU that need not be there: Triton only has to be told which."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILING], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["_join_kernel", "_join_backward_kernel", "cast_kernel"], done.stderr


COMPILING = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from train.attention.joint import _join_backward_kernel, _join_kernel
from train.precision.fp8_cast import cast_kernel

class Absent:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Absent())
triton.knobs.runtime.jit_post_compile_hook = lambda fn, **_: print(fn.name.split(".")[-1])
wide, fine, fp8, places = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64
sizes = dict(G=2, S=4, D=64, S2=4, D2=64, num_warps=1)
for counts in ((16, 32, 1), (17, 32, 2), (15, 33, 3), (16, 33, 3)):  # rows, places, steps
    _join_kernel.warmup(*[wide] * 4, fine, places, wide, fine, fine, *counts, 0.125, grid=(1,), **sizes)
    _join_backward_kernel.warmup(*[wide] * 5, fine, wide, places, *[wide] * 3, *counts, 0.125, grid=(1,), **sizes)
    cast_kernel.warmup(wide, fine, fp8, fp8, counts[0], 64, 32, 448.0, PLAIN=True, TURNED=True, BLOCK=64, grid=(1,))
"""


def on_gpu(visibility: Visibility) -> Visibility:
    move = lambda value: type(value)(*(getattr(value, f).cuda() for f in value.__dataclass_fields__))
    return Visibility(move(visibility.queries), move(visibility.memory), move(visibility.drafts), visibility.causal)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on a GPU only")
@pytest.mark.parametrize("rule", ["block", "causal block", "block under a window", "third step of ttt"])
def test_flex_backward_equals_reference_on_a_gpu(rule):
    q, k, v, rows, memory = packed_case(size=64)
    drafts = rows
    if rule.endswith("ttt"):
        steps = [ttt_rows([0, 0, 0, 1, 1, 2], [5, 40, 69, 1, 49, 20], j) for j in (1, 2, 3)]
        rows = steps[2]
        drafts = steps[0] + steps[1] + steps[2]
        g = torch.Generator().manual_seed(2)
        keys = memory.position.numel() + drafts.slot.numel()
        q, k, v = (torch.randn(n, h, 64, generator=g) for n, h in ((6, 4), (keys, 2), (keys, 2)))
    move = lambda value: type(value)(*(getattr(value, f).cuda() for f in value.__dataclass_fields__))
    window = 9 if rule.endswith("window") else None
    visibility = Visibility(move(rows), move(memory), move(drafts), causal=not rule.startswith("block"), window=window)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).cuda()
    gradients = []
    for name in ("reference", "flex"):
        leaves = [t.cuda().requires_grad_() for t in (q, k, v)]
        gradients.append(torch.autograd.grad(BACKENDS[name](*leaves, visibility), leaves, upstream))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)  # flex multiplies in tf32 on a GPU


def test_a_window_drawn_by_hand():
    """Blocks of 3 slots after anchors 4 of a document of 6 positions and 2 of one of 3, under a window of 3. A row at position p
    sees memory and draft rows from p - 2 on; of a bidirectional block also those behind it."""
    rows = block_rows(torch.tensor([0, 1]), torch.tensor([4, 2]), slots=3)
    assert drawn(Visibility(rows, places(6, 3), rows, causal=False, window=3)) == [
        # memory     blocks
        "..xx.....xxx...",
        "...x.....xxx...",
        ".........xxx...",
        "......xx....xxx",
        ".......x....xxx",
        "............xxx",
    ]
    assert drawn(Visibility(rows, places(6, 3), rows, causal=True, window=2))[:3] == [
        "...x.....x.....",
        ".........xx....",
        "..........xx...",
    ]


def test_a_window_of_ttt_s_steps_drawn_by_hand():
    """Step 3 of anchors 1 and 3 under a window of 2: its own and step 2's rows alone."""
    steps = [ttt_rows([0, 0], [1, 3], j) for j in (1, 2, 3)]
    drafts = steps[0] + steps[1] + steps[2]
    assert drawn(Visibility(steps[2], places(4), drafts, causal=True, window=2)) == ["......x.x.", ".......x.x"]
    assert drawn(Visibility(steps[0], places(4), steps[0], causal=True, window=2)) == ["x...x.", "..x..x"]


@pytest.mark.parametrize("rule", ["ttt", "block"])
@pytest.mark.parametrize("window", [1, 40, 400])
def test_flex_s_tiles_and_rule_of_a_window_are_the_dense_mask(window, rule):
    """Tiles that are said to be whole are, and none is left out of which something is visible."""
    memory = places(700, 300)
    if rule == "ttt":
        rows, second = (ttt_rows([0] * 600 + [1] * 200, [*range(1, 601), *range(1, 201)], j) for j in (1, 2))
        rows, drafts = second, rows + second
    else:
        rows = drafts = block_rows(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([5, 140, 290, 600, 1, 200]), slots=60)
    visibility = Visibility(rows, memory, drafts, causal=rule == "ttt", window=window)
    dense = visibility.dense
    at = torch.meshgrid(*(torch.arange(n) for n in dense.shape), indexing="ij")
    assert torch.equal(visibility.block_mask(2).mask_mod(0, 0, *at), dense)
    filled = F.pad(dense, (0, -dense.shape[1] % TILE, 0, -dense.shape[0] % TILE))
    tiles = filled.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).flatten(2)
    some_XY, every_XY = visibility._tiles()
    assert not (tiles.any(-1) & ~some_XY).any() and not (every_XY & ~tiles.all(-1)).any()
    # Tiles that the window leaves behind are not looked at, and those within it need not be asked key by key.
    blind_XY, _ = replace(visibility, window=None)._tiles()
    if rule == "ttt":  # a tile of blocks holds anchors of all documents
        assert some_XY.sum() < blind_XY.sum() or window == 400
        assert every_XY.any() or window < 400


@pytest.mark.slow
def test_flex_forward_equals_reference_under_a_window():
    q, k, v, rows, memory = packed_case()
    visibility = Visibility(rows, memory, rows, causal=True, window=9)
    expected = BACKENDS["reference"](q, k, v, visibility)
    with torch.no_grad():
        torch.testing.assert_close(BACKENDS["flex"](q, k, v, visibility), expected, rtol=1e-4, atol=1e-5)
    blind = BACKENDS["reference"](q, k, v, replace(visibility, window=10))
    assert (blind - expected).abs().max() > 1e-2  # a window of one more is noticed
