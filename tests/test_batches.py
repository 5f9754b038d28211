"""Packs: the same function of (seed, pass, document) at any rank and world size, and the same loss packed or apart."""

import numpy as np
import pytest
import torch

from data_prep.cache.reader import CacheReader
from data_prep.capture import capture, make_manifest
from data_prep.errors import UserError
from data_prep.recipe import DataPrepRecipe
from data_prep.target import load_target
from data_prep.tokens import tokenized
from tests.models import drafter_of, small_target
from tests.test_alignment import cached
from train import acceptance
from train.attention import EXECUTORS
from train.batches import PackStream, make_pack, sample_anchors, split
from train.objectives import Objective, Outcome

CELLS = [(o, r) for o in ("ttt", "blockwise") for r in ("hidden", "kv", "hybrid")]


def objective_of(target, drafter, chunk=16):
    weight = 0.8 ** torch.arange(drafter.config.draft_length)
    return Objective(drafter, target.frozen_head, "kl", weight, EXECUTORS["reference"], chunk)


def texts(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 11, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize("kind,reuse", CELLS)
def test_packing_two_documents_is_running_them_apart(kind, reuse):
    """Loss and gradient of a pack are the sums over its documents."""
    target = small_target(dtype=torch.float64)
    drafter = drafter_of(target, kind, reuse, layers=2)
    objective = objective_of(target, drafter)
    documents = [cached(target, t) for t in texts(19, 26)]
    anchors = [np.array([1, 7, 16]), np.array([2, 3, 20, 24])]

    def gradient(packs):
        drafter.zero_grad()
        loss = sum(objective(pack).loss_sum for pack in packs)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in drafter.parameters()])

    together = gradient([make_pack(["a", "b"], documents, anchors)])
    apart = gradient([make_pack([n], [d], [a]) for n, d, a in zip("ab", documents, anchors)])
    torch.testing.assert_close(together[0], apart[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-6, atol=1e-8)
    other = gradient([make_pack(["a", "b"], documents, [anchors[0], anchors[1][:2]])])
    assert (other[1] - apart[1]).abs().max() > 1e-3  # the control: one anchor more or less is seen


@pytest.mark.parametrize("kind,reuse", CELLS)
def test_cached_loss_is_live_loss(kind, reuse, tmp_path):
    """The embedded target: one batch read from a float32 cache, and the same batch with the target run live."""
    recipe = DataPrepRecipe.model_validate(
        {
            "mode": "capture",
            "target": {"path": "data_prep/targets/tiny", "device": "cpu", "mask_token_id": 2},
            "data": {"source": "jsonl", "max_length": 64},
            "capture": {"batch_tokens": 256},
            "cache": {
                "dir": str(tmp_path / "c"),
                "codec": "fp32",
                "kinds": ["hidden", "kv"],
                "layers": "auto",
                "shard_bytes": 1 << 18,
            },
        }
    )
    from data_prep.cache.writer import CacheWriter
    from data_prep.sources import Document
    from data_prep.target import load_tokenizer
    from train.drafter.config import DrafterConfig
    from train.drafter.model import Drafter

    target = load_target(recipe.target)
    source = [
        Document(f"d{i}", text) for i, text in enumerate(["import os\nimport sys\n" * 9, "def f(x):\n    return x + 1\n" * 5])
    ]
    pieces, _ = tokenized(source, load_tokenizer(target.path), recipe.data.max_length)
    manifest = make_manifest(recipe, target, pieces)
    capture(target, pieces, CacheWriter(recipe.cache.dir, manifest, recipe.cache.shard_bytes), recipe.capture.batch_tokens)
    reader = CacheReader(recipe.cache.dir)
    config = DrafterConfig(
        kind,
        reuse,
        [0, 5],
        [] if reuse == "kv" else manifest.hidden_layers,
        4,
        False,
        False,
        0,
        "target",
        2,
        target.architecture,
        {},
    )
    drafter = Drafter(config).start(target, target.frozen_head)
    objective = objective_of(target, drafter)
    indices = list(range(len(reader)))
    stored = PackStream(reader, indices, config.tensors, 4096, 16, seed=0).read(indices)

    live = []
    for index in indices:
        ids = reader.read(index, ["input_ids", "loss_mask"])
        target.capture(config.hidden_layers, config.kv_layers)
        states = target.forward(ids["input_ids"][None].long()).map(lambda t: t[0])
        live.append(
            {
                **ids,
                "last_hidden": states.last_hidden[:-1],
                **{f"hidden.{i}": t for i, t in states.hidden.items()},
                **{f"key.{i}": t for i, t in states.key.items()},
                **{f"value.{i}": t for i, t in states.value.items()},
            }
        )
    anchors = [sample_anchors(reader.ids[i], live[i]["loss_mask"].numpy().astype(bool), 16, 0, 0) for i in indices]
    ran = make_pack([reader.ids[i] for i in indices], live, anchors)
    with torch.no_grad():
        one, other = objective(stored), objective(ran)
    assert one.valid.sum() > 90
    torch.testing.assert_close(one.loss_sum, other.loss_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=1e-5)


def test_a_slot_counts_iff_it_and_all_before_it_are_supervised_in_the_document():
    target = small_target()
    first, second = (cached(target, t) for t in texts(8, 6))
    first["loss_mask"] = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.uint8)
    keep = first["loss_mask"][1:].bool()
    first["last_hidden"] = first["last_hidden"][keep]
    pack = make_pack(["a", "b"], [first, second], [np.array([1, 5]), np.array([4])])
    assert pack.valid(3).int().tolist() == [
        [1, 1, 0],  # x_2, x_3 supervised, x_4 not
        [1, 1, 0],  # x_6, x_7, then the next document
        [1, 0, 0],
    ]  # x_5 is the last of all
    # Teachers: the row of last_hidden at the position before the token.
    full = cached(target, first["input_ids"].tolist())["last_hidden"]
    for position in (0, 1, 2, 4, 5, 6):
        torch.testing.assert_close(pack.last_hidden_RE[pack.teacher_P[position]], full[position])


