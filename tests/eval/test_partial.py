"""SpecPV: the part is what it says it is, a part that holds everything changes nothing, and an audit makes any part lossless.

Shapes: B requests, N layers, T rows of each, H query heads, G key/value heads, D head size, L places of a cache. Of one request,
layer and key/value head: K drafts, S query heads.
"""

from functools import wraps

import numpy as np
import pytest
import torch

from data_prep.decoding.attention import PLAIN
from data_prep.decoding.cache import StaticCache
from data_prep.recipe import TargetRecipe
from data_prep.target.architecture import CachedLayer
from data_prep.target.loading import load_target
from data_prep.target.target import Target
from eval.caches.offload import OffloadedCache
from eval.caches.partial import PartialCache, PartialRecipe
from eval.engine.drafting import StaticLookup, StaticNobody
from eval.engine.request import Stops
from eval.engine.rounds import Rounds
from eval.engine.tree import TreeShape
from tests.support.decoding import generated
from tests.support.engines import engine_of, exact_target, ragged, trained, triples
from tests.support.families import miniature

TIGHT = PartialRecipe(sink=4, retrieval=8, window=12, block=4, partial_tokens=12)
WHOLE = PartialRecipe(sink=4, retrieval=400, window=12, block=4, partial_tokens=12)
NEW = 20
TREE = TreeShape(3, 3)
DRAFTING = {
    "ttt kv": lambda target: (trained(target, "ttt", "kv"), 4),
    "ttt hidden": lambda target: (trained(target, "ttt", "hidden", 2), 4),
    "tree hybrid": lambda target: (trained(target, "ttt", "hybrid", 2, tree=TREE), 8),
    "ttt queries": lambda target: (trained(target, "ttt", "queries+head_concat"), 4),
    "tree queries": lambda target: (trained(target, "ttt", "queries+constant", 2, tree=TREE), 8),
    "tree of one": lambda target: (trained(target, "ttt", "hybrid", 2, tree=TreeShape(4, 1)), 4),
    "tree none": lambda target: (trained(target, "ttt", "none", tree=TREE), 8),
    "block hybrid": lambda target: (trained(target, "blockwise", "hybrid", 2), 3),
    "lookup": lambda target: (StaticLookup(), 3),
    "nobody": lambda target: (StaticNobody(), 0),
}


@pytest.fixture(scope="module")
def target():
    return exact_target()


@pytest.fixture(scope="module")
def texts(target):
    """50 prompts, mostly larger than the tight part, and their greedy continuations."""
    prompts = ragged([5 + 13 * n % 75 for n in range(50)], seed=3)
    return prompts, [generated(target, p, NEW) for p in prompts]


def run(target, name, recipe, audited, prompts, new=NEW, stops=None):
    """(generations, their engine)."""
    drafting, length = DRAFTING[name](target)
    engine = engine_of(target, drafting, length, len(prompts), 90, new, recipe=recipe, audited=audited)
    return engine.generate(prompts, new, [0] * len(prompts), stops or Stops()), engine


def shifted(monkeypatch, by):
    """The fault of a published implementation: keys and values of the part stand `by` places from where they belong."""
    usual = PartialCache._take

    def take(self, layer, *rest):
        usual(self, layer, *rest)
        for kind in (self.part.key, self.part.value):
            kind[layer].copy_(kind[layer].roll(by, 1))

    monkeypatch.setattr(PartialCache, "_take", take)


@pytest.mark.parametrize("name", ["ttt hidden", "tree hybrid", "tree of one", "tree queries", "block hybrid", "lookup"])
def test_partial_verification_over_the_whole_context_equals_full_verification(target, texts, name):
    """Tokens and rounds; a tight part changes them (the control)."""
    prompts = texts[0][:4]
    full, whole, tight = (run(target, name, recipe, False, prompts)[0] for recipe in (None, WHOLE, TIGHT))
    assert [g.tokens for g in whole] == [g.tokens for g in full] == texts[1][:4]
    assert [triples(g) for g in whole] == [triples(g) for g in full]
    assert [g.tokens for g in tight] != [g.tokens for g in full]


