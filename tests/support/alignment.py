"""Is the training forward the decode loop? This measures how far they are apart; tests/train/test_alignment.py says how near they
must be, and explains it.

Nothing here asserts. `measure` decodes a text round by round, gives the text to the training forward with one anchor for each
round, and returns an `Alignment`: every way in which the two may differ, as numbers and lists.

Shapes: N anchors (one for each round), J slots of a block or steps of ttt, V vocabulary; budget_VN: V views.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_prep.target.target import Target
from eval.oracle.decode import Round, decode
from eval.oracle.drafting import Trained
from tests.support.models import HIDDEN_LAYERS
from tests.support.packs import KV_LAYERS, cached
from train.attention.choose import BACKENDS
from train.data.pack import Pack, PackDocument, make_pack
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision
from train.views.recipe import FULL, View

VOCABULARY = 11
PROMPT_TOKENS = 23
NEW_TOKENS = 80
MOST_ROUNDS = 60
# Documents that stand before and behind the decoded text in its pack.
NEIGHBOUR_LENGTHS = (17, 31)

VIEWS = {
    "sink_recent": View(kind="sink_recent", budget=16, sink=2),
    "sink_recent in cache": View(kind="sink_recent", budget=16, sink=2, positions="in_cache"),
    "mean": View(kind="topk_chunk", budget=20, sink=4, recent=4, chunk=4),
    "mean in cache": View(kind="topk_chunk", budget=20, sink=4, recent=4, chunk=4, positions="in_cache"),
    "quest, every 9 tokens": View(kind="topk_chunk", budget=24, recent=3, chunk=3, scorer="quest", refresh=9),
    "minmax in cache, never": View(
        kind="topk_chunk", budget=30, sink=2, recent=2, chunk=2, scorer="minmax", positions="in_cache", refresh="never"
    ),
    "lastkey, every 40 tokens": View(kind="topk_chunk", budget=24, sink=4, recent=0, chunk=4, scorer="lastkey", refresh=40),
    "h2o": View(kind="h2o", budget=16),
    "h2o in cache, every 7 tokens": View(kind="h2o", budget=24, sink=1, positions="in_cache", refresh=7),
    "snapkv": View(kind="snapkv", budget=16, recent=5, pool=3),
    "snapkv in cache, never": View(kind="snapkv", budget=30, recent=4, pool=3, positions="in_cache", refresh="never"),
}


@dataclass
class Alignment:
    """How far the training forward and the decode loop are apart, over the slots that can be compared."""

    # The largest difference of two logits.
    worst: float = 0.0
    # How many of the compared slots verification kept, and how many it refused. Both must occur, or little was tested.
    kept: int = 0
    refused: int = 0
    # Anchors of rounds in which one side can say a token that the other cannot (a reduced vocabulary leaves logits of -inf).
    other_vocabulary: list[int] = field(default_factory=list)
    # Anchors of rounds whose drafted tokens are not the training side's most likely ones. (Sampled drafts need not be.)
    other_tokens: list[int] = field(default_factory=list)
    # Anchors of rounds that kept more or fewer drafts than the training side's most likely tokens say. (The same.)
    other_lengths: list[int] = field(default_factory=list)


def measure(
    target: Target,
    drafter,
    packing: bool = True,
    attend=BACKENDS["reference"],
    tamper: Callable[[Pack], Pack] | None = None,
    temperature: float = 0.0,
    view: View | None = None,
) -> Alignment:
    """Decodes and compares. `packing`: among other documents. `tamper`: a fault put into the training side's pack."""
    target.capture(HIDDEN_LAYERS, KV_LAYERS)
    tokens, rounds = decoded(target, drafter, temperature, view)
    return compared(target, drafter, tokens, rounds, packing, attend, tamper, view)


def compared(
    target: Target,
    drafter,
    tokens: list[int],
    rounds: list[Round],
    packing: bool = True,
    attend=BACKENDS["reference"],
    tamper: Callable[[Pack], Pack] | None = None,
    view: View | None = None,
) -> Alignment:
    """What `decoded` gave, beside the training forward of `drafter`. The target yields the states that it reads."""
    # 1. The training forward over the same text, all anchors at once.
    pack = pack_of(target, tokens, [r.anchor for r in rounds], packing, view)
    logits_NJV = training_logits(target, drafter, tamper(pack) if tamper else pack, attend, view)

    # 2. Round by round, what differs.
    found = Alignment()
    for one, trained_JV in zip(rounds, logits_NJV):
        add_round(found, one, trained_JV, tokens, comparable_slots(drafter, one))
    return found