def test_anchor_zero_never_counts():
    target = small_target()
    pack = make_pack(["a"], [cached(target, texts(8)[0])], [np.array([], dtype=np.int64)])
    assert pack.anchor_N.tolist() == [0] and not pack.valid(3).any()
    outcome = objective_of(target, drafter_of(target, "ttt", "hybrid"))(pack)
    outcome.loss_sum.backward()
    assert outcome.loss_sum.item() == 0


def test_anchors_are_a_function_of_seed_pass_and_document():
    mask = np.ones(200, dtype=bool)
    mask[0] = mask[50:60] = False
    draw = lambda *key: sample_anchors(key[0], mask, 20, key[1], key[2]).tolist()
    assert draw("a", 0, 0) == draw("a", 0, 0)
    assert len({tuple(draw(*key)) for key in [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0)]}) == 4
    drawn = draw("a", 0, 0)
    assert drawn == sorted(set(drawn)) and len(drawn) == 20
    assert all(mask[a] and mask[a + 1] for a in drawn)
    assert sample_anchors("a", mask, None, 0, 0).tolist() == [a for a in range(199) if mask[a] and mask[a + 1]]


def test_stream_is_the_same_from_any_position(cache):
    reader = CacheReader(cache)
    training, validation = split(reader, 8)
    assert not {reader.ids[i].rsplit("#")[0] for i in training} & {reader.ids[i].rsplit("#")[0] for i in validation}
    names = ["input_ids", "loss_mask", "last_hidden"]
    stream = lambda: PackStream(reader, training, names, 256, 4, seed=3)
    forward = stream()
    packs = [forward[i] for i in range(60)]  # more than one pass
    fresh = stream()
    for number in (59, 0, 31, 7):
        assert fresh[number].names == packs[number].names
        assert torch.equal(fresh[number].anchor_N, packs[number].anchor_N)
    one_pass = forward.passes(0)
    assert sorted(i for pack in one_pass for i in pack) == sorted(training)
    assert all(sum(reader.lengths[i] for i in pack) <= 256 for pack in one_pass)
    assert forward.passes(0) != forward.passes(1)


def test_a_cache_of_one_document_is_refused():
    class OneDocument:
        ids, folder = ["a#0", "a#1"], "c"

    with pytest.raises(UserError, match="1 source document"):
        split(OneDocument, 4)


def test_acceptance_counts_by_hand():
    """Two anchors; the second has one slot that counts. Overlaps .5 .4 and .8: slot 1 .65 of both; slot 2 is judged on
    the first anchor alone, .2 of .5."""
    valid = torch.tensor([[True, True], [True, False]])
    outcome = Outcome(
        torch.tensor(0.0),
        torch.zeros(2, 2),
        torch.tensor([[0.5, 0.4], [0.8, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        valid,
    )
    found = acceptance.summarise(acceptance.counts(outcome))
    assert found["sampled"].joint == pytest.approx([0.65, 0.26]) and found["sampled"].tau == pytest.approx(1.91)
    assert found["sampled"].conditional == pytest.approx([0.65, 0.4])
    assert found["greedy"].joint == pytest.approx([0.5, 0.0]) and found["greedy"].conditional == [0.5, 0.0]
