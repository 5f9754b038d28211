"""What servers load: exports read by the speculators package, which computes the same logits from the target's own states."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from data_prep.target.architecture import KVLayer
from data_prep.target.target import Target
from tests.support.models import drafter_of, small_target
from tests.support.served_drafters import ANCHORS, assert_same, block_logits, differ, drafter_for, eagle3_logits, logits_of
from tests.support.speculators_models import TINY, model_of, package, real_text
from train.drafter.formats.export import check_export, save_export
from train.drafter.formats.names import MASK_FILE
from train.losses.recipe import LossRecipe

KL = LossRecipe(kl=1)


@pytest.fixture(scope="module")
def speculators():
    return package()


@pytest.fixture(scope="module")
def target():
    return Target(str(TINY))


@pytest.fixture(scope="module")
def text(target):
    return real_text(target)


def read(folder):
    return json.loads((folder / "config.json").read_text())


def speculators_model(folder):
    """The package's own model of an export, as its loader makes it."""
    from speculators import SpeculatorModel

    model = SpeculatorModel.from_pretrained(str(folder))
    weights = load_file(folder / "model.safetensors")
    # The package marks what a checkpoint lacks by NaN; this transformers, newer than it knows, has put random values there.
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name not in weights:
            torch.nn.init.constant_(model.get_parameter(name), torch.nan)
    model.load_verifier_weights()
    if (folder / MASK_FILE).is_file():  # speculators has no such thing: put where vLLM puts it
        mask = torch.load(folder / MASK_FILE, weights_only=True)
        model.embed_tokens.weight.data[mask["mask_token_id"]] = mask["embedding"]
    if "embed_tokens.weight" in weights:  # vLLM keeps it, speculators loads the target's again over a block's
        model.embed_tokens.weight.data = weights["embed_tokens.weight"]
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    return model.eval()


MARKOV = {"sequential": "markov", "sequential_size": 16}
REDUCED = {"draft_vocab": 500, "own_head": True, "rope_factor": 2.0}
EAGLE3 = {
    "whole": {},
    "a head of its own": {"own_head": True},
    "reduced": REDUCED,
    "reduced, the target's rows": {"draft_vocab": 500},
    "three layers": {"target_layers": [1, 2, 4]},
    "norms of queries and keys": {"target_layers": [1, 4], "qk_norm": True},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
}
BLOCKS = {
    "whole": {},
    "reduced": REDUCED,
    "reduced, the target's rows": {"draft_vocab": 500},
    "causal": {"causal": True},
    "shifted": {"shifted": True},
    "a Markov head": MARKOV,
    "shifted, a Markov head, reduced, causal": {"shifted": True, "causal": True} | MARKOV | REDUCED,
}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("changes", EAGLE3.values(), ids=EAGLE3)
def test_speculators_computes_the_logits_of_an_eagle3_export(speculators, target, text, tmp_path, changes):
    drafter = drafter_for(target, "ttt", **changes)
    (note,) = save_export(drafter, target, tmp_path, "speculators")
    assert note == "SGLang 0.5.23 does not read format=speculators"
    assert_same(eagle3_logits(speculators_model(tmp_path), text, ANCHORS, 4), logits_of(target, drafter, text, ANCHORS))


@pytest.mark.parametrize("changes", BLOCKS.values(), ids=BLOCKS)
def test_speculators_computes_the_logits_of_a_blocks_export(speculators, target, text, tmp_path, changes):
    drafter = drafter_for(target, "blockwise", **changes)
    notes = save_export(drafter, target, tmp_path, "speculators")
    assert not any("MASK" in note for note in notes)  # it is still the target's token
    assert not (tmp_path / MASK_FILE).exists() and "embed_tokens.weight" not in weights_of(tmp_path)
    assert_same(block_logits(speculators_model(tmp_path), text, ANCHORS), logits_of(target, drafter, text, ANCHORS))


