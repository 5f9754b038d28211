"""Assistants of Gemma 4 as checkpoints that others load, and such checkpoints as drafters here.

Shapes: T positions, G key/value heads, D head size, E hidden size of the target.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4AssistantForCausalLM, Gemma4TextConfig

from common.errors import UserError
from data_prep.recipe import TargetRecipe
from data_prep.target.architecture import TargetSizes, target_sizes
from data_prep.target.target import Target
from tests.support.assistants import assistant_of, read_layers, sharing_modes, transformers_assistant
from tests.support.families import add_tokenizer, miniature
from tests.support.packs import cached, objective_of
from train.data.pack import PackDocument, make_pack
from train.drafter.build import load_config, load_drafter
from train.drafter.formats.export import save_export
from train.drafter.formats.imported_weights import bind
from train.drafter.warm_start import check_warm_start, loses_clusters, warm_start
from train.losses.recipe import LossRecipe

FAMILIES = ("gemma4_text_k_eq_v", "gemma4_text_shared", "gemma4_unified_text")
VOCABULARY = 28
SIZES = {"vocab_size": VOCABULARY}
CLUSTERS = {"centroids": 7, "centroid_top_k": 3}


@pytest.fixture(scope="module", params=FAMILIES)
def target(request, tmp_path_factory):
    more = {"vocab_size_per_layer_input": VOCABULARY} if request.param == "gemma4_text_shared" else {}
    folder = add_tokenizer(miniature(request.param, tmp_path_factory.mktemp("target"), seed=1, **SIZES, **more))
    target = Target(str(folder))
    hidden, kv = read_layers(target)
    target.capture(hidden, sorted(set(kv)))
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A target whose assistants are built in a moment."""
    folder = tmp_path_factory.mktemp("plain")
    target = Target(str(add_tokenizer(miniature("gemma4_text_k_eq_v", folder, seed=1, **SIZES))))
    target.capture(*read_layers(target))
    return target


def sizes_of(folder) -> TargetSizes:
    return target_sizes(TargetRecipe(path=str(folder), dtype="float32", device="cpu"))


def logits_of(target: Target, drafter) -> torch.Tensor:
    tokens = torch.randint(3, VOCABULARY, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    pack = make_pack([PackDocument("text", cached(target, tokens, capture=False), np.arange(1, 24))])
    with torch.no_grad():
        return objective_of(target, drafter, LossRecipe(kl=1)).logits(pack)


def shuffled(drafter):
    """The same drafter; its clusters, if it has some, follow no order."""
    if drafter.config.centroids:
        drafter.head.clusters.ordering.copy_(torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3)))
    return drafter


def imported(target: Target, folder):
    drafter = load_drafter(folder, lambda: sizes_of(target.folder))
    assert drafter.target_norm.isnan().all() and not drafter.config.is_bound
    bind(drafter, folder, "named", target)
    return drafter


@pytest.mark.parametrize("clusters", [{}, CLUSTERS], ids=["whole head", "centroids"])
def test_what_we_export_comes_back_as_it_was(target, tmp_path, clusters):
    drafter = shuffled(assistant_of(target, **clusters))
    save_export(drafter, target, tmp_path, "gemma4_assistant")
    again = imported(target, tmp_path)
    for name, mine in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], mine), name
    assert torch.equal(logits_of(target, again), logits_of(target, drafter))
    same = {"target": drafter.config.target, "imported": None, "seed": 1, "kv_shapes": drafter.config.kv_shapes}
    assert replace(again.config, **same, own_sizes=[], architecture=drafter.config.architecture) == replace(
        drafter.config, own_sizes=[]
    )
    # It has the same place in our own format.
    again.save_pretrained(tmp_path / "native")
    assert load_config(tmp_path / "native") == again.config
    # One that is trained here begins as it.
    fresh = assistant_of(target, random=False, seed=5)
    beside = partial(sizes_of, target.folder)
    check_warm_start(str(tmp_path), fresh.config, beside)
    assert warm_start(fresh, str(tmp_path), target.frozen_head, beside)[1] == []
    assert loses_clusters(str(tmp_path), fresh.config, beside) == bool(drafter.config.centroids)
    for name, mine in fresh.state_dict().items():
        assert torch.equal(mine, drafter.state_dict()[name]), name
    with pytest.raises(UserError, match="is a drafter of drafter.kind=gemma4_assistant, not of layers"):
        check_warm_start(str(tmp_path), replace(fresh.config, kind="layers"), beside)


