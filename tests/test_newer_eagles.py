"""EAGLE-3.1's norms against the speculators package's own model class, on random weights.

Shapes: N anchors, J drafted slots, V vocabulary.
"""

import logging

import numpy as np
import pytest
import torch

from tests.models import HIDDEN_LAYERS, drafter_of, small_target
from tests.test_drafter import random_weights
from tests.test_objectives import document, objective_of
from train.batches import make_pack
from train.losses import LossRecipe

LENGTH = 40
ANCHORS = [1, 2, 9, 20, 35]


@pytest.fixture(scope="module", autouse=True)
def speculators():
    """The package, told to be quiet."""
    speculators = pytest.importorskip("speculators", reason="pip install --no-deps speculators (make test does)")
    __import__("loguru").logger.disable("speculators")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return speculators


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def target(request):
    """llama has no norms of queries and keys, qwen3 has; in float64, where the order of sums is of no account."""
    return small_target(request.param, torch.float64)


def theirs_of(drafter, model_class, config_class, **fields):
    """Their model of the same sizes with the weights of `drafter`, layer by layer under their names."""
    from transformers import LlamaConfig, Qwen3Config

    config, a = drafter.config, drafter.config.architecture
    sizes = dict(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size,
        num_hidden_layers=config.depth,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        rms_norm_eps=a.norm_eps,
        max_position_embeddings=a.max_positions,
        attention_bias=False,
        attn_implementation="eager",
    )
    layer_config = (Qwen3Config if config.normed else LlamaConfig)(**sizes)
    made = config_class(
        transformer_layer_config=layer_config,
        draft_vocab_size=a.vocab_size,
        eagle_aux_hidden_state_layer_ids=[i + 1 for i in config.hidden_layers],
        fc_norm=config.fc_norm,
        norm_output=config.norm_output,
        **fields,
    )
    model = model_class(made).double().eval()
    weights = {}
    for name, tensor in drafter.state_dict().items():
        if not name.startswith("layers."):
            weights[name] = tensor
            continue
        _, layer, part = name.split(".", 2)
        part = part.removeprefix("branches.hidden.").removesuffix(".weight")
        if part in ("q", "k", "v", "o"):
            part = f"self_attn.{part}_proj"
        elif part in ("q_norm", "k_norm"):
            part = f"self_attn.{part}"
        elif part in ("gate", "up", "down"):
            part = f"mlp.{part}_proj"
        elif layer == "0":
            part = {"token_norm": "input_layernorm", "input_norm": "hidden_norm"}.get(part, "post_attention_layernorm")
        else:
            part = {"input_norm": "input_layernorm"}.get(part, "post_attention_layernorm")
        weights[f"layers.{layer}.{part}.weight"] = tensor
    return model, weights


def loaded(model, weights, target):
    """`model` with these weights and the target's embedding and LM head; none is left over and none is missing."""
    head = target.frozen_head
    weights = weights | {"embed_tokens.weight": head.embedding_VE, "lm_head.weight": head.head_VE}
    absent, foreign = model.load_state_dict(weights, strict=False)
    assert not foreign and set(absent) <= {"verifier_norm.weight", "verifier_lm_head.weight"}
    return model


@pytest.fixture(scope="module")
def text(target):
    """One document as the cache hands it out."""
    return document(target, LENGTH, seed=1)


@torch.no_grad()
def ours(target, drafter, text):
    """[N, J, V]."""
    pack = make_pack(["text"], [text], [np.array(ANCHORS)])
    return objective_of(target, drafter, LossRecipe(kl=1)).logits(pack)


def pairs(text):
    """(tokens x_1 .. [1, T], what fc reads of f_0 .. [1, T, I]): row t is the pair at position t + 1."""
    hidden = torch.cat([text[f"hidden.{i}"] for i in HIDDEN_LAYERS], dim=-1)
    return text["input_ids"][None, 1:], hidden[None, :-1]


@torch.no_grad()
def eagle3_logits(target, drafter, text, steps):
    """[N, J, V] of speculators' EAGLE-3 model."""
    from speculators import Eagle3DraftModel
    from speculators.models.eagle3 import Eagle3SpeculatorConfig

    model = loaded(*theirs_of(drafter, Eagle3DraftModel, Eagle3SpeculatorConfig, norm_before_residual=False), target)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    tokens, hidden = pairs(text)
    model(hidden, tokens, torch.zeros_like(tokens), ttt_steps=steps)
    return torch.stack(seen, dim=1)[torch.tensor(ANCHORS) - 1]


@pytest.mark.parametrize("norms", [("fc_norm", "norm_output"), ("fc_norm",), ("norm_output",), ()], ids="+".join)
@pytest.mark.parametrize("layers", [1, 2])
def test_ttt_with_eagle31_norms_is_speculators(target, text, layers, norms):
    """The logits of four steps. Negative control: the same weights without one of the norms, or with one more, are another
    function, of the first step already with fc_norm and from the second on with norm_output."""
    drafter = random_weights(drafter_of(target, "ttt", "hidden", layers=layers, **dict.fromkeys(norms, True)))
    mine, theirs = ours(target, drafter, text), eagle3_logits(target, drafter, text, 4)
    assert mine.shape == theirs.shape == (len(ANCHORS), 4, 11) and mine.std() > 0.5
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)
    for name, first_step_differs in (("fc_norm", True), ("norm_output", False)):
        changed = drafter_of(target, "ttt", "hidden", layers=layers, **(dict.fromkeys(norms, True) | {name: name not in norms}))
        random_weights(changed, seed=3)
        known = {n: t for n, t in drafter.state_dict().items() if n in changed.state_dict()}
        changed.load_state_dict(known, strict=False)
        apart = (ours(target, changed, text) - theirs).abs().amax(dim=(0, 2))
        assert (apart[0] > 0.1) == first_step_differs and (apart[1:] > 0.1).all()
