"""Cached documents -> packs, in an order that is a function of (seed, pass, document id) alone: it survives resume and a
change of world size.

Shapes: P positions of a pack, N anchors, J drafted slots, R teacher rows, E hidden size.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.cache.reader import CacheReader
from data_prep.errors import UserError
from data_prep.sources import stable_hash
from data_prep.target import States
from train.attention.visibility import Places


@dataclass
class Pack:
    """Documents back to back, no padding. `anchor_N` indexes positions of the pack."""

    names: list[str]
    ids_P: Tensor
    mask_P: Tensor  # bool: the token's prediction is supervised
    places: Places
    states: States
    last_hidden_RE: Tensor
    teacher_P: Tensor  # row of last_hidden that predicts the token *after* the position
    anchor_N: Tensor

    def valid(self, slots: int) -> Tensor:
        """bool [N, J]: slot j counts iff x_{a+j} is in the document and supervised, and all slots before it count."""
        index = self.anchor_N[:, None] + torch.arange(1, slots + 1, device=self.anchor_N.device)
        inside = index < len(self.ids_P)
        index = index.clamp(max=len(self.ids_P) - 1)
        same = self.places.document[index] == self.places.document[self.anchor_N][:, None]
        started = self.places.position[self.anchor_N] >= 1
        return (inside & same & self.mask_P[index] & started[:, None]).cumprod(1).bool()

    def to(self, device: torch.device) -> "Pack":
        def move(t):
            return t.to(device, non_blocking=True)

        places = Places(move(self.places.document), move(self.places.position))
        return Pack(
            self.names,
            move(self.ids_P),
            move(self.mask_P),
            places,
            self.states.map(move),
            move(self.last_hidden_RE),
            move(self.teacher_P),
            move(self.anchor_N),
        )


def make_pack(names: list[str], documents: list[dict[str, Tensor]], anchors: list[np.ndarray]) -> Pack:
    """Join cached documents. `anchors[d]`: positions within document d; a pack without any gets one that counts nothing,
    so that every rank runs the same forward."""
    lengths = torch.tensor([len(d["input_ids"]) for d in documents])
    starts = lengths.cumsum(0) - lengths
    mask = torch.cat([d["loss_mask"] for d in documents]).bool()
    next_mask = torch.roll(mask, -1)  # wraps onto position 0 of a document, which is never supervised
    anchor = torch.cat([start + torch.from_numpy(a) for start, a in zip(starts, anchors)])

    def joined(kind: str) -> dict[int, Tensor]:
        names = [n for n in documents[0] if n.startswith(f"{kind}.")]
        return {int(n.split(".")[1]): torch.cat([d[n] for d in documents]) for n in names}

    return Pack(
        names=names,
        ids_P=torch.cat([d["input_ids"] for d in documents]).long(),
        mask_P=mask,
        places=Places(torch.arange(len(documents)).repeat_interleave(lengths), torch.cat([torch.arange(n) for n in lengths])),
        states=States(joined("hidden"), joined("key"), joined("value")),
        last_hidden_RE=torch.cat([d["last_hidden"] for d in documents]),
        teacher_P=torch.where(next_mask, next_mask.cumsum(0) - 1, 0),
        anchor_N=anchor if len(anchor) else torch.zeros(1, dtype=torch.long),
    )


def sample_anchors(id: str, mask: np.ndarray, count: int | None, seed: int, pass_number: int) -> np.ndarray:
    """Up to `count` positions a with mask[a] and mask[a + 1] (DFlash's rule), ascending, without replacement; all of
    them when `count` is None. A function of (seed, pass, document)."""
    candidates = np.flatnonzero(mask[:-1] & mask[1:])
    if count is None or count >= len(candidates):
        return candidates
    rng = np.random.default_rng(stable_hash(f"anchors/{seed}/{pass_number}/{id}"))
    return np.sort(rng.choice(candidates, count, replace=False))


class PackStream:
    """An endless sequence of packs over some documents of a cache; any element can be asked for at any time."""

    def __init__(
        self,
        reader: CacheReader,
        documents: list[int],
        names: list[str],
        pack_tokens: int,
        anchors: int | None,
        seed: int,
        shuffle: bool = True,
    ):
        self.reader, self.documents, self.names = reader, documents, names
        self.pack_tokens, self.anchors, self.seed, self.shuffle = pack_tokens, anchors, seed, shuffle
        self._first = [0]  # number of the first pack of each pass
        self._passes: dict[int, list[list[int]]] = {}

    def passes(self, number: int) -> list[list[int]]:
        """The packs of one pass: documents in the pass's order, joined while they fit into `pack_tokens`."""
        if number not in self._passes:
            order = list(self.documents)
            if self.shuffle:
                np.random.default_rng(stable_hash(f"order/{self.seed}/{number}")).shuffle(order)
            packs, room = [], -1
            for index in order:
                length = self.reader.lengths[index]
                if length > room:
                    packs.append([])
                    room = self.pack_tokens
                packs[-1].append(index)
                room -= length
            self._passes = {number: packs}  # one pass is kept; any other is as cheap to make again
        return self._passes[number]

    def __getitem__(self, number: int) -> Pack:
        while self._first[-1] <= number:
            self._first.append(self._first[-1] + len(self.passes(len(self._first) - 1)))
        pass_number = bisect_right(self._first, number) - 1
        return self.read(self.passes(pass_number)[number - self._first[pass_number]], pass_number)

    def read(self, indices: list[int], pass_number: int = 0) -> Pack:
        ids = [self.reader.ids[i] for i in indices]
        documents = [self.reader.read(i, self.names) for i in indices]
        anchors = [
            sample_anchors(id, d["loss_mask"].numpy().astype(bool), self.anchors, self.seed, pass_number)
            for id, d in zip(ids, documents)
        ]
        return make_pack(ids, documents, anchors)


def split(reader: CacheReader, validation_documents: int) -> tuple[list[int], list[int]]:
    """(training, validation) documents: the validation side is a twentieth of the source documents (all pieces of one
    together), chosen by hash, of which at most `validation_documents` pieces are used.

    Raises:
        UserError: fewer than two source documents.
    """
    stems = sorted({id.rsplit("#", 1)[0] for id in reader.ids}, key=lambda s: stable_hash(f"validation/{s}"))
    if len(stems) < 2:
        raise UserError(
            f"{reader.folder} holds {len(stems)} source document(s); training needs one to train on and one to judge on"
        )
    held = set(stems[: max(1, len(stems) // 20)])
    sides = [[], []]
    for index, id in enumerate(reader.ids):
        sides[id.rsplit("#", 1)[0] in held].append(index)
    training, validation = sides
    return training, sorted(validation, key=lambda i: stable_hash(f"validation/{reader.ids[i]}"))[:validation_documents]
