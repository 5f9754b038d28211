"""Cached documents -> packs, in an order that is a function of (seed, pass, document id) alone: it survives resume and a
change of world size.

Shapes: P positions of a pack, N anchors, J drafted slots, R teacher rows, E hidden size.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from common.hashing import stable_hash
from data_prep.cache.codec import Scaled, decode, paired
from data_prep.cache.reader import CacheReader
from data_prep.sources.sides import refuse_one_side, validation_side
from data_prep.target.states import States
from train.attention.visibility import Anchors, Places


@dataclass
class Pack:
    """Documents back to back, no padding. `anchor_N` indexes positions of the pack. States read from an fp8 cache stay
    `Scaled` until `to` decodes them on the device."""

    names: list[str]
    ids_P: Tensor
    mask_P: Tensor  # bool: the token's prediction is supervised
    places: Places
    states: States
    last_hidden_RE: Tensor | Scaled
    teacher_P: Tensor  # row of last_hidden that predicts the token *after* the position
    anchor_N: Tensor
    prefix_N: Tensor | None = None  # tokens x_a .. of each block that the drafter is shown; None: x_a alone
    query: dict[int, Tensor | Scaled] = field(default_factory=dict)  # the target's by layer, [R, H, D]: rows as last_hidden's
    budget_VN: Tensor | None = None  # memory positions that each view shows each anchor; None: one view, everything
    age_N: Tensor | None = None  # tokens between the selection that serves an anchor and the anchor; None: there are none

    @property
    def anchors(self) -> Anchors:
        return Anchors(self.anchor_N, self.places.document[self.anchor_N], self.places.position[self.anchor_N])

    @property
    def views(self) -> int:
        return 1 if self.budget_VN is None else len(self.budget_VN)

    def valid(self, slots: int) -> Tensor:
        """bool [N, J]: slot j counts iff x_{a+j} is in the document and supervised, all before it are, and it is not shown."""
        index, inside = (t[:, 1:] for t in self.row_index(slots + 1))
        return (inside & self.mask_P[index]).cumprod(1).bool() & ~self.in_prefix(slots)

    def in_prefix(self, slots: int) -> Tensor:
        """bool [N, J]: x_{a+j} is shown to the drafter, so that slot j has nothing to predict."""
        slot = torch.arange(1, slots + 1, device=self.anchor_N.device)
        return slot < (torch.ones_like(self.anchor_N) if self.prefix_N is None else self.prefix_N)[:, None]

    def row_index(self, slots: int) -> tuple[Tensor, Tensor]:
        """(pack index [N, S] of the positions a .. a + S - 1 at which an anchor's draft rows sit, whether each is in the anchor's
        document)."""
        index = self.anchor_N[:, None] + torch.arange(slots, device=self.anchor_N.device)
        inside = index < len(self.ids_P)
        index = index.clamp(max=len(self.ids_P) - 1)
        # A cropped document's first token has a position above zero, and still nothing before it.
        document_P, before_N = self.places.document, (self.anchor_N - 1).clamp(min=0)
        started = (self.anchor_N > 0) & (document_P[before_N] == document_P[self.anchor_N])
        return index, inside & (self.places.document[index] == self.places.document[self.anchor_N][:, None]) & started[:, None]

    def to(self, device: torch.device) -> "Pack":
        """On `device`, decoded; asynchronously from pinned memory."""
        return self._map(lambda t: decode(_each(t, lambda part: part.to(device, non_blocking=True))))

    def pin(self) -> "Pack":
        """In page-locked memory, from which a GPU copies while the host goes on."""
        return self._map(lambda t: _each(t, Tensor.pin_memory))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors, which another stream made."""
        self._map(lambda t: t.record_stream(stream) or t)

    def _map(self, function: Callable) -> "Pack":
        optional = lambda t: None if t is None else function(t)
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
    return Scaled(*map(function, stored)) if isinstance(stored, Scaled) else function(stored)


