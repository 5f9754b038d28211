"""Documents -> token ids with a loss mask, cut to the longest length the capture takes."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from data_prep.errors import UserError
from data_prep.sources import Document


class TokenDocument(NamedTuple):
    """`input_ids` int32 [T]; `loss_mask` uint8 [T] marks tokens whose *prediction* is supervised ([0] is always 0)."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray


def tokenized(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, max_length: int, max_tokens: int | None = None
) -> tuple[list[TokenDocument], int]:
    """Tokenise plain text: every token but a piece's first is supervised.

    Returns:
        The pieces `id#k` of at most `max_length` tokens, at most `max_tokens` together, and the number of pieces that
        are too short to supervise anything (fewer than two tokens).

    Raises:
        UserError: no piece is left.
    """
    pieces, short, left = [], 0, float("inf") if max_tokens is None else max_tokens
    for document in documents:
        if left < 2:
            break
        ids = np.asarray(tokenizer(document.text, verbose=False, add_special_tokens=False)["input_ids"], dtype=np.int32)
        if len(ids) > left:
            ids = ids[: int(left)]
        left -= len(ids)
        for k, start in enumerate(range(0, len(ids), max_length)):
            piece = ids[start : start + max_length]
            if len(piece) < 2:
                short += 1
                continue
            mask = np.ones(len(piece), dtype=np.uint8)
            mask[0] = 0
            pieces.append(TokenDocument(f"{document.id}#{k}", piece, mask))
    if not pieces:
        raise UserError("the data source holds no document of two tokens or more")
    return pieces, short


def source_hash(pieces: Iterable[TokenDocument]) -> str:
    """xxh3 over ids, tokens and masks: the same documents in the same order, and nothing else, give the same hash."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        for part in (piece.id.encode(), piece.input_ids.tobytes(), piece.loss_mask.tobytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
