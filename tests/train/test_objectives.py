"""What the engine trains, against a dense definition: every loss through the whole drafter, blocks that show more than their
anchor, and the supervision of keys and queries.

Shapes: N anchors, J steps or slots, P positions of a pack, R supervised positions, V vocabulary, D draft vocabulary, E hidden
size, T terms of a loss; alpha_VJ: V views; weight_NK: N outputs, K inputs.
"""

import numpy as np
import pytest
import torch

from tests.support.definitions import definition
from tests.support.models import drafter_of, from_layer_zero, small_target
from tests.support.packs import document, objective_of, packed
from train.attention.choose import BACKENDS
from train.data.pack import PackDocument, make_pack
from train.data.stream import sample_prefix
from train.losses import divergences, weights
from train.losses.recipe import LossRecipe
from train.objectives.align import Watch, target_queries
from train.objectives.objective import Objective, Supervision

REFERENCE = BACKENDS["reference"]


@pytest.fixture(scope="module")
def target():
    return small_target(dtype=torch.float64)


def by_definition(target, objective, pack, loss: LossRecipe, weight_J):
    """The loss of one pack from all logits at once."""
    valid = pack.valid(objective.slots)
    kept = objective.drafter.head.kept_D
    logits = objective.logits(pack)
    q = logits.softmax(-1) if kept is None else logits[..., kept].softmax(-1)
    index = (pack.anchor_N[:, None] + torch.arange(1, objective.slots + 1)).clamp(max=len(pack.ids_P) - 1)
    p = target.logits(pack.last_hidden_RE[pack.teacher_P[index - 1]]).softmax(-1)
    p = p if kept is None else p[..., kept]
    label = objective.drafter.head.labels(pack.ids_P[index], 11)
    said = torch.where(label < 0, 0.0, q.gather(-1, label.clamp(min=0)[..., None]).squeeze(-1))
    alpha = torch.minimum(p, q).sum(-1)
    lam = torch.exp(-loss.eta * objective.alpha_VJ[0]).expand(valid.shape)
    per_slot = sum(
        w * torch.stack([definition(name, *row) for row in zip(q, p, label, lam)]) for name, w in loss.per_slot.items()
    )
    if weight_J is None:
        weight = weights.dpace(said, valid)
        divisor = valid.sum()
    else:
        first = torch.zeros(len(valid), dtype=torch.long) if pack.prefix_N is None else pack.prefix_N - 1
        weight = torch.stack([torch.cat([torch.zeros(f), weight_J[: len(weight_J) - f]]) for f in first.tolist()]) * valid
        divisor = weight.sum()
    total = (per_slot * weight * valid).sum() / divisor
    if loss.expected_length:
        accepted = divergences.expected_accepted(alpha, valid).sum()
        total = total + loss.expected_length * (1 - accepted / valid.sum())
    return total


LOSSES = {
    "kl": LossRecipe(kl=1),
    "lk_lambda": LossRecipe(lk_lambda=1),
    "expected_length": LossRecipe(expected_length=1),
    "mixed": LossRecipe(ce=0.1, tv=1.8, lk_alpha=0.3, expected_length=0.7),
}


BLOCKS = [("blockwise", "hybrid"), ("blockwise_shifted+gru", "hidden+vocab")]
UNPREFIXED = [("ttt", "hidden+vocab"), ("blockwise_pairs", "hidden")]  # they show no tokens but the anchor's


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "cell,weighting",
    [
        *((cell, weighting) for cell in [*BLOCKS, *UNPREFIXED] for weighting in ("decay", "dpace")),
        *((cell, "prefix") for cell in BLOCKS),
    ],
)
def test_loss_and_gradient_equal_the_definition(target, cell, loss, weighting):
    """float64, every parameter of the drafter, its own head included, after the division by the step's sums of weights."""
    drafter = drafter_of(target, *cell)
    prefix = [np.array([1, 2, 3]), np.array([1, 3, 2, 1])] if weighting == "prefix" else None
    pack = packed(target, prefix)
    weight_J = None if weighting == "dpace" else 0.8 ** torch.arange(drafter.config.draft_length)
    objective = objective_of(target, drafter, LOSSES[loss], weight_J)
    objective.alpha_VJ = torch.linspace(0.1, 0.9, objective.slots, dtype=torch.float64)[None]
    expected = by_definition(target, objective, pack, LOSSES[loss], weight_J)
    outcome = objective(pack, objective.weight_sums(pack))
    torch.testing.assert_close(outcome.share, expected, rtol=1e-6, atol=1e-7)
    parameters = list(drafter.parameters())
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (expected, outcome.share)]
    for wanted, got in zip(*gradients):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)
    assert sum(g is not None and g.abs().max() > 1e-6 for g in gradients[0]) > 10


