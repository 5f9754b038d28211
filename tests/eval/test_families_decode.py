"""Greedy decoding of every family that is declared decodable equals transformers' own `generate`, whoever decodes.

Texts are longer than the miniatures' windows of 8 positions.

Shapes: B requests, T rows of each, J drafted tokens, L places of a text.
"""

import pytest
import torch

from data_prep.decoding.attention import Reading, among_rows
from data_prep.decoding.cache import StaticCache
from data_prep.decoding.dialogues import Ask
from data_prep.decoding.generate import BatchGenerator
from data_prep.target import target as target_module
from data_prep.target import transformers_private as private
from data_prep.target.architecture import CachedLayer
from data_prep.target.families import FAMILIES, Family
from data_prep.target.target import Target
from eval.engine.drafting import Proposal, StaticNobody, StaticTrained
from eval.engine.request import Stops
from eval.engine.tree import TreeShape
from eval.oracle.decode import decode
from eval.oracle.drafting import Draft, Nobody, Trained
from tests.support.decoding import generated
from tests.support.engines import REFERENCE, engine_of, triples
from tests.support.families import MINIATURES, MULTIMODAL, miniature
from tests.support.models import drafter_of

NEW = 16
CACHED = Target.cached_layers.fget
UNKNOWN = Family(decode="nobody has tried it")
QUICK = ("mistral", "gemma3_text", "gemma4_text_shared", "gemma4_unified_text", "gpt_oss", "glm4", "granite")
DECODABLE = [
    name
    for name, fields in (MINIATURES | MULTIMODAL).items()
    if FAMILIES.get(fields.get("model_type", name), UNKNOWN).decode is None
]
# Where the embedding is the head, these miniatures say one token for ever.
UNTIED = {name: {"tie_word_embeddings": False} for name in MINIATURES if name.startswith("gemma")}
# Two layers of each kind have keys of their own, so that there is a wrong one to read.
DEEPER = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DECODABLE]
PROMPTS = [torch.randint(3, 26, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (13, 4, 19)]


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    made = {}

    def one(name: str) -> tuple[Target, list[list[int]]]:
        """A miniature, and what transformers makes of PROMPTS."""
        if name not in made:
            changed = UNTIED.get(name, {}) | (DEEPER if name == "gemma4_text_shared" else {})
            target = Target(str(miniature(name, tmp_path_factory.mktemp("targets"), **changed)))
            made[name] = target, [generated(target, prompt, NEW) for prompt in PROMPTS]
        return made[name]

    return one


def answers(target: Target) -> list[list[int]]:
    """The batch generator's, on two places for three requests."""
    found = {}

    def dialogue(number, prompt):
        found[number] = (yield Ask(prompt, NEW, 0.0, 1.0, seed=0)).tokens

    BatchGenerator(target, [], places=2).run(dialogue(*one) for one in enumerate(PROMPTS))
    return [found[number] for number in range(len(PROMPTS))]


class Foretold(StaticNobody):
    """Knows the texts, and drafts every third of their places wrongly."""

    def __init__(self, texts: list[list[int]]):
        longest = max(map(len, texts)) + 8
        self._known_BL = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        self._known_BL[:, ::3] = (self._known_BL[:, ::3] + 1) % 29

    def propose(self, text_BL, anchor_B, length, sampling, u_BJ):
        place_BJ = anchor_B[:, None] + 1 + torch.arange(length)
        return Proposal(self._known_BL.gather(1, place_BJ.clamp(max=self._known_BL.shape[1] - 1)))


class ForetoldAlone(Nobody):
    """The same, in the plain loop."""

    def __init__(self, text: list[int]):
        self._known = Foretold([text])._known_BL[0].tolist()

    def draft(self, tokens, temperature, generator):
        return Draft(self._known[len(tokens) : len(tokens) + 4])


def ttt_of(target: Target, layer: int):
    """A random drafter over the keys and values of a layer as they are."""
    return drafter_of(target, "ttt", "kv", start="random", target_layers=[layer], kv_shapes=[target.kv_shapes[layer]])


@pytest.mark.parametrize("name", CASES)
def test_all_that_decode_give_generate_s_tokens(targets, name):
    target, expected = targets(name)
    texts = [prompt + new for prompt, new in zip(PROMPTS, expected)]
    assert answers(target) == expected
    engine = engine_of(target, Foretold(texts), 4, batch=3, new=NEW, prefill_chunk=7)
    found = engine.generate(PROMPTS, NEW, [0, 0, 0], Stops())
    for prompt, text, new, one in zip(PROMPTS, texts, expected, found):
        assert one.tokens == new
        plain = decode(target, Nobody(), prompt, NEW, 0.0, 0)
        oracle = decode(target, ForetoldAlone(text), prompt, NEW, 0.0, 0)
        assert plain.tokens == new and oracle.tokens == new
        assert triples(oracle) == triples(one)
        assert 0 < sum(r.kept for r in one.rounds) < sum(r.drafted for r in one.rounds)


OTHERS = ("gemma3_text", "gemma4_text_k_eq_v", "gemma4_unified_text", "glm4")


@pytest.mark.parametrize(
    "name", ["gpt_oss", "gemma4_text_shared", *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_a_drafter_s_rounds_are_the_plain_loop_s_and_its_trees_change_no_token(targets, name):
    target, expected = targets(name)
    layer = 2 if 2 in target.kv_shapes else 1
    target.capture((), (layer,))
    drafter = ttt_of(target, layer)
    head = target.frozen_head
    chains = engine_of(target, StaticTrained(drafter, head), 4, batch=3, new=NEW).generate(PROMPTS, NEW, [0, 0, 0], Stops())
    trees = StaticTrained(drafter, head, tree=TreeShape(4, 8))
    trees = engine_of(target, trees, 24, batch=3, new=NEW).generate(PROMPTS, NEW, [0, 0, 0], Stops())
    for prompt, new, chain, tree in zip(PROMPTS, expected, chains, trees):
        oracle = decode(target, Trained(drafter, head, REFERENCE), prompt, NEW, 0.0, 0)
        assert chain.tokens == new and tree.tokens == new and oracle.tokens == new
        assert triples(chain) == triples(oracle)
        assert [r.drafted_tokens[0] for r in chain.rounds] == [r.drafted_tokens[0] for r in oracle.rounds]
    assert sum(r.kept for one in trees for r in one.rounds) > 0
    target.capture((), ())


# What a family's attention has beside another's.
FORGOTTEN = {"scale": "granite", "window": "mistral", "sinks_H": "gpt_oss"}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_without_what_is_special_other_tokens_come(targets, what, monkeypatch):
    """Negative controls of the above."""
    target, expected = targets(FORGOTTEN[what])
    monkeypatch.setattr(private, "Reading", lambda *fields: Reading(*fields)._replace(**{what: None}))
    assert answers(target) != expected
    engine = engine_of(target, StaticNobody(), 0, batch=3, new=NEW)
    assert [one.tokens for one in engine.generate(PROMPTS, NEW, [0, 0, 0], Stops())] != expected


@pytest.mark.parametrize("by", [-1, 1])
def test_a_window_that_is_off_by_one_brings_other_tokens(targets, by, monkeypatch):
    target, expected = targets("gemma4_text_shared")
    read = lambda scale, window, sinks_H: Reading(scale, window and window + by, sinks_H)
    monkeypatch.setattr(private, "Reading", read)
    assert answers(target) != expected
    engine = engine_of(target, StaticNobody(), 0, batch=3, new=NEW)
    assert [one.tokens for one in engine.generate(PROMPTS, NEW, [0, 0, 0], Stops())] != expected


def rows_alone(monkeypatch):
    """What a shared layer is given are the keys of the new rows: it would read these and nothing before them."""
    usual = StaticCache.attention

    def attention(self, *arguments):
        attend = usual(self, *arguments)
        return lambda layer, *rows: attend(layer, *rows) if self.owns(layer) else among_rows(*rows)

    monkeypatch.setattr(StaticCache, "attention", attention)


def another_owner(monkeypatch):
    """The first layer of its kind, in place of the last."""
    monkeypatch.setattr(target_module, "kv_owners", lambda config: [0, 1, 2, 3, 0, 1])


def nobodys(monkeypatch):
    """Places of its own, which nobody fills."""
    alone = property(lambda self: [one._replace(owner=n) for n, one in enumerate(CACHED(self))])
    monkeypatch.setattr(Target, "cached_layers", alone)
    usual = StaticCache.write
    monkeypatch.setattr(StaticCache, "write", lambda self, layer, *rows: layer < 4 and usual(self, layer, *rows))


@pytest.mark.parametrize("fault", [rows_alone, another_owner, nobodys])
def test_a_shared_layer_that_reads_other_keys_than_its_owner_s_is_noticed(targets, fault, monkeypatch):
    """Negative controls of Gemma 4."""
    target, expected = targets("gemma4_text_shared")
    assert [one.owner for one in target.cached_layers] == [0, 1, 2, 3, 2, 3]
    fault(monkeypatch)
    if fault is not nobodys:  # its prompts are written by other means
        assert answers(target) != expected
    engine = engine_of(target, StaticNobody(), 0, batch=3, new=NEW)
    assert [one.tokens for one in engine.generate(PROMPTS, NEW, [0, 0, 0], Stops())] != expected


def test_a_cache_has_one_tensor_a_layer_and_none_for_a_shared_one(targets):
    target, _ = targets("gemma4_text_shared")
    cache = StaticCache.of(target, 3, 10)
    assert [tuple(key.shape) for key in cache.key] == [(3, 10, 2, size) for size in (16, 32) * 3]
    for kind in (cache.key, cache.value):
        storages = [t.data_ptr() for t in kind]
        assert storages[4:] == storages[2:4] and len(set(storages)) == 4
    assert cache.nbytes == 2 * 2 * (16 + 32) * 2 * 3 * 10 * 4  # layers of each kind, K and V, numbers, heads, places, bytes
    # Rows move, requests move, a larger cache takes over: of every layer.
    for n, key in enumerate(cache.key[:4]):
        key.copy_(torch.arange(10)[:, None, None] + 100 * n)
    cache.first(2).keep(torch.tensor([4, 5]), torch.tensor([[0, 3], [1, 2]]))
    cache.move(torch.tensor([1]), torch.tensor([2]))
    larger = StaticCache.of(target, 3, 16)
    larger.take_over(cache)
    for n, key in zip((0, 1, 2, 3, 2, 3), larger.key):
        assert (key[:, :10, 1, 15] - 100 * n).tolist() == [
            [0, 1, 2, 3, 4, 7, 6, 7, 8, 9],
            [0, 1, 2, 3, 4, 6, 7, 7, 8, 9],
            [0, 1, 2, 3, 4, 6, 7, 7, 8, 9],
        ]


@pytest.mark.parametrize("name", ["llama_longrope", pytest.param("llama_dynamic", marks=pytest.mark.slow)])
def test_drafts_beyond_the_last_position_leave_the_rotary_embedding_as_it_is(targets, name):
    """Of one that depends on the length: the text ends at the last position, and drafts reach beyond it."""
    target, _ = targets(name)
    most = target.architecture.max_positions
    prompt = torch.randint(3, 26, (most - NEW,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = generated(target, prompt, NEW)
    engine = engine_of(target, Foretold([prompt + expected]), 5, batch=1, longest=most, new=NEW)
    assert engine.generate([prompt], NEW, [0], Stops())[0].tokens == expected


@pytest.mark.parametrize("sinks_H", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("window", [None, 3, 30])
def test_nodes_of_a_tree_read_what_their_paths_read_one_by_one(window, sinks_H):
    """Trees deeper than the window: each node gets what it gets as the end of a chain."""
    generator = torch.Generator().manual_seed(0)
    up_T = [0, 0, 1, 1, 2, 4, 5, 3, 6]  # depths 0 1 2 2 3 4 5 3 6
    paths = [[0]]
    for row, up in enumerate(up_T[1:], 1):
        paths.append([*paths[up], row])
    rows = len(up_T)
    q, k, v = (torch.randn(2, 12 + rows, heads, 8, generator=generator) for heads in (4, 2, 2))
    seen_BTT = torch.tensor([[other in path for other in range(rows)] for path in paths]).expand(2, -1, -1)
    reading = Reading(0.4, window, sinks_H)

    def filled() -> StaticCache:
        cache = StaticCache([CachedLayer(2, 8, 0)], 2, 40, torch.float32, "cpu")
        cache.attention(torch.zeros(2, dtype=torch.long), 12)(0, q[:, :12], k[:, :12], v[:, :12], reading)
        return cache

    base_B = torch.tensor([12, 9])  # the second request has fewer
    tree = [t[:, 12:] for t in (q, k, v)]
    out_BTHD = filled().attention(base_B, rows, seen_BTT)(0, *tree, reading)
    for row, path in enumerate(paths):
        alone = filled().attention(base_B, len(path))(0, *(t[:, path] for t in tree), reading)
        torch.testing.assert_close(out_BTHD[:, row], alone[:, -1], rtol=1e-5, atol=1e-5)


def test_keys_are_lent_to_drafters_where_they_lie_as_drafters_read_them(targets):
    assert StaticCache.of(targets("qwen3_moe")[0], 1, 8).lends
    assert not StaticCache.of(targets("glm4")[0], 1, 8).lends  # its neighbours turn together


def test_where_the_host_decides_something_no_graph_is_recorded(targets):
    """Of experts on a CPU, in float32; and of a rotary embedding that looks how long the text is."""
    graphs = {name: targets(name)[0].graphs for name in ("mistral", "gpt_oss", "qwen3_moe", "llama_longrope")}
    assert graphs == {"mistral": True, "gpt_oss": False, "qwen3_moe": False, "llama_longrope": False}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_of_experts_is_widened_to_float64(targets, name):
    """By which a report tells ties from errors. PyTorch's kernel for all experts at once has no float64."""
    target, _ = targets(name)
    wide = target.widened(torch.float64, "cpu")
    ids_BT = torch.tensor([PROMPTS[0]])
    exact_BTV, found_BTV = (one.logits(one.forward(ids_BT).last_hidden) for one in (wide, target))
    assert exact_BTV.dtype == torch.float64
    torch.testing.assert_close(found_BTV, exact_BTV.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["gemma3_text", "gemma4_text_shared", "gpt_oss", "qwen3_moe"])
def test_graphs_on_a_gpu_give_the_tokens_of_plain_calls(name, tmp_path):
    # Heads of 64: some builds of flash-attn have no smaller ones.
    target = Target(str(miniature(name, tmp_path, head_dim=64)), dtype=torch.bfloat16, device="cuda")
    counts_on_device = torch.cuda.get_device_capability()[0] in (9, 10)
    assert target.graphs == (name.startswith("gemma") or counts_on_device)
    found = [
        engine_of(target, StaticNobody(), 0, batch=3, new=NEW, graphs=graphs).generate(PROMPTS, NEW, [0, 0, 0], Stops())
        for graphs in (False, True)
    ]
    assert [one.tokens for one in found[0]] == [one.tokens for one in found[1]]
    target.compile()  # rounds otherwise
    compiled = engine_of(target, StaticNobody(), 0, batch=3, new=NEW).generate(PROMPTS, NEW, [0, 0, 0], Stops())
    assert [len(one.tokens) for one in compiled] == [NEW] * 3
