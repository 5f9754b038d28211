"""What a rank reads of its target when a training starts: the embedding, the LM head, and layers that its drafter starts from."""

from pathlib import Path

import pytest
import torch

from common import cli
from data_prep.cache.reader import CacheReader
from data_prep.target.loading import load_target
from train.build import drafter_config
from train.drafter.build import new_drafter
from train.recipe import TrainRecipe
from train.run.parts import RunContext, _read_target


@pytest.mark.parametrize("start,read", [("target", {0, 5}), ("random", set())])
def test_a_drafter_starts_from_a_few_weights_as_from_the_whole_target(cache, start, read):
    words = [f"cache.dir={cache}", "target.device=cpu", "reuse=hybrid", "drafter.layers=2", f"drafter.start={start}"]
    recipe = cli.compose("train", TrainRecipe, words)
    reader = CacheReader(cache)
    target = _read_target(RunContext(recipe, Path("run"), torch.device("cpu"), reader, print))
    config = drafter_config(recipe, reader.manifest)
    found = new_drafter(config).start(target, target.frozen_head).state_dict()
    layers = enumerate(target.layers)
    assert {number for number, layer in layers if not all(p.is_meta for p in layer.parameters())} == read
    whole = load_target(recipe.target)
    expected = new_drafter(config).start(whole, whole.frozen_head).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
