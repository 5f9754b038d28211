"""A pack: cached documents back to back, with the anchors at which a drafter is trained or judged.

Shapes: P positions of a pack, N anchors, J drafted slots, S draft rows of an anchor, V views, R teacher rows, E hidden size,
H heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_prep.cache.codec import Scaled, decode, paired
from data_prep.target.states import States
from train.attention.visibility import Anchors, Places


@dataclass
class Pack:
    """Documents back to back, without padding. `anchor_N` holds indices into the pack. States that were read from an fp8 cache
    stay `Scaled` until `to` decodes them on the device."""

    names: list[str]
    ids_P: Tensor
    mask_P: Tensor  # bool: the token's prediction is supervised
    places: Places
    states: States
    last_hidden_RE: Tensor | Scaled
    teacher_P: Tensor  # row of last_hidden that predicts the token *after* the position
    anchor_N: Tensor
    prefix_N: Tensor | None = None  # tokens x_a .. of each block that the drafter is given; None: x_a alone
    query: dict[int, Tensor | Scaled] = field(default_factory=dict)  # the target's by layer, [R, H, D]: rows as last_hidden's
    budget_VN: Tensor | None = None  # memory positions that each view leaves each anchor; None: one view, everything
    age_N: Tensor | None = None  # tokens between the selection that serves an anchor and the anchor; None: no selections

    @property
    def anchors(self) -> Anchors:
        return Anchors(self.anchor_N, self.places.document[self.anchor_N], self.places.position[self.anchor_N])

    @property
    def views(self) -> int:
        return 1 if self.budget_VN is None else len(self.budget_VN)

    def valid(self, slots: int) -> Tensor:
        """bool [N, J]: whether slot j counts: x_{a+1} .. x_{a+j} are all in the document and supervised, and x_{a+j} is not given
        to the drafter."""
        index, inside = (t[:, 1:] for t in self.row_index(slots + 1))
        return (inside & self.mask_P[index]).cumprod(1).bool() & ~self.in_prefix(slots)

    def in_prefix(self, slots: int) -> Tensor:
        """bool [N, J]: x_{a+j} is given to the drafter, so that slot j has nothing to predict."""
        slot = torch.arange(1, slots + 1, device=self.anchor_N.device)
        return slot < (torch.ones_like(self.anchor_N) if self.prefix_N is None else self.prefix_N)[:, None]

    def row_index(self, slots: int) -> tuple[Tensor, Tensor]:
        """(pack index [N, S] of the positions a .. a + S - 1 at which an anchor's draft rows sit, whether each is in the anchor's
        document)."""
        index = self.anchor_N[:, None] + torch.arange(slots, device=self.anchor_N.device)
        inside = index < len(self.ids_P)
        index = index.clamp(max=len(self.ids_P) - 1)
        document_P = self.places.document
        document_N = document_P[self.anchor_N]
        # An anchor needs a token before it, whose state its rows read. The position does not say whether there is one: a cropped
        # document's first token has a position above zero, and still nothing before it in the pack.
        before_N = (self.anchor_N - 1).clamp(min=0)
        started_N = (self.anchor_N > 0) & (document_P[before_N] == document_N)
        same_document = document_P[index] == document_N[:, None]
        return index, inside & same_document & started_N[:, None]

    def finite(self) -> bool:
        """Whether all states are that were read from the cache, of a pack that is decoded."""
        found = []
        self._map(lambda t: found.append(t.isfinite().all()) or t)
        return all(found)

    def to(self, device: torch.device) -> "Pack":
        """The pack on `device`, decoded. The copy is asynchronous where the pack is in pinned memory."""
        return self._map(lambda t: decode(_each(t, lambda part: part.to(device, non_blocking=True))))

    def pin(self) -> "Pack":
        """The pack in page-locked memory, from which a GPU copies while the host goes on."""
        return self._map(lambda t: _each(t, Tensor.pin_memory))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors, which another stream made."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, function: Callable) -> "Pack":
        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return Pack(
            self.names,
            function(self.ids_P),
            function(self.mask_P),
            Places(function(self.places.document), function(self.places.position)),
            self.states.map(function),
            function(self.last_hidden_RE),
            function(self.teacher_P),
            function(self.anchor_N),
            optional(self.prefix_N),
            {layer: function(t) for layer, t in self.query.items()},
            optional(self.budget_VN),
            optional(self.age_N),
        )


def _each(stored: Tensor | Scaled, function: Callable) -> Tensor | Scaled:
    """`function` of a tensor, or of the values and of the scales of a `Scaled` one."""
    return Scaled(*map(function, stored)) if isinstance(stored, Scaled) else function(stored)


@dataclass(frozen=True)
class PackDocument:
    """One document that goes into a pack, and what was drawn for it. All documents of a pack have a prefix or none has; the same
    holds for budgets and for ages."""

    name: str
    tensors: dict[str, Tensor]  # as a cache gives them: input_ids, loss_mask, last_hidden, hidden.N, key.N, value.N, query.N
    anchors: np.ndarray  # indices into the document as it is given
    start: int = 0  # the position of its first token, where it was cropped
    prefix: np.ndarray | None = None  # for each anchor: how many tokens its block is given
    budgets: list[int] | None = None  # for each view
    ages: np.ndarray | None = None  # for each anchor: tokens since the selection that serves it


def make_pack(documents: list[PackDocument]) -> Pack:
    """Join cached documents. A pack without any anchor gets one that counts nothing, so that every rank runs the same forward."""
    lengths = torch.tensor([len(document.tensors["input_ids"]) for document in documents])
    offsets = lengths.cumsum(0) - lengths
    names = documents[0].tensors
    joined = paired({name: torch.cat([document.tensors[name] for document in documents]) for name in names})

    # Teachers. last_hidden has a row for each supervised token, in order: the state from which the target predicts that token.
    # So the row for the token after position i is the number of supervised tokens up to and including i + 1, less one.
    mask_P = torch.cat([document.tensors["loss_mask"] for document in documents]).bool()
    next_mask_P = torch.roll(mask_P, -1)  # wraps onto position 0 of a document, which is never supervised
    teacher_P = torch.where(next_mask_P, next_mask_P.cumsum(0) - 1, 0)

    # Places.
    document_P = torch.arange(len(documents)).repeat_interleave(lengths)
    spans = [torch.arange(d.start, d.start + length) for d, length in zip(documents, lengths.tolist())]

    # Anchors, and what was drawn for each of them.
    anchor_N = torch.cat([offset + torch.from_numpy(d.anchors) for offset, d in zip(offsets, documents)])
    empty = not len(anchor_N)
    prefix_N = _of_anchors([d.prefix for d in documents], filler=1 if empty else None)
    age_N = _of_anchors([d.ages for d in documents], filler=0 if empty else None)
    if empty:
        anchor_N = torch.zeros(1, dtype=torch.long)

    def layers(kind: str) -> dict[int, Tensor | Scaled]:
        return {int(name.split(".")[1]): t for name, t in joined.items() if name.startswith(f"{kind}.")}

    return Pack(
        names=[document.name for document in documents],
        ids_P=joined["input_ids"].long(),
        mask_P=mask_P,
        places=Places(document_P, torch.cat(spans)),
        states=States(layers("hidden"), layers("key"), layers("value")),
        last_hidden_RE=joined["last_hidden"],
        teacher_P=teacher_P,
        anchor_N=anchor_N,
        prefix_N=prefix_N,
        query=layers("query"),
        budget_VN=_budgets(documents),
        age_N=age_N,
    )


def _of_anchors(values: list[np.ndarray | None], filler: int | None) -> Tensor | None:
    """What was drawn for the anchors of each document, one after the other. `filler`: of the one anchor of a pack without any."""
    if values[0] is None:
        return None
    if filler is not None:
        return torch.from_numpy(np.full(1, filler))
    return torch.from_numpy(np.concatenate(values))


def _budgets(documents: list[PackDocument]) -> Tensor | None:
    """The budgets of each document's views for each of its anchors, [V, N]. The one anchor of a pack without any is the first
    document's."""
    if documents[0].budgets is None:
        return None
    counts = [len(document.anchors) for document in documents]
    if not sum(counts):
        counts[0] = 1
    budget_VD = torch.tensor([document.budgets for document in documents]).T
    return budget_VD.repeat_interleave(torch.tensor(counts), dim=1)
