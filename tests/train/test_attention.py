"""The visibility rule, drawn cell by cell, and every backend against the reference."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError
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