def make_pack(
    names: list[str],
    documents: list[dict[str, Tensor]],
    anchors: list[np.ndarray],
    starts: list[int] | None = None,
    prefix: list[np.ndarray] | None = None,
    budgets: list[list[int]] | None = None,
    ages: list[np.ndarray] | None = None,
) -> Pack:
    """Join cached documents. `anchors[d]`: indices into document d as it is given; `starts[d]`: the position of its first
    token, where it was cropped; `prefix[d]`: how many tokens the block of each anchor shows; `budgets[d]`: one a view;
    `ages[d]`: of the selection that serves each anchor. A pack without any anchor gets one that counts nothing, so that every
    rank runs the same forward."""
    lengths = torch.tensor([len(d["input_ids"]) for d in documents])
    offsets = lengths.cumsum(0) - lengths
    mask = torch.cat([d["loss_mask"] for d in documents]).bool()
    next_mask = torch.roll(mask, -1)  # wraps onto position 0 of a document, which is never supervised
    anchor = torch.cat([offset + torch.from_numpy(a) for offset, a in zip(offsets, anchors)])
    positions = [torch.arange(start, start + n) for start, n in zip(starts or [0] * len(documents), lengths.tolist())]
    joined = paired({name: torch.cat([d[name] for d in documents]) for name in documents[0]})

    def of_anchors(values: list[np.ndarray] | None, filler: int) -> Tensor | None:
        return None if values is None else torch.from_numpy(np.concatenate(values) if len(anchor) else np.full(1, filler))

    if budgets is not None:
        count_D = [len(a) for a in anchors] if len(anchor) else [1] + [0] * (len(anchors) - 1)
        budgets = torch.tensor(budgets).T.repeat_interleave(torch.tensor(count_D), dim=1)

    def layers(kind: str) -> dict[int, Tensor | Scaled]:
        return {int(name.split(".")[1]): t for name, t in joined.items() if name.startswith(f"{kind}.")}

    return Pack(
        names=names,
        ids_P=joined["input_ids"].long(),
        mask_P=mask,
        places=Places(torch.arange(len(documents)).repeat_interleave(lengths), torch.cat(positions)),
        states=States(layers("hidden"), layers("key"), layers("value")),
        last_hidden_RE=joined["last_hidden"],
        teacher_P=torch.where(next_mask, next_mask.cumsum(0) - 1, 0),
        anchor_N=anchor if len(anchor) else torch.zeros(1, dtype=torch.long),
        prefix_N=of_anchors(prefix, 1),
        query=layers("query"),
        budget_VN=budgets,
        age_N=of_anchors(ages, 0),
    )


def sample_anchors(id: str, mask: np.ndarray, count: int | None, seed: int, pass_number: int) -> np.ndarray:
    """Up to `count` positions a with mask[a] and mask[a + 1] (DFlash's rule), ascending, without replacement; all of
    them when `count` is None. A function of (seed, pass, document)."""
    candidates = np.flatnonzero(mask[:-1] & mask[1:])
    if count is None or count >= len(candidates):
        return candidates
    rng = np.random.default_rng(stable_hash(f"anchors/{seed}/{pass_number}/{id}"))
    return np.sort(rng.choice(candidates, count, replace=False))


def sample_prefix(id: str, anchors: int, most: int, base: float, seed: int, pass_number: int) -> np.ndarray:
    """How many tokens (1 .. `most`) each block shows, the anchor's own included: v with a chance in proportion to base^(v - 1)
    (the truncated geometric of D2SD). A function of (seed, pass, document)."""
    chance = base ** np.arange(most)
    # The seed's word is older than the name `prefix`; another one would draw other prefixes.
    rng = np.random.default_rng(stable_hash(f"shown/{seed}/{pass_number}/{id}"))
    return rng.choice(np.arange(1, most + 1), anchors, p=chance / chance.sum())


def sample_ages(id: str, anchors: np.ndarray, lasts: int, seed: int, pass_number: int) -> np.ndarray:
    """How many tokens before each anchor the selection was made that serves it: fewer than `lasts`, and after the document's
    first token. A function of (seed, pass, document)."""
    rng = np.random.default_rng(stable_hash(f"ages/{seed}/{pass_number}/{id}"))
    return np.minimum(rng.integers(lasts, size=len(anchors)), np.maximum(anchors - 1, 0))


