"""Batched engines on small targets, for tests."""

import torch

from data_prep.decoding.cache import StaticCache
from data_prep.decoding.sampling import Sampling
from eval.caches.partial import PartialCache
from eval.engine.drafting import StaticTrained
from eval.engine.engine import Engine, room_for
from eval.engine.lengths import Lengths
from eval.engine.verification import Verification
from tests.support.models import HIDDEN_LAYERS, drafter_of, small_target
from train.attention.choose import BACKENDS

REFERENCE = BACKENDS["reference"]
GREEDY = Sampling(0.0)


def exact_target(family="qwen3"):
    """float64, where the order of sums changes no token."""
    target = small_target(family, torch.float64)
    target.capture(HIDDEN_LAYERS, (1, 2))
    return target


def engine_of(
    target, drafting, length, batch=4, longest=24, new=40, sampling=GREEDY, recipe=None, audited=False, kind=StaticCache, **more
):
    """An engine whose caches hold prompts of `longest` tokens and `new` tokens behind them. `length`: of drafts (of trees: their
    nodes), or `Lengths`. `recipe`: of partial verification. `kind`: of the target's cache."""
    lengths = length if isinstance(length, Lengths) else Lengths(length)
    room = room_for(longest, new, lengths.longest, recipe.longest_interval if recipe else 0)
    cache = kind.of(target, batch, room)
    partial = PartialCache(cache, recipe, lengths.longest + 1) if recipe else None
    return Engine(target, drafting, cache, lengths, Verification(sampling, partial, audited), **more)


def trained(target, objective, reuse, layers=1, **options):
    """A random drafter of tests/support/models.py, as the engine drafts with it."""
    return StaticTrained(drafter_of(target, objective, reuse, layers=layers), target.frozen_head, **options)


def ragged(lengths=(12, 5, 20, 9), seed=5):
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 11, (n,), generator=generator).tolist() for n in lengths]


def triples(generation):
    """What each round did: where it began, how many tokens it drafted and how many it kept."""
    return [(r.anchor, r.drafted, r.kept) for r in generation.rounds]
