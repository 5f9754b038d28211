"""What the LM head, the chunks of rows and the kernels of the loss hand to each other.

Shapes: M rows of the drafter, R of them that count, L teachers, C rows of a chunk, T teachers of a chunk, V target vocabulary,
D draft vocabulary, E hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from train.precision.fp8 import Frozen


class Heads(NamedTuple):
    """`draft_DE` reads the drafter, `target_VE` the target (None: the loss asks it nothing, and overlap and match are not known);
    `kept_D`: which of the target's tokens are the draft vocabulary's (None: all that `target_VE` has are);
    `narrow`: a frozen `draft_DE` in fp8, with which its products are made instead. The teacher's are not. `finish`: makes the
    target's logits of its products (FrozenHead.finish); None: they are the logits."""

    draft_DE: Tensor
    target_VE: Tensor | None
    kept_D: Tensor | None = None
    narrow: Frozen | None = None
    finish: Callable[[Tensor], Tensor] | None = None


class Teachers(NamedTuple):
    """Rows in the order of their teachers, so that a teacher's logits are computed once (`chunked.by_teacher`)."""

    order_R: Tensor  # row of each place
    used_L: Tensor  # the teachers that have rows
    teacher_R: Tensor  # of each place, among those
    bounds: list[tuple[int, int]]  # of each chunk: the first teacher that it needs, and the one behind the last


class HeadInput(NamedTuple):
    """What is known before the head is applied: the drafter's output and, of its rows that count, which they are, each one's
    teacher, the text's token (in the draft vocabulary, -1 outside it) and lk_lambda's lambda. `teachers`: their order, where
    it was made before."""

    draft_ME: Tensor
    index_R: Tensor
    teacher_LE: Tensor  # the target's last hidden states
    teacher_R: Tensor
    label_R: Tensor
    mix_R: Tensor
    teachers: Teachers | None = None


class RowStatistics(NamedTuple):
    """For each row [R]: its unweighted loss, the overlap sum_v min(p, q) (the chance that a token drawn from q is accepted
    at temperature 1), whether both distributions have the same most likely token (accepted at temperature 0; a token that
    the drafter cannot say never is), and q of the text's token. Overlap and match mean this where the whole of the target's
    distribution was asked for, and nothing elsewhere."""

    loss: Tensor
    overlap: Tensor
    match: Tensor
    label_probability: Tensor


class Chunk(NamedTuple):
    """Logits of some rows and of their teachers, and what else their loss depends on."""

    draft_CD: Tensor
    target_TV: Tensor | None
    teacher_C: Tensor  # among the T
    kept_D: Tensor | None
    label_C: Tensor
    mix_C: Tensor
    weight_C: Tensor
    overlap_weight_C: Tensor | None


class LossKernel(Protocol):
    """What happens between a chunk's logits and their gradient: `reference.reference_loss`, or `fused.fused` on a GPU."""

    def __call__(self, loss: dict[str, float], chunk: Chunk, learns: bool) -> tuple[RowStatistics, Tensor | None]:
        """(statistics, gradient [C, D] of sum_c weight_c loss_c + overlap_weight_c overlap_c in the drafter's logits, or None
        where nothing `learns`). The gradient may stand where the drafter's logits stood.

        Args:
            loss: the weight of each per-slot term.
        """
