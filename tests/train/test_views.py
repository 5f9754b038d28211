"""Views: selection against a brute-force reference, both backends against attention by hand, budgets, and how they are drawn.

Shapes: N anchors, V views of each, M = V x N groups, P memory positions, G key/value heads, C chunks of a document, D head size.
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.definitions import softmax_by_hand
from train.attention.choose import BACKENDS
from train.attention.visibility import Anchors, DraftRows, Places, Visibility
from train.drafter.layers import KV, Rope
from train.drafter.memory import Memory
from train.views import scores
from train.views.gather import gather
from train.views.layout import check, layout
from train.views.plan import plan
from train.views.recipe import FULL, View

INV_FREQ = torch.tensor([1.0, 0.3, 0.1, 0.02])
KINDS = {
    "sink_recent": {"sink": 3},
    "mean": {"kind": "topk_chunk", "sink": 4, "recent": 5, "chunk": 4, "scorer": "mean"},
    "lastkey": {"kind": "topk_chunk", "sink": 4, "recent": 0, "chunk": 4, "scorer": "lastkey"},
    "minmax": {"kind": "topk_chunk", "sink": 0, "recent": 3, "chunk": 3, "scorer": "minmax"},
    "quest": {"kind": "topk_chunk", "sink": 2, "recent": 2, "chunk": 2, "scorer": "quest"},
    "h2o": {"sink": 1},
    "snapkv": {"recent": 4, "pool": 3},
}


def view_of(name: str, **more) -> View:
    return View(**{"kind": name, **KINDS[name], **more})


def rotate(key_PGD, moved_PG):
    return Rope(moved_PG, INV_FREQ, 1.0, torch.float32)(key_PGD)


class Scene:
    """Packed documents of random keys for two layers and two branches (the second one's keys sit one position further on, as
    pairs do), random queries of every token, and anchors with selections before them."""

    def __init__(self, seed: int, lengths=(37, 21), heads=4, kv_heads=2, size=8):
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.heads, self.kv_heads = lengths, heads, kv_heads
        draw = lambda *shape: torch.randn(*shape, generator=g)
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        position = torch.cat([torch.arange(n) for n in lengths])
        places = {"kv": Places(document, position), "hidden": Places(document, position + 1)}
        total = len(document)
        layer = lambda: {n: KV(draw(total, kv_heads, size), draw(total, kv_heads, size)) for n in places}
        self.memory = Memory([layer(), layer()], places)
        self.query = [{n: draw(total, heads, size) for n in places} for _ in range(2)]  # of the token at each place of the pack
        self.first = [sum(lengths[:d]) for d in range(len(lengths))]
        positions = [torch.randint(1, n, (5,), generator=g).sort().values for n in lengths]
        document_N = torch.arange(len(lengths)).repeat_interleave(5)
        position_N = torch.cat(positions)
        self.anchors = Anchors(torch.tensor(self.first)[document_N] + position_N, document_N, position_N)
        self.age_N = torch.minimum(torch.randint(0, 9, position_N.shape, generator=g), position_N - 1)
        self.draft = [
            {n: KV(draw(3 * len(position_N), kv_heads, size), draw(3 * len(position_N), kv_heads, size)) for n in places}
        ]
        self.rows_query = draw(3 * len(position_N), heads, size)

    def observe(self, window):
        if window is None:
            return self.query, self.memory.places["kv"]
        back = torch.arange(1 - window, 1)
        chosen = self.anchors.index - self.age_N
        index = (chosen[:, None] + back).flatten().clamp(min=0)
        document = self.anchors.document.repeat_interleave(window)
        position = ((self.anchors.position - self.age_N)[:, None] + back).flatten()
        return [{n: q[index] for n, q in layer.items()} for layer in self.query], Places(document, position)

    def plan(self, view, budget_VN):
        return plan(view, self.memory, self.anchors, self.age_N, budget_VN, self.observe)

    def keys(self, layer, branch, document):
        first, length = self.first[document], self.lengths[document]
        return self.memory.layers[layer][branch].key[first : first + length]

    def check(self, found: set[int], view, layer, branch, n, budget, head) -> None:
        """Whether these are the keys of its document (by index) that KV head `head` of anchor n is shown: from the definitions,
        one number at a time. Chunks whose scores tie may stand for each other."""
        document, anchor, age = int(self.anchors.document[n]), int(self.anchors.position[n]), int(self.age_N[n])
        first = int(self.memory.places[branch].position[0])
        count = anchor - first
        since = anchor - age - first
        if count <= budget:
            assert found == set(range(count))
            return
        room = budget - view.sink
        recent = {"sink_recent": room, "h2o": room // 2}.get(view.kind, view.recent)
        tail = max((since - recent) // view.chunk * view.chunk, count - room)
        chunks = (room - (count - tail)) // view.chunk
        shown = set(range(view.sink)) | set(range(tail, count))
        able = [c for c in range(1000) if c * view.chunk >= view.sink and (c + 1) * view.chunk <= tail]
        chosen = sorted({key // view.chunk for key in found - shown})
        assert found == shown | {c * view.chunk + i for c in chosen for i in range(view.chunk)}
        assert len(chosen) == chunks and set(chosen) <= set(able)
        if chunks:
            score = self.scores(view, layer, branch, document, since, first, head)
            best = sorted((score(c) for c in able), reverse=True)[:chunks]
            assert sorted((score(c) for c in chosen), reverse=True) == pytest.approx(best, abs=1e-5)

    def scores(self, view, layer, branch, document, since, first, head):
        keys = self.keys(layer, branch, document)[:, head]
        share = self.heads // self.kv_heads
        mine = range(head * share, (head + 1) * share)
        query = lambda position, h: self.query[layer][branch][self.first[document] + position, h]
        if view.kind == "topk_chunk":

            def score(c):
                chunk = keys[c * view.chunk : (c + 1) * view.chunk]
                found = []
                low, high = chunk.min(0).values, chunk.max(0).values
                if view.scorer == "lastkey":
                    return float(keys[since - 1] @ chunk.mean(0))
                for h in mine:
                    q = query(since + first, h)
                    found.append(
                        {
                            "mean": lambda q: q @ chunk.mean(0),
                            "minmax": lambda q: max(q @ low, q @ high),
                            "quest": lambda q: sum(max(q[d] * low[d], q[d] * high[d]) for d in range(len(q))),
                        }[view.scorer](q)
                    )
                return float(sum(found)) / share

            return score

        def attention(position):  # over the keys that a token at `position` could read
            count = position - first
            if count < 1:
                return torch.zeros(len(keys))
            seen = torch.zeros(len(keys))
            for h in mine:
                seen[:count] += (keys[:count] @ query(position, h) / keys.shape[1] ** 0.5).softmax(0) / share
            return seen

        if view.kind == "h2o":
            total = sum(attention(t) for t in range(since + first + 1))
            return lambda c: float(total[c])
        votes = sum(attention(t) for t in range(since + first + 1 - view.recent, since + first + 1))
        votes[since - view.recent :] = 0
        half = view.pool // 2
        return lambda c: float(votes[max(0, c - half) : c + half + 1].sum()) / view.pool


scene = st.builds(
    Scene,
    st.integers(0, 10_000),
    st.sampled_from([(37, 21), (50,), (9, 40, 14)]),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
)


@settings(max_examples=100, deadline=None)
@given(scene, st.sampled_from(list(KINDS)), st.data())
def test_the_plan_equals_a_selection_by_brute_force(scene, name, data):
    view = view_of(name)
    budgets = [data.draw(st.integers(view.least, 30)), data.draw(st.integers(view.least, 60)), FULL]
    count = len(scene.anchors.index)
    with patch.object(scores, "SCORES", data.draw(st.sampled_from([1, 1000, scores.SCORES]))):  # in small tiles, or all at once
        plan = scene.plan(view, torch.tensor(budgets)[:, None].expand(-1, count))
    for layer in range(2):
        for branch, places in scene.memory.places.items():
            everyone = scene.anchors.repeated(3)
            group = torch.arange(3 * count)
            rows = DraftRows(everyone.document, everyone.position, group, torch.ones_like(group), everyone.position)
            dense = Visibility(rows, places, rows, True, plan[layer][branch]).dense
            for v, budget in enumerate(budgets):
                for n in range(count):
                    for head in range(scene.kv_heads):
                        seen = dense[head, v * count + n, : len(places.position)].nonzero().squeeze(1)
                        first = scene.first[int(scene.anchors.document[n])]
                        found = {int(i) - first for i in seen}
                        scene.check(found, view, layer, branch, n, budget, head)
                        assert len(found) <= budget
                        # The recent window and the trailing partial chunk are always there.
                        last = int(scene.anchors.position[n]) - int(places.position[0])
                        at_least = min(last, max((view.recent or 0) + int(scene.age_N[n]), last % view.chunk))
                        if budget - view.sink >= at_least:
                            assert set(range(last - at_least, last)) <= found


@settings(max_examples=100, deadline=None)
@given(scene, st.sampled_from(list(KINDS)), st.sampled_from(["absolute", "in_cache"]), st.data())
def test_masking_and_gathering_both_equal_attention_over_the_selection(scene, name, positions, data):
    """Rows of every anchor under several budgets, two a group: masked in place, and over keys that were taken out; by hand, keys
    one by one. In the cache, each visible key stands behind the one before it, and the anchor behind the last."""
    view = view_of(name, positions=positions)
    budgets = [data.draw(st.integers(view.least, 40)), data.draw(st.integers(view.least, 60))]
    count = len(scene.anchors.index)
    groups = 2 * len(scene.anchors.index)
    plan = scene.plan(view, torch.tensor(budgets)[:, None].expand(-1, count))
    everyone = scene.anchors.repeated(2)
    taken, moved = gather(scene.memory, plan, everyone, lambda i, n, *key: rotate(*key) if positions == "in_cache" else key[0])
    group = torch.arange(groups).repeat_interleave(2)
    slot = torch.arange(1, 3).repeat(groups)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 * groups, h, 8, generator=g) for h in (scene.heads, scene.kv_heads, scene.kv_heads))
    for layer in range(2):
        for branch, places in scene.memory.places.items():
            key, value = scene.memory.layers[layer][branch]
            expected = torch.zeros(2 * groups, scene.heads, 8, dtype=torch.float64)
            in_place = DraftRows(everyone.document[group], everyone.position[group], group, slot, slot)
            apart = DraftRows(moved.document[group], moved.position[group], group, slot, slot)
            shown = Visibility(in_place, places, in_place, True, plan[layer][branch])
            own = shown.dense[0, :, len(places.position) :]
            for m in range(groups):
                for head in range(scene.kv_heads):
                    seen = shown.dense[head, 2 * m, : len(places.position)].nonzero().squeeze(1)
                    keys, values = key[seen, head], value[seen, head]
                    if positions == "in_cache":
                        slots = int(moved.position[m]) - len(seen) + torch.arange(len(seen))
                        keys = rotate(keys[:, None], (slots - places.position[seen])[:, None])[:, 0]
                    for row in (2 * m, 2 * m + 1):
                        mine = own[row].nonzero().squeeze(1)
                        some = torch.cat([keys, k[mine, head]]), torch.cat([values, v[mine, head]])
                        share = scene.heads // scene.kv_heads
                        rows = slice(head * share, (head + 1) * share)
                        whole = torch.ones(1, len(some[0]), dtype=torch.bool)
                        expected[row, rows] = softmax_by_hand(q[row : row + 1, rows], some[0][:, None], some[1][:, None], whole)[
                            0
                        ]
            out = taken.layers[layer][branch]
            keys = KV(torch.cat([out.key, k]), torch.cat([out.value, v]))
            found = BACKENDS["reference"](q, *keys, Visibility(apart, taken.places[branch], apart, True))
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
            if positions == "absolute":
                found = BACKENDS["reference"](q, torch.cat([key, k]), torch.cat([value, v]), shown)
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_layout_beyond_its_budget_is_noticed():
    count = torch.tensor([40, 5])
    view = view_of("mean")
    parts = layout(view, 20, count, count)
    check(parts, torch.tensor(20), count)
    for more in (parts._replace(picked=parts.picked + view.chunk), parts._replace(tail=parts.tail - 1)):
        with pytest.raises(AssertionError, match="a view shows more than its budget"):
            check(more, torch.tensor(20), count)


# The masked backend on tiles


def case(seed, lengths, per_document, views_of, steps=2, heads=4, kv_heads=2):
    """(queries' rows, memory's places, draft rows, what each view shows) of packed documents, several steps of ttt."""
    scene = Scene(seed, lengths, heads, kv_heads)
    g = torch.Generator().manual_seed(seed)
    positions = [torch.randperm(n - 1, generator=g)[:per_document].sort().values + 1 for n in lengths]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor([len(p) for p in positions]))
    position = torch.cat(positions)
    scene.anchors = Anchors(torch.tensor(scene.first)[document] + position, document, position)
    scene.age_N = torch.zeros_like(position)
    view, budgets = views_of
    shown = scene.plan(view, torch.tensor(budgets)[:, None].expand(-1, len(position)))[0]["kv"] if view else None
    everyone = scene.anchors.repeated(len(budgets))
    group = torch.arange(len(everyone.index))
    row = lambda j: DraftRows(everyone.document, everyone.position, group, group * 0 + j, everyone.position + j - 1)
    rows = [row(j) for j in range(1, steps + 1)]
    return rows[-1], scene.memory.places["kv"], sum(rows[1:], rows[0]), shown


CASES = {
    "no view": ((300, 131, 40), 60, (None, [FULL])),
    "chunks": ((300, 131, 40), 60, (view_of("mean"), [24, FULL, 60])),
    "a long document": ((900,), 400, (None, [FULL])),
    "a long document, chunks": ((900,), 400, (view_of("quest"), [30, FULL])),
    "tokens": ((300, 200), 50, (view_of("h2o"), [20, FULL])),
    "sinks": ((2000,), 600, (view_of("sink_recent"), [40])),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_hold_everything_visible_and_nothing_else_is_called_whole(name, causal):
    queries, memory, drafts, shown = case(1, *CASES[name])
    visibility = Visibility(queries, memory, drafts, causal, shown)
    dense = visibility.dense if shown is not None else visibility.dense[None]
    some, every = visibility._tiles()
    pad = [-dense.shape[2] % 128, -dense.shape[1] % 128]
    tiles = lambda fill: (
        torch.nn.functional.pad(dense, (0, pad[0], 0, pad[1]), value=fill).unfold(1, 128, 128).unfold(2, 128, 128)
    )
    visible = tiles(False).flatten(3).any(3).any(0)
    whole = tiles(True).flatten(3).all(3).all(0)
    assert some.shape == visible.shape and not (visible & ~some).any()
    assert not (every & ~whole).any()
    assert every.any() == name.startswith("a long")  # some tiles need no mask
    if name == "sinks":
        assert (~some).float().mean() > 0.2  # and some are left out
    rule = visibility._rule(2)
    h, q, k = torch.meshgrid(*(torch.arange(n) for n in (4, *dense.shape[1:])), indexing="ij")
    assert torch.equal(rule(0, h, q, k), dense.repeat_interleave(4 // len(dense), 0))


def test_flex_equals_the_reference_under_a_view():
    queries, memory, drafts, shown = case(2, *CASES["chunks"])
    g = torch.Generator().manual_seed(0)
    keys = len(memory.position) + len(drafts.group)
    q, k, v = (torch.randn(n, h, 16, generator=g) for n, h in ((len(queries.group), 4), (keys, 2), (keys, 2)))
    visibility = Visibility(queries, memory, drafts, True, shown)
    expected = BACKENDS["reference"](q, k, v, visibility)
    with torch.no_grad():
        torch.testing.assert_close(BACKENDS["flex"](q, k, v, visibility), expected, rtol=1e-4, atol=1e-5)
    blind = BACKENDS["reference"](q, k, v, Visibility(queries, memory, drafts, True))
    assert (blind - expected).abs().max() > 1e-2  # the view is noticed when dropped


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on a GPU only")
@pytest.mark.parametrize("name", CASES)
def test_flex_backward_equals_the_reference_under_a_view_on_a_gpu(name):
    move = lambda value: type(value)(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in vars(value).values()))
    queries, memory, drafts, shown = (one and move(one) for one in case(3, *CASES[name]))
    g = torch.Generator().manual_seed(0)
    keys = len(memory.position) + len(drafts.group)
    q, k, v = (torch.randn(n, h, 64, generator=g).cuda() for n, h in ((len(queries.group), 4), (keys, 2), (keys, 2)))
    visibility = Visibility(queries, memory, drafts, True, shown)
    upstream = torch.randn(q.shape, generator=g).cuda()
    found = []
    for backend in ("reference", "flex"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = BACKENDS[backend](*leaves, visibility)
        found.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)  # flex multiplies in tf32 on a GPU


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes())
        return out


def test_a_plan_of_many_documents_grows_with_them_and_not_with_their_square():
    """Anchors choose among their own document's chunks; scores exist in tiles."""
    sizes = {}
    for count in (16, 32):
        with Largest() as largest, patch.object(scores, "SCORES", 1 << 14):
            queries, memory, drafts, shown = case(0, (64,) * count, 8, (view_of("h2o"), [20, FULL]))
            Visibility(queries, memory, drafts, True, shown).block_mask(2)
        sizes[count] = largest.numel
        assert shown.chosen_MGC.shape == (2 * 8 * count, 2, 64)
    assert sizes[32] <= 2.2 * sizes[16], sizes


@pytest.mark.parametrize("name", ["mean", "sink_recent"])
def test_no_mask_grows_with_rows_times_keys(name):
    """A plan and its mask of tiles, of a fixed number of anchors, and the mask of a pass over all positions: twice the context
    takes twice the memory, and far less than the dense mask."""
    sizes = {}
    for length in (4096, 8192):
        with Largest() as largest:
            queries, memory, drafts, shown = case(0, (length,), 64, (view_of(name), [256, FULL]))
            Visibility(queries, memory, drafts, True, shown).block_mask(2)
            own = DraftRows(memory.document, memory.position, torch.arange(length), torch.ones(length).long(), memory.position)
            Visibility(own, memory, own, True).block_mask(2)
        sizes[length] = largest.numel
    assert sizes[8192] <= 2.2 * sizes[4096] and sizes[8192] < 8192 * 16384 / 16, sizes
