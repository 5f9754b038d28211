"""The batched engine: its tokens are `generate`'s, its rounds the plain loop's, and it keeps nothing.

Shapes: B requests, J drafted tokens, L places of a text.
"""

import gc
import itertools
import random
import time
import tracemalloc
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval.engine.rounds
import eval.engine.tree
import train.data.stream
from data_prep.cache.writer import CacheWriter
from data_prep.capture.capture import capture
from data_prep.recipe import DataRecipe, TargetRecipe
from data_prep.sources.counts import Counts
from data_prep.sources.documents import Documents, write_documents
from data_prep.sources.sides import VALIDATION
from data_prep.sources.tokens import TokenDocument
from data_prep.target.loading import load_target, load_tokenizer
from eval.engine.drafting import StaticLookup, StaticNobody, StaticTrained
from eval.engine.lengths import Adaptive
from eval.engine.one_by_one import OneByOne
from eval.engine.request import Stops
from eval.judging import measure
from eval.judging.controls import OtherMemory
from eval.judging.score import score
from eval.oracle.decode import decode
from eval.oracle.drafting import Draft, Nobody, PromptLookup, Trained
from eval.prompts.load import heldout_prompts
from eval.prompts.suites import SuiteRecipe
from eval.reports import page
from tests.support.caches import manifest_of
from tests.support.decoding import generated
from tests.support.engines import GREEDY, REFERENCE, engine_of, ragged, trained, triples
from tests.support.models import HIDDEN_LAYERS, drafter_of, small_target
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.views.recipe import View

OBJECTIVES = ("ttt", "blockwise", "blockwise_shifted", "blockwise_causal", "blockwise+markov", "blockwise_shifted+gru")
SOURCES = ("kv+projected", "kv+projected_rope", "kv+head_concat", "hybrid+cross_only", "hidden+vocab", "kv+vocab")
ALL = list(itertools.product(OBJECTIVES, ("none", "hidden", "kv", "hybrid", *SOURCES), (1, 2)))
ALL += itertools.product(["ttt"], ("queries", "queries+constant", "queries+head_concat"), (1, 2))
QUICK = [
    ("ttt", "none", 1),
    ("ttt", "hybrid", 2),
    ("ttt", "hidden+vocab", 1),
    ("ttt", "hidden+norms", 2),
    ("blockwise", "kv", 2),
    ("blockwise_causal", "hidden", 1),
    ("blockwise_pairs", "hidden", 2),
    ("blockwise+markov", "kv+projected_rope", 1),
    ("blockwise_shifted+gru", "hybrid+cross_only", 2),
    ("ttt", "queries+constant", 2),
]


@pytest.fixture(scope="module")
def targets():
    """Two families in float64, where the order of sums changes no token."""
    found = {family: small_target(family, torch.float64) for family in ("qwen3", "llama")}
    for target in found.values():
        target.capture(HIDDEN_LAYERS, (1, 2))
    return found


@pytest.fixture(scope="module")
def target(targets):
    return targets["qwen3"]


@pytest.fixture(scope="module")
def tiny():
    """The embedded target in float32, and its tokenizer."""
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    return target, load_tokenizer(target.path)


class Shorter(Trained):
    """The plain loop's drafter, whose drafts are cut."""

    def draft(self, tokens, temperature, generator):
        return Draft(super().draft(tokens, temperature, generator).tokens[: self.most])


def plain_loop(target, drafter, prompt, new, most):
    drafting = Shorter(drafter, target.frozen_head, REFERENCE)
    drafting.most = most
    return decode(target, drafting, prompt, new, 0.0, 0)


def check_cell(target, cell, new):
    drafter = drafter_of(target, cell[0], cell[1], layers=cell[2])
    prompts = ragged()
    length = drafter.config.draft_length
    found = engine_of(target, StaticTrained(drafter, target.frozen_head), length, prefill_chunk=7).generate(
        prompts, new, [0, 1, 2, 3], Stops()
    )
    for prompt, one in zip(prompts, found):
        assert one.tokens == generated(target, prompt, new)
        assert triples(one) == triples(plain_loop(target, drafter, prompt, new, length))
    kept, drafted = (sum(getattr(r, name) for g in found for r in g.rounds) for name in ("kept", "drafted"))
    assert 0 < kept < drafted  # else one side of verification was not tested


