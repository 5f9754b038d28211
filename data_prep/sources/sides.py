"""The three sides of every source of documents: held out, validation, training.

    all records -- 1 in 50 --> held out: never captured. Prompts of suite=heldout come from these alone.
        |
        +-- the rest: captured -- 1 in 20 --> validation: judges a training while it runs, chooses its best checkpoint,
                |                             and is what mode=score looks at. Never trained on.
                +--> training

The *held-out* side is decided when a source is read (`is_heldout`), by a record's id alone. The source stdlib has a rule of its
own (`is_heldout_module`): the one by which the embedded target was trained.

The *validation* side is decided when a cache is read (`validation_side`), by the ids of all its documents. It does not depend on
how the cache was made: by how many processes, in which order, on disk or live. All pieces of one source document are on one side.
Where records are joined end to end (`data.long=join`), a document is made of many records. These are put on a side first
(`is_validation`), each side is joined by itself, and the ids of what comes of it say the side (`VALIDATION` begins them).

Every decision is a hash of ids, and needs no file. What several records share, as conversations of mode=synthesize may share a
text, is not known here.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import UserError
from common.hashing import stable_hash

VALIDATION = "validation/"  # begins the ids of documents that are joined from records of the validation side
HELDOUT_IN = 50
HELDOUT_MODULES_IN = 8
VALIDATION_IN = 20
PIECE = r"(@[0-9]+)?#[0-9]+$"  # what data_prep/sources/tokens.py puts behind a source document's id


def is_heldout(id: str) -> bool:
    """Whether a record is kept for evaluation and never captured."""
    return stable_hash(id) % HELDOUT_IN == 0


def is_heldout_module(file_name: str) -> bool:
    """The same of a module of the standard library: the embedded target has never seen these (targets/tiny/README.md)."""
    # md5, because the script that trained the embedded target used it.
    return int(hashlib.md5(file_name.encode()).hexdigest(), 16) % HELDOUT_MODULES_IN == 0


def is_validation(id: str) -> bool:
    """Whether joined documents judge a training by this record instead of training on it."""
    # The prefix makes it a hash of its own. By the one that held records out, fewer than 1 in 20 of those that are left would be
    # taken.
    return stable_hash(VALIDATION + id) % VALIDATION_IN == 0


def validation_side(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """bool [N]: the documents on the validation side, a twentieth of the source documents (all pieces of one together), chosen
    by hash. Joined documents bring their side with them, if there are records enough for two. With fewer than two source
    documents one side is empty."""
    source_of = pc.replace_substring_regex(ids, PIECE, "")
    sources = sorted(pc.unique(source_of).to_pylist(), key=lambda name: stable_hash(VALIDATION + name))
    # Joined documents bring their side with them. Of others the first twentieth in the order of hashes is taken, and not those
    # below a bound: a small source has a validation side too.
    joined = [name for name in sources if name.startswith(VALIDATION)]
    held = joined or sources[: max(1, len(sources) // VALIDATION_IN)]
    return pc.is_in(source_of, value_set=pa.array(held, source_of.type)).to_numpy(zero_copy_only=False)


def one_side(ids: pa.Array | pa.ChunkedArray, side: np.ndarray) -> str | None:
    """What is said of documents of which training cannot make two sides; None: it can. `side`: their `validation_side`."""
    if side.any() and not side.all():
        return None
    count = len(pc.unique(pc.replace_substring_regex(ids, PIECE, "")))
    beyond = ", all of them on one side" if count > 1 else ""
    return f"{count:,} source document(s){beyond}; training needs one to train on and one to judge on"


def refuse_too_few(ids: pa.Array | pa.ChunkedArray, what: str, advice: str = "", ranks: int = 1) -> None:
    """Raises UserError ('`what` 1 source document(s) ...: `advice`') when `ranks` processes cannot train on these documents."""
    side = validation_side(ids)
    if said := one_side(ids, side):
        raise UserError(f"{what} {said}" + f": {advice}" * bool(advice))
    refuse_idle_ranks(what, int((~side).sum()), "training document(s)", ranks)


def refuse_idle_ranks(what: str, count: int, documents: str, ranks: int) -> None:
    """Raises UserError ('`what` 3 `documents` for 4 ranks ...') where there is none for each rank."""
    if count < ranks:
        raise UserError(f"{what} {count:,} {documents} for {ranks} ranks; start {count} at most")
