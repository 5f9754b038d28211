"""Language models of other families as drafters: one function in training and decoding, with and without a view, or a refusal
that says why."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from tests.support.alignment import VIEWS, Alignment, measure
from tests.support.models import small_target
from tests.support.packs import packed_with_budgets
from train.attention.choose import BACKENDS
from train.drafter.build import load_drafter, new_drafter
from train.drafter.config import DrafterConfig
from train.drafter.standalone import Standalone, check_vocabulary, lm_config
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision
from train.views.recipe import FULL

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 11}
SIZES |= {"max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "llama, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {},  # rotates a part of each head
    "gpt2": GPT2,  # learned positions, dropout
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # scales its queries itself
}
IN_CACHE = ("llama", "llama, tied", "qwen3", "gpt_neox")


@pytest.fixture(scope="module")
def target():
    return small_target()


def saved(folder, family, **more):
    torch.manual_seed(3)
    kind = family.split(",")[0]
    sizes = SIZES | FAMILIES.get(family, {}) | more
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    return str(folder)


def drafter_of(target, path, start="target", **more):
    about = {"id": "small", "weights_hash": "w", "tokenizer_hash": "t"}
    config = DrafterConfig("ttt", "none", [], [], 4, False, False, 1, start, 4, target.architecture, about, lm=lm_config(path))
    config = dataclasses.replace(config, **more)
    return new_drafter(config).start(target, target.frozen_head)


def same_as_decoded(found: Alignment) -> bool:
    """Greedy decoding and the training forward: the same logits, tokens and numbers of kept drafts."""
    return found.worst < 1e-4 and not (found.other_vocabulary or found.other_tokens or found.other_lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_forward_is_decode_loop(target, tmp_path, family):
    drafter = drafter_of(target, saved(tmp_path, family))
    assert drafter.config.position_table == (not hasattr(drafter.body, "rotary_emb"))
    views = [None, "quest, every 9 tokens", "h2o", "snapkv"]
    if family in IN_CACHE:
        drafter.check_in_cache()
        views += ["mean in cache", "sink_recent in cache"]
    else:
        with pytest.raises(UserError, match="view.positions=in_cache: the keys of .* do not turn with their positions"):
            drafter.check_in_cache()
    for view in views:
        found = measure(target, drafter, view=view and VIEWS[view], temperature=1.0)
        assert not found.other_vocabulary, view
        assert found.worst < 1e-4 and found.refused >= 5, view


def test_a_drafter_with_the_targets_own_weights_is_always_accepted(target, tmp_path):
    """A drafter that is the target: with the target's own weights as a standalone model, everything it says is accepted."""
    target.model.save_pretrained(tmp_path)
    found = measure(target, drafter_of(target, str(tmp_path)))
    assert same_as_decoded(found)
    assert found.kept > 60 and found.refused == 0


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2"])
def test_a_saved_standalone_drafter_loads_with_its_tied_head(target, tmp_path, family):
    """A tied head is saved once, trains as one tensor, and is one again."""
    drafter = drafter_of(target, saved(tmp_path / "lm", family))
    names = [name for name, _ in drafter.named_parameters()]
    assert ("head.weight" in names) == (family == "llama")  # GPT-2's is tied too
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    drafter.save_pretrained(tmp_path / "out")
    again = load_drafter(tmp_path / "out")
    assert isinstance(again, Standalone) and [n for n, _ in again.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(drafter.state_dict().values(), again.state_dict().values()))
    assert same_as_decoded(measure(target, again))


def test_bf16_leaves_frequencies_alone_and_training_drops_nothing_out(target, tmp_path):
    drafter = drafter_of(target, saved(tmp_path, "llama"))
    exact = drafter.body.rotary_emb.inv_freq.clone()
    assert exact.to(torch.bfloat16).float().sub(exact).abs().max() > 0
    drafter.bfloat16()
    assert torch.equal(drafter.body.rotary_emb.inv_freq, exact) and drafter.dtype == torch.bfloat16
    noisy = drafter_of(target, saved(tmp_path / "gpt2", "gpt2")).train()
    assert noisy.training and same_as_decoded(measure(target, noisy))


def test_its_own_code_is_left_uncompiled(target, tmp_path):
    """Every drafter is told to compile on a GPU. A language model has no parts of ours, and drafts as before."""
    drafter = drafter_of(target, saved(tmp_path, "llama"))
    drafter.compile_parts()
    assert same_as_decoded(measure(target, drafter))