@pytest.mark.parametrize("kind", [StaticCache, OffloadedCache])
def test_layers_that_share_keys_choose_each_their_own_part_of_them(kind, tmp_path):
    """Of a Gemma 4 without windows, whose last layers keep nothing: tokens and rounds are those of full verification, where its
    cache lies in the host's memory too; a tight part changes them (the control)."""
    path = miniature("gemma4_unified_text", tmp_path, layer_types=["full_attention"] * 4, tie_word_embeddings=False)
    target = Target(str(path), dtype=torch.float64)
    assert [one.owner for one in target.cached_layers] == [0, 1, 1, 1]
    prompts = ragged([12, 33, 70], seed=3)

    def found(recipe, kind=StaticCache):
        engine = engine_of(target, StaticLookup(), 3, 3, 90, NEW, recipe=recipe, kind=kind)
        return [(one.tokens, triples(one)) for one in engine.generate(prompts, NEW, [0] * 3, Stops())], engine

    full = found(None)[0]
    assert [tokens for tokens, _ in full] == [generated(target, prompt, NEW) for prompt in prompts]
    assert found(WHOLE, kind)[0] == full
    tight, engine = found(TIGHT, kind)
    assert tight != full and tight == found(TIGHT)[0]
    part = engine.verification.partial.part
    assert not torch.equal(part.key[2], part.key[3])


def check_audited(target, name, recipe, prompts, plain, new=NEW):
    """Returns how many rollbacks there were."""
    found, engine = run(target, name, recipe, True, prompts, new)
    for b, one in enumerate(found):
        assert one.tokens == plain[b]
        assert one.emitted == int(engine._rounds.length_B[b]) - len(prompts[b])  # positions that were gained
        assert len(one.tokens) - 1 <= one.emitted and (one.rollbacks == 0) == (one.undone == 0) and one.rollbacks <= one.undone
        at = len(prompts[b])  # what is left of the rounds stands one behind the other
        for round in one.rounds:
            assert round.kept == -1 or round.anchor == at
            at += round.kept + 1
        assert one.rollbacks <= sum(round.drafted == 0 for round in one.rounds)
    return sum(g.rollbacks for g in found)


def test_audited_output_equals_generate_on_fifty_prompts(target, texts):
    """In batches of ten, each with another drafter, over a part so tight that it errs."""
    names = ("ttt kv", "tree hybrid", "block hybrid", "lookup", "ttt hidden")
    for n, name in enumerate(names):
        some = slice(10 * n, 10 * n + 10)
        assert check_audited(target, name, TIGHT, texts[0][some], texts[1][some]) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTING)
def test_audited_output_is_lossless_for_every_drafter(target, texts, name):
    tens = [[some[n : n + 10] for some in texts] for n in range(0, 50, 10)]
    assert sum(check_audited(target, name, TIGHT, *ten) for ten in tens) > 10
    assert sum(check_audited(target, name, WHOLE, *ten) for ten in tens[:2]) == 0


@pytest.mark.slow
def test_audited_output_is_lossless_for_the_embedded_target():
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(9, 8000, (20 + n,), generator=generator).tolist() for n in range(50)]
    plain = [generated(target, p, 24) for p in prompts]
    for n in range(5):
        some = slice(10 * n, 10 * n + 10)
        check_audited(target, ("lookup", "nobody")[n % 2], TIGHT, prompts[some], plain[some], 24)


@pytest.mark.parametrize("name", ["ttt kv", "tree none"])
def test_a_fault_in_the_part_is_seen_by_the_audit_alone(target, texts, name, monkeypatch):
    prompts, plain = (some[:6] for some in texts)
    assert check_audited(target, name, WHOLE, prompts, plain) == 0
    shifted(monkeypatch, WHOLE.sink)
    assert [g.tokens for g in run(target, name, WHOLE, False, prompts)[0]] != plain
    assert check_audited(target, name, WHOLE, prompts, plain) > 5


def test_an_end_token_seen_only_by_partial_steps_is_verified_in_full(target, texts, monkeypatch):
    """A broken part says end tokens that the target never says, and reaches limits in partial steps."""
    steps = []
    usual = Rounds.verify

    @wraps(usual)
    def verify(self, length, missing, proposal):
        steps.append(missing is not None)
        return usual(self, length, missing, proposal)

    monkeypatch.setattr(Rounds, "verify", verify)
    shifted(monkeypatch, 3)
    prompts, plain = (some[5:11] for some in texts)
    cut = lambda tokens, end: tokens[: tokens.index(end) + 1] if end in tokens else tokens
    lossy = [g.tokens for g in run(target, "ttt kv", WHOLE, False, prompts)[0]]
    wrong_ends = 0
    late = 0
    for end in sorted({token for tokens in lossy for token in tokens}):
        found = run(target, "ttt kv", WHOLE, True, prompts, stops=Stops(frozenset({end})))[0]
        assert [g.tokens for g in found] == [cut(tokens, end) for tokens in plain]
        wrong_ends += sum(cut(a, end) != cut(b, end)[: len(cut(a, end))] for a, b in zip(lossy, plain))
    for prompt, tokens in zip(prompts[:3], plain):
        for new in (5, 8):
            steps.clear()
            assert run(target, "ttt kv", WHOLE, True, [prompt], new)[0][0].tokens == tokens[:new]
            assert steps[-1]  # no output ends in a partial step
            late += not all(steps)
    assert wrong_ends > 5 and late > 2