def test_a_block_reads_the_tokens_of_its_prefix_and_no_later_ones(target):
    """A block that shows two tokens reads x_{a+1}, and nothing of x_{a+2}, which its first supervised slot has to say."""
    drafter = drafter_of(target, "blockwise", "kv")
    objective = objective_of(target, drafter, LossRecipe(kl=1))
    prefix = [np.array([1, 2, 3]), np.array([2, 2, 2, 2])]
    pack = packed(target, prefix)
    assert pack.valid(3).int().tolist() == [
        [1, 1, 1],
        [0, 1, 1],
        [0, 0, 1],
        [0, 1, 1],
        [0, 1, 0],  # x_9 of the second document is not supervised
        [0, 1, 1],
        [0, 0, 0],  # only one token is left
    ]
    with torch.no_grad():
        before = objective.logits(pack)
        for offset, changes in ((1, True), (2, False)):
            other = packed(target, prefix)
            place = int(other.anchor_N[3]) + offset
            other.ids_P[place] = 3 + (other.ids_P[place] - 2) % 8
            after = objective.logits(other)
            assert ((after[3] - before[3]).abs().max() > 1e-3) == changes
    alone = objective.logits(packed(target))
    torch.testing.assert_close(alone[0], before[0])  # a block that shows its anchor alone is the ordinary one


def test_prefix_lengths_follow_a_truncated_geometric_distribution():
    draws = np.concatenate([sample_prefix(f"d{i}", 50, 7, 0.9, seed=0, pass_number=0) for i in range(400)])
    chance = 0.9 ** np.arange(7)
    found = np.bincount(draws, minlength=8)[1:] / len(draws)
    np.testing.assert_allclose(found, chance / chance.sum(), atol=0.01)
    assert (sample_prefix("a", 20, 7, 0.9, 0, 0) == sample_prefix("a", 20, 7, 0.9, 0, 0)).all()
    assert (sample_prefix("a", 20, 7, 0.9, 0, 0) != sample_prefix("a", 20, 7, 0.9, 0, 1)).any()


@pytest.mark.parametrize("term", ["kv_align", "query_align"])
def test_alignment_is_zero_for_the_target_s_own_layer(target, term):
    """Under ttt a row reads its token and sits at its position: as the target's first layer it makes the target's own keys,
    values and queries. Any shift by one would show; so does a fault put in on purpose."""
    drafter = from_layer_zero(target, "ttt")
    loss = LossRecipe(kl=1, **{term: 1.0})
    objective = objective_of(target, drafter, loss)
    pack = packed(target)
    number = {"kv_align": 2, "query_align": 3}[term]
    assert objective(pack).terms_T[number].item() == pytest.approx(0, abs=1e-9)
    shifted = packed(target)
    shifted.states = shifted.states.map(lambda t: t.roll(1, 0))
    shifted.query = {i: t.roll(1, 0) for i, t in shifted.query.items()}
    assert objective(shifted).terms_T[number].item() > 1e-2
    branch = drafter.layers[0].branches["kv"]
    (branch.v.weight if term == "kv_align" else branch.q_norm.weight).data.mul_(1.3)
    assert objective(pack).terms_T[number].item() > 1e-2


@pytest.mark.parametrize("cell", [("blockwise", "kv"), ("blockwise", "kv+projected_rope"), ("ttt", "hybrid+head_concat")])
def test_kv_alignment_equals_its_definition(target, cell):
    """Row by row and head by head, on the rows inside the document; the target's side gets no gradient."""
    drafter = drafter_of(target, *cell)
    objective = objective_of(target, drafter, LossRecipe(kl=1, kv_align=1))
    pack = packed(target)
    memory = objective.remember(pack)
    config = drafter.config
    with Watch(drafter) as watch:
        objective.draft(pack, memory)
    own = watch.own(0)
    expected = 0.0
    count = 0
    for n, anchor in enumerate(pack.anchor_N.tolist()):
        for s in range(config.slots):
            place = anchor + s
            if place >= len(pack.ids_P) or pack.places.document[place] != pack.places.document[anchor]:
                continue
            for mine, theirs in zip(own, memory.layers[0]["kv"]):
                for head in range(mine.shape[2]):
                    error = (mine[n, s, head] - theirs[place, head]).square().sum() / theirs[place, head].square().sum()
                    expected += error.item() / mine.shape[2] / 2
            count += 1
    outcome = objective(pack)
    assert outcome.terms_T[2].item() == pytest.approx(expected, rel=1e-5)
    assert objective.weight_sums(pack)[2].item() == count == 7 * config.slots - 2  # two rows lie past a document's end
    if config.source.startswith("projected"):  # one layer of a block: its own K/V are made before any memory is read
        only = objective_of(target, drafter, LossRecipe(kl=0, tv=1e-12, kv_align=1))
        drafter.zero_grad()
        only(pack).share.backward()
        k = drafter.target_kv[0].k.weight.grad
        own_k = drafter.layers[0].branches["kv"].k.weight.grad
        assert own_k.abs().max() > 1e-3 and k.abs().max() < 1e-6