def test_a_random_start_is_a_function_of_the_seed(target, tmp_path):
    path = saved(tmp_path, "llama")
    one, same, own = (drafter_of(target, path, start) for start in ("random", "random", "target"))
    alike = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert alike(one, same) and not alike(one, own)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_rows_beyond_a_table_of_learned_positions_count_for_nothing(target, tmp_path, family):
    """The last anchors' draft rows and the first ones' queries lie outside the table, and count for nothing."""
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    long, short = (drafter_of(target, saved(tmp_path / str(size), family, **{name: size})) for size in (64, 26))
    fits = {key: value[: len(short.state_dict()[key])] for key, value in long.state_dict().items()}
    short.load_state_dict(fits)
    pack = packed_with_budgets(target, [FULL, 8])
    outcomes = []
    supervision = Supervision(LossRecipe(kl=1), torch.ones(4), 64, VIEWS["snapkv"])
    for drafter in (long, short):
        made = Objective(drafter, target.frozen_head, BACKENDS["reference"], supervision).eval()
        outcomes.append(made(pack))
    assert pack.anchor_N.min() == 1 and outcomes[0].valid[-1].tolist() == [
        True,
        False,
        False,
        False,
    ]  # the document has 26 tokens
    torch.testing.assert_close(outcomes[1].loss, outcomes[0].loss)


@pytest.mark.parametrize("rows", [9, 16])
def test_a_vocabulary_of_another_size_is_padded_or_cut_to_the_targets(target, tmp_path, rows):
    """Rows beyond the target's vocabulary say nothing; tokens beyond the model's are never said, and read as its last."""
    drafter = drafter_of(target, saved(tmp_path, "llama", vocab_size=rows))
    logits = drafter.head.logits(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), target.frozen_head)
    assert logits.shape == (3, 11) and logits.isfinite().sum(1).tolist() == [min(rows, 11)] * 3
    assert same_as_decoded(measure(target, drafter))


@pytest.mark.parametrize(
    "family,more,message",
    [
        ("gemma2", {"head_dim": 16}, "a sliding window, a cap on its scores"),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}, "a sliding window"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "its own logits differ"),
        ("cohere", {"num_key_value_heads": 4}, r"its own logits differ by .*\(logits that are scaled"),
        ("falcon", {}, "lets no other attention in"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' changes with"),
    ],
)
def test_a_family_that_would_be_wrong_is_refused(target, tmp_path, family, more, message):
    with pytest.raises(UserError, match=message):
        drafter_of(target, saved(tmp_path, family, **more))


def test_scaled_rotary_positions_are_checked_and_learned_ones_refused(target, tmp_path):
    path = saved(tmp_path / "llama", "llama")
    scaled = drafter_of(target, path, rope_factor=2.0)
    assert same_as_decoded(measure(target, scaled))
    with pytest.raises(UserError, match="drafter.rope_factor=2 scales rotary positions, which it has not"):
        drafter_of(target, saved(tmp_path / "gpt2", "gpt2"), rope_factor=2.0)


def test_a_wrong_model_with_small_logits_is_refused(target, tmp_path):
    """A model that says almost the same of every token is wrong when its differences are."""
    with pytest.raises(UserError, match="its own logits differ"):
        drafter_of(target, saved(tmp_path, "bloom", n_layer=2, n_head=4, initializer_range=0.01))


def test_missing_or_truncated_weights_are_a_one_line_error(target, tmp_path):
    path = saved(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp.up_proj" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks model.layers.1.mlp.up_proj.weight$"):
        drafter_of(target, path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be loaded"):
        drafter_of(target, path)


def test_what_is_no_model_or_speaks_otherwise_is_refused(target, tmp_path):
    with pytest.raises(UserError, match="there is no language model"):
        lm_config(str(tmp_path))

    class Tokenizer:
        def get_vocab(self):
            return {"a": 0, "b": 1}

    path = saved(tmp_path, "llama", vocab_size=11)
    check_vocabulary(path, Tokenizer(), 11)  # it has no tokenizer of its own, and as many tokens
    with pytest.raises(UserError, match="no tokenizer, and 11 tokens where the target has 12"):
        check_vocabulary(path, Tokenizer(), 12)
    with pytest.raises(UserError, match="another vocabulary than the target: token 0 is '<|endoftext|>' there and 'a' here"):
        check_vocabulary("data_prep/targets/tiny", Tokenizer(), 11)


def test_scaled_positions_are_those_of_a_shorter_context(target, tmp_path):
    """rope_factor=2: the logits at positions 2 p are those without it at positions p; both kinds of drafter."""
    drafter = drafter_of(target, saved(tmp_path, "llama"))
    scaled = Standalone(dataclasses.replace(drafter.config, rope_factor=2.0))
    scaled.load_state_dict(drafter.state_dict())
    from tests.support import models
    from train.attention.reference import reference
    from train.attention.visibility import Places

    own = models.drafter_of(target, "ttt", "none", layers=2)
    own_scaled = new_drafter(dataclasses.replace(own.config, rope_factor=2.0))
    own_scaled.load_state_dict(own.state_dict())
    position = torch.arange(9)
    for plain, wide in ((drafter, scaled), (own, own_scaled)):
        token = plain.embed(torch.arange(9), target.frozen_head)
        at = lambda d, p: d.remember(None, Places(p * 0, p), token, Places(p * 0, p), reference).layers[1]["tokens"].key
        torch.testing.assert_close(at(wide, 2 * position), at(plain, position), rtol=1e-5, atol=1e-5)
        assert (at(wide, position) - at(plain, position)).abs().max() > 1e-3