@pytest.mark.parametrize("family,cell", zip(("qwen3", "llama") * 5, QUICK), ids=lambda v: v if isinstance(v, str) else str(v[:2]))
def test_greedy_output_is_generate_s_and_rounds_are_the_plain_loop_s(targets, family, cell):
    check_cell(targets[family], cell, 24)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_greedy_batches_equal_the_plain_loop_for_every_drafter(targets, objective, family):
    for number, cell in enumerate(c for c in ALL if c[0] == objective):
        if (family, number % 4) in (("qwen3", 0), ("qwen3", 2), ("llama", 1)):
            check_cell(targets[family], cell, 25)


def test_wrong_memory_shows_in_the_rounds_and_a_wrong_verdict_in_the_tokens(target, monkeypatch):
    """The controls of the test above: either comparison can fail, and a drafter that errs is still lossless."""
    prompts = ragged()
    drafter = drafter_of(target, "ttt", "kv")
    right = [plain_loop(target, drafter, p, 30, 4) for p in prompts]
    turned = StaticTrained(drafter, target.frozen_head, change=lambda states, _: states.map(lambda t: t.flip(-1)))
    run = lambda: engine_of(target, turned, 4).generate(prompts, 30, [0] * 4, Stops())
    wrong = run()
    assert [g.tokens for g in wrong] == [g.tokens for g in right]
    assert [triples(g) for g in wrong] != [triples(g) for g in right]
    accept = eval.engine.rounds.accept
    monkeypatch.setattr(eval.engine.rounds, "accept", lambda *a: ((kept := accept(*a))[0].add(1).clamp(max=4), kept[1]))
    assert [g.tokens for g in run()] != [g.tokens for g in right]


@pytest.fixture(scope="module")
def few_drafters(target):
    cells = [("ttt", "hybrid"), ("ttt", "none"), ("ttt", "kv+vocab"), ("blockwise", "hidden"), ("blockwise_shifted+gru", "kv")]
    return [drafter_of(target, *cell) for cell in cells]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_greedy_batches_equal_the_plain_loop_for_any_sizes(target, few_drafters, data):
    """Any prompts (of one token too), batch with idle places, limit, chunk of the prefill, and drafts shorter than trained."""
    pick = lambda low, high: data.draw(st.integers(low, high))
    batch = pick(1, 4)
    new = pick(1, 16)
    drafter = data.draw(st.sampled_from(few_drafters))
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=batch))
    prompts = ragged(lengths, seed=pick(0, 99))
    length = pick(1, drafter.config.draft_length)
    drafting = StaticTrained(drafter, target.frozen_head)
    engine = engine_of(target, drafting, length, batch, new=new, prefill_chunk=pick(1, 25))
    for prompt, one in zip(prompts, engine.generate(prompts, new, [0] * len(prompts), Stops())):
        plain = plain_loop(target, drafter, prompt, new, length)
        assert (one.tokens, triples(one)) == (plain.tokens, triples(plain))


def test_static_lookup_is_prompt_lookup():
    """On 400 texts of few words at once, of 1 to 12 tokens, with other tokens where nothing is known yet."""
    generator = torch.Generator().manual_seed(0)
    text_BL = torch.randint(3, 6, (400, 20), generator=generator)
    anchor_B = torch.arange(400) % 12
    found = StaticLookup().propose(text_BL, anchor_B, 3, GREEDY, None)
    for text, anchor, tokens, count in zip(text_BL.tolist(), anchor_B.tolist(), found.tokens_BJ.tolist(), found.count_B.tolist()):
        assert tokens[:count] == PromptLookup(3).draft(text[: anchor + 1], 0.0, None).tokens
    assert set(found.count_B.tolist()) == {0, 1, 2, 3}


