"""A new objective is one class and its name in the registry: training, the oracle and the engine follow.

Shapes: N anchors, J slots, E hidden size.
"""

import ast
import dataclasses

import pytest
import torch

from eval.engine.drafting import StaticTrained
from eval.engine.request import Stops
from eval.oracle.decode import decode
from eval.oracle.drafting import Trained
from tests.support.alignment import measure
from tests.support.commands import ROOT
from tests.support.engines import REFERENCE, engine_of, exact_target, ragged, triples
from tests.support.models import drafter_of
from tests.support.packs import objective_of, packed
from train.drafter.build import load_drafter, new_drafter
from train.losses.recipe import LossRecipe
from train.schedules.blockwise import Blockwise, block_rows
from train.schedules.registry import OBJECTIVES

REFUSALS = ("train/rules.py",)  # may name objectives: they say which keys exclude one another


class TwoHalves(Blockwise):
    """A block that is filled in two passes: the second half reads the last token that the first half drafted."""

    def causal(self, config):
        return True

    def first_slot(self, config):
        return 0

    def draft(self, drafter, start, source):
        half = drafter.config.slots // 2
        rows = block_rows(start.document_N, start.anchor_N, drafter.config.slots)
        # The first pass draws one slot after another; the second knows the token at the middle.
        first_NJE = drafter.block(source.token(0)[:, None], rows, start.memory, source.attend, None, start.feature_NE)
        for slot in range(min(half, source.length)):
            source.drafted(first_NJE[:, slot])
        if source.length > half:
            behind_N = start.anchor_N + half
            rows = block_rows(start.document_N, behind_N, drafter.config.slots)
            # Memory reaches to the anchor, wherever the rows stand.
            rows = dataclasses.replace(rows, anchor=rows.anchor - half)
            second_NJE = drafter.block(source.token(half)[:, None], rows, start.memory, source.attend, None, start.feature_NE)
            for slot in range(source.length - half):
                source.drafted(second_NJE[:, slot])


@pytest.fixture
def halves(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "two_halves", TwoHalves())
    return "two_halves"


@pytest.mark.parametrize("reuse", ["hidden", "kv", "hybrid"])
def test_an_objective_registered_alone_trains_and_decodes_alike_everywhere(halves, reuse, tmp_path):
    target = exact_target()
    drafter = drafter_of(target, "blockwise", reuse)
    drafter = new_drafter(dataclasses.replace(drafter.config, objective=halves)).double().start(target, target.frozen_head)

    # A step of training changes it.
    outcome = objective_of(target, drafter, LossRecipe(kl=1))(packed(target))
    outcome.share.backward()
    moved = [p for p in drafter.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert outcome.valid.shape[1] == drafter.config.draft_length == 4 and len(moved) > 5
    torch.optim.SGD(moved, lr=1e-3).step()
    drafter.save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path).double()

    # The oracle and the engine draft the same tokens, and keep as many.
    prompts = ragged()
    expected = [decode(target, Trained(drafter, target.frozen_head, REFERENCE), p, 40, 0.0, 0) for p in prompts]
    engine = engine_of(target, StaticTrained(drafter, target.frozen_head), drafter.config.draft_length)
    found = engine.generate(prompts, 40, [0] * len(prompts), Stops())
    for one, other in zip(found, expected):
        assert one.tokens == other.tokens and triples(one) == triples(other)

    # Training's forward over the decoded text proposes what decoding proposed.
    found = measure(target, drafter)
    assert found.worst < 1e-9 and found.kept > 0 and found.refused > 0
    assert not (found.other_vocabulary or found.other_tokens or found.other_lengths)


def named(path) -> bool:
    """Whether a file compares something with an objective's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            if any(isinstance(part, ast.Constant) and part.value in ("ttt", "blockwise") for part in ast.walk(node)):
                return True
    return False


def test_no_file_asks_for_an_objective_by_name(tmp_path):
    rooms = ("common", "data_prep", "train", "eval")
    asking = {str(p.relative_to(ROOT)) for room in rooms for p in (ROOT / room).rglob("*.py") if named(p)}
    assert asking <= set(REFUSALS)
    asks = tmp_path / "asks.py"
    asks.write_text('def f(config):\n    return config.objective in ("ttt", "other")\n')
    assert named(asks)


def test_a_new_objective_touches_three_files_and_a_recipe():
    """Those that know an objective's own module or its name."""
    importing = [
        str(p.relative_to(ROOT))
        for room in ("common", "data_prep", "train", "eval")
        for p in (ROOT / room).rglob("*.py")
        if "schedules.ttt import" in p.read_text() or "schedules.blockwise import" in p.read_text()
    ]
    assert importing == ["train/schedules/registry.py"]  # beside the schedule itself and the refusals of the recipe
