"""Adaptive intervals of partial verification: the fastest one is found, and none changes a token.

Shapes: B requests, L places of a cache, G key/value heads, D head size.
"""

import random

import pytest
import torch

from eval.caches.partial import PartialRecipe
from eval.engine.drafting import StaticLookup
from eval.engine.intervals import AdaptiveIntervals
from eval.engine.request import Stops
from eval.engine.tree import TreeShape
from tests.support.decoding import generated
from tests.support.engines import engine_of, exact_target, ragged, trained

DEEPEST = 3


def cycle(intervals, full, partial, hazard, generator, batch=4):
    """One cycle, simulated token by token. Returns (interval, tokens that are left of it per request, its seconds)."""
    interval = intervals.allowed
    since = [[] for _ in range(batch)]  # of each request, whether its tokens are right
    spent = 0.0
    while max(map(len, since)) + DEEPEST + 1 <= interval:
        emitted = [generator.randint(1, DEEPEST + 1) for _ in range(batch)]
        for tokens, count in zip(since, emitted):
            tokens += [generator.random() >= hazard for _ in range(count)]
        intervals.saw(None, emitted, [(0, 0)] * batch, partial)
        spent += partial
    room = intervals.turn()
    assert room >= max(map(len, since)) and (room or not intervals.allowed)  # what is missing fits, and a part is taken
    audits = [(len(tokens), len(tokens) - tokens.index(False) if False in tokens else 0) for tokens in since]
    emitted = [1 if lost else generator.randint(1, DEEPEST + 1) for _, lost in audits]
    intervals.saw(room, emitted, audits, full(room))
    left = sum(count - lost + one for (count, lost), one in zip(audits, emitted)) / batch
    return interval, left, spent + full(room)


# Seconds of a full round with this room, of a partial one, and how often a token is wrong: the intervals that are best.
CASES = {
    "faults are frequent": (lambda room: 10 + room / 64, 1.0, 0.2, {16}),
    "faults are rare": (lambda room: 10 + room / 64, 1.0, 0.001, {64, 128}),
    "full rounds are as fast": (lambda room: 1 + room / 64, 1.0, 0.01, {0}),
    "rows of full rounds cost": (lambda room: 3 + room / 8, 0.5, 0.02, {16, 32}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fastest_interval_is_found(name):
    """By simulation: intervals that are nearly the best are used nearly always, and they are those that one would expect."""
    full, partial, hazard, expected = CASES[name]
    fixed = {}
    for interval in AdaptiveIntervals(128, DEEPEST).choices:  # what each earns when nothing else is used
        generator = random.Random(1)
        intervals = AdaptiveIntervals(128, DEEPEST)
        intervals.turn = lambda room=interval: room
        intervals.allowed = interval
        cycles = [cycle(intervals, full, partial, hazard, generator) for _ in range(400)]
        fixed[interval] = sum(left for _, left, _ in cycles) / sum(seconds for *_, seconds in cycles)
    near = {interval for interval, rate in fixed.items() if rate > 0.9 * max(fixed.values())}
    assert near <= expected, fixed
    intervals = AdaptiveIntervals(128, DEEPEST)
    generator = random.Random(0)
    cycles = [cycle(intervals, full, partial, hazard, generator) for _ in range(500)]
    used = [interval for interval, *_ in cycles[100:]]
    assert sum(interval in near for interval in used) > 0.85 * len(used), (near, fixed)
    rate = sum(left for _, left, _ in cycles[100:]) / sum(seconds for *_, seconds in cycles[100:])
    assert rate > 0.9 * max(fixed.values())


def test_intervals_follow_a_text_that_becomes_easier():
    intervals = AdaptiveIntervals(128, DEEPEST)
    generator = random.Random(0)
    full = CASES["faults are rare"][0]
    hard = [cycle(intervals, full, 1.0, 0.2, generator)[0] for _ in range(200)][100:]
    easy = [cycle(intervals, full, 1.0, 0.001, generator)[0] for _ in range(400)][200:]
    assert sum(hard) / len(hard) < 24 and sum(easy) / len(easy) > 60


TIGHT = PartialRecipe(sink=4, retrieval=8, window=16, block=4, partial_tokens="adaptive")
WHOLE = TIGHT.model_copy(update={"retrieval": 400})
DRAFTING = {
    "chains": lambda target: (trained(target, "ttt", "kv"), 3),
    "trees": lambda target: (trained(target, "ttt", "hybrid", 2, tree=TreeShape(3, 3)), 8),
    "lookup": lambda target: (StaticLookup(), 3),
}


@pytest.fixture(scope="module")
def target():
    return exact_target()


def audited(target, name, recipe, monkeypatch, prompts, new):
    """(generations under intervals that change all the time, rooms of full rounds (None: a partial one), the part)."""
    drafting, length = DRAFTING[name](target)
    engine = engine_of(target, drafting, length, len(prompts), 60, new, recipe=recipe, audited=True)
    generator = random.Random(0)
    monkeypatch.setattr(engine.intervals, "_next", lambda: generator.choice(engine.intervals.choices))
    rooms = []
    usual = engine.intervals.saw
    monkeypatch.setattr(engine.intervals, "saw", lambda room, *rest: (rooms.append(room), usual(room, *rest)))
    return engine.generate(prompts, new, [0] * len(prompts), Stops()), rooms, engine.verification.partial


@pytest.mark.parametrize("name", DRAFTING)
def test_adaptive_intervals_change_no_token(target, name, monkeypatch):
    """Ragged prompts and many orders of intervals. A part so tight that it errs is corrected; one that holds everything does not
    err; and blocks are chosen by summaries that are those of their keys."""
    prompts = ragged([6, 31, 58, 20], seed=4)
    new = 40
    plain = [generated(target, p, new) for p in prompts]
    for recipe, errs in ((TIGHT, True), (WHOLE, False)):
        found, rooms, part = audited(target, name, recipe, monkeypatch, prompts, new)
        assert [g.tokens for g in found] == plain
        assert {0, 4, 8, 16, None} <= {*rooms} and 0 < found[0].interval < 16
        rollbacks = sum(g.rollbacks for g in found)
        assert rollbacks > 3 if errs else rollbacks == 0
        for b, tail in enumerate(part.tail_B.tolist()):
            for number, start in enumerate(range(recipe.sink, tail, recipe.block)):
                for key_BLGD, low, high in zip(part.full.key, part._low, part._high):
                    keys = key_BLGD[b, start : start + recipe.block]
                    assert torch.equal(low[b, number], keys.amin(0)) and torch.equal(high[b, number], keys.amax(0))


@pytest.mark.parametrize("rounds", [6, 7, 8])
def test_a_batch_that_is_left_says_nothing_of_the_next_ones_pace(target, rounds):
    """Left after partial rounds (here the seventh): the next batch begins with a full round that audits nothing."""
    prompts = ragged([6, 31, 58, 20], seed=4)
    drafting, length = DRAFTING["chains"](target)
    engine = engine_of(target, drafting, length, len(prompts), 60, 20, recipe=TIGHT, audited=True)
    left = engine.stream(prompts, 20, [0] * 4, Stops())
    for _ in range(rounds):
        next(left)
    left.close()
    found = engine.generate(prompts, 20, [0] * 4, Stops())
    assert [g.tokens for g in found] == [generated(target, p, 20) for p in prompts]
