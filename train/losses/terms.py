"""The terms of a loss, in one table. From it derive the keys of `conf/loss/` (`LossRecipe`), the reference, what the fused kernel
is asked for, and what the objective divides by. `docs/extend/loss.md` says how to add a term.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from train.losses import divergences


class Term(NamedTuple):
    """One term of a loss.

    Args:
        meaning: what it is, in a line, with its paper where it has one.
        definition: the plain definition. Of a per-slot term a function (log_q [R, D], log_p [R, D], label [R], mix [R]) -> [R],
            see `divergences`; of another term what its caller in `train/objectives/` asks for.
        per_slot: its rows are summed under the slot weights, with those of all per-slot terms. Otherwise it is averaged by
            itself, with a divisor of its own.
        in_kernel: the Triton kernel (`train/losses/fused.py`) has it. Only of per-slot terms: no other passes through the kernel.
        reads: of the target's distribution "nothing", what it says of the "draft" vocabulary's tokens among themselves, or
            the "whole" of it.
    """

    meaning: str
    definition: Callable[..., Tensor]
    per_slot: bool = True
    in_kernel: bool = False
    reads: Literal["nothing", "draft", "whole"] = "whole"


TERMS: dict[str, Term] = {
    "kl": Term("the forward KL(p || q), p the target's distribution (EAGLE-3)", divergences.kl, in_kernel=True, reads="draft"),
    "reverse_kl": Term("KL(q || p)", divergences.reverse_kl, in_kernel=True),
    "ce": Term("the cross entropy with the text's own token (DFlash)", divergences.ce, in_kernel=True, reads="nothing"),
    "ce_greedy": Term(
        "the cross entropy with the target's most likely token (BudgetDraft)",
        divergences.ce_greedy,
        in_kernel=True,
        reads="draft",
    ),
    "tv": Term("the total variation, half of the L1 distance", divergences.tv, in_kernel=True),
    "lk_alpha": Term(
        "-log sum_v min(p, q), the chance of acceptance (LK losses, equation 6)",
        divergences.lk_alpha,
        in_kernel=True,
    ),
    "lk_lambda": Term(
        "lambda KL + (1 - lambda) TV, lambda = exp(-eta * acceptance) (LK losses)",
        divergences.lk_lambda,
        in_kernel=True,
    ),
    "expected_length": Term(
        "1 - E/J, E the expected number of accepted slots of J",
        divergences.expected_accepted,
        per_slot=False,
    ),
    "kv_align": Term(
        "the distance of the drafter's own K/V from the target's at the same position",
        divergences.relative_error,
        per_slot=False,
        reads="nothing",
    ),
    "query_align": Term(
        "the distance of the drafter's queries from the target's; needs cache.kinds=[...,query]",
        divergences.relative_error,
        per_slot=False,
        reads="nothing",
    ),
}


def parts() -> tuple[str, ...]:
    """What is averaged by itself, in the order of `Outcome.terms_T`: all per-slot terms together ("slots"), then each other."""
    return ("slots", *(name for name, term in TERMS.items() if not term.per_slot))


def per_slot() -> tuple[str, ...]:
    return tuple(name for name, term in TERMS.items() if term.per_slot)


def in_kernel() -> tuple[str, ...]:
    """The terms that the Triton kernel has."""
    return tuple(name for name, term in TERMS.items() if term.in_kernel)


def reads(loss: dict[str, float]) -> str:
    """The most that a term with a weight reads of the target's distribution."""
    order = ("nothing", "draft", "whole")
    return order[max(order.index(TERMS[name].reads) for name, weight in loss.items() if weight)]


def without_kernel(loss: dict[str, float]) -> list[str]:
    """Terms that have a weight and are not in the fused kernel."""
    return [name for name, weight in loss.items() if weight and name not in in_kernel()]
