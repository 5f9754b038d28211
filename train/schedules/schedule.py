"""What an objective is: which rows draft, in which order, and what each of them reads. Training and decoding run the same loop.

`Schedule` is the loop of one objective. It takes its tokens from a `Source`: in training the text says them (`Text`), in decoding
a sampler draws them from what the drafter proposes, and in a tree each depth is the nodes that were chosen.

Shapes: N anchors, S rows of an anchor, J drafted tokens, E hidden size, P positions of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # the drafter's configuration asks its schedule: at run time the imports go the other way
    from train.drafter.base import Drafter
    from train.drafter.config import DrafterConfig
    from train.drafter.memory import Memory


class Start(NamedTuple):
    """What is known when the rounds of N anchors begin. `anchor_N` counts from the start of each anchor's document.

    `feature_NE` is fc(f_{a-1}) for drafters that read pairs of token and feature; None for all others.
    """

    memory: Memory
    document_N: Tensor
    anchor_N: Tensor
    feature_NE: Tensor | None


class Source:
    """Where the tokens of a round come from, and where the drafter's outputs go.

    `length` is how many tokens are drafted. `attend` is the attention backend of the next rows. `prefix_N` is how many tokens of
    each block are given (None: the anchor's alone).
    """

    length: int
    attend: Callable
    prefix_N: Tensor | None = None

    def token(self, slot: int) -> Tensor:
        """The embeddings [N, E] of the tokens x_{a + slot}. Slot 0 is the anchor's own token, which is always known."""
        raise NotImplementedError

    def drafted(self, output_NE: Tensor) -> Tensor | None:
        """Take the output that proposes the next token of each row.

        Returns:
            for each row of the next step the row [N'] that it continues; None: every row continues itself.
        """
        raise NotImplementedError

    def drafted_at_once(self, output_NJE: Tensor) -> None:
        """Take the outputs that propose all tokens of a block, none of which depends on another."""
        raise NotImplementedError


class Text(Source):
    """The tokens of a text that is known to its end: training.

    Args:
        read: places in the text -> what the drafter reads of their tokens. Places past the text's end are asked for too: their
            slots never count.
        index_N: each anchor's place in the text.
    """

    def __init__(self, read: Callable, index_N: Tensor, attend: Callable, length: int, prefix_N: Tensor | None = None):
        self._read = read
        self._index_N = index_N
        self.attend = attend
        self.length = length
        self.prefix_N = prefix_N
        self._outputs: list[Tensor] = []
        self._at_once_NJE: Tensor | None = None

    def token(self, slot: int) -> Tensor:
        # Past a document's end the token is another document's. Such slots never count (Pack.valid).
        return self._read(self._index_N + slot)

    def drafted(self, output_NE: Tensor) -> None:
        self._outputs.append(output_NE)

    def drafted_at_once(self, output_NJE: Tensor) -> None:
        self._at_once_NJE = output_NJE

    @property
    def output_NJE(self) -> Tensor:
        """What the LM head reads for each drafted token."""
        return torch.stack(self._outputs, dim=1) if self._at_once_NJE is None else self._at_once_NJE


class Schedule:
    """One objective. What is asked of it elsewhere is asked here, so that no other file needs to know which objective it has.

    `token_by_token`: each pass of the drafter has one row of each anchor and reads the token before. Otherwise one pass fills a
    block, whose undrafted slots carry MASK.
    `first_row`: `DraftRows.slot` of an anchor's first row.
    """

    token_by_token: bool
    first_row: int

    def causal(self, config: DrafterConfig) -> bool:
        """Whether a row sees the earlier rows of its anchor alone, not the later ones."""
        raise NotImplementedError

    def first_slot(self, config: DrafterConfig) -> int:
        """How many rows of an anchor come before the row that proposes x_{a+1}."""
        raise NotImplementedError

    def reads_pairs(self, config: DrafterConfig) -> bool:
        """Whether a row of a drafter over hidden states reads a token and a feature (EAGLE-3's input path)."""
        raise NotImplementedError

    def slot_weights(self, slots: int, decay: float) -> Tensor:
        """What each drafted token counts in the loss, [J]. The sum is divided out."""
        raise NotImplementedError

    def draft(self, drafter: Drafter, start: Start, source: Source) -> None:
        """One round of every anchor: tokens come from `source`, outputs go to it. Runs inside CUDA graphs, so that nothing here
        may wait for the device or depend on what a tensor holds."""
        raise NotImplementedError