# ---------------------------------------------------------------------------------------------------- what is in the part


def best_blocks(q_KSD, key_LD, tail, recipe, least=True):
    """Brute force: numbers of the best blocks before `tail` for one request, layer and KV head. `least=False`: a wrong score."""
    scores = {}
    for number, start in enumerate(range(recipe.sink, tail, recipe.block)):
        low, high = (f(key_LD[start : start + recipe.block], axis=0) for f in (np.min, np.max))
        scores[number] = np.maximum(q_KSD @ high, q_KSD @ low if least else -np.inf).mean()
    return sorted(sorted(scores, key=lambda number: -scores[number])[: recipe.retrieval // recipe.block])


@pytest.mark.parametrize("sink,retrieval,window,block", [(4, 12, 8, 4), (3, 10, 9, 5), (0, 64, 8, 8)])
def test_the_selected_part_equals_brute_force_at_every_offset(sink, retrieval, window, block):
    """150 requests of 1 .. 150 tokens, three full steps each, random keys: the positions that are held, of every layer and KV
    head, and their keys and values. The greatest alone would choose other blocks (the control)."""
    recipe = PartialRecipe(sink=sink, retrieval=retrieval, window=window, block=block, partial_tokens=8)
    batch = 150
    layers = 2
    heads = 2
    size = 4
    drafts = 3
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    cache = StaticCache([CachedLayer(heads, size, n) for n in range(layers)], batch, batch + 80, torch.float32, "cpu")
    cache.blocks[0].copy_(random(*cache.blocks[0].shape))
    part = PartialCache(cache, recipe, drafts)
    base_B = torch.arange(1, batch + 1)
    part.begin(base_B)
    rows = recipe.partial_tokens + drafts
    differ = 0
    for step in range(3):
        anchor_B = base_B + (torch.randint(0, recipe.partial_tokens + 1, (batch,), generator=generator) if step else 0)
        attend = part.fully(base_B, anchor_B, rows, recipe.partial_tokens, None)
        q_NBTHD, k, v = random(layers, batch, rows, 4, size), *random(2, layers, batch, rows, heads, size)
        for layer in range(layers):
            attend(layer, q_NBTHD[layer], k[layer], v[layer], PLAIN)
        part.settle(anchor_B)
        for b, (base, anchor) in enumerate(zip(base_B.tolist(), anchor_B.tolist())):
            tail = max(e for e in range(sink, anchor + sink + 1, block) if e <= max(sink, anchor - window))
            for layer, g in np.ndindex(layers, heads):
                q_KSD = q_NBTHD[layer, b, anchor - base : anchor - base + drafts, 2 * g : 2 * g + 2].numpy()
                key_LD = cache.key[layer][b, :, g].numpy()
                chosen = best_blocks(q_KSD, key_LD, tail, recipe)
                differ += chosen != best_blocks(q_KSD, key_LD, tail, recipe, least=False)
                held = [*range(min(sink, anchor)), *(sink + c * block + s for c in chosen for s in range(block))]
                held += range(tail, anchor)
                assert part.filled_B[b] == len(held)
                held += range(anchor, anchor + drafts)  # the rows of this step follow
                for mine, whole in zip(part.part.layer(layer), cache.layer(layer)):
                    assert torch.equal(mine[b, : len(held), g], whole[b, held, g]), (step, anchor)
        kept_B = torch.randint(0, drafts, (batch,), generator=generator)
        base_B = anchor_B + kept_B + 1
        part.settle(base_B)
    assert differ > 100


@pytest.mark.parametrize("name,audited", [("block hybrid", False), ("block hybrid", True), ("tree none", True)])
def test_summaries_of_blocks_are_those_made_from_scratch(target, texts, name, audited):
    """After many rounds, with rollbacks, each block before the tail has the least and the greatest of its keys as they are."""
    prompts = texts[0][10:16]
    found, engine = run(target, name, TIGHT, audited, prompts, 50)
    part = engine.verification.partial
    grown = 0
    for b, prompt in enumerate(prompts):
        tail = int(part.tail_B[b])
        grown += (tail - TIGHT.sink) // TIGHT.block - max(0, len(prompt) - TIGHT.window - TIGHT.sink) // TIGHT.block
        for number, start in enumerate(range(TIGHT.sink, tail, TIGHT.block)):
            for key_BLGD, low, high in zip(part.full.key, part._low, part._high):
                keys = key_BLGD[b, start : start + TIGHT.block]
                assert torch.equal(low[b, number], keys.amin(0)) and torch.equal(high[b, number], keys.amax(0))
    assert grown > 40 and (sum(g.rollbacks for g in found) > 5) == audited
