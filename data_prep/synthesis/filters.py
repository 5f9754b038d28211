"""What makes a conversation worthless for training: a turn that runs in circles, and a first message that another has said."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from common.hashing import stable_hash

WORD = re.compile(r"\w+")
# Words and marks: "1. 2. 3." is no loop, "- - - -" is one, and so is "hehehehe...": what is longer than a word is taken by fours.
MARKED = re.compile(r"\w{1,20}(?!\w)|\w{1,4}|[^\w\s]")
GRAM = 4  # words and marks
WINDOW = 100  # words and marks: a loop of half a page in a long text does not hide behind the rest
SHINGLE = 3  # words


def looping(text: str) -> float:
    """The share of 4-grams of words and marks that the text has said before: in all of it, or in its worst stretch of 100. A text
    that says one sentence of ten words over and over comes near to 0.9, plain prose stays below 0.1, lists below 0.3."""
    words = MARKED.findall(text.casefold())
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    stretch = WINDOW - GRAM + 1
    # Stretches overlap by half: a loop of up to half a stretch lies whole in one of them.
    starts = range(0, max(1, len(grams) - stretch + stretch // 2), stretch // 2)
    stretches = [grams[start : start + stretch] for start in starts]
    # A short rest says little: the last stretch is as long as the others.
    stretches = [part if len(part) == stretch else grams[-stretch:] for part in stretches]
    return max(_repeated(part) for part in [grams, *stretches])


def _repeated(grams: list[tuple]) -> float:
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def shingles(text: str) -> np.ndarray:
    """Hashes (uint64, ascending) of the runs of 3 words in a text; of all its words where there are fewer. Case and marks do not
    count."""
    words = WORD.findall(text.casefold())
    runs = {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}
    return np.sort(np.array([stable_hash(run) for run in runs], dtype=np.uint64))


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard's: of all shingles of two texts, the share that both have."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def repeats(texts: Sequence[str], near: float) -> list[str | None]:
    """For every text whether it repeats an earlier one that repeats none itself: "exact" (but for white space), "near" (a
    similarity of `near` at least), or None.

    Comparing each with each would take hours for 100,000 texts. Two sets of shingles of which one has n, and which are that
    similar, share at least ceil(near * n) of them. Put the shingles in any one order: one of the first n - ceil(near * n) + 1 is
    in the other set as well, and among its first ones for the same reason. In the order of how many texts have them, the rarest
    first, hardly any two texts meet there that are not alike.
    """
    # White space is no difference: models vary it from one writing to the next.
    plain = [" ".join(text.split()) for text in texts]
    sets = [shingles(text) for text in plain]
    known, spread = np.unique(np.concatenate(sets), return_counts=True) if sets else (np.empty(0), np.empty(0))
    said: set[str] = set()
    having: dict[int, list[int]] = defaultdict(list)  # shingle -> the texts that are kept and have it among their first
    outcome: list[str | None] = []
    for number, own in enumerate(sets):
        first = _rarest(own, spread[np.searchsorted(known, own)], near)
        if plain[number] in said:
            outcome.append("exact")
            continue
        others = {other for shingle in first for other in having.get(shingle, ())}
        if any(similarity(own, sets[other]) >= near for other in others):
            outcome.append("near")
            continue
        outcome.append(None)
        said.add(plain[number])
        for shingle in first:
            having[shingle].append(number)
    return outcome


def _rarest(own: np.ndarray, spread: np.ndarray, near: float) -> list[int]:
    """The shingles by which a text is looked up; those that no other text has find nothing."""
    shared = int(np.ceil(near * len(own) - 1e-9))  # 0.7 * 10 is 7.000000000000001
    order = np.lexsort((own, spread))[: len(own) - shared + 1]
    return own[order][spread[order] > 1].tolist()
