"""Documents of a small target, packs of them, and an objective over such packs.

Shapes: J draft steps or slots.
"""

import numpy as np
import torch

from tests.support.models import HIDDEN_LAYERS
from train.attention.choose import BACKENDS
from train.data.pack import PackDocument, make_pack
from train.objectives.objective import Objective, Supervision

REFERENCE = BACKENDS["reference"]
LAYERS = (0, 1, 2)
KV_LAYERS = (1, 2)


def cached(target, tokens, capture=True):
    """One document as the cache would hand it out, in the target's own precision."""
    if capture:
        target.capture(HIDDEN_LAYERS, KV_LAYERS)
    states = target.forward(torch.tensor([tokens])).map(lambda t: t[0])
    mask = torch.ones(len(tokens), dtype=torch.uint8)
    mask[0] = 0
    return {
        "input_ids": torch.tensor(tokens),
        "loss_mask": mask,
        "last_hidden": states.last_hidden[:-1],
        **{f"hidden.{i}": t for i, t in states.hidden.items()},
        **{f"key.{i}": t for i, t in states.key.items()},
        **{f"value.{i}": t for i, t in states.value.items()},
    }


def document(target, length, seed, unsupervised=()):
    """One document as the cache hands it out, queries included."""
    tokens = torch.randint(3, 11, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    target.capture(HIDDEN_LAYERS, LAYERS, LAYERS)
    states = target.forward(torch.tensor([tokens])).map(lambda t: t[0])
    mask = torch.ones(length, dtype=torch.uint8)
    mask[0] = 0
    mask[list(unsupervised)] = 0
    teachers = mask[1:].nonzero().squeeze(1)
    named = {f"{kind}.{i}": t for kind in ("hidden", "key", "value") for i, t in getattr(states, kind).items()}
    named |= {f"query.{i}": t[teachers] for i, t in states.query.items()}
    return {"input_ids": torch.tensor(tokens), "loss_mask": mask, "last_hidden": states.last_hidden[teachers], **named}


def two_documents(target):
    """Two documents and the anchors of each. The second has a gap in its loss mask, into which the last slots of an anchor fall,
    and an anchor at its end."""
    documents = [document(target, 17, 1), document(target, 26, 2, unsupervised=(9,))]
    anchors = [np.array([1, 6, 13]), np.array([2, 6, 15, 24])]
    return documents, anchors


def packed(target, prefix=None):
    """A pack of `two_documents`. `prefix`: how many tokens of each anchor's block are given."""
    documents, anchors = two_documents(target)
    return make_pack([PackDocument(*one[:3], prefix=one[3]) for one in zip("ab", documents, anchors, prefix or [None, None])])


def packed_with_budgets(target, budgets, ages=True):
    """A pack of `two_documents`. `budgets`: of each view, or for each document of each view."""
    documents, anchors = two_documents(target)
    each = budgets if isinstance(budgets[0], list) else [budgets, budgets]
    old = [np.minimum(a - 1, 2 * ages) for a in anchors]
    rows = zip("ab", documents, anchors, each, old)
    return make_pack([PackDocument(name, d, a, budgets=b, ages=age) for name, d, a, b, age in rows])


def objective_of(target, drafter, loss, weight_J="default"):
    """An objective over the reference attention. `weight_J`: weights of slots (0.8 to the power of j unless given);
    None: D-PACE decides."""
    weight_J = 0.8 ** torch.arange(drafter.config.draft_length) if isinstance(weight_J, str) else weight_J
    return Objective(drafter, target.frozen_head, REFERENCE, Supervision(loss, weight_J, chunk_rows=7))
