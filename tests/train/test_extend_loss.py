"""The page on how to add a loss term is followed to the letter, in a copy of the repository."""

import re
import shutil
import subprocess
import sys

from common.recipe import ROOT

BLOCK = re.compile(r"^```\w+ (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

PROGRAM = """
import torch
from hydra import compose, initialize_config_dir
from train.losses.chunked import chunked_loss
from train.losses.choose import slower_on_a_gpu
from train.losses.recipe import LossRecipe
from train.losses.types import HeadInput, Heads

with initialize_config_dir("{conf}", version_base=None):
    loss = LossRecipe(**compose("loss/ce", overrides=["loss.ce=0", "loss.hellinger=2"]).loss)
assert loss.per_slot == {{"hellinger": 2.0}}, loss
draft, teacher, head = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8), torch.randn(11, 8)
index, one = torch.arange(5), torch.ones(5)
found, _ = chunked_loss(HeadInput(draft, index, teacher, index, index, one), Heads(head, head), loss.per_slot, one, 2)
q, p = (draft @ head.T).softmax(-1), (teacher @ head.T).softmax(-1)
expected = 2 * (1 - (p * q).sqrt().sum(-1)).sum()
torch.testing.assert_close(found, expected)
torch.testing.assert_close(*(torch.autograd.grad(total, draft)[0] for total in (found, expected)))
assert "loss.hellinger" in slower_on_a_gpu(loss.per_slot)
"""


def test_the_page_adds_a_term_with_two_files_and_a_yaml(tmp_path):
    steps = BLOCK.findall((ROOT / "docs/extend/loss.md").read_text())
    touched = [file for file, _ in steps]
    assert sorted(touched) == ["conf/loss/_terms.yaml", "train/losses/divergences.py", "train/losses/terms.py"]
    for folder in ("common", "conf", "data_prep", "train"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "outputs", "*.gguf"))
    for file, text in steps:
        with open(tmp_path / file, "a") as f:
            f.write("\n" + text)
    program = PROGRAM.format(conf=tmp_path / "conf")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
