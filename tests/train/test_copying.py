"""Copy distances against a loop that looks at every earlier place, and acceptance apart for each bucket of them."""

import numpy as np
import pytest
import torch

from train.data.pack import PackDocument, make_pack
from train.measure import acceptance, copying
from train.objectives.objective import Outcome

SLOTS = 6


def pack_of(*documents: tuple[list[int], list[int]]):
    """Of (tokens, anchors) of each document: what copying reads of a pack."""
    tensors = [{"input_ids": torch.tensor(ids), "loss_mask": torch.ones(len(ids))} for ids, _ in documents]
    made = [one | {"last_hidden": torch.zeros(len(one["input_ids"]) - 1, 1)} for one in tensors]
    return make_pack([PackDocument(str(i), one, np.array(at)) for i, (one, (_, at)) in enumerate(zip(made, documents))])


def oracle(ids: list[int], anchor: int, slot: int) -> int:
    """From the anchor back to where the pair of the slot began last, in text up to the anchor; 0: nowhere."""
    for place in range(anchor - 1, -1, -1):
        if ids[place : place + 2] == ids[anchor + slot - 1 : anchor + slot + 1]:
            return anchor - place
    return 0


@pytest.mark.parametrize("vocabulary", [2, 8, 40])
def test_distances_equal_those_of_a_loop_over_all_earlier_places(vocabulary):
    rng = np.random.default_rng(vocabulary)
    texts = [rng.integers(vocabulary, size=length).tolist() for length in (200, 30, 90)]
    pack = pack_of(*((text, list(range(len(text) - 1))) for text in texts))
    found = copying.distances(pack, SLOTS)
    expected = [
        [oracle(text, anchor, slot) if anchor + slot < len(text) else -1 for slot in range(1, SLOTS + 1)]
        for text in texts
        for anchor in range(len(text) - 1)
    ]
    expected = torch.tensor(expected)
    there = expected >= 0
    assert torch.equal(found[there], expected[there])
    assert 0 < int((expected == 0).sum()) and int(expected.max()) > 10  # some are new, some far away


def test_distances_by_hand():
    """8 9 stands at the start and is wanted at an anchor. What is not verified yet, or is another document's, counts nothing."""
    pack = pack_of(([8, 9, 3, 4, 8, 9, 8, 9], [4]), ([4, 8, 9, 3], [1]))
    assert copying.distances(pack, 3)[0].tolist() == [4, 0, 4]
    assert copying.distances(pack, 2)[1].tolist() == [0, 0]
    again = pack_of(([5, 5, 5, 5], [1]))
    assert copying.distances(again, 2).tolist() == [[1, 1]]


def test_acceptance_is_counted_in_the_bucket_of_each_slot():
    """A pair once more after 63, 64, 255, 256 and 5000 tokens: at the edges of the buckets, whose counts add up to all."""
    gaps = (63, 64, 255, 256, 5000)
    texts = [[1, 2, *range(10, 8 + gap), 1, 2, 3] for gap in gaps]
    pack = pack_of(*((text, [gap]) for text, gap in zip(texts, gaps)))
    valid = torch.ones(len(gaps), 2, dtype=torch.bool)
    valid[0, 1] = False
    overlap = torch.rand(1, len(gaps), 2, generator=torch.Generator().manual_seed(0))
    outcome = Outcome(None, None, None, overlap, overlap > 0.5, valid)
    counted = copying.counts(outcome, pack)
    torch.testing.assert_close(counted.sum(0), acceptance.counts(outcome)[0])
    found = {bucket: kinds["sampled"] for bucket, kinds in copying.summarise(counted).items()}
    first = overlap[0, :, 0].tolist()
    assert found["1-63"]["conditional"] == pytest.approx([first[0], 0]) and found["1-63"]["rounds"] == [1, 0]
    assert found["64-255"]["conditional"][0] == pytest.approx((first[1] + first[2]) / 2)
    assert found["256-1023"]["rounds"] == [1, 0] and found["1024-4095"]["rounds"] == [0, 0]
    assert found["4096+"]["conditional"] == pytest.approx([first[4], 0])
    # Token 3 is new after 2, and its slot is reached with the chance that the one before was accepted.
    assert found["new"]["rounds"] == pytest.approx([0, sum(first[1:])])
    assert copying.summarise(counted)["new"]["greedy"]["rounds"][1] == int((outcome.match[0, 1:, 0]).sum())


def test_slots_are_grouped_by_the_rounds_that_reached_them():
    found = copying.grouped([0.9, 0.5, 0.2, 0.0, 0.4], [100.0, 30.0, 10.0, 0.0, 5.0])
    assert list(found) == ["1", "2-4", "5-8"]
    assert [*found.values()] == [pytest.approx(pair) for pair in ((0.9, 100), ((15 + 2) / 40, 40), (0.4, 5))]
