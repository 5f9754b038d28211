"""Which documents a pack holds and what is drawn for them: a function of (seed, pass, document id) alone. So the order of packs
survives a resume and a change of world size, and any rank can make any pack.

The first word of each hash ("order/", "anchors/", ...) is part of the seed: with another word other numbers would be drawn.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from common.hashing import stable_hash
from data_prep.cache.reader import CacheReader
from data_prep.capture.live import LiveReader
from train.data.pack import Pack, PackDocument, make_pack


def sample_anchors(id: str, mask: np.ndarray, count: int | None, seed: int, pass_number: int) -> np.ndarray:
    """Up to `count` positions a with mask[a] and mask[a + 1] (DFlash's rule), ascending, without replacement; all of
    them when `count` is None. A function of (seed, pass, document)."""
    candidates = np.flatnonzero(mask[:-1] & mask[1:])
    if count is None or count >= len(candidates):
        return candidates
    rng = np.random.default_rng(stable_hash(f"anchors/{seed}/{pass_number}/{id}"))
    return np.sort(rng.choice(candidates, count, replace=False))


def sample_prefix(id: str, anchors: int, most: int, base: float, seed: int, pass_number: int) -> np.ndarray:
    """How many tokens (1 .. `most`) each block is given, the anchor's own included: v with a chance in proportion to base^(v - 1)
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


@dataclass(frozen=True)
class Prefix:
    """How many tokens of each block are given; see `sample_prefix`."""

    most: int
    base: float


@dataclass(frozen=True)
class ViewDraws:
    """What is drawn for the views of a step, as functions, so that training and judging can draw in different ways."""

    budgets: Callable[[int, str], list[int]]  # (optimizer step, document) -> the budget of each view
    ages: Callable[[str, np.ndarray, int], np.ndarray]  # (document, its anchors, pass) -> the age of each anchor's selection


@dataclass(frozen=True)
class StreamSettings:
    """How a stream makes packs of its documents."""

    pack_tokens: int  # at most, in a pack; a longer document is cropped to that length, elsewhere in every pass
    anchors: int | None  # at most, in each document and pass; None: all positions that can be one
    seed: int
    shuffle: bool = True  # another order of documents in every pass
    batch: int = 1  # packs in an optimizer step, over all ranks: pack n belongs to step n // batch
    prefix: Prefix | None = None  # None: blocks are given their anchor's token alone
    views: ViewDraws | None = None  # None: one view, everything
    span: tuple[int, int] | None = None  # the only positions of anchors; a longer document is cropped behind them


class PackStream:
    """An endless sequence of packs over some documents of a cache. Any element can be asked for at any time."""

    def __init__(self, reader: CacheReader | LiveReader, documents: np.ndarray, names: list[str], settings: StreamSettings):
        """`names`: the tensors of each document that are read."""
        self.reader = reader
        self.documents = np.asarray(documents)
        self.names = names
        self.settings = settings
        # The number of the first pack of each pass, as far as packs were asked for.
        self._first = [0]
        # (number, packs) of the pass that was asked for last. One is kept: any other is as cheap to make again.
        self._pass: tuple[int, list[np.ndarray]] = (-1, [])

    def passes(self, number: int) -> list[np.ndarray]:
        """The packs of one pass: documents in the pass's order, joined while they fit into `pack_tokens`."""
        if self._pass[0] != number:
            self._pass = (number, self._packs_of(number))
        return self._pass[1]

    def locate(self, number: int) -> tuple[np.ndarray, int, int]:
        """(documents, pass, optimizer step) of a pack."""
        while self._first[-1] <= number:
            self._first.append(self._first[-1] + len(self.passes(len(self._first) - 1)))
        pass_number = bisect_right(self._first, number) - 1
        place = number - self._first[pass_number]
        return self.passes(pass_number)[place], pass_number, number // self.settings.batch

    def __getitem__(self, number: int) -> Pack:
        return self.read(*self.locate(number))

    def read(self, indices: np.ndarray, pass_number: int = 0, step: int = 0) -> Pack:
        """The pack of these documents, as this pass and optimizer step draw it."""
        ids = [self.reader.id(index) for index in indices]
        spans = [self._crop(id, int(self.reader.lengths[index]), pass_number) for index, id in zip(indices, ids)]
        documents = self.reader.read_many(indices, self.names, spans)
        return make_pack(
            [
                self._draw(id, tensors, start, pass_number, step)
                for id, tensors, (start, _) in zip(ids, documents, spans, strict=True)
            ]
        )

    def has_anchor(self, index: int) -> bool:
        """Whether the first pass can draw an anchor in this document, whose first slot then counts."""
        start, stop = self._crop(self.reader.id(index), int(self.reader.lengths[index]), 0)
        mask = self.reader.text(index)[1].numpy()[start:stop].astype(bool)
        mask[0] = False  # as where a crop is read: nothing lies before it
        return len(sample_anchors("", mask, None, 0, 0)) > 0

    def _draw(self, id: str, tensors: dict[str, Tensor], start: int, pass_number: int, step: int) -> PackDocument:
        settings = self.settings
        mask = tensors["loss_mask"].numpy().astype(bool)
        if settings.span:
            first, stop = settings.span
            mask[:first] = False
            mask[stop:] = False
        anchors = sample_anchors(id, mask, settings.anchors, settings.seed, pass_number)
        document = PackDocument(id, tensors, anchors, start)
        if settings.prefix:
            given = sample_prefix(id, len(anchors), settings.prefix.most, settings.prefix.base, settings.seed, pass_number)
            document = replace(document, prefix=given)
        if settings.views:
            budgets = settings.views.budgets(step, id)
            document = replace(document, budgets=budgets, ages=settings.views.ages(id, anchors, pass_number))
        return document

    def _packs_of(self, number: int) -> list[np.ndarray]:
        order = self.documents.copy()
        if self.settings.shuffle:
            np.random.default_rng(stable_hash(f"order/{self.settings.seed}/{number}")).shuffle(order)
        cuts = []  # places in the order at which a pack begins
        room = -1
        for place, length in enumerate(np.minimum(self.reader.lengths[order], self.settings.pack_tokens).tolist()):
            if length > room:
                cuts.append(place)
                room = self.settings.pack_tokens
            room -= length
        return np.split(order, cuts[1:])

    def _crop(self, id: str, length: int, pass_number: int) -> tuple[int, int]:
        """Positions [start, stop) of a document that one pass reads."""
        spare = max(0, length - self.settings.pack_tokens)
        if self.settings.span:
            start = 0  # the span counts from the document's first token
        else:
            start = stable_hash(f"crop/{self.settings.seed}/{pass_number}/{id}") % (spare + 1)
        return start, start + length - spare