def test_a_second_batch_is_not_affected_by_the_first(target):
    """Nothing of the first batch is left in the second, whose prompts are shorter and fewer."""
    for static, plain, length in ((StaticNobody(), Nobody(), 0), (StaticLookup(), PromptLookup(3), 3)):
        engine = engine_of(target, static, length)
        for prompts in (ragged(), ragged((7, 3, 4), seed=8)):
            for prompt, one in zip(prompts, engine.generate(prompts, 20, [0] * 4, Stops())):
                other = decode(target, plain, prompt, 20, 0.0, 0)
                assert one.tokens == other.tokens == generated(target, prompt, 20)
                assert triples(one) == triples(other)


def test_greedy_output_is_generate_s_on_twenty_prompts_in_float32(tiny):
    """The embedded target, 20 prompts of its held-out text, a drafter and prompt lookup."""
    target, tokenizer = tiny
    recipe = SuiteRecipe(kind="heldout", count=20, prompt_tokens=48, new_tokens=8)
    prompts = [p.tokens for p in heldout_prompts(DataRecipe(source="stdlib", max_length=512), recipe, tokenizer)]
    plain = [generated(target, p, 8) for p in prompts]
    target.capture([0, 2], [0, 5])
    config = DrafterConfig("blockwise", "hybrid", [0, 5], [0, 2], 4, True, False, 0, "target", 2, target.architecture, {})
    drafter = new_drafter(config).start(target, target.frozen_head)
    for drafting in (StaticTrained(drafter, target.frozen_head), StaticLookup()):
        found = engine_of(target, drafting, 4, 20, 48, 8).generate(prompts, 8, [0] * 20, Stops())
        assert [g.tokens for g in found] == plain
        assert sum(r.kept for g in found for r in g.rounds) > 5


def simulated(lengths, cond, seconds, rounds, generator):
    chosen = []
    for _ in range(rounds):
        chosen.append(length := lengths.choose())
        kept = [next((j for j in range(length) if generator.random() >= cond), length) for _ in range(4)]
        lengths.saw(length, kept, seconds(length))
    return chosen


def test_adaptive_lengths_find_the_fastest_and_follow_it():
    generator = random.Random(0)
    lengths = Adaptive(8)
    cond = 0.7
    emitted = lambda n: sum(cond**j for j in range(n + 1))
    for seconds in (lambda n: 1 + 0.2 * n, lambda n: 1 + 0.02 * n, lambda n: 1 + 0.6 * n):
        best = max(range(1, 9), key=lambda n: emitted(n) / seconds(n))
        settled = simulated(lengths, cond, seconds, 900, generator)[400:]
        near = [n for n in range(1, 9) if emitted(n) / seconds(n) > 0.97 * emitted(best) / seconds(best)]
        assert len(near) < 6 and sum(n in near for n in settled) > 0.85 * len(settled), (best, near)


def test_a_stream_shows_every_round_and_can_be_left(target):
    """What was shown before each round only grows into what `generate` returns; time spent looking does not count; and a stream
    that was left in the middle changes nothing for the next one."""
    prompts = ragged()
    engine = engine_of(target, trained(target, "ttt", "hybrid", 2), 4)
    expected = engine.generate(prompts, 30, [0] * 4, Stops())
    left = engine.stream(prompts, 30, [1] * 4, Stops())
    for _ in range(3):
        next(left)
    del left
    begun = time.perf_counter()
    shown = []
    stream = engine.stream(prompts, 30, [0] * 4, Stops())
    while True:
        try:
            shown.append([list(r.output) for r in next(stream)])
            time.sleep(0.02)
        except StopIteration as end:
            found = end.value
            break
    wall = time.perf_counter() - begun
    assert [g.tokens for g in found] == [g.tokens for g in expected] and list(map(triples, found)) == list(map(triples, expected))
    assert [len(one) for one in shown[0]] == [1] * 4 and len(shown) == max(len(g.rounds) for g in found)
    for earlier, later in zip(shown, shown[1:]):
        assert all(b[: len(a)] == a for a, b in zip(earlier, later)) and earlier != later
    assert sum(g.prefill_s + g.decode_s for g in found) < wall - 0.02 * len(shown)


