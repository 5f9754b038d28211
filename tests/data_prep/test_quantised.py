"""Quantised targets: states of the quantised model as transformers runs it, and what would be read without its scales is refused.

Shapes: B texts, T tokens, N outputs, K inputs.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common import cli
from common.errors import UserError
from data_prep.capture import plan as planning
from data_prep.recipe import DataPrepRecipe, TargetRecipe
from data_prep.target import quantised_model
from data_prep.target.checkpoint import refuse_unexpected
from data_prep.target.loading import load_target
from data_prep.target.quantised import unrounded
from data_prep.target.target import Target
from tests.support.quantised import METHODS, TINY, quantised

IDS_BT = torch.randint(2, 8000, (2, 40), generator=torch.Generator().manual_seed(1))


def each(*quick: str) -> list:
    """Every way to quantise; all but `quick` in slow tests."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in METHODS]


EVERY = each("fp8", "fp8_dynamic")
ROUNDED = {"fp8": False, "w4a16": False}  # what computes with plain numbers once it is loaded on a CPU
SAID = {
    "fp8": {"method": "fp8", "bits": 8, "group": [64, 64], "activations": "dynamic", "computed": "dequantised"},
    "fp8_dynamic": {"method": "compressed-tensors", "weights": "float8 channel", "activations": "float8 token dynamic"},
    "fp8_static": {"method": "compressed-tensors", "weights": "float8 tensor", "activations": "float8 tensor"},
    "w4a16": {"method": "compressed-tensors", "weights": "int4 group 64", "computed": "dequantised"},
    "w8a8": {"method": "compressed-tensors", "weights": "int8 channel", "activations": "int8 token dynamic"},
    "bnb8": {"method": "bitsandbytes", "bits": 8, "kind": "int8"},
    "bnb4": {"method": "bitsandbytes", "bits": 4, "kind": "nf4"},
    "gptq": {"method": "gptq", "bits": 4, "group": 64},
    "awq": {"method": "awq", "bits": 4, "group": 64},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes each checkpoint once."""
    made = {}
    place = tmp_path_factory.mktemp("quantised")

    def of(name: str):
        if name not in made:
            made[name] = quantised(name, place)
        return made[name]

    return of


@pytest.fixture(scope="module")
def plain():
    return Target(str(TINY), dtype=torch.bfloat16)


def apart(one, other) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("name", each("fp8", "fp8_dynamic", "bnb4"))
def test_states_are_those_of_the_quantised_model(name, folder, plain):
    path = folder(name)
    target = Target(str(path), dtype=torch.bfloat16)
    every = range(len(target.layers))
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(input_ids=IDS_BT, output_hidden_states=True)
    for one in (target, plain):
        one.capture(every, every)
    states = target.forward(IDS_BT)
    before = plain.forward(IDS_BT)
    for layer in every[:-1]:
        assert torch.equal(states.hidden[layer], own.hidden_states[layer + 1])
        assert apart(states.hidden[layer], before.hidden[layer]) > 0.005
    assert torch.equal(states.last_hidden, own.hidden_states[-1])
    assert apart(states.key[3], before.key[3]) > 0.005
    assert target.rounds == ROUNDED.get(name, True)


@pytest.mark.parametrize("name", EVERY)
def test_a_hash_is_of_the_files_and_equal_however_they_are_loaded(name, folder, plain, tmp_path):
    path = folder(name)
    hashes = {Target(str(path), dtype=dtype).weights_hash() for dtype in (torch.bfloat16, torch.float32)}
    assert len(hashes) == 1 and plain.weights_hash() not in hashes
    other = tmp_path / "other"
    shutil.copytree(path, other)
    tensors = load_file(other / "model.safetensors")
    key = next(key for key in tensors if key.endswith(("down_proj.weight", "weight_packed", "qweight")))
    tensors[key].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert Target(str(other), dtype=torch.bfloat16).weights_hash() not in hashes


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_quantised_is_in_the_dtype_that_was_asked_for(name, folder):
    """The checkpoint holds it in bf16."""
    target = Target(str(folder(name)), dtype=torch.float32)
    target.capture((0,), (0,))
    states = target.forward(IDS_BT)
    assert {t.dtype for t in states.tensors()} == {torch.float32}
    assert {target.frozen_head.head_VE.dtype, target.final_norm_weight.dtype} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_draft_layers_begin_with_what_quantised_layers_compute(name, folder, plain):
    target = Target(str(folder(name)), dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    for key, weight_NK in target.layer_weights(1).items():
        before_NK = plain.layer_weights(1)[key].float()
        assert weight_NK.dtype == torch.float32 and apart(weight_NK, before_NK) < 0.15
        module = {"k.weight": target.layers[1].self_attn.k_proj, "down.weight": target.layers[1].mlp.down_proj}.get(key)
        if module is not None:
            x = torch.randn(7, weight_NK.shape[1], generator=generator)
            # What is left is the rounding of inputs.
            assert apart(x @ weight_NK.T, module(x)) < min(0.04, 0.9 * apart(x @ before_NK.T, module(x)))


def test_a_layer_of_fp8_is_multiplied_out_by_its_blocks():
    """As it is on a GPU; blocks need not divide a weight."""
    weight_NK = torch.randn(48, 40, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    module = torch.nn.Linear(40, 48, bias=False)
    module.weight = torch.nn.Parameter(weight_NK, requires_grad=False)
    module.weight_scale_inv = torch.nn.Parameter(scale)
    module.block_size = (32, 16)
    found = quantised_model.dense(module, torch.float32)
    for row, column in ((0, 0), (31, 15), (32, 16), (47, 39)):
        assert found[row, column] == weight_NK[row, column].float() * scale[row // 32, column // 16]


def recipe_of(path, cache, *words: str) -> DataPrepRecipe:
    asked = [f"target.path={path}", f"cache.dir={cache}", "target.device=cpu", "target.dtype=bfloat16", *words]
    return cli.compose("data_prep", DataPrepRecipe, asked)


@pytest.mark.parametrize("name", EVERY)
def test_a_manifest_names_the_quantisation(name, folder, tmp_path):
    recipe = recipe_of(folder(name), tmp_path / "cache")
    planning.check_capture(recipe)
    planned = planning.plan(recipe, {})
    said = {key: value for key, value in SAID[name].items() if key != "computed"}
    assert planned.target["quantisation"] == said
    done = planning.completed(planned, load_target(recipe.target))
    assert done.target["quantisation"] == SAID[name]
    assert unrounded(done.target["quantisation"]) == (name == "fp8")
    assert planning.differences(planned, done) == []
    other = planning.plan(recipe_of(TINY, tmp_path / "cache"), {})
    assert "quantisation" not in other.target
    assert "target.quantisation.method" in planning.differences(other, done)


def test_a_quantised_head_is_refused_where_its_inputs_are_rounded(tmp_path):
    with pytest.raises(UserError, match="its LM head is quantised"):
        Target(str(quantised("fp8_dynamic", tmp_path, head=True)), dtype=torch.bfloat16)


@pytest.mark.slow
def test_a_quantised_head_that_reads_whole_inputs_is_taken_as_it_computes(tmp_path):
    target = Target(str(quantised("w4a16", tmp_path, head=True)), dtype=torch.float32)
    assert 0.01 < apart(target.frozen_head.head_VE, target.frozen_head.embedding_VE) < 0.2


# What would be read without its scales.


def broken(folder, kind: str, tmp_path):
    """A checkpoint of fp8 that does not say so, in one of several ways."""
    path = tmp_path / kind
    shutil.copytree(folder("fp8"), path)
    config = json.loads((path / "config.json").read_text())
    if kind == "unknown method":
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    else:
        del config["quantization_config"]
    if kind == "ModelOpt":
        (path / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    if kind == "adapter":
        (path / "adapter_config.json").write_text("{}")
    if kind == "no safetensors":
        config["quantization_config"] = {"quant_method": "fp8"}
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "kind, words",
    [
        ("unknown method", "is quantised by 'modelopt', which transformers does not load"),
        ("ModelOpt", r"is quantised by ModelOpt \(hf_quant_config.json\)"),
        ("adapter", "holds an adapter"),
        ("no word", r"its files hold scales of quantised weights \(model.layers.0.\S+_scale_inv\)"),
        ("no safetensors", "has no model.safetensors"),
    ],
)
def test_files_that_would_be_read_without_their_scales_are_refused(kind, words, folder, tmp_path):
    path = broken(folder, kind, tmp_path)
    for refused in (
        lambda: planning.check_capture(recipe_of(path, tmp_path / "cache")),
        lambda: load_target(TargetRecipe(path=str(path), device="cpu")),
    ):
        with pytest.raises(UserError, match=words) as said:
            refused()
        assert "\n" not in str(said.value)


@torch.no_grad()
def test_scales_that_transformers_leaves_out_are_refused_when_all_else_is_missed(folder, tmp_path):
    """Without the check the model is another one, and nobody says so."""
    path = broken(folder, "no word", tmp_path)
    ids_BT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    right, wrong = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(ids_BT).logits for p in (TINY, path))
    assert apart(wrong, right) > 0.5
    with pytest.raises(UserError, match="transformers has no place for model.layers.0.mlp.down_proj.weight_scale_inv"):
        Target(str(path))


def test_tensors_that_a_decoder_does_without_are_no_fault():
    refuse_unexpected(
        "p",
        [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.61.mlp.experts.0.gate_proj.weight",
            "model.layers.0.self_attn.k_scale",
            "mtp.layers.0.self_attn.q_proj.weight",
            "vision_tower.blocks.0.weight",
            "model.visual.merger.weight",
            "multi_modal_projector.linear_1.weight",
            "lm_head.weight",
        ],
        layers=61,
    )
    for name in ("model.layers.60.mlp.extra.weight", "model.layers.3.mlp.up_proj.weight_scale", "model.supervisual.weight"):
        with pytest.raises(UserError, match=f"transformers has no place for {name} of its files"):
            refuse_unexpected("p", [name], layers=61)
