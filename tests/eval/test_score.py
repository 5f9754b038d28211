"""What mode=score refuses to say, and what mode=diagnose counts as compute."""

import pytest
import torch

from common import cli
from common.errors import UserError
from data_prep.capture.build import build
from data_prep.recipe import DataPrepRecipe
from eval.check import check_evaluation
from eval.judging.score import product_counter
from eval.main import run
from eval.recipe import EvalRecipe
from tests.support.conversations import write_lines
from tests.support.tiny_drafter import save_tiny_drafter


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_a_kernel_of_attention_over_grouped_heads_counts_nothing_beside_other_products(kernel):
    """The GPU's kernels, on tensors without content. PyTorch 2.11 cannot count them, 2.13 would."""
    q, k = torch.empty(1, 8, 5, 16, device="meta"), torch.empty(1, 2, 7, 16, device="meta")
    attend = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    more = {"efficient_attention": (None, False), "cudnn_attention": (None, False)}.get(kernel, ())
    with product_counter() as counter:
        attend(q, k, k, *more)
        q[0, 0] @ k[0, 0].T
    assert counter.get_total_flops() == 2 * 5 * 7 * 16


def test_a_score_in_which_nothing_counts_stops_with_the_reason(tmp_path, monkeypatch):
    """Documents of two tokens, as earlier releases captured them: behind their anchors there is no token that a draft could be
    held against."""
    monkeypatch.setattr("data_prep.sources.tokens.unusable", lambda document: None)
    path = write_lines(tmp_path / "short.jsonl", [{"id": f"t{i}", "text": text} for i, text in enumerate(["a b", "x ="] * 8)])
    words = [f"cache.dir={tmp_path / 'cache'}"]
    captured = [*words, "data=jsonl", f"data.path={path}", "data.max_length=64", "capture.workers=1", "cache.layers=[0,5]"]
    build(cli.compose("data_prep", DataPrepRecipe, captured), lambda: None)
    drafter = save_tiny_drafter(tmp_path / "drafter")
    recipe = cli.compose("eval", EvalRecipe, [*words, "mode=score", f"drafter={drafter}", f"out={tmp_path / 'out'}"])
    check_evaluation(recipe)
    with pytest.raises(UserError, match="cache: no drafted token of its held-out documents counts; they are too short"):
        run(recipe)
    assert not (tmp_path / "out").exists()
