"""Views in the batched engine: what its drafters are shown and draft is what the plain loop's are shown and draft.

Shapes: B requests, P places of a part, K keys that are visible, G key/value heads, D head size; u_BJ: J drafted tokens.
"""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import eval.oracle.drafting
from data_prep.decoding.sampling import Sampling, drawn
from eval.caches.budgeted import BudgetedMemory
from eval.caches.sparse import SparseCache
from eval.engine.drafting import StaticTrained
from eval.engine.lengths import Adaptive
from eval.engine.one_by_one import OneByOne
from eval.engine.request import Stops
from eval.judging.controls import OtherMemory, zero_memory
from eval.oracle.decode import decode
from eval.oracle.drafting import Trained
from tests.support.decoding import generated
from tests.support.engines import REFERENCE, engine_of, exact_target, ragged, triples
from tests.support.models import HIDDEN_LAYERS, drafter_of, small_target
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.drafter.standalone import lm_config
from train.views.recipe import View

KINDS = {
    "sink_recent": dict(kind="sink_recent", budget=12, sink=2),
    "mean": dict(kind="topk_chunk", budget=16, sink=4, recent=4, chunk=4),
    "lastkey": dict(kind="topk_chunk", budget=14, sink=3, recent=0, chunk=3, scorer="lastkey"),
    "minmax": dict(kind="topk_chunk", budget=13, sink=2, recent=2, chunk=2, scorer="minmax"),
    "quest": dict(kind="topk_chunk", budget=9, sink=1, recent=3, chunk=1, scorer="quest"),
    "snapkv": dict(kind="snapkv", budget=12, sink=1, recent=4, pool=3),
    "snapkv, few shorter texts": dict(kind="snapkv", budget=30, recent=8, pool=5),
}
REUSES = [
    ("ttt", "kv", 2),
    ("ttt", "kv+projected_rope", 1),
    ("ttt", "hidden", 1),
    ("ttt", "hidden", 2),
    ("ttt", "none", 2),
    ("ttt", "hybrid", 1),
    ("blockwise", "kv", 1),
    ("blockwise", "hidden", 2),
    ("blockwise_pairs", "hidden", 2),
    ("ttt", "queries+constant", 2),
    ("ttt", "queries+head_concat", 1),
    ("ttt", "small language model", 2),
]
WAYS = list(itertools.product(("absolute", "in_cache"), ("verify", 5, "never")))
QUICK = [
    (("ttt", "kv", 2), "mean", "absolute", "verify"),
    (("ttt", "hidden", 2), "snapkv", "in_cache", 5),
    (("ttt", "none", 2), "quest", "absolute", 5),
    (("ttt", "hybrid", 1), "minmax", "in_cache", "never"),
    (("blockwise", "kv", 1), "lastkey", "absolute", "verify"),
    (("ttt", "queries+head_concat", 1), "snapkv, few shorter texts", "absolute", "never"),
    (("ttt", "small language model", 2), "sink_recent", "in_cache", "verify"),
]
NEW = 30


@pytest.fixture(scope="module")
def target():
    return exact_target()


