"""The target's states are those of transformers, and what it would get wrong is refused.

Shapes: B texts, T tokens of each, H query heads, G key/value heads, D head size.
"""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from common.errors import UserError
from common.recipe import ROOT
from data_prep.capture.capture import Batch
from data_prep.sources.tokens import TokenDocument
from data_prep.target.target import Target
from tests.support.models import small_target

LAYERS = (0, 1, 2)
SIZES = dict(
    vocab_size=11,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)
IDS_BT = torch.randint(0, 11, (2, 37), generator=torch.Generator().manual_seed(1))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def target(request):
    target = small_target(request.param)
    target.capture(LAYERS, LAYERS, LAYERS)
    return target


@torch.no_grad()
def test_rotated_keys_and_values_are_the_kv_cache(target):
    cache = target.new_cache()
    states = target.forward(IDS_BT, cache)
    rotate = sys.modules[type(target.model).__module__].apply_rotary_pos_emb
    cos, sin = target.model.model.rotary_emb(states.last_hidden, torch.arange(37)[None])
    for layer in LAYERS:
        key_BGTD = states.key[layer].transpose(1, 2)
        _, rotated = rotate(key_BGTD, key_BGTD, cos, sin)
        close(rotated, cache.layers[layer].keys)
        close(states.value[layer].transpose(1, 2), cache.layers[layer].values)
        assert not torch.allclose(key_BGTD, cache.layers[layer].keys, atol=1e-2)


@torch.no_grad()
def test_queries_are_those_that_the_layer_attends_with(target):
    """Recomputed from the layer's input; and, rotated, they give its attention's output over its keys and values."""
    outputs = {}
    hooks = [
        target.layers[layer].self_attn.register_forward_hook(lambda *args, layer=layer: outputs.update({layer: args[2][0]}))
        for layer in LAYERS
    ]
    states = target.forward(IDS_BT)
    [hook.remove() for hook in hooks]
    rotate = sys.modules[type(target.model).__module__].apply_rotary_pos_emb
    cos, sin = target.model.model.rotary_emb(states.last_hidden, torch.arange(37)[None])
    for layer in LAYERS:
        attention = target.layers[layer].self_attn
        before = states.hidden[layer - 1] if layer else target.frozen_head.embed(IDS_BT)
        query_BTHD = attention.q_proj(target.layers[layer].input_layernorm(before)).unflatten(-1, (4, 8))
        close(states.query[layer], attention.q_norm(query_BTHD) if hasattr(attention, "q_norm") else query_BTHD)
        query, key = rotate(states.query[layer].transpose(1, 2), states.key[layer].transpose(1, 2), cos, sin)
        key, value = (t.repeat_interleave(2, 1) for t in (key, states.value[layer].transpose(1, 2)))  # 4 heads share 2
        scores = (query @ key.mT) / 8**0.5 + torch.full((37, 37), -torch.inf).triu(1)
        close(attention.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)), outputs[layer])


@torch.no_grad()
def test_hidden_states_and_logits_are_those_of_transformers(target):
    states = target.forward(IDS_BT)
    output = target.model(IDS_BT, output_hidden_states=True)
    for layer in LAYERS[:-1]:
        close(states.hidden[layer], output.hidden_states[layer + 1])  # [0] is the embedding
    close(target.model.model.norm(states.hidden[LAYERS[-1]]), states.last_hidden)
    assert not torch.allclose(states.hidden[LAYERS[-1]], states.last_hidden, atol=1e-2)
    close(target.logits(states.last_hidden), output.logits)


@pytest.mark.parametrize("first", [1, 20, 36])
def test_a_forward_in_two_chunks_equals_one_forward(target, first):
    cache = target.new_cache()
    whole = target.forward(IDS_BT)
    one, two = target.forward(IDS_BT[:, :first], cache), target.forward(IDS_BT[:, first:], cache)
    close(torch.cat([one.last_hidden, two.last_hidden], 1), whole.last_hidden)
    for kind in ("hidden", "key", "value", "query"):
        for layer in LAYERS:
            close(torch.cat([getattr(one, kind)[layer], getattr(two, kind)[layer]], 1), getattr(whole, kind)[layer])