def test_a_length_that_was_slow_when_it_was_tried_is_tried_again():
    """Shorter drafts are worth it, and were measured while the machine was busy."""
    lengths = Adaptive(4)
    chosen = []
    for _ in range(400):
        length = lengths.choose()
        busy = 10 if len(chosen) < 4 and length < 4 else 1
        lengths.saw(length, [0], busy * (1 + length))
        chosen.append(length)
    assert chosen[4:12] == [4] * 8 and chosen[-40:].count(1) > 30


def test_adaptive_lengths_change_no_token(target):
    prompts = ragged()
    lengths = Adaptive(4)
    found = engine_of(target, trained(target, "ttt", "hybrid", 2), lengths).generate(prompts, 40, [0] * 4, Stops())
    assert [g.tokens for g in found] == [generated(target, p, 40) for p in prompts]
    assert {r.drafted for g in found for r in g.rounds} == {1, 2, 3, 4}


@pytest.mark.parametrize("reuse,own", [("kv", 0), ("none", 1), ("hidden", 1), ("hybrid", 1), ("kv+projected", 1)])
def test_reported_drafter_memory_equals_the_tensors_it_adds(target, reuse, own):
    """Native K/V is the target's own cache, the same tensors; anything else is as large as it says."""
    drafting = trained(target, "blockwise", reuse, layers=2)
    engine = engine_of(target, drafting, 3)
    one = engine.generate(ragged(), 10, [0] * 4, Stops())[0]
    cache = engine._rounds.cache
    longest = int(engine._rounds.length_B.max())
    parts = [part for kinds in drafting.memory.layers for part in kinds.values()]
    storages = {t.untyped_storage().data_ptr() for t in cache.blocks}
    added = [t for part in parts for t in (part.key, part.value) if t.untyped_storage().data_ptr() not in storages]
    assert len(parts) == 2 * (1 + (reuse == "hybrid")) and len(added) == 4 * own
    position = own * 2 * 2 * 2 * 8 * 8  # layers, K and V, heads, numbers, bytes
    assert one.kv_bytes["kept"] == position * longest
    assert one.kv_bytes["peak"] == sum(t.nbytes for t in added) // 4


def tensors_of(held) -> tuple:
    return held if isinstance(held, tuple) else (held,)


@pytest.mark.parametrize("reuse,layers", [("queries", 2), ("queries+constant", 1), ("queries+head_concat", 1)])
def test_queries_alone_keep_no_byte_of_keys_and_values(target, reuse, layers):
    """What they read is the target's cache itself, and nothing else is there."""
    drafting = trained(target, "ttt", reuse, layers=layers)
    engine = engine_of(target, drafting, 4)
    found = engine.generate(ragged(), 24, [0] * 4, Stops())
    cache = engine._rounds.cache
    read = [[1, 2]] if reuse == "queries+head_concat" else [[1], [2]][-layers:]
    for kinds, sources in zip(drafting.memory.layers, read, strict=True):
        assert list(kinds) == ["kv"]
        for held, kind in ((kinds["kv"].key, 0), (kinds["kv"].value, 1)):
            assert [t.data_ptr() for t in tensors_of(held)] == [cache.layer(source)[kind].data_ptr() for source in sources]
            assert [t.shape for t in tensors_of(held)] == [cache.layer(source)[kind].shape for source in sources]
    longest = int(engine._rounds.length_B.max())
    position = 2 * 2 * 8 * 8  # K and V, heads, numbers, bytes
    assert found[0].kv_bytes == {"read": position * longest * sum(map(len, read)), "searched": 0, "kept": 0, "peak": 0}
    assert page.mib(measure.kv_mib(found)["kept_mib"]) == "0" and page.mib(2**-20) == "< 0.01"  # a byte is not nothing
    assert sum(r.kept for g in found for r in g.rounds) > 0


