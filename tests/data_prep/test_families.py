"""Every family of targets hands out the states that it computes with: hidden states, keys and values, logits.

The oracle is transformers' own forward over a text longer than the windows: its hidden states, its KV cache, its logits, and its
attention as it is given (`attention_given`). tests/support/families.py makes the miniatures.

Shapes: B texts, T tokens of each, H query heads, G key/value heads, D head size, E hidden size.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from common.errors import UserError
from data_prep.recipe import TargetRecipe
from data_prep.target import proof
from data_prep.target import transformers_private as private
from data_prep.target.architecture import layers_with_kv, target_config, target_sizes
from data_prep.target.families import FAMILIES, family_of
from data_prep.target.parts import TargetParts
from data_prep.target.rotation import halves_of_neighbours, turned
from data_prep.target.target import Target
from tests.support.families import MINIATURES, MULTIMODAL, SIZES, configuration, miniature, miniature_model

NAMES = [*MINIATURES, *MULTIMODAL]
IDS_BT = torch.randint(0, 25, (2, 37), generator=torch.Generator().manual_seed(1))  # 25 on: images, where there are some


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=NAMES)
def target(request, tmp_path_factory):
    return Target(miniature(request.param, tmp_path_factory.mktemp("family")))


@torch.no_grad()
def test_states_are_those_of_transformers(target):
    every = range(len(target.layers))
    target.capture(every, target.kv_shapes)
    states = target.forward(IDS_BT)
    target.capture((), ())
    hidden, logits = private.own_outputs(target.model, IDS_BT)
    for layer in every[:-1]:
        close(states.hidden[layer], hidden[layer + 1])
        assert not torch.allclose(states.hidden[layer], hidden[layer], atol=1e-2)  # a layer off by one is another state
    close(target.logits(states.last_hidden), logits)
    # 1. The model's own cache, which keeps all positions when nobody tells it of windows.
    windowed = any(shape.window for shape in target.kv_shapes.values())
    cache = target.new_cache() if windowed else DynamicCache(config=target.model.config)
    target.forward(IDS_BT, cache)
    # 2. Turned by what is said of their layer, captured keys are the cache's; as they are stored, they are not.
    for layer, shape in target.kv_shapes.items():
        neighbours = target._kv[layer].neighbours
        kept_BTGD = cache.layers[layer].keys.transpose(1, 2)
        kept_BTGD = halves_of_neighbours(kept_BTGD, neighbours) if neighbours else kept_BTGD
        close(turned(states.key[layer], shape.inv_freq, shape.rope_scale), kept_BTGD)
        close(states.value[layer].transpose(1, 2), cache.layers[layer].values)
        assert states.key[layer].shape[2:] == (shape.kv_heads, shape.head_dim)
        assert not shape.inv_freq or not torch.allclose(states.key[layer], kept_BTGD, atol=1e-2)


@torch.no_grad()
def test_queries_and_windows_are_those_of_its_attention(target):
    """From captured queries, keys and values, and the window, the scores of a layer are those that its own attention makes."""
    if family_of(target.model.config).decode or not target.kv_shapes:
        pytest.skip("its attention is not exchanged here")
    target.capture((), target.kv_shapes, target.kv_shapes)
    states = target.forward(IDS_BT)
    target.capture((), ())
    asked = {}

    def attend(layer, q_BTHD, k_BTGD, v_BTGD, reading):
        size = q_BTHD.shape[-1]
        # Stored queries have the layer's own scale in them: scores are q k / sqrt(D) for all.
        asked[layer] = (q_BTHD * (reading.scale or size**-0.5) * size**0.5, k_BTGD)
        return v_BTGD.repeat_interleave(q_BTHD.shape[2] // v_BTGD.shape[2], 2)

    target.forward_through(IDS_BT, torch.arange(IDS_BT.shape[1]).expand_as(IDS_BT), attend)
    first = min(asked)  # later layers read what `attend` made
    shape = target.kv_shapes[first]
    found = [turned(t[first], shape.inv_freq, shape.rope_scale) for t in (states.query, states.key)]
    for mine, theirs in zip(found, asked[first]):
        neighbours = target._kv[first].neighbours
        close(mine, halves_of_neighbours(theirs, neighbours) if neighbours else theirs)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2", "gemma3_text", "gemma4_text", "olmo3", "cohere2"])
@torch.no_grad()
def test_a_window_is_how_far_a_layer_reads(name, tmp_path):
    """Another first token changes what layer 0 makes of the positions within its window, and of no other."""
    target = Target(miniature(name, tmp_path))
    target.capture([0], [])
    one = target.forward(IDS_BT).hidden[0]
    other = target.forward(IDS_BT.index_fill(1, torch.tensor([0]), 3)).hidden[0]
    changed_T = (one - other).abs().amax((0, 2)) > 1e-6
    window = target.kv_shapes[0].window
    assert window == 8 and changed_T[:window].all() and not changed_T[window:].any()


def test_every_declared_family_has_a_miniature():
    assert {configuration(name).model_type for name in NAMES} >= FAMILIES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_declared_of_a_family_is_known_without_its_weights(name, tmp_path):
    recipe = TargetRecipe(path=str(miniature(name, tmp_path)))
    config = target_config(recipe)
    target = Target(recipe.path)
    assert list(target.kv_shapes) == ([] if family_of(config).kv else layers_with_kv(config))
    sizes = target_sizes(recipe)
    assert all(getattr(target.architecture, name) == value for name, value in vars(sizes).items() if name != "last_kv")
    shapes = {layer: shape for layer, shape in sizes.last_kv.values()}
    assert shapes == {layer: target.kv_shapes[layer] for layer in shapes} and bool(shapes) == ("gemma4" in name)
    # The norm behind the last layer, of all that there are.
    last = sizes.num_layers - 1
    target.capture([last], [])
    states = target.forward(IDS_BT)
    close(private.final_norm(target.model)(states.hidden[last]) * target.logit_scale, states.last_hidden)


def test_a_family_that_would_be_read_wrongly_is_refused_by_name(tmp_path, monkeypatch):
    """Faults put into what is found: each is noticed on six tokens, and named."""
    folder = miniature("granite", tmp_path)
    for name, fault, words in (
        ("logit_scale", lambda config: 1.0, "'granite', whose logits are not"),
        ("embed_scale", lambda model: 1.0, "multiplies its embeddings by 3"),
        ("rotary", lambda model, layer=None: ([0.5] * 4, 1.0), "whose keys of layer 0 are not"),
        ("text_config", private.text_config, None),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(private, name, fault)
            if words is None:
                Target(folder)
                continue
            with pytest.raises(UserError, match=words):
                Target(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_off_by_one_is_noticed(dtype, tmp_path, monkeypatch):
    """Also where a layer changes next to nothing of what it is given, beside some numbers that are very large."""
    model = miniature_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1e4
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1e-2
            layer.mlp.down_proj.weight *= 1e-2
    model.save_pretrained(tmp_path)
    assert Target(tmp_path, dtype=dtype).kv_shapes
    hidden_of = private.own_outputs
    monkeypatch.setattr(proof.private, "own_outputs", lambda *_: ((*hidden_of(*_)[0][1:], None), hidden_of(*_)[1]))
    with pytest.raises(UserError, match="'llama', whose hidden states after layer 0 are not"):
        Target(tmp_path, dtype=dtype)


def test_a_window_that_no_layer_reads_through_is_none(tmp_path):
    """A configuration may have kept the key of another family."""
    target = Target(miniature("llama", tmp_path, sliding_window=8))
    assert {shape.window for shape in target.kv_shapes.values()} == {None}


def test_a_window_that_is_not_the_configuration_s_is_refused(tmp_path, monkeypatch):
    folder = miniature("mistral", tmp_path)
    monkeypatch.setattr(proof.private, "window_of", lambda *_: None)
    with pytest.raises(UserError, match="layer 0 reads 8 positions, where its configuration says None"):
        Target(folder)


def test_an_owner_of_keys_that_is_not_the_configuration_s_is_refused(tmp_path, monkeypatch):
    folder = miniature("gemma4_text_shared", tmp_path)
    monkeypatch.setattr(proof, "kv_owners", lambda config: [0, 1, 1, 1])
    with pytest.raises(UserError, match="'gemma4_text', whose layer 2 does not read the keys of layer 1"):
        Target(folder)


@pytest.mark.parametrize(
    "name,changed", [("gemma3_text", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})]
)
def test_a_model_that_sees_what_follows_is_refused(name, changed, tmp_path):
    with pytest.raises(UserError, match="is not causal"):
        Target(miniature(name, tmp_path, **changed))


def test_the_nearest_rotation_is_taken_where_a_bias_makes_all_alike(tmp_path):
    model = miniature_model("glm4", attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[-1] = 1000.0  # of a dimension that does not turn
    model.save_pretrained(tmp_path)
    assert all(found.neighbours for found in Target(tmp_path, dtype=torch.bfloat16)._kv.values())


OTHERS = {
    "apertus": {"hidden_act": "xielu"},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 0, "head_dim": 16},
    "openai-gpt": {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 512},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_that_nobody_declared_yields_hidden_states_or_is_refused_by_name(name, tmp_path):
    fields = {key: value for key, value in SIZES.items() if value is not None} | OTHERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields))
    with torch.no_grad():
        for weight in model.parameters():  # one norm is not as another
            weight += 0.2 * torch.randn_like(weight) * (weight.dim() == 1)
    model.save_pretrained(tmp_path)
    if name == "gemma3n_text":
        with pytest.raises(UserError, match="is a 'gemma3n_text', "):
            Target(tmp_path)
        return
    target = Target(tmp_path)
    target.capture([0, 2], [])
    states = target.forward(IDS_BT)
    if name != "openai-gpt":  # which norms inside of its layers alone
        close(private.final_norm(target.model)(states.hidden[2]), states.last_hidden)
    assert target.kv_shapes == {} and TargetParts(str(tmp_path)).weights_hash() == target.weights_hash()


def test_damaged_weights_are_told_apart_from_a_family_read_wrongly(tmp_path):
    target = Target(miniature("olmo2", tmp_path))
    target.layers[1].mlp.up_proj.weight.view(-1)[0] = torch.nan
    target.model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(UserError, match="not finite: its weights are damaged"):
        Target(tmp_path / "damaged")


def test_a_text_longer_than_its_rotary_embedding_stays_constant_is_too_long(tmp_path):
    assert target_sizes(TargetRecipe(path=str(miniature("phi3", tmp_path)))).max_positions == 64
    assert target_sizes(TargetRecipe(path=str(miniature("llama_dynamic", tmp_path)))).max_positions == 512


def test_a_manifest_record_is_made_only_where_layers_differ(tmp_path):
    plain = Target(miniature("qwen3", tmp_path))
    assert plain.other_kv_shapes([0, 2]) == {} and plain.head_facts == {}
    gemma = Target(miniature("gemma4_text", tmp_path))
    shapes = gemma.other_kv_shapes([0, 1])
    assert (shapes[0].head_dim, shapes[1].head_dim, shapes[0].window) == (16, 32, 8)
    assert gemma.head_facts == {"embed_scale": pytest.approx(32**0.5), "softcap": 5.0}
    assert replace(shapes[0], window=None) != gemma.kv_shapes[1]
