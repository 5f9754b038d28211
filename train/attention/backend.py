"""What an attention backend is: one implementation of the rule of visibility.

Shapes: Q draft rows, K keys, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from train.attention.visibility import Visibility

Keys = Tensor | tuple[Tensor, ...]  # [K, G, D], or in parts: the memory's, then those of each step


class AttentionBackend(Protocol):
    """Softmax attention of rows over the keys that they see.

    `takes_parts`: it also takes keys, and values, as a tuple of the memory's and each step's. They need not be joined then, and
    no step of ttt keeps a long tensor of its own for the backward.
    """

    takes_parts: bool

    def __call__(self, q_QHD: Tensor, k_KGD: Keys, v_KGD: Keys, visibility: Visibility) -> Tensor:
        """[Q, H, D]. Keys are ordered memory first, draft rows after, as in `Visibility`."""


def backend(takes_parts: bool) -> Callable[[Callable[..., Tensor]], AttentionBackend]:
    """Declares a function to be an attention backend."""

    def declare(attend: Callable[..., Tensor]) -> AttentionBackend:
        attend.takes_parts = takes_parts
        return attend

    return declare
