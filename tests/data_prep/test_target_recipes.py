"""Every recipe of conf/target, checked on a miniature of its family: a configuration with the real vocabulary, and no weights."""

import shutil

import pytest

from common import cli
from data_prep.main import check_data_prep
from data_prep.recipe import DataPrepRecipe
from tests.support.commands import ROOT
from tests.support.families import configuration
from train.build import check_training
from train.recipe import TrainRecipe

TINY = ROOT / "data_prep/targets/tiny"
# The miniature of a recipe's family, and how many rows the embedding of the real model has.
RECIPES = {
    "deepseek_v3": ("deepseek_v3", 129280),
    "gemma3_27b": ("gemma3", 262208),
    "gemma4_26b_a4b": ("gemma4", 262144),
    "glm45_air": ("glm4_moe", 151552),
    "gpt_oss_120b": ("gpt_oss", 201088),
    "gpt_oss_20b": ("gpt_oss", 201088),
    "llama31_8b": ("llama", 128256),
    "qwen35_27b": ("qwen3_5", 248320),
    "qwen35_35b_a3b": ("qwen3_5_moe", 248320),
    "qwen3_30b_a3b": ("qwen3_moe", 151936),
    "qwen3_4b": ("qwen3", 151936),
    "qwen3_8b": ("qwen3", 151936),
    "qwen3_next_80b_a3b": ("qwen3_next", 151936),
}
EMBEDDED = {"tiny", "smollm2"}  # models that are here themselves


@pytest.fixture(params=sorted(RECIPES))
def words(request, tmp_path):
    """The words that take a recipe with a miniature for the model."""
    family, vocabulary = RECIPES[request.param]
    config = configuration(family)
    config.get_text_config(decoder=True).vocab_size = vocabulary
    config.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, tmp_path)
    return [
        f"target={request.param}",
        f"target.path={tmp_path}",
        f"cache.dir={tmp_path / 'cache'}",
        "cache.kinds=[hidden]",
        "data.max_length=256",
    ]


def test_each_recipe_has_a_miniature():
    names = {path.stem for path in (ROOT / "conf/target").glob("*.yaml")}
    assert names == RECIPES.keys() | EMBEDDED


def test_states_of_the_recipe_can_be_captured(words):
    check_data_prep(cli.compose("data_prep", DataPrepRecipe, words))


def test_drafters_of_the_recipe_can_be_trained(words):
    """Among what is checked: MASK is a token of the real vocabulary."""
    recipe = cli.compose("train", TrainRecipe, ["experiment=dflash", *words, "drafter.layers=2", "cache.on_missing=live"])
    assert recipe.target.mask_token_id is not None
    check_training(recipe)