def test_target_queries_reproduce_the_target_s_attention(target):
    """The target's query of a slot's teacher, over the target's own keys up to there, gives the target's own attention: the
    positions, the rows and the rotation of `query_align` and of the oracle are right."""
    drafter = drafter_of(target, "blockwise", "kv")
    pack = packed(target)
    valid = pack.valid(3)
    outputs = {}
    attention = target.layers[2].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.__setitem__("o", inputs[0][0]))
    found = target_queries(drafter, pack, valid, at_teacher=True)[0]
    memory = objective_of(target, drafter, LossRecipe(kl=1)).remember(pack)
    keys = memory.layers[0]["kv"]
    anchor, slot = valid.nonzero(as_tuple=True)
    for r, (n, j) in enumerate(zip(anchor.tolist(), slot.tolist())):
        place = int(pack.anchor_N[n]) + j
        seen = (pack.places.document == pack.places.document[place]) & (pack.places.position <= pack.places.position[place])
        ids = pack.ids_P[pack.places.document == pack.places.document[place]]
        target.forward(ids[None])
        expected = outputs["o"][pack.places.position[place]].view(4, 8)
        for head in range(4):
            scores = keys.key[seen, head // 2] @ found[r, head] / 8**0.5
            torch.testing.assert_close(scores.softmax(0) @ keys.value[seen, head // 2], expected[head], rtol=1e-6, atol=1e-6)
    handle.remove()


@pytest.mark.parametrize(
    "objective,reuse,further",
    [("blockwise", "kv", 1), ("blockwise_shifted", "kv", 0), ("ttt", "queries", 0), ("ttt", "queries+constant", None)],
)
def test_the_target_s_queries_are_turned_to_where_the_rows_sit(target, objective, reuse, further):
    """In a same-slot block that is one position behind the teacher; with constant positions it is one before the anchor."""
    drafter = drafter_of(target, objective, reuse)
    pack = packed(target)
    valid = pack.valid(3)
    slot_R = valid.nonzero()[:, 1]
    moved_R = -1 - slot_R if further is None else torch.full_like(slot_R, further)
    teacher, row = (target_queries(drafter, pack, valid, at_teacher)[0] for at_teacher in (True, False))
    expected = drafter.rotate(0, "kv", teacher, moved_R[:, None].expand(-1, teacher.shape[1]))
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_ttt_and_blocks_order_their_rows_by_anchor(target):
    """`Watch` hands rows out as [N, S] whatever order they came in."""
    for objective in ("ttt", "blockwise"):
        drafter = from_layer_zero(target, objective)
        pack = packed(target)
        with Watch(drafter) as watch:
            objective_of(target, drafter, LossRecipe(kl=1))(pack)
        own = watch.own(0)
        assert own.key.shape[:2] == (7, 4) and watch.queries(0).shape[:2] == (7, 4)
        for n, anchor in enumerate(pack.anchor_N.tolist()):  # the first row reads the anchor's token at the anchor's position
            torch.testing.assert_close(own.value[n, 0], pack.states.value[0][anchor])


def share_and_gradients(target, drafter, pack, loss=LossRecipe(kl=1)):  # noqa: B008
    objective = objective_of(target, drafter, loss)
    share = objective(pack, objective.weight_sums(pack)).share
    return [share, *torch.autograd.grad(share, list(drafter.parameters()), allow_unused=True)]


@pytest.mark.parametrize(
    "cell",
    [
        ("ttt", "hybrid"),
        ("blockwise", "hidden"),
        ("blockwise_pairs", "hidden"),
        ("ttt", "queries+constant"),
        pytest.param(("ttt", "hidden"), marks=pytest.mark.slow),
        pytest.param(("ttt", "queries"), marks=pytest.mark.slow),
    ],
)
def test_recomputing_and_compiling_change_nothing(target, cell, request):
    """float64, two packs of other sizes; compiled only among the slow tests, for compilers take half a minute."""
    slow = any(mark.name == "slow" for mark in request.node.iter_markers())
    plain, changed = (drafter_of(target, *cell, layers=2) for _ in range(2))
    changed.recompute = True
    if slow:
        changed.compile_parts()
    for pack in (packed(target), make_pack([PackDocument("a", document(target, 23, 4), np.array([3, 9]))])):
        for one, other in zip(*(share_and_gradients(target, drafter, pack) for drafter in (plain, changed))):
            torch.testing.assert_close(one, other)


def test_what_rows_share_is_made_once_and_changes_nothing(target):
    """float64. The tokens' half of ttt's products is made once for all steps, a block's undrafted slots are projected once in
    training, and an acceptance that nobody asks for is not counted: loss and gradients stay."""
    for cell in (("ttt", "hidden"), ("ttt", "hybrid"), ("blockwise", "hybrid"), ("blockwise_pairs", "hidden")):
        drafter = drafter_of(target, *cell, layers=2)
        supervision = Supervision(LossRecipe(kl=1), torch.ones(drafter.config.draft_length, dtype=torch.float64), chunk_rows=7)
        every = np.arange(1, 22)
        pack = make_pack([PackDocument("a", document(target, 23, 4), every), PackDocument("b", document(target, 23, 5), every)])
        found = []
        for shared in (False, True):
            trained = Objective(drafter.train(shared), target.frozen_head, REFERENCE, supervision)
            trained.shares_tokens = shared
            outcome = trained(pack, acceptance=not shared)
            assert (outcome.overlap is None) == (outcome.match is None) == shared
            found.append([outcome.share, *torch.autograd.grad(outcome.share, list(drafter.parameters()), allow_unused=True)])
        for one, other in zip(*found):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective,reuse", [("blockwise", "hybrid"), ("ttt", "queries")])
def test_fp8_products_stay_near_the_others(objective, reuse):
    """Loss and gradients of a whole drafter, MLPs and the frozen head in fp8: off by a little, in the same direction."""
    target = small_target(vocab=16)
    found = []
    for narrow in (False, True):
        drafter = drafter_of(target, objective, reuse).to(torch.bfloat16)
        supervision = Supervision(LossRecipe(kl=1), torch.ones(drafter.config.draft_length), chunk_rows=7)
        trained = Objective(drafter, target.frozen_head.to("cpu", torch.bfloat16), REFERENCE, supervision)
        if narrow:
            drafter.use_fp8()
        share = trained(packed(target)).share
        found.append((share.item(), torch.autograd.grad(share, drafter.layers[0].gate.weight)[0].double().flatten()))
    (loss, gradient), (loss_8, gradient_8) = found
    assert 0 < abs(loss_8 / loss - 1) < 0.05
    assert 0.95 < torch.cosine_similarity(gradient, gradient_8, dim=0) < 0.99999


@pytest.mark.parametrize("cell", [("ttt", "hidden"), ("blockwise", "hybrid"), ("blockwise_pairs", "hidden"), ("ttt", "queries")])
@pytest.mark.parametrize("start", [0, 11], ids=["whole", "cropped"])
def test_a_pack_without_anchors_teaches_nothing(target, cell, start):
    """Its one filler stands at the first token, which has nothing before it, also where the document was cropped."""
    drafter = drafter_of(target, *cell)
    none = np.zeros(0, dtype=np.int64)
    pack = make_pack([PackDocument("a", document(target, 17, 1), none, start)])
    assert not pack.valid(4).any() and not pack.row_index(4)[1].any()
    share, *gradients = share_and_gradients(target, drafter, pack)
    assert share.item() == 0 and not any(g.any() for g in gradients if g is not None)


def test_a_frozen_head_in_fp8_follows_the_draft_vocabulary():
    """A checkpoint is loaded after the engine was made, and brings its own."""
    target = small_target(vocab=32)
    drafter = drafter_of(target, "ttt", "hidden", draft_vocab=16).to(torch.bfloat16)
    head = target.frozen_head.to("cpu", torch.bfloat16)
    drafter.use_fp8()
    drafter.head.d2t.copy_(torch.arange(16))  # every second token
    heads = drafter.head.heads(head)
    wide = heads.narrow.weight_NK.float() * heads.narrow.scale
    assert (wide - head.head_VE[::2].float()).norm() / wide.norm() < 0.05
    assert drafter.eval().head.heads(head).narrow is None  # held-out evaluation is what decoding will be
