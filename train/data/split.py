"""Which documents of a cache train and which judge."""

import numpy as np

from common.hashing import stable_hash
from common.ranks import world_size
from data_prep.cache.reader import CacheReader
from data_prep.sources.sides import refuse_too_few, validation_side


def split(reader: CacheReader, validation_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) documents: the two sides of data_prep/sources/sides.py. Of the validation side at most
    `validation_documents` pieces are used.

    Raises:
        UserError: one side is empty, or there are fewer training documents than ranks.
    """
    refuse_too_few(reader.ids, f"{reader.folder} holds", ranks=world_size())
    return np.flatnonzero(~validation_side(reader.ids)), judging(reader)[:validation_documents]


def judging(reader: CacheReader) -> np.ndarray:
    """The documents of the validation side, in an order of their own: the first few are not all of one source."""
    validation = np.flatnonzero(validation_side(reader.ids))
    return np.array(sorted(validation, key=lambda i: stable_hash(f"validation/{reader.id(i)}")))
