"""Folders in which something of a target is missing, strange or ill: refused in one line before anything is written."""

import json
import shutil

import pytest
from tokenizers import Tokenizer

from common import cli
from common.errors import UserError
from data_prep.capture.plan import check_capture
from data_prep.recipe import DataPrepRecipe
from data_prep.sources.records import Record
from data_prep.sources.tokens import LeftOut, encode
from data_prep.target.loading import target_tokenizer
from tests.support.commands import ROOT

TINY = ROOT / "data_prep/targets/tiny"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded target."""
    return shutil.copytree(TINY, tmp_path / "target")


def composed(folder, *words) -> DataPrepRecipe:
    return cli.compose("data_prep", DataPrepRecipe, [f"target.path={folder}", f"cache.dir={folder.parent / 'cache'}", *words])


def refused(folder, *words) -> str:
    """The one line with which a capture is refused before a document is read."""
    with pytest.raises(UserError) as error:
        check_capture(composed(folder, *words))
    assert not (folder.parent / "cache").exists() and "\n" not in str(error.value)
    return str(error.value)


def change(file, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_token(folder, token: str) -> None:
    """Another special token behind the last, which the model does not have."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([token])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_that_is_not_there_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "makes no tokens of any text" in refused(folder)


def test_a_tokenizer_with_tokens_beyond_the_model_is_refused_unless_they_are_of_pictures(folder):
    with_token(folder, "<|tool|>")
    assert "has '<|tool|>' (id 8192), and the model has 8192 tokens" in refused(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    with_token(folder, "<image_soft_token>")
    recipe = composed(folder)
    check_capture(recipe)
    tokenizer = target_tokenizer(recipe.target)
    assert encode(Record("a", {"text": "a word"}), tokenizer, recipe.data)[0]
    with pytest.raises(LeftOut, match="outside the vocabulary"):
        encode(Record("a", {"text": "a <image_soft_token> word"}), tokenizer, recipe.data)


def test_stored_tokens_are_those_of_the_model_and_not_of_the_tokenizer(folder):
    change(folder / "config.json", vocab_size=8256)  # as models whose embedding is padded
    recipe = composed(folder)
    tokenizer = target_tokenizer(recipe.target)
    assert encode(Record("a", {"input_ids": [1, 8255]}), tokenizer, recipe.data) == ([1, 8255], [1, 1])
    with pytest.raises(LeftOut, match="outside the vocabulary"):
        encode(Record("a", {"input_ids": [1, 8256]}), tokenizer, recipe.data)
