"""Packs: the same function of (seed, pass, document) at any rank and world size, and the same loss packed or apart.

Shapes: P positions of a pack, N anchors, R supervised positions, E hidden size.
"""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from common import cli
from common.errors import UserError
from data_prep.cache.reader import CacheReader
from data_prep.capture.build import build
from data_prep.capture.live import LiveReader
from data_prep.target.loading import load_target
from tests.support.caches import document, manifest_of, write
from tests.support.models import drafter_of, small_target
from tests.support.packs import cached
from train.attention.choose import BACKENDS
from train.build import drafter_config
from train.data.loader import loaded
from train.data.pack import PackDocument, make_pack
from train.data.split import split
from train.data.stream import PackStream, StreamSettings, sample_anchors
from train.drafter.build import new_drafter
from train.losses.recipe import LossRecipe
from train.measure import acceptance
from train.objectives.objective import Objective, Outcome, Supervision
from train.recipe import TrainRecipe
from train.run.parts import DataParts, refuse_nothing_to_learn

ON_GPU = torch.cuda.is_available()
CELLS = [(o, r) for o in ("ttt", "blockwise") for r in ("hidden", "kv", "hybrid")]


def objective_of(target, drafter, chunk=16):
    weight = 0.8 ** torch.arange(drafter.config.draft_length)
    return Objective(drafter, target.frozen_head, BACKENDS["reference"], Supervision(LossRecipe(kl=1), weight, chunk))


def texts(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 11, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize("kind,reuse", [*CELLS, ("ttt", "queries+constant")])
def test_packing_two_documents_gives_the_loss_of_running_them_apart(kind, reuse):
    """Loss and gradient of a pack are the sums over its documents."""
    target = small_target(dtype=torch.float64)
    drafter = drafter_of(target, kind, reuse, layers=2)
    objective = objective_of(target, drafter)
    documents = [cached(target, t) for t in texts(19, 26)]
    anchors = [np.array([1, 7, 16]), np.array([2, 3, 20, 24])]

    def gradient(packs):
        drafter.zero_grad()
        loss = sum(objective(pack).share for pack in packs)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in drafter.parameters()])

    together = gradient([make_pack(list(map(PackDocument, "ab", documents, anchors)))])
    apart = gradient([make_pack([PackDocument(n, d, a)]) for n, d, a in zip("ab", documents, anchors)])
    torch.testing.assert_close(together[0], apart[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-6, atol=1e-8)
    other = gradient([make_pack(list(map(PackDocument, "ab", documents, [anchors[0], anchors[1][:2]])))])
    assert (other[1] - apart[1]).abs().max() > 1e-3  # the control: one anchor more or less is seen


@pytest.mark.parametrize(
    "kind,reuse,codec", [*((*cell, "fp32") for cell in CELLS), ("ttt", "hybrid", "fp8"), ("blockwise", "hybrid", "bf16")]
)
def test_the_loss_from_a_cache_equals_the_loss_from_the_live_target(kind, reuse, codec, tmp_path):
    """The embedded target: one pack read from a cache, read from the target run live through the same codec, and (float32)
    made of the target's own forward over each document."""
    texts = ["import os\nimport sys\n" * 9, "def f(x):\n    return x + 1\n" * 5]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    words = [f"cache={codec}", "data=jsonl", "data.max_length=32", "capture.batch_tokens=256", "capture.workers=1"]
    words += [
        "target.device=cpu",
        f"data.path={tmp_path / 'texts.jsonl'}",
        f"cache.dir={tmp_path / 'c'}",
        f"objective={kind}",
        f"reuse={reuse}",
    ]
    recipe = cli.compose("train", TrainRecipe, words)
    build(recipe, lambda: None)
    cache = CacheReader(recipe.cache.dir)
    live = LiveReader(recipe)
    assert live.manifest == cache.manifest and live.ids == cache.ids and len(cache) > 3
    assert all(torch.equal(a, b) for i in range(len(cache)) for a, b in zip(cache.text(i), live.text(i)))
    config = drafter_config(recipe, cache.manifest)
    target = load_target(recipe.target)
    drafter = new_drafter(config).start(target, target.frozen_head)
    objective = objective_of(target, drafter)
    indices = np.arange(len(cache))
    settings = StreamSettings(4096, 16, seed=0)
    packs = [PackStream(r, indices, config.tensors, settings).read(indices).to(torch.device("cpu")) for r in (cache, live)]
    if codec == "fp32":
        target.capture(config.hidden_layers, config.kv_layers)
        documents = [cached(target, cache.read(i, ["input_ids"])["input_ids"].tolist(), capture=False) for i in indices]
        masks = [cache.read(i, ["loss_mask"])["loss_mask"].numpy().astype(bool) for i in indices]
        anchors = [sample_anchors(cache.id(i), mask, 16, 0, 0) for i, mask in zip(indices, masks)]
        packs.append(make_pack(list(map(PackDocument, [cache.id(i) for i in indices], documents, anchors))))
    with torch.no_grad():
        one, *others = [objective(pack) for pack in packs]
    assert one.valid.sum() > 80
    for other in others:
        torch.testing.assert_close(one.share, other.share, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=1e-5)


def test_a_slot_counts_iff_it_and_all_before_it_are_supervised_in_the_document():
    target = small_target()
    first, second = (cached(target, t) for t in texts(8, 6))
    first["loss_mask"] = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.uint8)
    keep = first["loss_mask"][1:].bool()
    first["last_hidden"] = first["last_hidden"][keep]
    pack = make_pack([PackDocument("a", first, np.array([1, 5])), PackDocument("b", second, np.array([4]))])
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
    pack = make_pack([PackDocument("a", cached(target, texts(8)[0]), np.array([], dtype=np.int64))])
    assert pack.anchor_N.tolist() == [0] and not pack.valid(3).any()
    outcome = objective_of(target, drafter_of(target, "ttt", "hybrid"))(pack)
    outcome.share.backward()
    assert outcome.share.item() == 0


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


