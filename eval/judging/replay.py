"""The rows of a run, computed once more as they were: as many of them, in as large a batch, over the same cache.

Shapes: B requests, T rows of each, L places of a text, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.decoding.cache import StaticCache
from data_prep.target.target import Target
from eval.oracle.decode import Generation


@dataclass(frozen=True)
class Batches:
    """How the requests were decoded: those of a group side by side, over `cache`, prompts in chunks of `chunk` tokens."""

    groups: list[range]
    cache: StaticCache
    chunk: int


@torch.no_grad()
def replayed(
    target: Target, batches: Batches, prompts: list[list[int]], run: Sequence[Generation], places: dict[int, int]
) -> dict[int, int]:
    """The likeliest token at `places` {request of the batch: place of its output, above 0}, by the rows that the run's rounds
    had: an anchor's, and one for each drafted token. Nothing is accepted here: rows hold the text's own tokens. What was refused
    in a round is not known and does not matter, since no row reads a later one."""
    # 1. The texts as they came to be, and where they begin.
    cache = batches.cache
    size = cache.batch
    # The batch and the room of the engine's own caches: with other sizes a kernel may add in another order.
    text_BL = torch.zeros(size, cache.room + 2, dtype=torch.long)
    length_B = torch.ones(size, dtype=torch.long)  # a place of the batch without a request reads one token
    for b, (prompt, one) in enumerate(zip(prompts, run)):
        text = prompt + one.tokens
        text_BL[b, : len(text)] = torch.tensor(text)
        length_B[b] = len(prompt)
    text_BL = text_BL.to(target.device)

    # 2. The prompts, in the chunks that the engine read.
    longest = int(length_B.max())
    for start in range(0, longest, batches.chunk):
        base_B = torch.full((size,), start)
        with torch.compiler.set_stance("force_eager"):  # as the engine reads prompts
            _forward(target, cache, text_BL, base_B, min(batches.chunk, longest - start))

    # 3. Round after round. Rows that are not asked for are computed too: rounding depends on how many there are.
    found = {}
    index = 0
    while len(found) < len(places):
        going = [one.rounds[index] for one in run if index < len(one.rounds)]
        if not going:  # rounds that do not add up to the output
            break
        for b, one in enumerate(run):  # who has ended stays where he is
            if index < len(one.rounds):
                length_B[b] = one.rounds[index].anchor
            elif one.rounds:
                length_B[b] = one.rounds[-1].anchor + one.rounds[-1].kept + 1
        last_hidden_BTE = _forward(target, cache, text_BL, length_B, going[0].drafted + 1)
        rows = {}
        for b, place in places.items():
            row = len(prompts[b]) + place - 1 - int(length_B[b])
            if index < len(run[b].rounds) and 0 <= row <= run[b].rounds[index].kept:
                rows[b] = row
        if rows:
            best_BT = target.logits(last_hidden_BTE).argmax(-1)
            found |= {b: int(best_BT[b, row]) for b, row in rows.items()}
        index += 1
    return found


def _forward(target: Target, cache: StaticCache, text_BL: Tensor, base_B: Tensor, rows: int) -> Tensor:
    """Rows of each request from `base_B` on, [B, T, E]."""
    base_B = base_B.to(target.device)
    position_BT = base_B[:, None] + torch.arange(rows, device=target.device)
    ids_BT = text_BL.gather(1, position_BT)
    return target.forward_through(ids_BT, position_BT, cache.attention(base_B, rows)).last_hidden
