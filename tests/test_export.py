"""What servers load: exports read by the speculators package, which computes the same logits from the target's own states."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import UserError
from data_prep.target import Target
from tests.models import drafter_of, small_target
from tests.speculators_models import LENGTH, TINY, package, real_text
from tests.test_objectives import objective_of
from train.batches import make_pack
from train.drafter.config import DrafterConfig
from train.drafter.export import MASK_FILE, check_export, save_export
from train.drafter.model import Drafter
from train.losses import LossRecipe

KL = LossRecipe(kl=1)
HIDDEN = [3, 0, 2]  # not in ascending order, in which servers read them


@pytest.fixture(scope="module")
def speculators():
    return package()


@pytest.fixture(scope="module")
def target():
    return Target(str(TINY))


@pytest.fixture(scope="module")
def text(target):
    return real_text(target)


def drafter_for(target, objective, **changes):
    """One that no weight leaves as it started."""
    options = dict(
        objective=objective,
        reuse="hidden",
        target_layers=[1] if objective == "ttt" else [1, 4],
        hidden_layers=HIDDEN,
        slots=4,
        shifted=False,
        causal=False,
        seed=1,
        start="target",
        mask_token_id=2,
        architecture=target.architecture,
        target={},
        qk_norm=objective == "blockwise",
    )
    config = DrafterConfig(**options | changes)
    counts_V = torch.randint(0, 99, (config.architecture.vocab_size,), generator=torch.Generator().manual_seed(0))
    drafter, g = Drafter(config).start(target, target.frozen_head, counts_V), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in drafter.named_parameters():
            if name != "mask.weight":
                p += torch.randn(p.shape, generator=g) * (0.02 if p.dim() > 1 else 0.2)
    return drafter


@torch.no_grad()
def ours(target, drafter, text, anchors):
    """Logits of what a draft can say, [N, J, D]."""
    ids, states = text
    document = {
        "input_ids": ids,
        "loss_mask": (torch.arange(len(ids)) > 0).to(torch.uint8),
        "last_hidden": states.last_hidden[:-1],
        **{f"hidden.{i}": t for i, t in states.hidden.items()},
    }
    pack = make_pack(["text"], [document], [np.array(anchors)])
    logits, kept_D = objective_of(target, drafter, KL).logits(pack), drafter.head.kept_D
    return logits if kept_D is None else logits[..., kept_D]


def read(folder):
    return json.loads((folder / "config.json").read_text())


def aux(text, layers):
    return torch.cat([text[1].hidden[i] for i in layers], dim=-1)[None]


@torch.no_grad()
def eagle3_logits(folder, text, anchors, steps, layers=None):
    """[N, J, D] of speculators' EAGLE-3 model: its own converter reads the export."""
    from speculators import Eagle3DraftModel
    from speculators.convert import convert_model

    ids, layer_ids = text[0], read(folder)["eagle_aux_hidden_state_layer_ids"]
    convert_model(str(folder), str(TINY), "eagle3", str(folder / "converted"), eagle_aux_hidden_state_layer_ids=layer_ids)
    model = Eagle3DraftModel.from_pretrained(str(folder / "converted")).eval()
    # The package marks what a checkpoint lacks by NaN; this transformers, newer than it knows, has put random values there.
    torch.nn.init.constant_(model.embed_tokens.weight, torch.nan)
    model.load_verifier_weights()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    # Row t is the pair (x_{t+1}, f_t): step 1 of anchor t + 1. The layers are inputs, one more than the outputs that they name.
    features = aux(text, [i - 1 for i in layer_ids] if layers is None else layers)[:, :-1]
    rows = len(ids) - 1
    model(features, ids[None, 1:], torch.zeros(1, rows, dtype=torch.long), ttt_steps=steps)
    return torch.stack(seen, dim=1)[torch.tensor(anchors) - 1]


