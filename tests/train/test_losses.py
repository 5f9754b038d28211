"""Every loss equals a plain float64 definition in value and gradient, in chunks, and logits never exist all at once.

Shapes: R rows that count, V target vocabulary, D draft vocabulary.
"""

import importlib

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from common.recipe import ROOT
from data_prep.target.frozen_head import FrozenHead
from tests.support.definitions import definition
from train.losses import choose, divergences, reference, terms, weights
from train.losses.chunked import chunked_loss
from train.losses.recipe import LossRecipe
from train.losses.types import Chunk, HeadInput, Heads

ROWS, HIDDEN, VOCAB = 37, 16, 211
# How far apart drafter and teacher are: the first two agree in being flat or sharp, the last is sharp where p is not.
REGIMES = {"near-uniform": (0.02, 0.02), "ordinary": (1.0, 1.0), "near-one-hot": (5.0, 5.0), "mismatched": (5.0, 0.3)}
KEPT = torch.arange(3, 190, 4)  # a reduced draft vocabulary


def rows(regime: str = "ordinary", dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    draft_scale, teacher_scale = REGIMES[regime]
    draft = (torch.randn(ROWS, HIDDEN, generator=g) * draft_scale).to(dtype).requires_grad_()
    teacher = (torch.randn(ROWS, HIDDEN, generator=g) * teacher_scale).to(dtype)
    label = torch.randint(0, VOCAB, (ROWS,), generator=g)
    weight, mix = torch.rand(ROWS, generator=g).to(dtype), torch.rand(ROWS, generator=g).to(dtype)
    head = torch.randn(VOCAB, HIDDEN, generator=g).to(dtype)
    return draft, teacher, label, weight, mix, head


def row_inputs(draft, teacher, label, mix) -> HeadInput:
    """Every row counts; the teachers serve the rows of one view after another."""
    index = torch.arange(len(draft))
    teacher_of = index % max(1, len(teacher))
    return HeadInput(draft, index, teacher, teacher_of, label[teacher_of], mix)


def in_vocabulary(label, kept):
    if kept is None:
        return label
    index = torch.full((VOCAB,), -1)
    index[kept] = torch.arange(len(kept))
    return index[label]


PER_SLOT = ["kl", "reverse_kl", "ce", "ce_greedy", "tv", "lk_alpha", "lk_lambda"]


def test_every_term_of_the_table_is_judged_here_and_has_its_key():
    """A term that is new in the table also needs a definition above, and a key in conf/loss/_terms.yaml."""
    assert list(terms.per_slot()) == PER_SLOT
    keys = yaml.safe_load((ROOT / "conf/loss/_terms.yaml").read_text())
    assert set(keys) == {*terms.TERMS, "eta"} == set(LossRecipe.model_fields)
    assert keys == {name: field.default for name, field in LossRecipe.model_fields.items()}
    assert terms.parts() == ("slots", "expected_length", "kv_align", "query_align")


@pytest.mark.parametrize("kept", [None, KEPT], ids=["full", "reduced"])
@pytest.mark.parametrize("loss", PER_SLOT)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_loss_equals_its_definition(loss, regime, kept):
    """Value, gradient for the drafter's output and for a head of its own, and the statistics; float64 as the judge of float64,
    so that what differs is the formula and not the rounding."""
    draft, teacher, label, weight, mix, head = rows(regime, torch.float64)
    own = (head if kept is None else head[kept]).clone().requires_grad_()
    label_D = in_vocabulary(label, kept)
    q = (draft @ own.T).softmax(-1)
    p = (teacher @ head.T).softmax(-1)
    p_D = p if kept is None else p[:, kept]
    per_row = definition(loss, q, p_D, label_D, mix)
    expected = torch.autograd.grad((per_row * weight).sum() * 3, (draft, own))
    for chunk in (1, 8, 100):
        total, found = chunked_loss(row_inputs(draft, teacher, label_D, mix), Heads(own, head, kept), {loss: 1.0}, weight, chunk)
        torch.testing.assert_close(total, (per_row * weight).sum(), rtol=1e-9, atol=1e-9)
        for got, wanted in zip(torch.autograd.grad(total * 3, (draft, own)), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.loss, per_row.detach())
    torch.testing.assert_close(found.overlap, torch.minimum(p_D, q).sum(-1).detach())
    best_q = q.argmax(-1) if kept is None else kept[q.argmax(-1)]
    torch.testing.assert_close(found.match, (p.argmax(-1) == best_q).double())  # over the whole vocabulary: a break outside it
    said = torch.where(label_D < 0, 0.0, q[torch.arange(ROWS), label_D.clamp(min=0)])
    torch.testing.assert_close(found.label_probability, said.detach())
    if kept is not None:
        assert (label_D < 0).any() and (p.argmax(-1)[:, None] != kept).all(-1).any()


@pytest.mark.parametrize("loss", ["kl", "tv"])
def test_the_teacher_has_its_bias_and_its_cap_and_the_drafter_has_not(loss):
    """Phi's head has a bias, Gemma caps its logits: both are the target's alone."""
    draft, teacher, label, weight, mix, head = rows("ordinary", torch.float64)
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    frozen = FrozenHead(head, head, bias_V=bias, softcap=3.0)
    q = (draft @ head.T).softmax(-1)
    plain = definition(loss, q, (teacher @ head.T).softmax(-1), label, mix)
    per_row = definition(loss, q, (3 * torch.tanh((teacher @ head.T + bias) / 3)).softmax(-1), label, mix)
    heads = Heads(head, head, finish=frozen.finish)
    total, found = chunked_loss(row_inputs(draft, teacher, label, mix), heads, {loss: 1.0}, weight, 8)
    torch.testing.assert_close(found.loss, per_row.detach())
    (gradient,) = torch.autograd.grad(total, draft)
    torch.testing.assert_close(gradient, torch.autograd.grad((per_row * weight).sum(), draft)[0])
    assert not torch.allclose(per_row, plain, atol=0.01)


@pytest.mark.parametrize("kept", [None, KEPT], ids=["full", "reduced"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_one_teacher_serves_the_rows_of_several_views(kept, chunk):
    """Three views' rows one behind the other against three calls with a view each: value, gradients, statistics."""
    first, teacher, label, weight, mix, head = rows("ordinary", torch.float64)
    own = (head if kept is None else head[kept]).clone().requires_grad_()
    label = in_vocabulary(label, kept)
    draft = torch.cat([rows("ordinary", torch.float64, seed)[0] for seed in (1, 2, 3)]).detach().requires_grad_()
    weight, mix = torch.cat([weight, 0.3 * weight, weight * 0]), torch.cat([mix, 1 - mix, mix])
    heads = Heads(own, head, kept)
    loss = {"lk_lambda": 1.0, "ce": 0.5}
    together, found = chunked_loss(row_inputs(draft, teacher, label, mix), heads, loss, weight, chunk, 0.1 * weight)
    apart = [
        chunked_loss(row_inputs(draft[part], teacher, label, mix[part]), heads, loss, weight[part], chunk, 0.1 * weight[part])
        for part in (slice(v * ROWS, (v + 1) * ROWS) for v in range(3))
    ]
    torch.testing.assert_close(together, sum(total for total, _ in apart))
    for column, parts in zip(found, zip(*(statistics for _, statistics in apart))):
        torch.testing.assert_close(column, torch.cat(parts))
    one, other = (torch.autograd.grad(total, (draft, own)) for total in (together, sum(total for total, _ in apart)))
    for mine, theirs in zip(one, other):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("loss", PER_SLOT)
@pytest.mark.parametrize("regime", REGIMES)
def test_losses_in_float32_are_near_those_in_float64(loss, regime):
    """The tolerance is float32's: 2^-24 of logits of up to about 60, summed over 211 tokens."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        draft, teacher, label, weight, mix, head = rows(regime, dtype)
        total, _ = chunked_loss(row_inputs(draft, teacher, label, mix), Heads(head, head), {loss: 1.0}, weight, 8)
        gradients.append((total.detach().double(), torch.autograd.grad(total, draft)[0].double()))
    for one, other in zip(*gradients):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_paper():
    """LK losses, section 3: dKL = q - p, dTV = q (s - E_q s) / 2 with s = sign(q - p), dLK_alpha = dTV / alpha."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 7, generator=g, dtype=torch.float64).requires_grad_()
    log_p = torch.randn(5, 7, generator=g, dtype=torch.float64).log_softmax(-1)
    q = logits.softmax(-1).detach()
    p = log_p.exp()
    label = torch.zeros(5, dtype=torch.long)
    s = (q - p).sign()
    tv = 0.5 * q * (s - (q * s).sum(-1, keepdim=True))
    alpha = torch.minimum(p, q).sum(-1, keepdim=True)
    for name, expected in (("kl", q - p), ("tv", tv), ("lk_alpha", tv / alpha)):
        loss = terms.TERMS[name].definition(logits.log_softmax(-1), log_p, label).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_lk_alpha_has_a_gradient_where_the_overlap_underflows():
    """alpha underflows to zero in float32; -log alpha and its gradient do not."""
    logits = torch.tensor([[200.0, 0.0, -200.0]]).requires_grad_()
    log_p = torch.tensor([[-200.0, 0.0, 200.0]]).log_softmax(-1)
    assert divergences.overlap(logits.log_softmax(-1), log_p).item() == 0
    loss = divergences.lk_alpha(logits.log_softmax(-1), log_p, torch.tensor([2])).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(200, rel=1e-3) and gradient.isfinite().all() and gradient.abs().max() > 0.1


def test_losses_equal_numbers_computed_by_hand():
    """p = (.5, .3, .2), q = (.2, .3, .5): alpha = .7, KL = .5 ln 2.5 + .2 ln .4, and lambda = exp(-3 x .7) mixes KL and TV. With
    the last token cut from the draft vocabulary, q = (.4, .6): alpha = .4 + .3 of p = (.5, .3), and p = (.625, .375) in KL."""
    head = torch.eye(3)
    one = torch.ones(1)
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    q = torch.tensor([[0.2, 0.3, 0.5]]).log()
    kl = 0.5 * 0.916291 + 0.2 * -0.916291
    mix = torch.exp(torch.tensor([-3 * 0.7]))
    found = {}
    for name in PER_SLOT:
        total, statistics = chunked_loss(row_inputs(q, p, torch.tensor([0]), mix), Heads(head, head), {name: 1.0}, one, 4)
        found[name] = total.item()
    assert statistics.overlap.item() == pytest.approx(0.7) and statistics.match.item() == 0
    assert statistics.label_probability.item() == pytest.approx(0.2)
    lam = 0.122456
    expected = {
        "kl": kl,
        "reverse_kl": kl,
        "ce": 1.609438,
        "ce_greedy": 1.609438,
        "tv": 0.3,
        "lk_alpha": 0.356675,
        "lk_lambda": lam * kl + (1 - lam) * 0.3,
    }
    assert found == pytest.approx(expected, abs=1e-5)
    kept = torch.tensor([0, 1])
    small = torch.tensor([[0.4, 0.6, 0.0]]).log().clamp(min=-99)
    cut, statistics = chunked_loss(
        row_inputs(small, p, torch.tensor([-1]), mix), Heads(head[:2], head, kept), {"kl": 1.0}, one, 4
    )
    assert statistics.overlap.item() == pytest.approx(0.7) and statistics.label_probability.item() == 0
    assert cut.item() == pytest.approx(0.625 * 0.446287 + 0.375 * -0.470004, abs=1e-5)


def test_expected_length_equals_numbers_computed_by_hand():
    """Overlaps .5 .4 .8: E = .5 + .2 + .16; dE / d alpha_1 = 1 + .4 + .32. A shown slot cannot be refused: E = .4 + .32."""
    overlap = torch.tensor([[0.5, 0.4, 0.8]], requires_grad=True)
    length = divergences.expected_accepted(overlap, torch.tensor([[True, True, True]]))
    assert length.item() == pytest.approx(0.86)
    torch.testing.assert_close(torch.autograd.grad(length.sum(), overlap)[0], torch.tensor([[1.72, 0.9, 0.2]]))
    assert divergences.expected_accepted(overlap, torch.tensor([[False, True, True]])).item() == pytest.approx(0.72)
    assert divergences.expected_accepted(overlap, torch.tensor([[True, True, False]])).item() == pytest.approx(0.7)


def test_dpace_weights_equal_numbers_computed_by_hand():
    """q(label) = .5 .2 1 -> c = .75 .6 1 -> reached .75 .45 .45; w_j adds up what is still to come."""
    q, every = torch.tensor([[0.5, 0.2, 1.0]], requires_grad=True), torch.tensor([[True, True, True]])
    found = weights.dpace(q, every)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.tensor([[1.65, 0.9, 0.45]]))
    torch.testing.assert_close(weights.dpace(q, torch.tensor([[True, True, False]])), torch.tensor([[1.2, 0.45, 0.0]]))
    torch.testing.assert_close(weights.dpace(q, torch.tensor([[False, True, True]])), torch.tensor([[0.0, 1.2, 0.6]]))
    torch.testing.assert_close(weights.dpace(q, every, smoothing=0.0), torch.tensor([[0.7, 0.2, 0.1]]))


def test_slot_weights_equal_numbers_computed_by_hand():
    torch.testing.assert_close(weights.geometric(3, 0.8), torch.tensor([1.0, 0.8, 0.64]))
    torch.testing.assert_close(weights.exponential(3, 7.0), torch.exp(-torch.tensor([0.0, 1.0, 2.0]) / 7))


def test_a_perfect_drafter_is_always_accepted():
    draft, _, label, weight, mix, head = rows()
    loss = {"kl": 1.0}
    total, found = chunked_loss(row_inputs(draft, draft.detach(), label, mix), Heads(head, head), loss, weight, 8)
    assert abs(total.item()) < 1e-4
    torch.testing.assert_close(found.overlap, torch.ones(ROWS))
    assert found.match.all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation produced."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kept", [None, KEPT], ids=["full", "reduced"])
def test_no_tensor_of_all_rows_and_the_vocabulary(kept):
    draft, teacher, label, weight, mix, head = rows()
    own = (head if kept is None else head[kept]).clone().requires_grad_()
    arguments = (row_inputs(draft, teacher, in_vocabulary(label, kept), mix), Heads(own, head, kept), {"kl": 1})
    with Largest() as seen:
        total, _ = chunked_loss(*arguments, weight, 4, overlap_weight_R=weight)
        total.backward()
    assert seen.numel == max(4 * VOCAB, VOCAB * HIDDEN)
    with Largest() as control:  # the control: one chunk does hold them all
        chunked_loss(*arguments, weight, ROWS)
    assert control.numel == ROWS * VOCAB


def test_a_loss_over_no_rows_is_a_differentiable_zero():
    """The drafter has rows, none of which counts."""
    draft, teacher, label, weight, mix, head = rows()
    every = row_inputs(draft, teacher, label, mix)
    none = every._replace(index_R=every.index_R[:0], teacher_R=every.teacher_R[:0], label_R=label[:0], mix_R=mix[:0])
    total, found = chunked_loss(none, Heads(head, head), {"kl": 1.0}, weight[:0], 4)
    total.backward()
    assert total.item() == 0 and found.loss.shape == (0,) and not draft.grad.any()


def test_a_loss_without_a_term_is_refused():
    with pytest.raises(ValueError, match="no term has a weight"):
        LossRecipe(kv_align=1.0)


@pytest.mark.parametrize("kept", [None, KEPT], ids=["full", "reduced"])
def test_every_teacher_is_asked_once(kept):
    """Rows in any order, some teachers serving many and some none, chunks that cut a teacher's: the sum of one call a row."""
    _, teacher, label, weight, mix, head = rows("ordinary", torch.float64)
    own = (head if kept is None else head[kept]).clone().requires_grad_()
    label = in_vocabulary(label, kept)
    g = torch.Generator().manual_seed(3)
    teacher_R = torch.randint(0, ROWS, (50,), generator=g)
    draft = torch.randn(80, HIDDEN, generator=g, dtype=torch.float64).requires_grad_()
    index_R = torch.randperm(80, generator=g)[:50]
    picked = HeadInput(draft, index_R, teacher, teacher_R, label[teacher_R], mix[teacher_R])
    weight_R = torch.rand(50, generator=g).double()
    heads = Heads(own, head, kept)
    loss = {"lk_lambda": 1.0, "ce": 0.5}
    total, found = chunked_loss(picked, heads, loss, weight_R, 7, 0.1 * weight_R)
    apart = [
        chunked_loss(row_inputs(draft[i], teacher[t], label[t], mix[t]), heads, loss, weight_R[r], 1, 0.1 * weight_R[r])
        for r, i, t in zip(torch.arange(50).split(1), index_R.split(1), teacher_R.split(1))
    ]
    torch.testing.assert_close(total, sum(one for one, _ in apart))
    for column, parts in zip(found, zip(*(statistics for _, statistics in apart))):
        torch.testing.assert_close(column, torch.cat(parts))
    for mine, theirs in zip(*(torch.autograd.grad(t, (draft, own)) for t in (total, sum(one for one, _ in apart)))):
        torch.testing.assert_close(mine, theirs)


@pytest.fixture(scope="module")
def fused():
    """The kernels: compiled where there is a GPU, else run by Triton's interpreter."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("train.losses.fused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", 64)  # several blocks, the last not full
        yield kernels.fused


@pytest.fixture
def unfused(monkeypatch) -> str:
    """The name of a term that the reference knows and the kernel lacks: Hellinger's distance, squared."""
    distance = lambda log_q, log_p, label, mix=None: 1 - ((log_q + log_p) / 2).exp().sum(-1)
    monkeypatch.setitem(terms.TERMS, "hellinger", terms.Term("1 - sum_v sqrt(p q)", distance))
    return "hellinger"


def test_a_term_that_the_kernel_lacks_is_refused_and_not_trained_as_zero(fused, unfused):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a compiled kernel reads a GPU's memory alone
    logits = torch.randn(1, VOCAB, device=device)
    one = torch.ones(1, device=device)
    none = torch.zeros(1, dtype=torch.long, device=device)
    chunk = Chunk(logits, logits.clone(), none, None, none, one, one, None)
    with pytest.raises(UserError, match="loss.hellinger is no part of the fused kernel"):
        fused({"kl": 1.0, unfused: 1.0}, chunk, True)
    fused({"kl": 1.0, unfused: 0.0}, chunk, True)  # without a weight there is nothing to train


def test_a_gpu_trains_a_term_without_a_kernel_by_the_reference_and_says_so(fused, unfused):
    gpu = torch.device("cuda")
    assert choose.loss_kernel(EVERYTHING, gpu, torch.bfloat16).__name__ == "fused"
    assert choose.loss_kernel(EVERYTHING, gpu, torch.float64) is reference.reference_loss
    assert choose.loss_kernel(EVERYTHING, torch.device("cpu"), torch.float32) is reference.reference_loss
    assert choose.loss_kernel({**EVERYTHING, unfused: 0.1}, gpu, torch.bfloat16) is reference.reference_loss
    assert choose.slower_on_a_gpu(EVERYTHING) is None
    assert "loss.hellinger: no part of the fused kernel" in choose.slower_on_a_gpu({"kl": 1.0, unfused: 0.1})


def test_the_table_and_the_kernel_name_the_same_terms(fused):
    kernel = importlib.import_module("train.losses.fused")._loss_kernel
    others = {"OVERLAP", "TEACHER", "LEARNS", "BLOCK"}
    assert {name for name in kernel.arg_names if name.isupper()} == {name.upper() for name in terms.in_kernel()} | others


EVERYTHING = {"kl": 0.2, "reverse_kl": 0.2, "ce": 0.3, "ce_greedy": 0.1, "tv": 0.7, "lk_alpha": 0.4, "lk_lambda": 0.5}


@pytest.mark.parametrize("kept", [None, KEPT], ids=["full", "reduced"])
@pytest.mark.parametrize("loss", [{"kl": 1.0, "ce": 0.5}, {"ce_greedy": 1.0}, EVERYTHING, {}], ids=str)
def test_fused_kernels_equal_the_reference(fused, loss, kept):
    """Value, statistics and gradients in float32, with and without weights on the overlap. The tolerance is that of
    `test_losses_in_float32_are_near_those_in_float64`: both round, and each in its own order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for regime, overlap_weight in (("ordinary", 0.0), ("near-one-hot", 0.3), ("mismatched", 0.3)):
        if not loss and not overlap_weight:
            continue
        draft, teacher, label, weight, mix, head = (t.detach().to(device) for t in rows(regime))
        draft.requires_grad_()
        kept_D = None if kept is None else kept.to(device)
        own = (head if kept is None else head[kept_D]).clone().requires_grad_()
        found = []
        for kernel in (reference.reference_loss, fused):
            inputs = row_inputs(draft, teacher, in_vocabulary(label.cpu(), kept).to(device), mix)
            inputs = inputs._replace(index_R=inputs.index_R.to(device), teacher_R=inputs.teacher_R.to(device) // 2)
            extra = overlap_weight * weight if overlap_weight else None
            total, statistics = chunked_loss(inputs, Heads(own, head, kept_D), loss, weight, 8, extra, kernel)
            found.append([total.detach(), *statistics, *torch.autograd.grad(total, (draft, own))])
        for mine, expected in zip(*reversed(found)):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
        assert found[0][1].std() > 0.01 or loss == {}  # rows differ


@pytest.mark.parametrize("loss", [{"kl": 1.0}, {"ce_greedy": 1.0}, {"ce": 1.0}], ids=str)
def test_a_loss_needs_no_more_of_the_teachers_than_it_reads(fused, loss):
    """The same loss and gradients from the draft vocabulary's part of the target's head, or from none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draft, teacher, label, weight, mix, head = (t.detach().to(device) for t in rows())
    draft.requires_grad_()
    kept_D = KEPT.to(device)
    own = head[kept_D].clone().requires_grad_()
    inputs = row_inputs(draft, teacher, in_vocabulary(label.cpu(), KEPT).to(device), mix)
    inputs = inputs._replace(index_R=inputs.index_R.to(device), teacher_R=inputs.teacher_R.to(device))
    part = None if terms.reads(loss) == "nothing" else head[kept_D]
    for kernel in (reference.reference_loss, fused):
        found = []
        for heads in (Heads(own, head, kept_D), Heads(own, part)):
            total, statistics = chunked_loss(inputs, heads, loss, weight, 8, None, kernel)
            found.append([total.detach(), statistics.loss, *torch.autograd.grad(total, (draft, own))])
        for mine, expected in zip(*reversed(found)):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_fused_kernels_have_a_gradient_where_the_overlap_underflows(fused):
    """As in `test_lk_alpha_has_a_gradient_where_the_overlap_underflows`: the overlap underflows, its logarithm does not."""
    logits, target = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])
    one = torch.ones(1)
    none = torch.zeros(1, dtype=torch.long)
    if torch.cuda.is_available():
        logits, target, one, none = (t.cuda() for t in (logits, target, one, none))
    chunk = Chunk(logits, target, none, None, none + 2, one, one, None)
    _, expected = reference.reference_loss({"lk_alpha": 1.0}, chunk, True)
    statistics, gradient = fused({"lk_alpha": 1.0}, chunk, True)
    assert statistics.overlap.item() == 0 and statistics.loss.item() == pytest.approx(200, rel=1e-3)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["drafter", "teacher"])