def test_the_stream_of_packs_is_the_same_from_any_resume_position(cache):
    reader = CacheReader(cache)
    training, validation = split(reader, 8)
    assert not {reader.id(i).rsplit("#")[0] for i in training} & {reader.id(i).rsplit("#")[0] for i in validation}
    names = ["input_ids", "loss_mask", "last_hidden"]
    stream = lambda: PackStream(reader, training, names, StreamSettings(256, 4, seed=3))
    forward = stream()
    packs = [forward[i] for i in range(60)]  # more than one pass
    fresh = stream()
    for number in (59, 0, 31, 7):
        assert fresh[number].names == packs[number].names
        assert torch.equal(fresh[number].anchor_N, packs[number].anchor_N)
    one_pass = forward.passes(0)
    assert sorted(i for pack in one_pass for i in pack) == sorted(training)
    assert all(sum(reader.lengths[i] for i in pack) <= 256 for pack in one_pass)
    assert [pack.tolist() for pack in forward.passes(0)] != [pack.tolist() for pack in forward.passes(1)]


def test_joined_documents_are_judged_by_records_that_nobody_trains_on():
    """A hundred books of five pieces each, cut wherever they fall: no book has tokens on both sides."""
    from data_prep.sources.tokens import Part, joined

    books = [Part(f"b{i}", [i] * 95, [1] * 95) for i in range(100)]
    pieces = {f"{part.id}#0": part.ids for part in joined(books, 20, None)}

    class Joined:
        folder = "c"
        ids = pa.array(sorted(pieces))
        id = staticmethod(lambda index: sorted(pieces)[index])

    sides = [{book for index in side for book in pieces[Joined.id(index)]} for side in split(Joined, 1000)]
    assert len(sides[1]) >= 2 and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 100
    # Too few books for two sides: all pieces of one book still stay together.
    few = {f"{name}#0" for name in ("a", "a@20", "a@40", "b@15", "b@35")}

    class Few(Joined):
        ids = pa.array(sorted(few))
        id = staticmethod(lambda index: sorted(few)[index])

    names = [{sorted(few)[i][0] for i in side} for side in split(Few, 1000)]
    assert not names[0] & names[1]


def test_a_cache_of_one_document_is_refused():
    class OneDocument:
        ids = pa.array(["a#0", "a#1"])
        folder = "c"

    with pytest.raises(UserError, match="1 source document"):
        split(OneDocument, 4)


@pytest.mark.parametrize(
    "mask,pack_tokens,counts",
    [([0, 1], 9, False), ([0, 1, 0, 1], 9, False), ([0, 1, 1], 9, True), ([0, 1, 1, 1], 3, True), ([0, *[1] * 9], 2, False)],
)
def test_a_side_of_which_nothing_counts_is_refused(tmp_path, mask, pack_tokens, counts):
    """Two supervised tokens in a row, behind another of the same crop; what packs then hold says the same."""
    manifest = manifest_of()
    write(tmp_path / "c", manifest, {"a": document(manifest, [0, 1, 1]), "b": document(manifest, mask)}, 10**6)
    settings = StreamSettings(pack_tokens, anchors=4, seed=3)
    reader, names = CacheReader(tmp_path / "c"), ["input_ids", "loss_mask", *manifest.states]
    sound = PackStream(reader, [0], names, replace(settings, pack_tokens=9))
    asked = PackStream(reader, [1], names, settings)
    assert counts == bool(asked[0].valid(4).any())
    recipe = cli.compose("train", TrainRecipe, [f"cache.dir={tmp_path / 'c'}"])
    for training, validation, side in ((asked, sound, "training"), (sound, asked, "validation")):
        with nullcontext() if counts else pytest.raises(UserError, match=f"none of the 1 {side} documents of .* has two"):
            refuse_nothing_to_learn(DataParts(training, validation, [0]), recipe)