def test_a_warm_start_of_other_layers_leaves_their_attention(plain, tmp_path):
    """The export reads layers 2 and 3; what it asks of layer 2 is no start for what asks layer 0."""
    save_export(assistant_of(plain), plain, tmp_path, "gemma4_assistant")
    fresh = assistant_of(plain, random=False, seed=5)
    shapes = [plain.kv_shapes[0], *fresh.config.kv_shapes[1:]]
    fresh.config = replace(fresh.config, target_layers=[0, *fresh.config.target_layers[1:]], kv_shapes=shapes)
    left = warm_start(fresh, str(tmp_path), plain.frozen_head, partial(sizes_of, plain.folder))[1]
    assert left and all(".branches.kv." in name for name in left)


def test_a_configuration_says_of_keys_what_the_model_says(target):
    found = sizes_of(target.folder).last_kv
    assert set(found) == {"sliding_attention", "full_attention"}
    assert all(target.kv_shapes[layer] == kv for layer, kv in found.values())
    assert {kv.window for _, kv in found.values()} == {8, None}


@pytest.mark.parametrize("clusters", [{}, CLUSTERS], ids=["whole head", "centroids"])
def test_transformers_loads_an_export(plain, tmp_path, monkeypatch, clusters):
    """As the model that tests/train/test_assistant.py shows to compute our logits: the same weights, and the same function."""
    drafter = shuffled(assistant_of(plain, **clusters))
    notes = save_export(drafter, plain, tmp_path, "gemma4_assistant")
    with pytest.raises(ValueError, match="layer types producing a cache"):  # what the note says; if not, it can go
        Gemma4AssistantForCausalLM.from_pretrained(tmp_path)
    assert "transformers 5.23.0 cannot build" in notes[0] and len(notes) == 1 + bool(clusters)
    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(sharing_modes), raising=False)
    loaded, said = Gemma4AssistantForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values())
    shown = transformers_assistant(drafter, plain)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in shown.state_dict().items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    shapes = dict(zip(("sliding_attention", "full_attention"), drafter.config.kv_shapes[-2:]))
    shared = {
        kind: tuple(torch.randn(1, kv.kv_heads, 6, kv.head_dim, generator=generator) for _ in "kv") for kind, kv in shapes.items()
    }
    pair_11E = torch.randn(1, 1, 2 * drafter.config.state_size, generator=generator)
    one, other = (m(inputs_embeds=pair_11E, position_ids=torch.tensor([[5]]), shared_kv_states=shared) for m in (loaded, shown))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert loaded.generation_config.num_assistant_tokens == drafter.config.draft_length


@pytest.mark.parametrize("said,drafted", [({"num_assistant_tokens": 3}, 3), ({}, 4), (None, 4)])
def test_how_many_tokens_an_assistant_drafts_is_what_its_folder_says(plain, tmp_path, said, drafted):
    save_export(assistant_of(plain), plain, tmp_path, "gemma4_assistant")
    path = tmp_path / "generation_config.json"
    path.unlink() if said is None else path.write_text(json.dumps(said))
    assert load_config(tmp_path, lambda: sizes_of(plain.folder)).draft_length == drafted


@pytest.mark.parametrize("said", [*(f'{{"num_assistant_tokens": {n}}}' for n in ('"many"', "2.5", "-3")), "[", "[]"])
def test_a_number_of_tokens_that_is_none_is_refused(plain, tmp_path, said):
    save_export(assistant_of(plain), plain, tmp_path, "gemma4_assistant")
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(UserError, match="generation_config.json"):
        load_config(tmp_path, lambda: sizes_of(plain.folder))


@pytest.mark.parametrize("clusters", [{}, CLUSTERS], ids=["whole head", "centroids"])
def test_what_transformers_writes_is_read(plain, tmp_path, monkeypatch, clusters):
    """It says heads by layer (`per_layer_config`), where published assistants say them by kind."""
    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(sharing_modes), raising=False)
    drafter = shuffled(assistant_of(plain, **clusters))
    transformers_assistant(drafter, plain).save_pretrained(tmp_path)
    assert "per_layer_config" in (tmp_path / "config.json").read_text()
    assert torch.equal(logits_of(plain, imported(plain, tmp_path)), logits_of(plain, drafter))