@pytest.mark.parametrize("loss", ["kl", "tv", "lk_alpha", "ce"])
def test_fused_kernels_pass_nan_on(fused, loss, side):
    """A NaN must not become a perfect acceptance: minima and maxima of a GPU pass over it. Wherever it stands in the row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for place in (0, 70, 210):
        logits, target = torch.randn(2, 1, VOCAB, generator=torch.Generator().manual_seed(0)).to(device)
        (logits if side == "drafter" else target)[0, place] = torch.nan
        one = torch.ones(1, device=device)
        none = torch.zeros(1, dtype=torch.long, device=device)
        found = []
        for kernel in (reference.reference_loss, fused):
            chunk = Chunk(logits.clone(), target, none, None, none + 5, one, one, None)
            found.append(kernel({loss: 1.0}, chunk, True)[0])
        for name in ("loss", "overlap", "label_probability"):
            mine, expected = (getattr(one, name).isnan() for one in reversed(found))
            assert torch.equal(mine, expected), (name, place)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 products that add up in float32 need a GPU")
@pytest.mark.parametrize("loss", [{"kl": 1.0}, EVERYTHING], ids=str)
def test_fused_kernels_in_bf16_on_a_gpu(loss):
    """The size of a real vocabulary, in bf16, against `reference_loss` on the same logits: both round alike: the difference
    is one rounding of a gradient (2^-8) and the order of sums."""
    g = torch.Generator().manual_seed(0)
    draft, teacher, head = (torch.randn(n, 256, generator=g).to("cuda", torch.bfloat16) for n in (600, 200, 50_021))
    index = torch.arange(600, device="cuda")
    teacher_R = torch.randint(0, 200, (600,), generator=g).cuda()
    label, mix, weight = (
        torch.randint(0, 50_021, (600,), generator=g).cuda(),
        *(torch.rand(600, generator=g).cuda() for _ in "ab"),
    )
    found = []
    for kernel in (reference.reference_loss, None):
        leaves = [draft.clone().requires_grad_(), (0.05 * head).requires_grad_()]
        inputs = HeadInput(leaves[0], index, teacher, teacher_R, label, mix)
        total, statistics = chunked_loss(inputs, Heads(leaves[1], 0.05 * head), loss, weight, 256, 0.1 * weight, kernel)
        found.append([total.detach(), *statistics, *torch.autograd.grad(total, leaves)])
    for expected, mine in zip(*found):
        error = (mine.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
        assert error < 5e-3, float(error)
