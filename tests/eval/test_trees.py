"""Trees of drafts hold the likeliest paths, and attention merged over parts is attention over the whole.

Shapes: B requests, W breadth, N nodes, T = N + 1 rows (the anchor's first), Q = B x T rows, R draft rows as keys, L places of a
text, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch

import eval.engine.rounds
import eval.engine.tree
from data_prep.decoding.attention import merge, over_cache, over_rows
from eval.caches.static import static_attention
from eval.engine.drafting import StaticTrained
from eval.engine.request import Stops
from eval.engine.tree import Growing, TreeShape
from eval.oracle.drafting import Trained
from tests.support.decoding import generated
from tests.support.engines import GREEDY, REFERENCE, engine_of, ragged
from tests.support.models import HIDDEN_LAYERS, drafter_of, small_target
from train.attention.visibility import DraftRows
from train.views.recipe import View


@pytest.fixture(scope="module")
def target():
    """In float64, where the order of sums changes no token."""
    target = small_target(dtype=torch.float64)
    target.capture(HIDDEN_LAYERS, (1, 2))
    return target


def candidates(chain, shape, count):
    """(the beams of each depth, {path: log-probability} of the best), EAGLE-2 in plain Python."""
    beams = [((), 0.0)]
    found = {}
    every = []
    for _ in range(shape.depth):
        every.append([path for path, _ in beams])
        here = {}
        for path, score in beams:
            logp = chain(path).tolist()
            for token in sorted(range(len(logp)), key=lambda v: -logp[v])[: shape.breadth]:
                here[(*path, token)] = score + logp[token]
        beams = sorted(here.items(), key=lambda item: -item[1])[: shape.breadth]
        found |= here
    return every, dict(sorted(found.items(), key=lambda item: -item[1])[:count])


def chain_of(target, drafter, view, prompt, token):
    """path -> the drafter's log-probabilities behind it [V], its tokens forced, through the plain loop's memory."""
    plain = Trained(drafter, target.frozen_head, REFERENCE, view)
    plain.observe(target.forward(torch.tensor([prompt])).map(lambda t: t[0]), [*prompt, token])
    memory, position = plain.cache.visible(len(prompt))
    anchor = torch.tensor([position])
    zero = torch.zeros_like(anchor)

    @torch.no_grad()
    def chain(path):
        feature = None if memory.feature is None else memory.feature[-1:]
        earlier = None
        past = None
        for j, known in enumerate([token, *path]):
            rows = DraftRows(zero, anchor, zero, zero + j + 1, drafter.config.row_position(anchor, j))
            output, feature, past = drafter.step(plain.embed([known]), feature, rows, earlier, memory, past, REFERENCE)
            earlier = rows if earlier is None else earlier + rows
        return plain.logits(output)[0].log_softmax(-1)

    return chain


def grown(target, drafter, prompts, shape, nodes, view=None):
    """(a tree behind each prompt, log-probabilities [B, W, V] of each depth, the tokens behind the prompts)."""
    drafting = StaticTrained(drafter, target.frozen_head, tree=shape, view=view)
    seen = []
    usual = drafting._log_probabilities
    drafting._log_probabilities = lambda output: seen.append(usual(output)) or seen[-1]
    engine = engine_of(target, drafting, nodes)
    first = [g.tokens[0] for g in engine.generate(prompts, 1, [0] * len(prompts), Stops())]
    rounds = engine._rounds
    with torch.no_grad():
        if drafting.due(rounds.length_B.tolist()):
            drafting.select(rounds.text_BL, rounds.length_B)
        tree = drafting.propose(rounds.text_BL, rounds.length_B, nodes, GREEDY, None).tree
    return tree, [t.unflatten(0, (4, -1)) for t in seen], first


TREES = [("none", 2, 0), ("hybrid", 1, 0), ("hidden", 2, 0), ("hidden+norms", 1, 0), ("kv+vocab", 1, 0), ("kv", 2, 3)]
TREES += [("queries+constant", 2, 0)]
MORE = [("queries", 2, 4), ("queries+constant", 2, 3), ("queries+head_concat", 1, 0)]


@pytest.mark.parametrize("reuse,layers,window", [*TREES, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE)])
def test_a_tree_holds_the_likeliest_paths(target, reuse, layers, window, monkeypatch):
    """Scores of every row, the chosen set, order and masks, against chains that are drafted one path at a time. `window`: of the
    K/V, where they have one."""
    shapes = {"kv_shapes": [replace(target.kv_shapes[layer], window=window) for layer in (1, 2)]} if window else {}
    drafter = drafter_of(target, "ttt", reuse, layers=layers, **shapes)
    check_trees(target, drafter, monkeypatch)


VIEWS = {
    "chunks": View(kind="topk_chunk", budget=10, sink=2, recent=2, chunk=2),
    "positions in cache": View(kind="snapkv", budget=7, recent=3, positions="in_cache"),
}


@pytest.mark.parametrize("reuse,view", zip(("kv", "hidden"), VIEWS))
def test_a_tree_under_a_view_holds_the_likeliest_paths(target, reuse, view, monkeypatch):
    check_trees(target, drafter_of(target, "ttt", reuse, layers=2), monkeypatch, VIEWS[view])


def check_trees(target, drafter, monkeypatch, view=None):
    prompts = ragged()
    shape = TreeShape(4, 3)
    nodes = 11
    tree, logps, first = grown(target, drafter, prompts, shape, nodes, view)
    chains = [chain_of(target, drafter, view, *known) for known in zip(prompts, first)]
    found = [candidates(chain, shape, nodes) for chain in chains]

    def error(logps):
        return max(
            (logp.exp() - chains[b](path).exp()).abs().max()
            for b, (beams, _) in enumerate(found)
            for paths, logp_BWV in zip(beams, logps)
            for path, logp in zip(paths, logp_BWV[b])
        )

    assert error(logps) < 1e-10
    for b, (_, best) in enumerate(found):
        paths = [()]
        row = tree.seen_BTT[b]
        for token, parent in zip(tree.token_BN[b].tolist(), tree.parent_BN[b].tolist()):
            assert parent < len(paths)  # it stands before
            paths.append((*paths[parent], token))
        assert set(paths[1:]) == set(best) and len(set(paths)) == nodes + 1
        assert tree.depth_BT[b].tolist() == [len(path) for path in paths]
        assert row.tolist() == [[path[: len(other)] == other for other in paths] for path in paths]
    beside = lambda seen_QR: seen_QR.unflatten(0, (4, -1)).roll(1, 1).flatten(0, 1)
    monkeypatch.setattr(eval.engine.tree, "static_attention", lambda seen_QR: static_attention(seen_QR=seen_QR | beside(seen_QR)))
    _, leaking, _ = grown(target, drafter, prompts, shape, nodes, view)
    if drafter.config.own_kv:
        assert error(leaking[:2]) > 1e-4  # the control: a row that sees its sibling scores differently
        return
    # Without keys no row sees another, whatever a mask says; another's stream is noticed.
    assert error(leaking) < 1e-10
    usual = Growing.drafted
    monkeypatch.setattr(Growing, "drafted", lambda *given: usual(*given).unflatten(0, (4, -1)).roll(1, 1).flatten(0, 1))
    assert error(grown(target, drafter, prompts, shape, nodes, view)[1][:3]) > 1e-4


def test_a_tree_of_breadth_one_is_the_chain_and_wider_ones_keep_more(target):
    drafter = drafter_of(target, "ttt", "hybrid", layers=2)
    prompts = ragged()
    kept = {}
    plain = [generated(target, p, 20) for p in prompts]
    for shape, nodes in ((None, 4), (TreeShape(4, 1), 4), (TreeShape(4, 3), 12)):
        engine = engine_of(target, StaticTrained(drafter, target.frozen_head, tree=shape), nodes)
        found = engine.generate(prompts, 20, [0] * 4, Stops())
        assert [g.tokens for g in found] == plain
        kept[shape] = [[r.kept for r in g.rounds] for g in found]
    assert kept[None] == kept[TreeShape(4, 1)]
    assert sum(map(len, kept[TreeShape(4, 3)])) < sum(map(len, kept[None]))  # fewer rounds


@pytest.mark.parametrize("growing", [False, True])
def test_merged_parts_are_softmax_attention_over_all_keys(growing):
    """Against PyTorch's own attention with a mask, for empty and for full caches."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    q = random(4, 3, 4, 8)
    k = random(4, 9, 2, 8)
    v = random(4, 9, 2, 8)
    own_k = random(12, 2, 8)
    own_v = random(12, 2, 8)
    count_B = torch.tensor([0, 9 - 2 * growing, 1, 4])
    row = torch.arange(12).view(4, 3)
    seen_BTR = (torch.arange(12) // 3 == row[..., None] // 3) & (torch.arange(12) <= row[..., None])
    part = over_cache(q, k, v, count_B, growing)
    merged = merge(part, over_rows(q, own_k, own_v, seen_BTR))
    count_BT = count_B[:, None] + growing * torch.arange(3)
    keys, values = (torch.cat([a, b.expand(4, -1, -1, -1)], dim=1).transpose(1, 2) for a, b in ((k, own_k), (v, own_v)))
    mask = torch.cat([torch.arange(9) < count_BT[..., None], seen_BTR], dim=-1)[:, None]
    dense = lambda m: torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, m, enable_gqa=True)
    torch.testing.assert_close(merged, dense(mask).transpose(1, 2), rtol=0, atol=1e-12)
    assert (merged - dense(mask.roll(1, -1)).transpose(1, 2)).abs().max() > 1e-3
    assert (part[0][0, 0] == 0).all() and (part[1][0, 0] == -torch.inf).all()