UNLENT = {
    "keys of its own": ({"own_kv": True}, None),
    "other positions": ({"rope_factor": 2.0}, None),
    "other states": ({}, lambda states, _: states.map(lambda t: t.flip(-1))),
}


@pytest.mark.parametrize("why", UNLENT)
@pytest.mark.parametrize("reuse", ["queries+head_concat", pytest.param("queries", marks=pytest.mark.slow)])
def test_queries_that_cannot_have_the_target_s_cache_decode_the_same_and_say_what_they_keep(target, reuse, why):
    """Heads side by side beside draft keys, positions that are scaled, and states that a control has changed are copies."""
    options, change = UNLENT[why]
    drafter = drafter_of(target, "ttt", reuse, **options)
    drafting = StaticTrained(drafter, target.frozen_head, change)
    engine = engine_of(target, drafting, 4, prefill_chunk=7)
    found = engine.generate(ragged(), 24, [0] * 4, Stops())
    for prompt, one in zip(ragged(), found):
        alone = decode(target, Trained(drafter, target.frozen_head, REFERENCE, change=change), prompt, 24, 0.0, 0)
        assert one.tokens == alone.tokens and triples(one) == triples(alone)
    lent = reuse == "queries" and why == "keys of its own"
    position = 2 * len(drafter.config.kv_layers) * 2 * 8 * 8  # K and V, layers, heads, numbers, bytes
    assert found[0].kv_bytes["kept"] == (0 if lent else position * int(engine._rounds.length_B.max()))
    held = drafting.memory.layers[0]["kv"]
    assert found[0].kv_bytes["peak"] == (0 if lent else (held.key.nbytes + held.value.nbytes) // 4)


@pytest.mark.slow
def test_a_thousand_generations_do_not_grow_memory(target):
    drafting = trained(target, "ttt", "hybrid")
    engine = engine_of(target, drafting, 4, 20, 8, 6)
    process = psutil.Process()
    seen = {}
    tracemalloc.start()
    for batch in range(50):
        prompts = ragged([4 + n % 5 for n in range(20)], seed=batch)
        engine.generate(prompts, 6, list(range(20)), Stops())
        if batch in (10, 49):
            gc.collect()
            seen[batch] = (process.memory_info().rss, len(gc.get_objects()), tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    (rss, objects, traced), after = seen[10], seen[49]
    assert after[0] - rss < 10 * 2**20 and after[1] - objects < 200 and after[2] - traced < 2**18


@pytest.mark.parametrize(
    "objective,reuse",
    [
        ("ttt", "hybrid"),
        ("blockwise", "kv"),
        ("blockwise_shifted+gru", "hidden"),
        ("ttt", "queries+constant"),
        pytest.param("ttt", "queries", marks=pytest.mark.slow),
        pytest.param("ttt", "queries+head_concat", marks=pytest.mark.slow),
    ],
)
def test_greedy_tau_of_mode_score_equals_the_decoded_one(objective, reuse, tmp_path, monkeypatch):
    """On the target's own greedy continuations, captured to a real cache and scored where the engine's rounds begin. A round
    that reaches beyond the text is left out of both; at other anchors tau is another (the control)."""
    target = small_target()
    prompts = ragged((12, 5, 20, 9, 7))
    new = 60
    target.capture(HIDDEN_LAYERS, (1, 2))
    drafter = drafter_of(target, objective, reuse)
    engine = engine_of(target, StaticTrained(drafter, target.frozen_head), drafter.config.draft_length, 5, new=new)
    rounds = {}
    pieces = []
    for number, (prompt, one) in enumerate(zip(prompts, engine.generate(prompts, new, [0] * 5, Stops()))):
        text = [*prompt, *generated(target, prompt, new)]
        assert one.tokens == text[len(prompt) :]
        mask = np.array([0] * len(prompt) + [1] * new, dtype=np.uint8)
        pieces.append(TokenDocument(f"{VALIDATION}{number}#0", np.array(text, dtype=np.int32), mask))
        rounds[pieces[-1].id] = [r for r in one.rounds if r.anchor + r.drafted < len(text)]
    source = write_documents(tmp_path / "documents.arrow", pieces, Counts())
    changed = dict(architecture=asdict(target.architecture), source=source, hidden_layers=[0, 1, 2], kv_layers=[1, 2])
    writer = CacheWriter(tmp_path / "cache", manifest_of(**changed, max_length=100), 4000)
    capture(target, Documents(tmp_path / "documents.arrow"), writer, batch_tokens=200)
    recipe = SimpleNamespace(
        cache=SimpleNamespace(dir=tmp_path / "cache"), score=SimpleNamespace(documents=64, anchors=64, pack_tokens=150),
        view=View(kind="full"), span=None, seed=0, attention="reference",
    )  # fmt: skip

    def tau(shift):
        anchors = lambda id, *_: np.array([r.anchor + shift for r in rounds[id]])
        monkeypatch.setattr(train.data.stream, "sample_anchors", anchors)
        return score(recipe, target, drafter)[0]["greedy"].tau

    kept = [r.kept for found in rounds.values() for r in found]
    assert len(kept) > 50 and sum(kept) > 20
    assert tau(0) == pytest.approx(1 + sum(kept) / len(kept), abs=1e-9)
    assert tau(-1) != pytest.approx(1 + sum(kept) / len(kept), abs=1e-3)


@pytest.mark.parametrize("objective,reuse", [("ttt", "hidden"), ("ttt", "none"), ("blockwise", "kv"), ("ttt", "queries")])
def test_drafters_under_a_view_draft_the_same_in_a_batch_and_alone(targets, objective, reuse):
    """Ragged prompts, of which some end in an earlier chunk of the prefill than others."""
    target = targets["qwen3"]
    view = View(kind="h2o", budget=12, sink=2)
    drafter = drafter_of(target, objective, reuse, layers=2)
    make = lambda b=0: Trained(drafter, target.frozen_head, REFERENCE, view)
    engine = engine_of(target, OneByOne(4, make), drafter.config.draft_length, prefill_chunk=8)
    prompts = ragged()
    for prompt, found in zip(prompts, engine.generate(prompts, 40, [0] * 4, Stops())):
        alone = decode(target, make(), prompt, 40, 0.0, 0)
        assert found.tokens == alone.tokens and triples(found) == triples(alone)
        assert found.kv_bytes["kept"] > 0  # a view takes out what it shows, and leaves the target's own cache alone


def test_graphs_are_recorded_before_the_first_request(targets):
    """The controls too: whatever a graph keeps the address of is there by then, and is what requests are shown later."""
    target = targets["qwen3"]
    drafter = drafter_of(targets["qwen3"], "ttt", "hybrid")
    other = OtherMemory(4, 200)
    engine = engine_of(target, StaticTrained(drafter, target.frozen_head, other), 4)
    engine.reserve(40)
    engine._capture()
    held = other._held.hidden[1]
    prompts = ragged()
    for b in range(4):
        other.fill(b, target.forward(torch.tensor([prompts[b - 1]])).map(lambda t: t[0]))
    found = engine.generate(prompts, 40, [0] * 4, Stops())
    assert other._held.hidden[1] is held
    for b, prompt in enumerate(prompts):
        alone = decode(target, Trained(drafter, target.frozen_head, REFERENCE, change=other.of(b)), prompt, 40, 0.0, 0)
        assert found[b].tokens == alone.tokens and triples(found[b]) == triples(alone)


def test_milliseconds_per_round_are_those_of_the_whole_batch(targets):
    """Milliseconds a round are those of the batch, whose requests end at different times."""
    engine = engine_of(targets["qwen3"], StaticLookup(), 3)
    found = engine.generate(ragged(), 40, [0] * 4, Stops())
    rounds = max(len(g.rounds) for g in found)
    assert sum(g.steps for g in found) == pytest.approx(rounds) and len({len(g.rounds) for g in found}) > 1
    total = sum(measure.round_ms(found).values())
    assert total == pytest.approx(1e3 * sum(g.decode_s for g in found) / rounds)
