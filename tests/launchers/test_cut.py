"""Language models that are cut out of a target: what they say, that they draft, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data_prep.target.from_gguf import plain
from data_prep.target.loading import load_tokenizer
from data_prep.target.target import Target
from tests.support.commands import ROOT, command
from tests.support.gguf_files import TINY, small_model, write_gguf
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.drafter.standalone import check_vocabulary, lm_config

sys.path.insert(0, str(ROOT / "launchers"))
from cut import cut  # noqa: E402

IDS = torch.arange(3, 90)[None]


@pytest.fixture(scope="module", params=["folder", "gguf"])
def target(request, tmp_path_factory):
    """The embedded target, a folder with a tied head, and a GGUF file of three layers with a head of its own."""
    if request.param == "folder":
        return str(TINY)
    model = small_model("llama", tied=False, num_hidden_layers=3)
    return str(write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", model))


def logits(path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(IDS).logits


def test_a_cut_of_all_layers_is_the_target_and_one_of_two_is_these_two(target, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(plain(target), dtype=torch.float32).eval()
    layers = model.model.layers
    last = len(layers) - 1
    assert cut(target, tmp_path / "all", None, count=last + 1) == list(range(last + 1))
    assert torch.equal(logits(tmp_path / "all"), logits(plain(target)))
    cut(target, tmp_path / "two", [0, last])
    model.model.layers = nn.ModuleList([layers[0], layers[last]])
    model.config.num_hidden_layers = 2
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    assert torch.equal(logits(tmp_path / "two"), expected)
    assert cut(target, tmp_path / "spread", None, count=2) == [0, last]


def test_a_cut_drafts_with_the_targets_tokens(target, tmp_path):
    out = str(tmp_path / "two")
    cut(target, Path(out), [1, 2])
    whole = Target(target)
    check_vocabulary(out, load_tokenizer(target), whole.architecture.vocab_size)
    config = DrafterConfig("ttt", "none", [], [], 4, False, False, 1, "target", 4, whole.architecture, {}, lm=lm_config(out))
    drafter = new_drafter(config).start(whole, whole.frozen_head)  # which checks that its own forward says the same
    assert config.depth == 2 and torch.equal(drafter.head.weight, whole.frozen_head.head_VE)


@pytest.mark.parametrize("layers,count", [([0, 99], None), ([1, 0], None), ([1, 1], None), ([-1], None), (None, 99), (None, 0)])
def test_layers_that_a_target_has_not_are_refused(target, tmp_path, layers, count):
    with pytest.raises(UserError, match="name layers of .*, 0 to [25], each once and in their order"):
        cut(target, tmp_path / "out", layers, count)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no causal LM can be loaded there"):
        cut(str(tmp_path / "none"), tmp_path / "out", [0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        cut(str(TINY), tmp_path / "file/out", [0])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    done = command(ROOT / "launchers/cut.py", TINY, tmp_path / "file", "--count", 2)
    assert done.returncode == 2 and done.stderr.endswith(f"error: {tmp_path / 'file'} is there already\n")