def test_capture_returns_exactly_the_chosen_layers(target):
    try:
        target.capture([1], [0, 2])
        states = target.forward(IDS_BT)
        assert (set(states.hidden), set(states.key), set(states.value), states.query) == ({1}, {0, 2}, {0, 2}, {})
        target.capture([], [], [1])
        states = target.forward(IDS_BT)
        assert (states.hidden, states.key, states.value, set(states.query)) == ({}, {}, {}, {1})
        for layers in (([3], []), ([], [-1]), ([], [], [3])):
            with pytest.raises(UserError, match="there is no layer"):
                target.capture(*layers)
    finally:
        target.capture(LAYERS, LAYERS, LAYERS)


def saved(config, folder, dtype=torch.float32):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("left", [0, 100, -1])
def test_truncated_weights_are_refused(tmp_path, left):
    weights = saved(LlamaConfig(**SIZES), tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(UserError, match="no causal LM can be loaded"):
        Target(tmp_path)


def test_a_weight_that_is_missing_is_refused(tmp_path):
    path = saved(LlamaConfig(**SIZES), tmp_path) / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks model.layers.0.mlp.up_proj.weight"):
        Target(tmp_path)


def test_weights_hash_is_of_the_weights_alone(tmp_path):
    saved(Qwen3Config(**SIZES, tie_word_embeddings=False), tmp_path, torch.bfloat16)
    target = Target(tmp_path, dtype=torch.float32)
    before = target.weights_hash()
    assert before == Target(tmp_path, dtype=torch.bfloat16).weights_hash()
    for name, weight in target.model.named_parameters():
        one = weight.view(-1)[-1:]
        kept = one.clone()
        one += 1
        assert target.weights_hash() != before, name
        one.copy_(kept)
    assert target.weights_hash() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("attention", [None, "flash_attention_2"])
def test_documents_of_a_batch_do_not_see_each_other_on_a_gpu(attention):
    """The embedded target in bf16: padded (sdpa) and packed (flash-attn's variable-length kernel) against each document
    alone in float32. bf16 keeps 8 bits: a few per cent of a state's norm after six layers; a leak is several times that."""
    if attention and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    path = str(ROOT / "data_prep/targets/tiny")
    random = np.random.default_rng(0)
    exact, fast = Target(path), Target(path, dtype=torch.bfloat16, device="cuda", attention=attention)
    assert fast.packs == bool(attention)
    ids = [random.integers(3, 8000, n, dtype=np.int32) for n in (300, 7, 120, 1, 64)]
    batch = Batch([TokenDocument(str(i), x, np.zeros(len(x), dtype=np.uint8)) for i, x in enumerate(ids)])
    for target in (exact, fast):
        target.capture([5], [5], [5])
    found = batch.forward(fast)
    place = 0
    for x in ids:
        alone = exact.forward(torch.from_numpy(x).long()[None])
        for kind in ("hidden", "key", "value", "query"):
            mine = getattr(found, kind)[5][place : place + len(x)].float().cpu()
            theirs = getattr(alone, kind)[5][0]
            assert ((mine - theirs).norm() / theirs.norm()) < 0.03, (len(x), kind)
        place += len(x)
    shifted = exact.forward(torch.from_numpy(np.concatenate(ids)).long()[None]).hidden[5][0][300:307]  # a leak, for comparison
    whole = exact.forward(torch.from_numpy(ids[1]).long()[None]).hidden[5][0]
    assert (shifted - whole).norm() / whole.norm() > 0.1


def test_generate_of_transformers_meets_no_hook_of_ours():
    """`as_loaded`: what transformers compiles is its own model; afterwards states are handed out as before."""
    target = small_target()
    target.capture([0, 2], [1])
    before = target.forward(IDS_BT)
    with target.as_loaded():
        assert not any(module._forward_hooks for module in target.model.modules())
    after = target.forward(IDS_BT)
    assert set(after.hidden) == {0, 2} and set(after.key) == {1}
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), after.tensors()))
