"""Acceptance by copy distance, how far back the text already has what a slot must say: does a memory keep what is far behind?

Slot j of anchor a must say x_{a+j} after x_{a+j-1}. The distance goes from a back to where this pair last began in the verified
text, positions up to a: it is 1 where the pair ends at a itself. Teacher-forced, as everything in acceptance.py.

Shapes: P positions of a pack, N anchors, J slots.
"""

import torch
from torch import Tensor

from train.data.pack import Pack
from train.measure import acceptance
from train.objectives.objective import Outcome

FROM = (1, 64, 256, 1024, 4096)  # the shortest distance of each bucket
BUCKETS = ("new", *(f"{low}-{high - 1}" for low, high in zip(FROM, FROM[1:])), f"{FROM[-1]}+")
GROUPS = {"1": slice(0, 1), "2-4": slice(1, 4), "5-8": slice(4, 8), "9-16": slice(8, 16), "17+": slice(16, None)}  # of slots
KINDS = ("sampled", "greedy")


def distances(pack: Pack, slots: int) -> Tensor:
    """[N, J]: the distance of each slot; 0: the verified text of the anchor's document does not have its pair. Slots that do not
    count (`Pack.valid`) have any."""
    ids_P = pack.ids_P
    document_P = pack.places.document
    count = len(ids_P)
    place_P = torch.arange(count, device=ids_P.device)
    # 1. A number for each document and pair, of the place where the pair ends. A document's first token ends none.
    tokens = ids_P.max() + 1
    pair_P = (document_P * tokens + ids_P.roll(1)) * tokens + ids_P
    pair_P = torch.where(document_P == document_P.roll(1), pair_P, -1 - place_P)
    pair_P[0] = -1
    rank_P = pair_P.unique(return_inverse=True)[1]
    # 2. Pairs and their places in one order, so that the last place up to an anchor stands just before where the anchor would.
    sorted_P = (rank_P * count + place_P).sort().values
    wanted_NJ = rank_P[(pack.anchor_N[:, None] + 1 + torch.arange(slots, device=ids_P.device)).clamp(max=count - 1)]
    found_NJ = torch.searchsorted(sorted_P, wanted_NJ * count + pack.anchor_N[:, None], right=True) - 1
    found_NJ = sorted_P[found_NJ.clamp(min=0)]
    # 3. The pair began one token before it ended.
    began_NJ = found_NJ % count - 1
    return torch.where(found_NJ // count == wanted_NJ, pack.anchor_N[:, None] - began_NJ, 0)


def counts(outcome: Outcome, pack: Pack) -> Tensor:
    """`acceptance.counts` of the first view, apart for each bucket, [buckets, 4, J]."""
    bucket_NJ = torch.bucketize(distances(pack, outcome.valid.shape[1]), torch.tensor(FROM, device=pack.ids_P.device), right=True)
    apart = [outcome._replace(valid=outcome.valid & (bucket_NJ == bucket)) for bucket in range(len(BUCKETS))]
    return torch.stack([acceptance.counts(one)[0] for one in apart])


def summarise(total_B4J: Tensor) -> dict[str, dict]:
    """{bucket: {"sampled" | "greedy": {"conditional": [J], "rounds": [J]}}} from summed `counts`: acceptance of slot j where it
    was reached, and how often it was (a sum of chances)."""
    found = {}
    for bucket, counted in zip(BUCKETS, total_B4J.unflatten(1, (2, 2))):
        found[bucket] = {
            kind: {"conditional": (through / before.clamp(min=1e-9)).tolist(), "rounds": before.tolist()}
            for kind, (through, before) in zip(KINDS, counted)
        }
    return found


def grouped(conditional: list[float], rounds: list[float]) -> dict[str, tuple[float, float]]:
    """{slots: (acceptance, rounds)} of the slots of `GROUPS` together."""
    through, before = torch.tensor([conditional, rounds], dtype=torch.float64)
    through = through * before
    found = {name: (float(through[part].sum()), float(before[part].sum())) for name, part in GROUPS.items() if len(before[part])}
    return {name: (t / max(b, 1e-9), b) for name, (t, b) in found.items()}
