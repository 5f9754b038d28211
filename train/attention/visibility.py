"""Who sees what: one rule for training and decoding, for every reuse, objective and executor.

A draft row (a query) belongs to one anchor. It attends two kinds of keys:

- memory: one key a verified position, from the target's states;
- draft: the keys of draft rows, its own included.

Shapes: Q draft rows (queries), P memory positions, R draft rows (keys), K = P + R keys, H query heads, G key/value
heads, D head size, N anchors.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Draft rows, all int64 [Q]. `anchor` and `position` count from the start of the row's own document."""

    document: Tensor
    anchor: Tensor  # position of the newest token that is known but not yet processed by the target
    group: Tensor  # which anchor of the batch the row belongs to
    slot: Tensor  # 0 = the anchor token itself (block-wise), j = the j-th drafted token
    position: Tensor

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(*(torch.cat([getattr(self, f), getattr(other, f)]) for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class Places:
    """Where memory keys sit, int64 [P]: their document and their position in it."""

    document: Tensor
    position: Tensor

    def __add__(self, other: "Places") -> "Places":
        return Places(torch.cat([self.document, other.document]), torch.cat([self.position, other.position]))


def sees_memory(q_document, q_anchor, k_document, k_position):
    """Memory *strictly* before the anchor (the target has not processed the anchor token) of the same document."""
    return (q_document == k_document) & (k_position < q_anchor)


def sees_draft(q_group, q_slot, k_group, k_slot, causal: bool):
    """Draft rows of the same anchor; under `causal` only up to the own slot."""
    same = q_group == k_group
    return same & (k_slot <= q_slot) if causal else same


@dataclass(frozen=True)
class Visibility:
    """The rule applied to these rows and keys; keys are ordered memory first, draft rows after.

    `dense` is the oracle's mask; `block_mask` is the same rule for FlexAttention. Built once, used by every layer.
    """

    queries: Rows
    memory: Places
    drafts: Rows
    causal: bool

    @cached_property
    def dense(self) -> Tensor:
        """bool [Q, P + R], True = attend."""
        q, m, d = self.queries, self.memory, self.drafts
        return torch.cat(
            [
                sees_memory(q.document[:, None], q.anchor[:, None], m.document[None], m.position[None]),
                sees_draft(q.group[:, None], q.slot[:, None], d.group[None], d.slot[None], self.causal),
            ],
            dim=1,
        )

    @cached_property
    def block_mask(self):
        from torch.nn.attention.flex_attention import create_block_mask

        q, memory = self.queries, self.memory.position.numel()
        # Both kinds of key under one index, so that the predicates need no branch.
        pad_d, pad_m = torch.full_like(self.drafts.group, -1), torch.full_like(self.memory.position, -1)
        k_document = torch.cat([self.memory.document, pad_d])
        k_position = torch.cat([self.memory.position, pad_d])
        k_group = torch.cat([pad_m, self.drafts.group])
        k_slot = torch.cat([pad_m, self.drafts.slot])

        def rule(batch, head, i, k):
            in_memory = sees_memory(q.document[i], q.anchor[i], k_document[k], k_position[k])
            in_draft = sees_draft(q.group[i], q.slot[i], k_group[k], k_slot[k], self.causal)
            return torch.where(k < memory, in_memory, in_draft)

        return create_block_mask(rule, None, None, q.group.numel(), k_group.numel(), device=q.group.device)
