"""Which documents judge a training, and which train: whole source documents, so that no document stands on both sides. (What
several records share, as conversations of mode=synthesize may share a text, is not known here.)"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import UserError
from common.hashing import stable_hash
from data_prep.sources.records import VALIDATION

PIECE = r"(@[0-9]+)?#[0-9]+$"  # what data_prep/sources/tokens.py puts behind a source document's id


def validation_side(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """bool [N]: the documents on the validation side, a twentieth of the source documents (all pieces of one together), chosen
    by hash. Joined documents bring their side with them, if there are records enough for two. With fewer than two source
    documents one side is empty."""
    source_of = pc.replace_substring_regex(ids, PIECE, "")
    sources = sorted(pc.unique(source_of).to_pylist(), key=lambda name: stable_hash(f"validation/{name}"))
    held = [name for name in sources if name.startswith(VALIDATION)] or sources[: max(1, len(sources) // 20)]
    return pc.is_in(source_of, value_set=pa.array(held, source_of.type)).to_numpy(zero_copy_only=False)


def one_side(ids: pa.Array | pa.ChunkedArray) -> str | None:
    """What is said of documents of which training cannot make two sides; None: it can."""
    side = validation_side(ids)
    if side.any() and not side.all():
        return None
    count = len(pc.unique(pc.replace_substring_regex(ids, PIECE, "")))
    beyond = ", all of them on one side" if count > 1 else ""
    return f"{count:,} source document(s){beyond}; training needs one to train on and one to judge on"


def refuse_one_side(ids: pa.Array | pa.ChunkedArray, what: str, advice: str = "") -> None:
    """Raises UserError ('`what` 1 source document(s) ...: `advice`') when training cannot make two sides of `ids`."""
    if said := one_side(ids):
        raise UserError(f"{what} {said}" + f": {advice}" * bool(advice))