def test_acceptance_counts_by_hand():
    """Two anchors; the second has one slot that counts. Overlaps .5 .4 and .8: slot 1 .65 of both; slot 2 is judged on
    the first anchor alone, .2 of .5."""
    valid = torch.tensor([[True, True], [True, False]])
    outcome = Outcome(
        torch.tensor(0.0),
        torch.zeros(4),
        torch.zeros(2, 2, 2),
        torch.tensor([[[0.5, 0.4], [0.8, 0.0]], [[1.0, 0.5], [0.0, 0.0]]]),
        torch.tensor([[[1.0, 0.0], [0.0, 0.0]]] * 2),
        valid,
    )
    found, sparse = map(acceptance.summarise, acceptance.counts(outcome))
    assert sparse["sampled"].joint == pytest.approx([0.5, 0.25]) and sparse["greedy"] == found["greedy"]
    assert found["sampled"].joint == pytest.approx([0.65, 0.26]) and found["sampled"].tau == pytest.approx(1.91)
    assert found["sampled"].conditional == pytest.approx([0.65, 0.4])
    assert found["greedy"].joint == pytest.approx([0.5, 0.0]) and found["greedy"].conditional == [0.5, 0.0]


def same_pack(one, other):
    assert one.names == other.names
    for name in ("ids_P", "mask_P", "last_hidden_RE", "teacher_P", "anchor_N"):
        assert torch.equal(getattr(one, name).cpu(), getattr(other, name).cpu()), name
    assert all(torch.equal(getattr(one.places, n).cpu(), getattr(other.places, n).cpu()) for n in ("document", "position"))
    for kind in ("hidden", "key", "value"):
        mine, theirs = getattr(one.states, kind), getattr(other.states, kind)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k].cpu(), theirs[k].cpu()) for k in mine)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not ON_GPU, reason="no GPU"))])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_changes_nothing(cache, device, workers):
    """Threads, pinned memory and a stream of its own give the packs that asking one by one gives, across passes, and the
    tensors of a pack survive the reading of the next ones."""
    reader = CacheReader(cache)
    names = ["input_ids", "loss_mask", "last_hidden", "hidden.0", "key.5", "value.5"]
    stream = PackStream(reader, np.arange(len(reader)), names, StreamSettings(512, 4, seed=3))
    numbers = range(1, 2 * len(stream.passes(0)), 2)  # as one rank of two
    kept = list(loaded(stream, numbers, torch.device(device), workers))
    assert len(kept) == len(numbers)
    for number, pack in zip(numbers, kept):
        assert pack.ids_P.device.type == device
        same_pack(pack, stream[number])


def test_an_error_in_the_reading_thread_is_raised_in_training(cache):
    stream = PackStream(CacheReader(cache), np.arange(4), ["input_ids", "no such tensor"], StreamSettings(512, 4, seed=3))
    with pytest.raises(KeyError):
        list(loaded(stream, range(3), torch.device("cpu"), 2))


def test_long_documents_are_cropped_elsewhere_in_every_pass(cache):
    """A pack never exceeds its budget; positions and teachers stay those of the whole document."""
    reader = CacheReader(cache)
    names = ["input_ids", "loss_mask", "last_hidden"]
    long = np.flatnonzero(reader.lengths > 100)
    stream = PackStream(reader, long, names, StreamSettings(40, None, seed=0))
    starts = set()
    for number in range(2 * len(long)):
        pack = stream[number]
        assert len(pack.ids_P) == 40 and len(pack.names) == 1
        whole = reader.read(reader.ids.to_pylist().index(pack.names[0]), names)
        position = pack.places.position
        assert torch.equal(pack.ids_P, whole["input_ids"][position].long()) and position.diff().eq(1).all()
        assert not pack.mask_P[0] and pack.anchor_N.min() >= 1
        supervised = position[pack.mask_P]  # every token but a document's first is: token i's teacher is row i - 1
        rows = pack.last_hidden_RE[pack.teacher_P[pack.mask_P.nonzero().squeeze(1) - 1]]
        assert torch.equal(rows, whole["last_hidden"][supervised - 1])
        starts.add((pack.names[0], int(position[0])))
    assert len(starts) > len(long) + 5 and len({start for _, start in starts}) > 10
