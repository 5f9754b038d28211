"""Targets that are not what a target should be: refused in one line, or read all the same."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, dynamic_module_utils

from common import cli
from common.errors import UserError
from data_prep.capture.live import manifest_of, open_cache
from data_prep.recipe import DataPrepRecipe
from data_prep.target.architecture import target_sizes
from data_prep.target.loading import load_target
from data_prep.target.target import Target
from tests.support.commands import ROOT
from tests.support.conversations import write_lines
from tests.support.families import MULTIMODAL, SIZES, configuration, miniature
from train.recipe import TrainRecipe

IDS_BT = torch.tensor([[5, 2, 7, 11, 3, 8, 1]])
ENCODERS_WITH_DECODERS = {
    "t5": {"vocab_size": 29, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "bart": {"vocab_size": 29, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24,
             "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}  # fmt: skip
CONFIGURATION_CODE = """from transformers import LlamaConfig


class DoubledConfig(LlamaConfig):
    model_type = "doubled"
"""
# A Llama whose layers say twice what they would: read as a Llama, its states would be wrong.
MODELING_CODE = """from transformers import LlamaForCausalLM

from .configuration_doubled import DoubledConfig


class DoubledForCausalLM(LlamaForCausalLM):
    config_class = DoubledConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
"""


def recipe_of(path, *words):
    return cli.compose("data_prep", DataPrepRecipe, [f"target.path={path}", "cache.kinds=[hidden]", *words]).target


def refused(path, *words) -> str:
    """The one line with which a target is refused, before its weights are loaded and when they are."""
    recipe = recipe_of(path, *words)
    with pytest.raises(UserError) as early:
        target_sizes(recipe)
    with pytest.raises(UserError) as late:
        load_target(recipe)
    assert str(early.value) == str(late.value)
    assert "\n" not in str(early.value)
    return str(early.value)


@pytest.mark.parametrize("name", ENCODERS_WITH_DECODERS)
def test_encoder_with_a_decoder(name, tmp_path):
    config = AutoConfig.for_model(name, **ENCODERS_WITH_DECODERS[name])
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    assert f"is a '{name}', an encoder with a decoder" in refused(tmp_path)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_language_part_of_a_model_that_reads_pictures(name, tmp_path):
    """Its states are those of the whole, given text alone."""
    path = miniature(name, tmp_path)
    recipe = recipe_of(path)
    target = load_target(recipe)
    assert target_sizes(recipe).num_layers == len(target.layers) == target.architecture.num_layers
    target.capture([0, 1], [])
    states = target.forward(IDS_BT)
    own = target.model(input_ids=IDS_BT, output_hidden_states=True)
    torch.testing.assert_close(states.hidden[1], own.hidden_states[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.logits(states.last_hidden), own.logits, rtol=1e-4, atol=1e-5)


def test_a_line_need_not_name_the_kinds_of_a_finished_cache(tmp_path):
    """The kinds of conf/cache hold keys and values, which DeepSeek-V3 does not have."""
    config = configuration("deepseek_v3")
    config.vocab_size = 8192  # of the tokenizer
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "data_prep/targets/tiny" / name, tmp_path)
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": f"text {i} of a few, as long as it has to be"} for i in range(4)])
    words = [f"target.path={tmp_path}", f"cache.dir={tmp_path / 'cache'}", "data=jsonl", f"data.path={texts}"]
    recipe = lambda *more: cli.compose("train", TrainRecipe, [*words, "data.max_length=64", "capture.workers=1", *more])
    with pytest.raises(UserError, match="'deepseek_v3', which yields no keys and values"):
        open_cache(recipe(), lambda: None)
    captured = open_cache(recipe("cache.kinds=[hidden]"), lambda: None).manifest
    assert captured.hidden_layers == [0, 1, 2] and captured.kv_layers == []
    assert manifest_of(recipe()) == captured


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A folder as hubs have it: weights, and the code that transformers needs to load them."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    path = tmp_path / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(path)
    fields = json.loads((path / "config.json").read_text())
    fields["model_type"] = "doubled"
    fields["architectures"] = ["DoubledForCausalLM"]
    fields["auto_map"] = {
        "AutoConfig": "configuration_doubled.DoubledConfig",
        "AutoModelForCausalLM": "modeling_doubled.DoubledForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(fields))
    (path / "configuration_doubled.py").write_text(CONFIGURATION_CODE)
    (path / "modeling_doubled.py").write_text(MODELING_CODE)
    return path


def test_code_of_a_model_does_not_run_unless_it_is_said(with_code):
    (with_code / "configuration_doubled.py").write_text("raise SystemExit('the code ran')")
    said = refused(with_code)
    assert "its own Python code" in said and "target.trust_remote_code=true" in said


def test_code_of_a_model_that_is_trusted(with_code):
    recipe = recipe_of(with_code, "target.trust_remote_code=true")
    assert target_sizes(recipe).num_layers == 3
    target = load_target(recipe)
    assert type(target.model).__name__ == "DoubledForCausalLM"
    target.capture([0, 2], [])
    states = target.forward(IDS_BT)
    own = target.model(input_ids=IDS_BT, output_hidden_states=True)
    torch.testing.assert_close(states.hidden[0], own.hidden_states[1])
    torch.testing.assert_close(target.logits(states.last_hidden), own.logits)
    assert target.kv_shapes == {}  # nobody declared what its keys are


def test_code_of_a_model_that_fails_is_one_line(with_code):
    (with_code / "modeling_doubled.py").write_text("import transformers\n\ntransformers.was_there_once")
    with pytest.raises(UserError, match="no causal LM can be loaded there"):
        load_target(recipe_of(with_code, "target.trust_remote_code=true"))


def test_trust_is_not_needed_where_transformers_knows_the_family(with_code):
    """Code of an older day beside a model of a known family is left alone."""
    fields = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps({**fields, "model_type": "llama"}))
    assert type(Target(str(with_code)).model).__name__ == "LlamaForCausalLM"
