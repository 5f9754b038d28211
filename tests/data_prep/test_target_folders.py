"""Folders in which something of a target is missing, strange or ill: refused in one line before anything is written."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing

from common import cli
from common.errors import UserError
from data_prep.capture.capture import Batch
from data_prep.capture.first_batch import check_first_batch
from data_prep.capture.plan import check_capture, plan
from data_prep.recipe import DataPrepRecipe
from data_prep.sources.counts import Counts
from data_prep.sources.documents import tokenized
from data_prep.sources.records import Record, records
from data_prep.sources.tokens import LeftOut, TokenDocument, encode
from data_prep.target.loading import load_parts, target_tokenizer
from data_prep.target.target import Target
from eval.prompts.load import heldout_prompts
from eval.prompts.suites import Style, SuiteRecipe
from eval.recipe import EvalRecipe
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
    assert "makes no tokens of a text" in refused(folder)


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


def putting(folder, before: str, behind: str) -> None:
    """A tokenizer that puts special tokens around any text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(token, tokenizer.token_to_id(token)) for token in (before, behind)]
    put = TemplateProcessing(single=f"{before} $A {behind}", special_tokens=special)
    tokenizer.post_processor = Sequence([tokenizer.post_processor, put])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_texts_begin_as_the_tokenizer_has_it_wherever_they_are_read(folder, tmp_path):
    """Captures, held-out prompts and prompts of a suite; none ends as the tokenizer ends texts. A chat has its template's tokens
    alone, and what a tokenizer puts before a text stands in the manifest."""
    path = tmp_path / "texts.jsonl"
    text = "{} is a number that has a name and another one"
    path.write_text("".join(json.dumps({"id": str(n), "text": text.format(n)}) + "\n" for n in range(300)))
    words = ["data=jsonl", f"data.path={path}", "data.max_length=8"]
    before = plan(composed(folder, *words), {})
    putting(folder, "<|endoftext|>", "<|im_end|>")
    recipe = composed(folder, *words)
    tokenizer = target_tokenizer(recipe.target)
    ids = tokenizer(text.format(7), add_special_tokens=False)["input_ids"]
    assert tokenizer("7")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0

    record = Record("7", {"text": text.format(7)})
    assert encode(record, tokenizer, recipe.data) == ([0, *ids], [0] + [1] * len(ids))
    left_out = Counts()
    found = {d.id: d for d in tokenized(records(recipe.data, heldout=False), tokenizer, recipe.data, left_out)}
    assert found["7#0"].input_ids.tolist() == [0, *ids[:7]] and found["7#1"].input_ids.tolist() == ids[7:15]
    of_one = cli.compose("eval", EvalRecipe, ["suite=heldout", "suite.count=2", "suite.prompt_tokens=5", "drafter=x", *words])
    prompts = heldout_prompts(of_one.data, of_one.suite, tokenizer)
    assert [p.tokens[0] for p in prompts] == [0, 0] and all(p.tokens.count(0) == 1 for p in prompts)
    style = Style(SuiteRecipe(kind="x", template="{a}"), tokenizer, 64, 128)
    assert style.render([{"content": record.fields["text"]}]) == [0, *ids]

    chat = Record("c", {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]})
    chats = composed(folder, "data=chat", f"data.path={path}")
    assert encode(chat, tokenizer, chats.data) == encode(chat, target_tokenizer(composed(TINY).target), chats.data)
    assert plan(recipe, {}).before_texts == [0]
    assert "before_texts" not in before.model_dump() and "before_texts" not in plan(chats, {}).model_dump()


LAYER = "model.layers.2.mlp.up_proj.weight"


def rewrite(folder, change_of) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change_of(tensors), folder / "model.safetensors", {"format": "pt"})


def eighth(tensors):
    return tensors | {LAYER: tensors[LAYER].to(torch.float8_e4m3fn)}


# What becomes of the tensors, fields of the configuration, and what is said.
WRONG = {
    "unused": (
        lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(256)},
        {},
        "has no place for model.layers.0.self_attn.q_proj.bias of its files",
    ),
    "missing": (lambda t: {k: v for k, v in t.items() if k != LAYER}, {}, f"the checkpoint lacks {LAYER}"),
    "misshapen": (None, {"num_key_value_heads": 1}, "k_proj.weight is [64, 256] in the model of config.json, and"),
    "unscaled": (eighth, {}, f"{LAYER} is stored as F8_E4M3, and nothing says by which scales"),
    "a scale missing": (
        lambda t: eighth(t) | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(6, 2)},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        f"{LAYER} is stored as F8_E4M3, and no tensor holds its scales ({LAYER}_scale_inv)",
    ),
    "blocks that do not divide": (
        lambda t: eighth(t) | {f"{LAYER}_scale_inv": torch.ones(6, 2)},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        f"{LAYER} is [704, 256], which [6, 2] blocks of scales do not divide evenly",
    ),
    "quantised in words alone": (
        None,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "says that it is quantised by bitsandbytes, and its files hold no scales",
    ),
    "tied to another": (
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2},
        {},
        "ties lm_head.weight and model.embed_tokens.weight, and the files hold two that differ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_not_those_of_the_configuration_are_refused(name, folder):
    change_of, fields, said = WRONG[name]
    change(folder / "config.json", **fields)
    if change_of:
        rewrite(folder, change_of)
    assert said in refused(folder)
    with pytest.raises(UserError) as error:
        load_parts(composed(folder).target)
    assert said in str(error.value)


def test_a_head_that_is_stored_beside_its_equal_and_a_folder_in_shards_are_whole(folder):
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    check_capture(composed(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_capture(composed(folder))
    save_file({names[1]: tensors[names[1]]}, folder / "b.safetensors", {"format": "pt"})
    assert f"b.safetensors does not hold {names[3]}, as the index says" in refused(folder)
    (folder / "b.safetensors").unlink()
    assert "its index names b.safetensors, which is not there" in refused(folder)


def test_an_error_of_loading_says_what_the_report_of_transformers_says(folder):
    change(folder / "config.json", num_key_value_heads=1)
    with pytest.raises(UserError, match=r"k_proj.weight is \[128, 256\] in the files and \[64, 256\] in the model; .* more"):
        Target(str(folder))


def test_weights_that_are_not_finite_are_not_taken_from_files(folder):
    def ill(tensors):
        tensors[LAYER][0, 0] = float("nan")
        return tensors

    rewrite(folder, ill)
    with pytest.raises(UserError, match=f"{LAYER} of its files has numbers that are not finite"):
        load_parts(composed(folder).target).weights_hash()


@torch.no_grad()
def test_the_first_batch_tells_of_weights_that_predict_nothing_or_are_ill(capsys):
    target = Target(str(TINY))
    target.capture([0], [])
    ids = target_tokenizer(composed(TINY).target)((ROOT / "common/errors.py").read_text())["input_ids"]
    batch = Batch([TokenDocument(str(n), np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.uint8)) for n in range(2)])
    check_first_batch(target, batch, batch.forward(target))
    assert capsys.readouterr().out == ""
    layer = target.layers[0].mlp.down_proj.weight
    layer.mul_(1000)  # as weights without their scales
    check_first_batch(target, batch, batch.forward(target))
    assert "WARNING: the target's own loss on" in capsys.readouterr().out
    layer[0, 0] = float("nan")
    with pytest.raises(UserError, match="model.layers.0.mlp.down_proj.weight has numbers that are not finite"):
        check_first_batch(target, batch, batch.forward(target))
