"""An export format is one row of a table (docs/extend/format.md)."""

import json
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import write_text
from eval.recipe import EvalRecipe
from tests.support.models import drafter_of, small_target
from train.drafter.formats.export import FORMATS, Format, check_export, save_export
from train.drafter.formats.served import exported_weights


def save_toy(drafter, target, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    weights = exported_weights(drafter, target, "toy")
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps({"slots": drafter.config.slots}))
    return ["toys are slow"]


def unfit_for_toy(config):
    return {"a toy drafts four tokens at most": config.draft_length > 4}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(FORMATS, "toy", Format(kinds=("dflash",), save=save_toy, unfit=unfit_for_toy))


def test_a_format_of_the_table_is_exported(toy, tmp_path):
    target = small_target()
    drafter = drafter_of(target, "blockwise", "hidden")
    assert save_export(drafter, target, tmp_path / "toy", "toy") == ["toys are slow"]
    assert json.loads((tmp_path / "toy/config.json").read_text()) == {"slots": drafter.config.slots}
    written = load_file(tmp_path / "toy/model.safetensors")
    assert torch.equal(written["norm.weight"], drafter.norm.weight)


def test_refusals_come_from_the_table(toy, tmp_path):
    target = small_target()
    with pytest.raises(UserError, match="format=toy: it is for dflash, and this is eagle3: format=eagle3 or format=speculators$"):
        check_export(drafter_of(target, "ttt", "hidden").config, "toy")
    with pytest.raises(UserError, match="format=toy: reuse=kv reads K/V"):
        check_export(drafter_of(target, "blockwise", "kv").config, "toy")
    with pytest.raises(UserError, match="format=toy: a toy drafts four tokens at most"):
        check_export(drafter_of(target, "blockwise", "hidden", slots=7).config, "toy")
    # Others name the new format where it would do.
    with pytest.raises(UserError, match="this is dflash: format=dflash or format=speculators or format=toy$"):
        check_export(drafter_of(target, "blockwise", "hidden").config, "eagle3")


def test_the_choices_of_the_command_are_the_table_s():
    assert get_args(EvalRecipe.model_fields["format"].annotation) == tuple(FORMATS)
