"""A target of which a few weights are read by name is the loaded target, in all that training takes of it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import UserError
from data_prep.recipe import TargetRecipe
from data_prep.target.architecture import unlike
from data_prep.target.checkpoint import check_checkpoint
from data_prep.target.parts import TargetParts
from data_prep.target.target import Target
from tests.support.families import MINIATURES, MULTIMODAL, miniature

# Tied heads, experts that files keep apart, names with a prefix, a scale and a cap, a bias of the head, other names altogether.
SOME = ("llama_yarn", "qwen3", "qwen3_moe", "gemma3", "gemma4_text", "deepseek_v3", "phi", "gpt2")
OTHERS = sorted({*MINIATURES, *MULTIMODAL} - {*SOME})


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_parts_and_hash_of_every_family_are_those_of_the_loaded_target(name, tmp_path, capsys):
    path = str(miniature(name, tmp_path))
    whole = Target(path)
    check_checkpoint(TargetRecipe(path=path))  # nothing is missing, left out or misshapen
    parts = TargetParts(path)
    assert parts.architecture == whole.architecture and parts.head_facts == whole.head_facts
    assert parts.layers_with_kv == list(whole.kv_shapes)
    assert parts.weights_hash() == whole.weights_hash() == TargetParts(path, dtype=torch.bfloat16).weights_hash()
    mine, theirs = parts.frozen_head, whole.frozen_head
    assert torch.equal(mine.embedding_VE, theirs.embedding_VE) and torch.equal(mine.head_VE, theirs.head_VE)
    assert (mine.embed_scale, mine.softcap) == (theirs.embed_scale, theirs.softcap)
    assert (mine.bias_V is None) == (theirs.bias_V is None)
    assert mine.bias_V is None or torch.equal(mine.bias_V, theirs.bias_V)
    assert (mine.head_VE is mine.embedding_VE or mine.head_VE.data_ptr() == mine.embedding_VE.data_ptr()) == (
        theirs.head_VE.data_ptr() == theirs.embedding_VE.data_ptr()
    )
    if unlike(whole.config) is None:
        assert parts.rope_config == whole.rope_config
        assert torch.equal(parts.final_norm_weight, whole.final_norm_weight)
        layers = whole.layer_weights(1)
        found = parts.layer_weights(1)
        assert found.keys() == layers.keys() and all(torch.equal(found[key], layers[key]) for key in layers)
    assert "whole model" not in capsys.readouterr().out


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_layers_that_are_not_asked_for_may_be_absent(tmp_path):
    """So they are not read. The hash misses them, and falls back to the whole model, which refuses."""
    folder = miniature("qwen2", tmp_path)
    whole = Target(str(folder))
    path = rewritten(folder, lambda tensors: {n: t for n, t in tensors.items() if ".layers." not in n or ".layers.1." in n})
    parts = TargetParts(path)
    assert torch.equal(parts.frozen_head.head_VE, whole.frozen_head.head_VE)
    assert torch.equal(parts.layer_weights(1)["q.weight"], whole.layer_weights(1)["q.weight"])
    assert all(p.is_meta for p in parts.layers[0].parameters())
    with pytest.raises(UserError, match="the checkpoint lacks"):
        parts.weights_hash()


def test_every_changed_weight_is_another_hash(tmp_path):
    folder = miniature("qwen3_moe", tmp_path)
    before = TargetParts(str(folder)).weights_hash()
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    expert = next(name for name in names if "experts.3.up_proj" in name)
    for name in (names[0], names[-1], expert):
        original = load_file(folder / "model.safetensors")
        rewritten(folder, lambda tensors: tensors | {name: tensors[name] + 1})  # noqa: B023
        assert TargetParts(str(folder)).weights_hash() != before, name
        save_file(original, folder / "model.safetensors", {"format": "pt"})
    assert TargetParts(str(folder)).weights_hash() == before


def test_files_in_shards_in_another_format_or_with_a_tied_head_twice(tmp_path, capsys):
    folder = miniature("qwen3", tmp_path)
    whole = Target(str(folder))
    expected = whole.weights_hash()

    whole.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    assert TargetParts(str(tmp_path / "shards")).weights_hash() == expected

    twice = lambda factor: lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * factor}
    parts = TargetParts(rewritten(folder, twice(1)))
    assert parts.weights_hash() == expected and parts.frozen_head.head_VE.data_ptr() == parts.frozen_head.embedding_VE.data_ptr()
    assert "whole model" not in capsys.readouterr().out
    # transformers has a rule of its own for two that differ.
    parts = TargetParts(rewritten(folder, twice(2)))
    assert torch.equal(parts.frozen_head.head_VE, Target(str(folder)).frozen_head.head_VE)
    assert "are one and differ); the whole model is loaded" in capsys.readouterr().out

    torch.save(whole.model.state_dict(), tmp_path / "shards/pytorch_model.bin")
    for file in (tmp_path / "shards").glob("model*"):
        file.unlink()
    parts = TargetParts(str(tmp_path / "shards"))
    assert parts.weights_hash() == expected and "the whole model is loaded" in capsys.readouterr().out


def test_what_is_no_target_is_refused_as_before(tmp_path):
    with pytest.raises(UserError, match="no causal LM can be loaded there"):
        TargetParts(str(tmp_path))
    folder = miniature("qwen2", tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="its safetensors cannot be read"):
        TargetParts(str(folder))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(UserError):
        TargetParts(str(folder))
