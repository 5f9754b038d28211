"""Head and loss in chunks equal a plain float32 computation, in value and gradient, and never hold all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train.losses import weights
from train.losses.chunked import chunked_loss

ROWS, HIDDEN, VOCAB = 37, 16, 211
REGIMES = {"near-uniform": 0.02, "ordinary": 1.0, "near-one-hot": 12.0}


def rows(scale: float, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    draft = (torch.randn(ROWS, HIDDEN, generator=g) * scale).requires_grad_()
    teacher = torch.randn(ROWS, HIDDEN, generator=g) * scale
    label = torch.randint(0, VOCAB, (ROWS,), generator=g)
    weight = torch.rand(ROWS, generator=g)
    head = torch.randn(VOCAB, HIDDEN, generator=g)
    return draft, teacher, label, weight, head


def plain(draft, teacher, label, weight, head, loss):
    """The definition, written out."""
    q, p = (draft @ head.T).softmax(-1), (teacher @ head.T).softmax(-1)
    log_q, log_p = (draft @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1)
    per_row = {"kl": (p * (log_p - log_q)).sum(-1), "ce": -log_q[torch.arange(ROWS), label]}[loss]
    return (per_row * weight).sum(), per_row, torch.minimum(p, q).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_equals_the_definition(loss, regime, chunk):
    draft, teacher, label, weight, head = rows(REGIMES[regime])
    expected, *statistics = plain(draft, teacher, label, weight, head, loss)
    (gradient,) = torch.autograd.grad(expected * 3, draft)
    total, found = chunked_loss(draft, teacher, label, weight, head, loss, chunk)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(total * 3, draft)[0], gradient, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, statistics):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


def test_perfect_drafter_is_always_accepted():
    draft, _, label, weight, head = rows(1.0)
    total, found = chunked_loss(draft, draft.detach(), label, weight, head, "kl", 8)
    assert abs(total.item()) < 1e-4
    torch.testing.assert_close(found.overlap, torch.ones(ROWS))
    assert found.match.all()


def test_overlap_is_known_by_hand():
    """p = (.5, .3, .2) and q = (.2, .3, .5): overlap .2 + .3 + .2, KL = .5 ln 2.5 + .2 ln .4."""
    head = torch.eye(3)
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    total, found = chunked_loss(q, p, torch.tensor([0]), torch.ones(1), head, "kl", 4)
    assert found.overlap.item() == pytest.approx(0.7)
    assert total.item() == pytest.approx(0.5 * 0.916291 + 0.2 * -0.916291, abs=1e-5)
    assert found.match.item() == 0


class Largest(TorchDispatchMode):
    """The largest tensor that any operation produced."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_all_rows_and_the_vocabulary():
    draft, teacher, label, weight, head = rows(1.0)
    with Largest() as seen:
        total, _ = chunked_loss(draft, teacher, label, weight, head, "kl", 4)
        total.backward()
    assert seen.numel == max(4 * VOCAB, VOCAB * HIDDEN)
    with Largest() as control:  # the control: one chunk does hold them all
        chunked_loss(draft, teacher, label, weight, head, "kl", ROWS)
    assert control.numel == ROWS * VOCAB


def test_no_rows_give_a_differentiable_zero():
    draft, teacher, label, weight, head = rows(1.0)
    total, found = chunked_loss(draft[:0], teacher[:0], label[:0], weight[:0], head, "kl", 4)
    total.backward()
    assert total.item() == 0 and found.loss.shape == (0,)


def test_slot_weights_by_hand():
    torch.testing.assert_close(weights.geometric(3, 0.8), torch.tensor([1.0, 0.8, 0.64]))
    torch.testing.assert_close(weights.exponential(3, 7.0), torch.exp(-torch.tensor([0.0, 1.0, 2.0]) / 7))