def test_speculators_loads_a_peagle_export(speculators, target, tmp_path):
    """As the model that tests/train/test_newer_eagles.py shows to compute our logits."""
    drafter = drafter_for(target, "blockwise", pairs=True, shifted=True, causal=True, fc_norm=True, qk_norm=False)
    with torch.no_grad():
        drafter.mask.weight += 0.1
    save_export(drafter, target, tmp_path, "speculators")
    loaded = speculators_model(tmp_path).state_dict()
    shown = model_of(drafter, target).state_dict()
    assert loaded.keys() == shown.keys() and loaded["mask_hidden"].std() > 0
    assert [name for name in shown if not torch.equal(loaded[name], shown[name])] == []


GOLDEN = {
    "eagle3": ("ttt", {}, "LlamaForCausalLMEagle3", "llama"),
    "eagle3, norms": ("ttt", {"target_layers": [1, 4], "qk_norm": True}, "Eagle3Qwen3ForCausalLM", "qwen3"),
    "eagle3, reduced": ("ttt", REDUCED, "LlamaForCausalLMEagle3", "llama"),
    "dflash": ("blockwise", {}, "DFlashDraftModel", "qwen3"),
    "dspark": ("blockwise", {"shifted": True}, "Qwen3DSparkModel", "qwen3"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_servers_own_formats_hold_the_same_weights(target, tmp_path, name):
    """The names and numbers that vLLM 0.32 and SGLang 0.5.23 look for, each in its own way of counting."""
    objective, changes, architecture, model_type = GOLDEN[name]
    drafter = drafter_for(target, objective, **changes)
    format = name.split(",")[0]
    save_export(drafter, target, tmp_path / "plain", format)
    save_export(drafter, target, tmp_path / "package", "speculators")
    plain, package = weights_of(tmp_path / "plain"), weights_of(tmp_path / "package")
    if name == "eagle3, norms":  # the norm that SGLang looks for under another name
        assert torch.equal(plain.pop("layers.1.hidden_norm.weight"), plain["layers.1.input_layernorm.weight"])
    renamed = {n.replace("midlayer.", "layers.0."): tensor for n, tensor in plain.items()}
    assert renamed.keys() == package.keys()
    assert all(torch.equal(renamed[n], package[n]) for n in package)
    assert any(n.startswith("midlayer.") for n in plain) == (format == "eagle3" and len(drafter.config.target_layers) == 1)
    # Beside a whole vocabulary vLLM refuses d2t ("no module or parameter named 'draft_id_to_target_id'").
    assert ({"lm_head.weight", "d2t", "t2d"} <= plain.keys()) == bool(drafter.config.draft_vocab)
    assert ({"lm_head.weight", "d2t", "t2d"}.isdisjoint(plain)) == (not drafter.config.draft_vocab)
    if drafter.config.draft_vocab:
        kept_D = torch.arange(500) + plain["d2t"]
        assert torch.equal(kept_D, drafter.head.kept_D) and torch.equal(plain["t2d"].nonzero().squeeze(1), kept_D)
    written = read(tmp_path / "plain")
    verifier = read(tmp_path / "package")["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str(TINY), "architectures": ["Qwen3ForCausalLM"]}
    assert (written["architectures"], written["model_type"]) == ([architecture], model_type)
    if format == "eagle3":
        assert written["draft_vocab_size"] == drafter.config.draft_vocab  # null: SGLang takes the target's head
        assert written["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # vLLM's: inputs
        assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]  # SGLang's: outputs
    else:
        assert written["dflash_config"] == {"mask_token_id": 2, "target_layer_ids": [0, 2, 3], "causal": False}
        assert written["draft_vocab_size"] == 8192
    if format == "dspark":
        assert written["block_size"] == drafter.config.draft_length  # there it counts what is drafted
        assert (written["target_layer_ids"], written["mask_token_id"]) == ([0, 2, 3], 2)
        assert (written["sample_from_anchor"], written["dspark_bonus_anchor"], written["markov_rank"]) == (True, False, 1)


def test_wrong_layers_show_in_an_eagle3_export(speculators, target, text, tmp_path):
    """Two negative controls: features in the order of training instead of ascending, and vLLM's ids taken for outputs."""
    drafter = drafter_for(target, "ttt")
    save_export(drafter, target, tmp_path, "speculators")
    mine = logits_of(target, drafter, text, ANCHORS)
    for layers in ([3, 0, 2], [1, 3, 4]):
        assert differ(eagle3_logits(speculators_model(tmp_path), text, ANCHORS, 2, layers), mine[:, :2])


def learned_mask(target, **changes):
    drafter = drafter_for(target, "blockwise", **changes)
    with torch.no_grad():
        drafter.mask.weight += torch.randn(drafter.mask.weight.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    return drafter


def test_a_learned_mask_is_exported_beside_the_weights(speculators, target, text, tmp_path):
    """And three negative controls: features in another order, off by one, and the token in MASK's place."""
    drafter = learned_mask(target)
    notes = save_export(drafter, target, tmp_path / "plain", "dflash")
    assert "SGLang 0.5.23 writes the learned MASK over the target's own embedding of token 2, which no text should hold" in notes
    assert (tmp_path / "plain" / MASK_FILE).is_file()
    save_export(drafter, target, tmp_path, "speculators")
    mine = logits_of(target, drafter, text, ANCHORS)
    model = speculators_model(tmp_path)
    assert_same(block_logits(model, text, ANCHORS), mine)
    for layers in ([3, 0, 2], [1, 3, 4]):
        assert differ(block_logits(model, text, ANCHORS, layers), mine)
    model.embed_tokens.weight.data[2] = target.frozen_head.embedding_VE[2]
    assert differ(block_logits(model, text, ANCHORS), mine)
    save_export(drafter_for(target, "blockwise"), target, tmp_path, "speculators")
    assert not (tmp_path / MASK_FILE).exists()  # another drafter's MASK does not stay


def test_dspark_holds_a_learned_mask_in_a_table_of_embeddings(speculators, target, text, tmp_path):
    """No pickle, but as large as the vocabulary, which the command says. Without the row it is another function."""
    drafter = learned_mask(target, shifted=True, **MARKOV)
    notes = save_export(drafter, target, tmp_path, "speculators")
    assert any("8 MiB larger" in note for note in notes) and not (tmp_path / MASK_FILE).exists()
    mine = logits_of(target, drafter, text, ANCHORS)
    model = speculators_model(tmp_path)
    assert_same(block_logits(model, text, ANCHORS), mine)
    model.embed_tokens.weight.data[2] = target.frozen_head.embedding_VE[2]
    assert differ(block_logits(model, text, ANCHORS), mine)
    model = speculators_model(tmp_path)
    model.markov_head.markov_w1.weight.data.zero_()
    assert differ(block_logits(model, text, ANCHORS), mine)


def test_an_export_says_what_sglang_cannot_do(target, tmp_path):
    layers = dict(hidden_layers=[0, 5])  # SGLang reads states before a layer, and there is none behind the last
    for objective, format in (("ttt", "eagle3"), ("blockwise", "dflash")):
        notes = save_export(drafter_for(target, objective, **layers), target, tmp_path / format, format)
        assert "SGLang 0.5.23 hands out no hidden state of the target's last layer, 5, which is read" in notes


@pytest.mark.parametrize(
    "objective,changes,format,said",
    [
        ("ttt", {"qk_norm": True}, "eagle3", "has no class for EAGLE-3 with norms of queries and keys, and refuses it"),
        ("ttt", {"norm_before_residual": True}, "eagle3", "does not know drafter.norm_before_residual"),
        ("ttt", {"hidden_layers": [2]}, "eagle3", "leaves out fc where one hidden state alone is read"),
        ("blockwise", {"shifted": True, "draft_vocab": 500}, "dspark", "does not load DSpark with a reduced vocabulary"),
        ("blockwise", {"draft_vocab": 500}, "dflash", "drafts with the target's LM head instead of the drafter's own"),
        ("ttt", {}, "eagle3", None),
    ],
)
def test_an_export_says_what_sglang_does_otherwise(target, tmp_path, objective, changes, format, said):
    notes = [n for n in save_export(drafter_for(target, objective, **changes), target, tmp_path, format) if "SGLang" in n]
    assert [said in note for note in notes] == [True] if said else notes == []


ASSISTANT = {"kind": "gemma4_assistant", "constant_positions": True}
ADVANCING = {"constant_positions": False}
WINDOWED = {"target_layers": [1], "kv_shapes": [KVLayer(2, 8, [1.0], 1.0, window=8)]}


@pytest.mark.parametrize(
    "cell,options,format,message",
    [
        (("ttt", "kv"), {}, "eagle3", "reuse=kv reads K/V, which vLLM 0.32 and SGLang 0.5.23 do not hand to such a drafter"),
        (("blockwise", "hybrid"), {}, "speculators", "reuse=hybrid reads K/V"),
        (("ttt", "queries"), {}, "eagle3", "queries alone, which no server does but .* Gemma 4 .*; format=drafter writes it"),
        (("ttt", "queries"), {}, "gemma4_assistant", "queries alone, which no server does but for assistants of Gemma 4"),
        (("ttt", "queries"), ASSISTANT, "eagle3", "it is for eagle3, and this is gemma4_assistant: format=gemma4_assistant"),
        (("ttt", "queries"), ASSISTANT, "speculators", "it is for eagle3 and .*, and this is gemma4_assistant: format=gemma4"),
        (("ttt", "queries"), ASSISTANT | ADVANCING, "gemma4_assistant", "hold all rows at the last processed position"),
        (("ttt", "queries"), ASSISTANT | WINDOWED, "gemma4_assistant", "last layer reads a layer without a window"),
        (("ttt", "kv"), {}, "gemma4_assistant", "reuse=kv reads K/V, which vLLM"),
        (("ttt", "hidden"), {}, "gemma4_assistant", "it is for gemma4_assistant, and this is eagle3: format=eagle3 or"),
        (("ttt", "none"), {}, "eagle3", "reuse=none reads no hidden states"),
        (("ttt", "none"), {"lm": {"path": "x", "layers": 1}}, "eagle3", "a language model of its own"),
        (("blockwise", "hidden"), {}, "eagle3", "it is for eagle3, and this is dflash: format=dflash or format=speculators"),
        (("ttt", "hidden"), {}, "dflash", "it is for dflash, and this is eagle3: format=eagle3 or format=speculators"),
        (("ttt", "hidden"), {"biases": True}, "eagle3", "its projections have biases"),
        (("blockwise", "hidden"), {"biases": True}, "dflash", "its projections have biases"),
        (("blockwise", "hidden"), {"qk_norm": False}, "dflash", "DFlash and DSpark norm queries and keys"),
        (("blockwise_pairs", "hidden"), {}, "dflash", "it is for dflash, and this is peagle: format=speculators"),
        (("blockwise", "hidden"), {"shifted": True}, "dflash", "it is for dflash, and this is dspark: format=dspark"),
        (("blockwise", "hidden"), {"sequential": "gru"}, "dspark", "run no GRU that corrects what the LM head reads"),
        (("blockwise", "hidden"), {"mask_token_id": None}, "dflash", "target.mask_token_id was null"),
        (("blockwise", "hidden"), {"scaled": True, "rope_factor": 2.0}, "dflash", "rope_factor=2 on top of the target's own"),
    ],
)
def test_what_no_server_can_load_is_not_exported(tmp_path, cell, options, format, message):
    drafter = drafter_of(small_target(), *cell)
    changes = dict(options)
    architecture = drafter.config.architecture
    if changes.pop("biases", False):
        changes["architecture"] = replace(architecture, qkv_bias=True)
    if changes.pop("scaled", False):
        changes["architecture"] = replace(architecture, inv_freq=[1.0, 0.1, 0.001, 0.0001])
    config = replace(drafter.config, **changes)
    for refusing in (
        lambda: check_export(config, format),
        lambda: save_export(SimpleNamespace(config=config), None, tmp_path / "served", format),
    ):
        with pytest.raises(UserError, match=f"cannot be exported as format={format}: .*{message}"):
            refusing()
    assert not any(tmp_path.iterdir())