def decoded(target: Target, drafter, temperature: float, view: View | None = None) -> tuple[list[int], list[Round]]:
    """The decode loop, rounds of drafting and verification: a random prompt with what the target wrote behind it, and the rounds
    that can be compared."""
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, VOCABULARY, (PROMPT_TOKENS,), generator=generator).tolist()
    drafting = Trained(drafter, target.frozen_head, BACKENDS["reference"], view)
    generation = decode(target, drafting, prompt, NEW_TOKENS, temperature, seed=3)
    # The text is everything that was emitted, not only what was asked for.
    tokens = prompt + generation.tokens
    # Behind the end of the text nothing says how many drafts would have been kept.
    return tokens, [r for r in generation.rounds[:MOST_ROUNDS] if r.anchor + r.drafted < len(tokens)]


def pack_of(target: Target, tokens: list[int], anchors: list[int], packing: bool, view: View | None) -> Pack:
    """Document `tokens` with `anchors`, alone or between two neighbours, which have none."""
    documents = [cached(target, tokens, capture=False)]
    marks = [np.asarray(anchors)]
    if packing:
        generator = torch.Generator().manual_seed(9)
        texts = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in NEIGHBOUR_LENGTHS]
        before, behind = (cached(target, text, capture=False) for text in texts)
        nowhere = np.zeros(0, dtype=np.int64)
        documents = [before, *documents, behind]
        marks = [nowhere, *marks, nowhere]
    pack = make_pack([PackDocument(str(i), *one) for i, one in enumerate(zip(documents, marks))])
    if view:
        # The rows of the view stand behind others of the same anchors, which must not disturb them: rows that see everything,
        # and rows of another budget.
        budget_V = torch.tensor([FULL, view.budget + 7, view.budget])
        pack.budget_VN = budget_V[:, None].expand(-1, len(anchors))
        pack.age_N = selection_ages(anchors, view.refresh)
    return pack


def training_logits(target: Target, drafter, pack: Pack, attend, view: View | None) -> Tensor:
    """Logits [N, J, V] of one training forward; under a view, those of its last rows."""
    weight_J = torch.ones(drafter.config.draft_length)
    objective = Objective(drafter, target.frozen_head, attend, Supervision(LossRecipe(kl=1), weight_J, 64, view))
    with torch.no_grad():
        logits = objective.logits(pack)
    return logits[-1] if view else logits


def selection_ages(anchors: list[int], refresh: str | int) -> Tensor:
    """How many tokens old the selection was that served each round [N], by the decode loop's rule of `view.refresh`."""
    chosen_at = anchors[0]
    found = []
    for anchor in anchors:
        if refresh == "verify" or (refresh != "never" and anchor - chosen_at >= refresh):
            chosen_at = anchor
        found.append(anchor - chosen_at)
    return torch.tensor(found)


def comparable_slots(drafter, one: Round) -> int:
    """How many slots of a round read the same on both sides.

    In training a slot reads the text's tokens before it, in decoding the drafted ones. They are the same up to the first refused
    draft, whose own slot still counts. Slots of a parallel block read no draft, so that all of them count.
    """
    parallel = drafter.config.objective == "blockwise" and not drafter.config.sequential
    return one.drafted if parallel else min(one.kept + 1, one.drafted)


def add_round(found: Alignment, one: Round, trained_JV: Tensor, tokens: list[int], compared: int) -> None:
    """Adds what differs in the first `compared` slots of a round."""
    # 1. Logits.
    mine_JV = trained_JV[:compared]
    theirs_JV = one.draft.logits_JV[:compared]
    if not torch.equal(mine_JV.isfinite(), theirs_JV.isfinite()):
        found.other_vocabulary.append(one.anchor)
    sayable_JV = mine_JV.isfinite() & theirs_JV.isfinite()
    found.worst = max(found.worst, (mine_JV - theirs_JV)[sayable_JV].abs().max().item())

    # 2. Coverage.
    kept = min(one.kept, compared)
    found.kept += kept
    found.refused += compared - kept

    # 3. Tokens, and how many of them the text confirms.
    likely = trained_JV.argmax(-1).tolist()
    if likely[:compared] != one.draft.tokens[:compared]:
        found.other_tokens.append(one.anchor)
    text = tokens[one.anchor + 1 : one.anchor + 1 + one.drafted]
    matches = [int(token == true) for token, true in zip(likely, text)]
    if int(np.cumprod(matches).sum()) != one.kept:
        found.other_lengths.append(one.anchor)