def test_another_export_leaves_nothing_of_the_one_before(plain, tmp_path):
    (tmp_path / "mask_embedding.pt").write_bytes(b"")
    save_export(assistant_of(plain), plain, tmp_path, "gemma4_assistant")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_layers_that_servers_would_not_read_are_not_exported(plain, tmp_path):
    drafter = assistant_of(plain)
    kv_shapes = [plain.kv_shapes[0], *drafter.config.kv_shapes[1:]]
    drafter.config = replace(drafter.config, target_layers=[0, *drafter.config.target_layers[1:]], kv_shapes=kv_shapes)
    with pytest.raises(UserError, match="of sliding_attention layer 2; this drafter reads layer 0"):
        save_export(drafter, plain, tmp_path / "out", "gemma4_assistant")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "size": ({"backbone_hidden_size": 64}, {}, "is for targets of hidden size 64 .*; this target has 32"),
    "tokens": ({}, {"vocab_size": 30}, "is for targets of 30 tokens; this target has 28"),
    "heads of a sliding layer": ({}, {"head_dim": 8}, "sliding_attention, with heads of 8; layer 2 .* has heads of 16"),
    "heads of a full layer": ({}, {"global_head_dim": 64}, "full_attention, with heads of 64; layer 3 .* has heads of 32"),
    "key heads": ({}, {"num_key_value_heads": 4}, "sliding_attention, with 4 heads; layer 2 of this target has 2"),
    "window": ({}, {"sliding_window": 9}, "with a window of 9 positions; layer 2 of this target has one of 8"),
    "rotary": ({}, {"rope_parameters": None}, "has another rotary embedding|another rotary embedding"),
    "query heads": ({}, {"num_attention_heads": 3}, "has 3 query heads, which cannot share 2 key/value heads"),
    "MLP": ({}, {"hidden_activation": "silu"}, "has hidden_activation=silu, which no assistant here has"),
    "layers with keys": ({}, {"num_kv_shared_layers": 2}, "has 2 layers with keys and values of their own"),
    "biases": ({}, {"attention_bias": True}, "has attention_bias=True, which no assistant here has"),
    "clusters": ({"use_ordered_embeddings": True, "num_centroids": 5}, {}, "has 5 clusters for 28 tokens"),
    "no clusters": ({"use_ordered_embeddings": True, "num_centroids": 0}, {}, "has 0 clusters for 28 tokens"),
    "clusters of nothing": ({"use_ordered_embeddings": True, "num_centroids": None}, {}, "has None clusters for 28 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_assistant_that_does_not_fit_is_refused(plain, tmp_path, name):
    top, text, message = REFUSED[name]
    save_export(assistant_of(plain), plain, tmp_path, "gemma4_assistant")
    config = json.loads((tmp_path / "config.json").read_text())
    if text == {"rope_parameters": None}:
        config["text_config"]["rope_parameters"]["full_attention"]["rope_theta"] = 5000.0
    else:
        config["text_config"] |= text
    (tmp_path / "config.json").write_text(json.dumps(config | top))
    with pytest.raises(UserError, match=message) as refused:
        load_config(tmp_path, lambda: sizes_of(plain.folder))
    assert "\n" not in str(refused.value)


def test_weights_that_are_another_assistant_are_refused(plain, tmp_path):
    """A head that is not tied, and a tensor too many."""
    save_export(assistant_of(plain), plain, tmp_path, "gemma4_assistant")
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"]
    for extra, message in (
        ({"lm_head.weight": head + 1}, "has an LM head that is not its embedding"),
        ({"model.layers.0.self_attn.k_proj.weight": head[:4].clone()}, "has a tensor that no drafter here has"),
    ):
        save_file(weights | extra, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_drafter(tmp_path, lambda: sizes_of(plain.folder))
    save_file(weights | {"lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    imported(plain, tmp_path)


def test_clusters_that_leave_tokens_out_and_another_norm_are_refused(plain, tmp_path):
    save_export(assistant_of(plain, **CLUSTERS), plain, tmp_path, "gemma4_assistant")
    weights = load_file(tmp_path / "model.safetensors")
    twice = weights["masked_embedding.token_ordering"].clone()
    twice[0] = twice[1]
    save_file(weights | {"masked_embedding.token_ordering": twice}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="token_ordering that leaves tokens out"):
        imported(plain, tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has rms_norm_eps=0.5, and the target 1e-06"):
        imported(plain, tmp_path)


def test_an_assistant_beside_another_family_is_refused(plain, tmp_path):
    save_export(assistant_of(plain), plain, tmp_path / "assistant", "gemma4_assistant")
    qwen = miniature("qwen3", tmp_path, **SIZES)
    with pytest.raises(UserError, match="is a Gemma 4 assistant, and the target is no Gemma 4"):
        load_config(tmp_path / "assistant", lambda: sizes_of(qwen))
    with pytest.raises(UserError, match="is a Gemma 4 assistant: it is read beside a target"):
        load_config(tmp_path / "assistant")