def drafter_of_cell(target, cell, folder):
    objective, reuse, layers = cell
    if reuse != "small language model":
        return drafter_of(target, objective, reuse, layers=layers)
    torch.manual_seed(3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)
    config = AutoConfig.for_model("llama", **sizes, vocab_size=11, initializer_range=0.2, max_position_embeddings=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    config = DrafterConfig("ttt", "none", [], [], 4, False, False, 1, "target", 4, target.architecture, {}, lm=lm_config(folder))
    return new_drafter(config).to(target.dtype).start(target, target.frozen_head)


@pytest.fixture
def shown(monkeypatch):
    """What drafters may read, round by round: (of the engine, of the plain loop)."""
    found = [], []

    def watched(usual, seen):
        def watch(self, at):
            memory, position = usual(self, at)
            seen.append((memory, torch.as_tensor(position).clone()))  # the engine raises its own in place
            return memory, position

        return watch

    monkeypatch.setattr(BudgetedMemory, "taken", watched(BudgetedMemory.taken, found[0]))
    monkeypatch.setattr(SparseCache, "visible", watched(SparseCache.visible, found[1]))
    return found


def in_order(key_KGD, value_KGD):
    """Keys and values of each head, sorted by what they are: they may stand in any order."""
    weight_D = torch.linspace(1, 2, key_KGD.shape[2], dtype=key_KGD.dtype)
    order_KGD = (key_KGD @ weight_D).argsort(dim=0)[..., None].expand_as(key_KGD)
    return key_KGD.gather(0, order_KGD), value_KGD.gather(0, order_KGD)


def check_shown(b, mine, theirs):
    """The keys and values of one round of request b, and where its anchor sits for them."""
    memory, position_B = mine
    plain, position = theirs
    assert position_B[b] == position
    for kinds, expected in zip(memory.layers, plain.layers, strict=True):
        for branch, part in kinds.items():
            count = int(memory.places[branch].count_B[b])
            before = plain.places[branch].position < position
            pairs = zip(in_order(*(t[b, :count] for t in part)), in_order(*(t[before] for t in expected[branch])))
            for found, wanted in pairs:
                torch.testing.assert_close(found, wanted)


def check_cell(target, drafter, view, shown, **options):
    prompts = ragged()
    drafting = StaticTrained(drafter, target.frozen_head, view=view)
    engine = engine_of(target, drafting, drafter.config.draft_length, new=NEW, prefill_chunk=8)
    found = engine.generate(prompts, NEW, [0] * 4, Stops())
    hidden = 0
    for b, (prompt, one) in enumerate(zip(prompts, found)):
        shown[1].clear()
        alone = decode(target, Trained(drafter, target.frozen_head, REFERENCE, view), prompt, NEW, 0.0, 0)
        assert one.tokens == alone.tokens and triples(one) == triples(alone)
        for r, theirs in enumerate(shown[1]):
            check_shown(b, shown[0][r], theirs)
            hidden += alone.rounds[r].anchor > view.budget + 1
    kept, drafted = (sum(getattr(r, name) for g in found for r in g.rounds) for name in ("kept", "drafted"))
    assert 0 < kept < drafted and hidden > 5  # else one side of verification was not tested, or no view
    return found


def view_of(kind, positions, refresh):
    return View(**KINDS[kind], positions=positions, refresh=refresh)


def name_of(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.mark.parametrize("cell,kind,positions,refresh", QUICK, ids=name_of)
def test_a_batch_is_shown_and_drafts_what_each_request_would_alone(target, tmp_path, shown, cell, kind, positions, refresh):
    """Ragged prompts, of which some end in an earlier chunk of the prefill than others, and some are shorter than the budget."""
    check_cell(target, drafter_of_cell(target, cell, tmp_path), view_of(kind, positions, refresh), shown)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(REUSES)), ids=lambda number: name_of(REUSES[number]))
def test_every_view_shows_a_batch_what_each_request_would_see_alone(target, tmp_path, shown, number):
    """Every kind of reuse under every second kind of view, and of these under each way to number and to refresh in turn."""
    drafter = drafter_of_cell(target, REUSES[number], tmp_path)
    for turn, kind in list(enumerate(KINDS, number))[number % 2 :: 2]:
        shown[0].clear()
        check_cell(target, drafter, view_of(kind, *WAYS[turn % len(WAYS)]), shown)


class WithTheEngineSNumbers(OneByOne):
    """Drafters side by side, whose tokens are drawn by the numbers that the engine's are drawn by."""

    def propose(self, text_BL, anchor_B, length, sampling, u_BJ):
        numbers = iter(u_BJ.flatten())
        self.patch(eval.oracle.drafting, "sample", lambda q_V, _: int(drawn(q_V[None], next(numbers)[None])))
        return super().propose(text_BL, anchor_B, length, sampling, u_BJ)


@pytest.mark.parametrize(
    "reuse,kind,refresh", [("hidden", "mean", 5), pytest.param("kv", "snapkv", "verify", marks=pytest.mark.slow)]
)
def test_drafts_are_drawn_alike_above_temperature_zero(target, monkeypatch, reuse, kind, refresh):
    drafter = drafter_of(target, "ttt", reuse, layers=2)
    view = view_of(kind, "absolute", refresh)
    plain = WithTheEngineSNumbers(4, lambda b: Trained(drafter, target.frozen_head, REFERENCE, view))
    plain.patch = monkeypatch.setattr
    found, expected, full = (
        engine_of(target, drafting, 4, new=NEW, sampling=Sampling(1.0)).generate(ragged(), NEW, [1, 2, 3, 4], Stops())
        for drafting in (StaticTrained(drafter, target.frozen_head, view=view), plain, StaticTrained(drafter, target.frozen_head))
    )
    assert [g.tokens for g in found] == [g.tokens for g in expected] != [g.tokens for g in full]
    assert list(map(triples, found)) == list(map(triples, expected))


def test_controls_are_shown_their_memory_under_a_view(target, shown):
    """Another request's states, and none."""
    drafter = drafter_of(target, "ttt", "hybrid")
    view = view_of("mean", "absolute", "verify")
    other = OtherMemory(4, 100)
    prompts = ragged()
    for b in range(4):
        other.fill(b, target.forward(torch.tensor([prompts[b - 1]])).map(lambda t: t[0]))
    for change in (other, zero_memory):
        shown[0].clear()
        drafting = StaticTrained(drafter, target.frozen_head, change, view=view)
        found = engine_of(target, drafting, 4, new=NEW, prefill_chunk=8).generate(prompts, NEW, [0] * 4, Stops())
        for b in (1, 2):
            shown[1].clear()
            mine = other.of(b) if change is other else change
            alone = decode(target, Trained(drafter, target.frozen_head, REFERENCE, view, mine), prompts[b], NEW, 0.0, 0)
            assert found[b].tokens == alone.tokens and triples(found[b]) == triples(alone)
            for r, theirs in enumerate(shown[1]):
                check_shown(b, shown[0][r], theirs)