def dflash_model(folder):
    """speculators' DFlash model of an export. Its converter knows whole vocabularies only; names of weights are the same."""
    from speculators import DFlashDraftModel, SpeculatorModel
    from speculators.convert.dflash import DFlashConverter

    written = read(folder)
    if written["draft_vocab_size"] == written["vocab_size"]:
        model = SpeculatorModel.from_pretrained(str(folder), verifier=str(TINY))
    else:
        config = DFlashConverter()._build_config(written, str(TINY), None)
        config.draft_vocab_size = written["draft_vocab_size"]
        model, weights = DFlashDraftModel(config), load_file(folder / "model.safetensors")
        model.load_vocab_mappings(weights["t2d"], weights["d2t"])
        absent, foreign = model.load_state_dict(weights, strict=False)
        assert not foreign and set(absent) <= {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
        model.load_verifier_weights()
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    if (folder / MASK_FILE).is_file():  # speculators has no such thing: put where vLLM puts it
        mask = torch.load(folder / MASK_FILE, weights_only=True)
        model.embed_tokens.weight.data[mask["mask_token_id"]] = mask["embedding"]
    return model.eval()


@torch.no_grad()
def dflash_logits(folder, text, anchors, model=None, layers=None):
    """[N, J, D] of speculators' DFlash model: whole blocks behind these anchors."""
    from torch.nn.attention.flex_attention import create_block_mask

    model = model or dflash_model(folder)
    model._create_mask_fn = create_block_mask  # it would compile this
    ids, supervised = text[0], torch.zeros(1, LENGTH, dtype=torch.long)
    supervised[:, anchors] = 1  # where it puts its anchors
    features = aux(text, [i - 1 for i in model.target_layer_ids] if layers is None else layers)
    nothing = torch.zeros(1, LENGTH, dtype=torch.long)
    last = text[1].last_hidden[None]
    _, logits, *_ = model._backbone_forward(features, ids[None], supervised, last, nothing, max_anchors=len(anchors))
    return logits[0].unflatten(0, (len(anchors), -1))[:, 1:]


def assert_same(theirs, mine):
    assert theirs.shape == mine.shape and mine.std() > 0.5
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)


def differ(theirs, mine):
    return (theirs - mine).abs().max() > 0.1


ANCHORS = [1, 2, 17, 60, 110]


@pytest.mark.parametrize("changes", [{}, {"draft_vocab": 500, "own_head": True, "rope_factor": 2.0}], ids=["whole", "reduced"])
def test_speculators_computes_the_logits_of_an_eagle3_export(speculators, target, text, tmp_path, changes):
    drafter = drafter_for(target, "ttt", **changes)
    assert save_export(drafter, target, tmp_path, "eagle3") == []
    mine = ours(target, drafter, text, ANCHORS)
    assert_same(eagle3_logits(tmp_path, text, ANCHORS, 4), mine)
    written = read(tmp_path)
    assert written["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # vLLM's: inputs
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]  # SGLang's: outputs
    weights = load_file(tmp_path / "model.safetensors")
    kept_D = torch.arange(len(weights["d2t"])) + weights["d2t"]
    assert torch.equal(kept_D, torch.arange(8192) if not changes else drafter.head.kept_D)
    assert torch.equal(weights["t2d"].nonzero().squeeze(1), kept_D)


def test_wrong_layers_show_in_an_eagle3_export(speculators, target, text, tmp_path):
    """Two negative controls: features in the order of training instead of ascending, and vLLM's ids taken for outputs."""
    drafter = drafter_for(target, "ttt")
    save_export(drafter, target, tmp_path, "eagle3")
    mine = ours(target, drafter, text, ANCHORS)
    for layers in ([3, 0, 2], [1, 3, 4]):
        assert differ(eagle3_logits(tmp_path, text, ANCHORS, 2, layers), mine[:, :2])