class PackStream:
    """An endless sequence of packs over some documents of a cache; any element can be asked for at any time. A document
    longer than `pack_tokens` is cropped to that length, elsewhere in every pass. Pack n is of optimizer step n // batch."""

    def __init__(
        self,
        reader: CacheReader,
        documents: np.ndarray,
        names: list[str],
        pack_tokens: int,
        anchors: int | None,
        seed: int,
        shuffle: bool = True,
        prefix: tuple[int, float] | None = None,  # (most, base) of `sample_prefix`
        budgets: Callable[[int, str], list[int]] | None = None,  # (step, document) -> one a view
        ages: Callable[[str, np.ndarray, int], np.ndarray] | None = None,  # (document, its anchors, pass) -> of their selections
        batch: int = 1,
        span: tuple[int, int] | None = None,  # positions of anchors; a longer document is cropped behind them
    ):
        self.reader, self.documents, self.names = reader, np.asarray(documents), names
        self.pack_tokens, self.anchors, self.seed, self.shuffle = pack_tokens, anchors, seed, shuffle
        self.prefix, self.budgets, self.ages, self.batch, self.span = prefix, budgets, ages, batch, span
        self._first = [0]  # number of the first pack of each pass
        self._pass: tuple[int, list[np.ndarray]] = (-1, [])

    def passes(self, number: int) -> list[np.ndarray]:
        """The packs of one pass: documents in the pass's order, joined while they fit into `pack_tokens`."""
        if self._pass[0] != number:
            order = self.documents.copy()
            if self.shuffle:
                np.random.default_rng(stable_hash(f"order/{self.seed}/{number}")).shuffle(order)
            cuts, room = [], -1
            for place, length in enumerate(np.minimum(self.reader.lengths[order], self.pack_tokens).tolist()):
                if length > room:
                    cuts.append(place)
                    room = self.pack_tokens
                room -= length
            self._pass = (number, np.split(order, cuts[1:]))  # one pass is kept; any other is as cheap to make again
        return self._pass[1]

    def locate(self, number: int) -> tuple[np.ndarray, int, int]:
        """(documents, pass, optimizer step) of a pack."""
        while self._first[-1] <= number:
            self._first.append(self._first[-1] + len(self.passes(len(self._first) - 1)))
        pass_number = bisect_right(self._first, number) - 1
        return self.passes(pass_number)[number - self._first[pass_number]], pass_number, number // self.batch

    def __getitem__(self, number: int) -> Pack:
        return self.read(*self.locate(number))

    def read(self, indices: np.ndarray, pass_number: int = 0, step: int = 0) -> Pack:
        ids = [self.reader.id(i) for i in indices]
        spans = [self._crop(id, int(self.reader.lengths[i]), pass_number) for i, id in zip(indices, ids)]
        documents, anchors = self.reader.read_many(indices, self.names, spans), []
        for id, tensors in zip(ids, documents):
            mask = tensors["loss_mask"].numpy().astype(bool)
            if self.span:
                mask[: self.span[0]] = mask[self.span[1] :] = False
            anchors.append(sample_anchors(id, mask, self.anchors, self.seed, pass_number))
        prefix = self.prefix and [sample_prefix(i, len(a), *self.prefix, self.seed, pass_number) for i, a in zip(ids, anchors)]
        budgets = self.budgets and [self.budgets(step, id) for id in ids]
        ages = self.ages and [self.ages(id, a, pass_number) for id, a in zip(ids, anchors)]
        return make_pack(ids, documents, anchors, [start for start, _ in spans], prefix, budgets, ages)

    def _crop(self, id: str, length: int, pass_number: int) -> tuple[int, int]:
        """Positions [start, stop) of a document that one pass shows."""
        spare = max(0, length - self.pack_tokens)
        start = 0 if self.span else stable_hash(f"crop/{self.seed}/{pass_number}/{id}") % (spare + 1)
        return start, start + length - spare


def loaded(stream: PackStream, numbers: Iterable[int], device: torch.device, workers: int) -> Iterator[Pack]:
    """Packs `numbers` of the stream on `device`. Threads read ahead, two packs each, sharing the reader and its index; on a
    GPU the next pack is copied, from pinned memory and on a stream of its own, while this one is being used.

    `workers=0`: everything happens when a pack is asked for.
    """
    if workers == 0:
        yield from (stream[number].to(device) for number in numbers)
        return
    on_gpu = device.type == "cuda"
    side = torch.cuda.Stream(device) if on_gpu else None

    def read(*where) -> Pack:
        pack = stream.read(*where)
        return pack.pin() if on_gpu else pack.to(device)

    def copied(pack: Pack) -> Pack:
        with torch.cuda.stream(side):
            return pack.to(device)

    pool = ThreadPoolExecutor(workers)
    try:
        jobs = (pool.submit(read, *stream.locate(number)) for number in numbers)
        window = deque(islice(jobs, 2 * workers))
        ahead: deque[Pack] = deque()
        while window or ahead:
            while window and len(ahead) < (2 if on_gpu else 1):
                pack = window.popleft().result()
                ahead.append(copied(pack) if on_gpu else pack)
                window.extend(islice(jobs, 1))
            pack = ahead.popleft()
            if on_gpu:
                torch.cuda.current_stream(device).wait_stream(side)
                pack.record_stream(torch.cuda.current_stream(device))
            yield pack
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def split(reader: CacheReader, validation_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) documents: the two sides of data_prep/sources/sides.py, of whose validation side at most
    `validation_documents` pieces are used.

    Raises:
        UserError: one side is empty.
    """
    refuse_one_side(reader.ids, f"{reader.folder} holds")
    return np.flatnonzero(~validation_side(reader.ids)), judging(reader)[:validation_documents]


def judging(reader: CacheReader) -> np.ndarray:
    """The documents of the validation side, in an order of their own."""
    validation = np.flatnonzero(validation_side(reader.ids))
    return np.array(sorted(validation, key=lambda i: stable_hash(f"validation/{reader.id(i)}")))