def test_a_budget_as_large_as_the_cache_reads_the_memory_where_it_is(target, shown):
    drafter = drafter_of(target, "ttt", "kv")
    drafting = StaticTrained(drafter, target.frozen_head, view=View(kind="topk_chunk", budget=500, recent=4, chunk=4))
    one = engine_of(target, drafting, 4, new=8).generate(ragged(), 8, [0] * 4, Stops())[0]
    assert not shown[0] and one.kv_bytes["peak"] == 0


def test_adaptive_lengths_under_a_view_change_no_token(target):
    drafting = StaticTrained(drafter_of(target, "ttt", "kv", 2), target.frozen_head, view=view_of("mean", "absolute", 5))
    found = engine_of(target, drafting, Adaptive(4), new=NEW).generate(ragged(), NEW, [0] * 4, Stops())
    assert [g.tokens for g in found] == [generated(target, p, NEW) for p in ragged()]
    assert {r.drafted for g in found for r in g.rounds} == {1, 2, 3, 4}


@pytest.mark.parametrize("kind,refresh,selections", [("mean", "verify", 1), ("mean", "never", 0), ("sink_recent", "verify", 0)])
def test_rounds_in_which_nobody_is_due_choose_nothing(target, monkeypatch, kind, refresh, selections):
    """A batch chooses in every round, once behind its prompts, or never; and so does the next one."""
    calls = []
    select = BudgetedMemory.select
    monkeypatch.setattr(BudgetedMemory, "select", lambda *a: calls.append(1) or select(*a))
    drafting = StaticTrained(drafter_of(target, "ttt", "kv"), target.frozen_head, view=view_of(kind, "absolute", refresh))
    engine = engine_of(target, drafting, 4, new=NEW)
    one, other = (engine.generate(ragged(), NEW, [0] * 4, Stops()) for _ in range(2))
    assert list(map(triples, one)) == list(map(triples, other))
    rounds = max(len(g.rounds) for g in one)
    assert len(calls) == 2 * (selections * rounds + (refresh == "never"))


def test_kv_bytes_are_those_of_the_tensors(target, shown):
    """Of a drafter with K/V of its own: the whole memory, its summaries, and a part of as many places as the budget has."""
    drafter = drafter_of(target, "ttt", "kv+projected_rope", layers=2)
    drafting = StaticTrained(drafter, target.frozen_head, view=view_of("minmax", "absolute", "verify"))
    engine = engine_of(target, drafting, 4, new=NEW)
    found = engine.generate(ragged(), NEW, [0] * 4, Stops())[0].kv_bytes
    position = 2 * 2 * 2 * 8 * 8  # layers, K and V, heads, numbers, bytes
    parts = [part for kinds in shown[0][-1][0].layers for part in kinds.values()]
    assert found["read"] == sum(t[0].nbytes for part in parts for t in part) == 13 * position
    room = engine._rounds.cache.room + 1
    summaries = 2 * 2 * (room // 2) * 2 * 8 * 4  # layers, least and greatest, chunks, heads, numbers, bytes
    longest = int(engine._rounds.length_B.max())
    assert found["kept"] == longest * position + summaries and found["peak"] == (room + 13) * position + summaries
    assert found["searched"] == summaries + longest * position // 2  # known tokens pass the first layer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("turn,kind", enumerate(KINDS))
@pytest.mark.parametrize("cell", [("ttt", "kv", 2), ("ttt", "hidden", 2), ("blockwise", "hybrid", 1)], ids=name_of)
def test_graphs_on_a_gpu_give_the_rounds_of_plain_calls(cell, turn, kind):
    target = small_target(dtype=torch.float64).widened(torch.float64, "cuda")
    target.capture(HIDDEN_LAYERS, (1, 2))
    drafter = drafter_of(target, cell[0], cell[1], layers=cell[2]).cuda()
    view = view_of(kind, *WAYS[turn % len(WAYS)])
    runs = []
    for graphs in (True, False):
        drafting = StaticTrained(drafter, target.frozen_head, view=view)
        engine = engine_of(target, drafting, drafter.config.draft_length, new=NEW, prefill_chunk=8, graphs=graphs)
        runs.append([engine.generate(ragged(), NEW, [0] * 4, Stops()) for _ in range(2)])
    rounds = [[list(map(triples, found)) for found in run] for run in runs]
    assert rounds[0] == rounds[1] and runs[0][0][0].tokens == runs[1][0][0].tokens
    prompt = ragged()[2]
    alone = decode(target, Trained(drafter, target.frozen_head, REFERENCE, view), prompt, NEW, 0.0, 0)
    assert rounds[0][0][2] == triples(alone)