CASES = {
    "whole": {},
    "reduced": {"draft_vocab": 500, "own_head": True, "rope_factor": 2.0},
    "reduced, the target's rows": {"draft_vocab": 500},
    "causal": {"causal": True},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_speculators_computes_the_logits_of_a_dflash_export(speculators, target, text, tmp_path, changes):
    drafter = drafter_for(target, "blockwise", **changes)
    notes = save_export(drafter, target, tmp_path, "dflash")
    assert [n for n in notes if "LM head" not in n] == [] and bool(notes) == bool(changes.get("draft_vocab"))
    assert not (tmp_path / MASK_FILE).exists()  # MASK is still the target's token
    assert_same(dflash_logits(tmp_path, text, ANCHORS), ours(target, drafter, text, ANCHORS))
    assert read(tmp_path)["dflash_config"]["target_layer_ids"] == [0, 2, 3]
    if drafter.config.draft_vocab:
        weights = load_file(tmp_path / "model.safetensors")
        assert torch.equal(torch.arange(500) + weights["d2t"], drafter.head.kept_D)
        assert torch.equal(weights["t2d"].nonzero().squeeze(1), drafter.head.kept_D)


def test_a_learned_mask_is_exported_beside_the_weights(speculators, target, text, tmp_path):
    """And three negative controls: features in another order, off by one, and the token in MASK's place."""
    drafter = drafter_for(target, "blockwise")
    with torch.no_grad():
        drafter.mask.weight += torch.randn(drafter.mask.weight.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    (note,) = save_export(drafter, target, tmp_path, "dflash")
    assert MASK_FILE in note and "SGLang" in note
    mine, model = ours(target, drafter, text, ANCHORS), dflash_model(tmp_path)
    assert_same(dflash_logits(tmp_path, text, ANCHORS, model), mine)
    for layers in ([3, 0, 2], [1, 3, 4]):
        assert differ(dflash_logits(tmp_path, text, ANCHORS, model, layers), mine)
    model.embed_tokens.weight.data[2] = target.frozen_head.embedding_VE[2]
    assert differ(dflash_logits(tmp_path, text, ANCHORS, model), mine)
    save_export(drafter_for(target, "blockwise"), target, tmp_path, "dflash")
    assert not (tmp_path / MASK_FILE).exists()  # another drafter's MASK does not stay


def test_an_export_says_what_sglang_cannot_do(target, tmp_path):
    layers = dict(hidden_layers=[0, 5])  # SGLang reads states before a layer, and there is none behind the last
    for objective, format in (("ttt", "eagle3"), ("blockwise", "dflash")):
        (note,) = save_export(drafter_for(target, objective, **layers), target, tmp_path / format, format)
        assert "SGLang hands out no hidden state of the target's last layer, 5" in note


@pytest.mark.parametrize(
    "cell,options,format,message",
    [
        (("ttt", "kv"), {}, "eagle3", "reuse=kv reads state that no server hands out"),
        (("blockwise", "hybrid"), {}, "dflash", "reuse=hybrid reads state that no server hands out"),
        (("ttt", "none"), {}, "eagle3", "reuse=none reads no hidden states"),
        (("ttt", "none"), {"lm": {"path": "x", "layers": 1}}, "eagle3", "a language model of its own"),
        (("blockwise", "hidden"), {}, "eagle3", "it is for ttt drafters, and this is blockwise: format=dflash"),
        (("ttt", "hidden"), {}, "dflash", "it is for block-wise drafters, and this is ttt: format=eagle3"),
        (("ttt", "hidden"), {}, "eagle3", "queries and keys are normed"),
        (("ttt", "hidden"), {"qk_norm": False, "target_layers": [1, 2]}, "eagle3", "it has 2 layers"),
        (("ttt", "hidden+norms"), {"qk_norm": False}, "eagle3", "EAGLE-3.1's norms"),
        (("ttt", "hidden"), {"biases": True}, "eagle3", "its projections have biases"),
        (("blockwise", "hidden"), {"biases": True}, "dflash", "its projections have biases"),
        (("blockwise", "hidden"), {"qk_norm": False}, "dflash", "DFlash norms queries and keys"),
        (("blockwise_pairs", "hidden"), {}, "dflash", "it is an EAGLE-3 drafter that fills a block"),
        (("blockwise", "hidden"), {"shifted": True}, "dflash", "train with objective.shifted=false"),
        (("blockwise", "hidden"), {"sequential": "markov"}, "dflash", "no DFlash server runs a sequential head"),
        (("blockwise", "hidden"), {"mask_token_id": None}, "dflash", "target.mask_token_id was null"),
        (("blockwise", "hidden"), {"scaled": True, "rope_factor": 2.0}, "dflash", "rope_factor=2 on top of the target's own"),
    ],
)
def test_what_no_server_can_load_is_not_exported(tmp_path, cell, options, format, message):
    drafter, changes = drafter_of(small_target(), *cell), dict(options)
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
