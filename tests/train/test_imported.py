"""What we and the speculators package write comes back as it was. (Public layouts and refusals: test_public_checkpoints.py.)

Shapes: V vocabulary, E hidden size, R rank of a sequential head.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from data_prep.target.target import Target
from tests.support.commands import ROOT, SMALL, command
from tests.support.served_drafters import assert_same, differ, drafter_for, four_slots, imported, refused
from tests.support.speculators_models import TINY, model_of, package, real_text
from train.drafter.base import Drafter
from train.drafter.build import load_config
from train.drafter.formats.export import save_export
from train.drafter.formats.imported_weights import MARKOV
from train.drafter.formats.names import MASK_FILE, method_of
from train.drafter.warm_start import check_warm_start, warm_start


@pytest.fixture(scope="module")
def target():
    return Target(str(TINY))


@pytest.fixture(scope="module")
def text(target):
    return real_text(target)


def rewritten(folder, remove=(), tensors=None, **changes):
    """The checkpoint with other keys in its configuration, and other tensors."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    config = {key: value for key, value in (config | changes).items() if key not in remove}
    weights = {name: tensor for name, tensor in (weights | (tensors or {})).items() if tensor is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


REDUCED = {"draft_vocab": 500, "own_head": True}
MARKOV_HEAD = {"sequential": "markov", "sequential_size": 8}
PEAGLE = {"pairs": True, "shifted": True, "causal": True}
CELLS = {
    "eagle3": ("ttt", {}),
    "eagle3, reduced": ("ttt", REDUCED),
    "eagle3, reduced, the target's rows": ("ttt", {"draft_vocab": 500}),
    "eagle3, own head": ("ttt", {"own_head": True}),
    "eagle3, scaled positions": ("ttt", {"rope_factor": 2.0}),
    "eagle3, two layers, query norms": ("ttt", {"target_layers": [1, 4], "qk_norm": True}),
    "eagle3, the residual after the norm": ("ttt", {"norm_before_residual": True}),
    "eagle3.1": ("ttt", {"fc_norm": True, "norm_output": True}),
    "dflash": ("blockwise", {}),
    "dflash, reduced": ("blockwise", REDUCED),
    "dflash, reduced, the target's rows": ("blockwise", {"draft_vocab": 500}),
    "dflash, own head": ("blockwise", {"own_head": True}),
    "dflash, causal, scaled positions": ("blockwise", {"causal": True, "rope_factor": 2.0}),
    "dflash, learned MASK": ("blockwise", {"learned": True}),
    "dspark, no Markov head": ("blockwise", {"shifted": True}),
    "dspark": ("blockwise", {"shifted": True, "learned": True} | MARKOV_HEAD),
    "dspark, reduced": ("blockwise", REDUCED | MARKOV_HEAD),
}
ROUND_TRIPS = {f"{name}, {how}": (*cell, how) for name, cell in CELLS.items() for how in ("plain", "speculators")}
ROUND_TRIPS["peagle"] = ("blockwise", PEAGLE, "speculators")
ROUND_TRIPS["peagle, learned MASK"] = ("blockwise", PEAGLE | {"learned": True}, "speculators")


def exported(target, folder, kind, changes, format="plain") -> Drafter:
    changes = dict(changes)
    learned = changes.pop("learned", False)
    drafter = drafter_for(target, kind, **changes)
    if learned:
        with torch.no_grad():
            drafter.mask.weight += torch.randn(drafter.mask.weight.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    save_export(drafter, target, folder, method_of(drafter.config) if format == "plain" else format)
    return drafter


@pytest.mark.parametrize("kind,changes,format", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_what_we_export_comes_back_as_it_was(target, text, tmp_path, kind, changes, format):
    """The same logits but for the order in which fc adds up; and a drafter of its cell starts from it whole."""
    drafter = exported(target, tmp_path, kind, changes, format)
    again = imported(tmp_path, target)
    mine, theirs = four_slots(target, drafter, text), four_slots(target, again, text)
    assert_same(theirs, mine)
    same = ("shifted", "causal", "draft_vocab", "rope_factor", "depth", "positions", "pairs", "fc_norm", "norm_output")
    for name in (*same, "sequential", "norm_before_residual"):
        assert getattr(again.config, name) == getattr(drafter.config, name), name
    assert again.config.hidden_layers == [0, 2, 3] and ("speculators" in again.config.imported) == (format == "speculators")
    # The native format holds it too, bound to the target beside which it was read.
    again.save_pretrained(tmp_path / "native")
    assert load_config(tmp_path / "native") == again.config
    options = {key: value for key, value in changes.items() if key != "learned"} | {"hidden_layers": [0, 2, 3]}
    options |= {"slots": again.config.slots}
    fresh = drafter_for(target, kind, **options | {"own_head": again.config.own_head, "seed": 9})
    check_warm_start(str(tmp_path), fresh.config)
    _, left = warm_start(fresh, str(tmp_path), target.frozen_head)
    assert left == []
    torch.testing.assert_close(four_slots(target, fresh, text), theirs)


def test_an_export_with_layers_in_ascending_order_gives_identical_logits(target, text, tmp_path):
    """Where fc's columns stand in ascending order already, there is no rounding between the two."""
    for kind in ("ttt", "blockwise"):
        drafter = drafter_for(target, kind, hidden_layers=[0, 2, 3])
        save_export(drafter, target, tmp_path / kind, {"ttt": "eagle3", "blockwise": "dflash"}[kind])
        assert torch.equal(four_slots(target, imported(tmp_path / kind, target), text), four_slots(target, drafter, text))


def test_a_layer_off_by_one_shows_in_an_import(target, text, tmp_path):
    """The negative control: outputs where inputs are meant, and two layers' columns exchanged."""
    drafter = exported(target, tmp_path, "ttt", {})
    mine = four_slots(target, drafter, text)
    config = json.loads((tmp_path / "config.json").read_text())
    rewritten(tmp_path, ["eagle_config"], eagle_aux_hidden_state_layer_ids=[2, 4, 5])
    assert differ(four_slots(target, imported(tmp_path, target), text), mine)
    first, second, third = load_file(tmp_path / "model.safetensors")["fc.weight"].chunk(3, dim=1)
    rewritten(tmp_path, tensors={"fc.weight": torch.cat([second, first, third], dim=1)}, **config)
    assert differ(four_slots(target, imported(tmp_path, target), text), mine)


# The speculators package writes, we read

WRITTEN = {name: cell for name, cell in CELLS.items() if not {"rope_factor", "learned"} & cell[1].keys()}
del WRITTEN["dflash, own head"]  # of a block over the whole vocabulary it writes no head: it takes the target's
WRITTEN |= {"peagle": ("blockwise", PEAGLE)}


@pytest.mark.parametrize("kind,changes", WRITTEN.values(), ids=WRITTEN)
def test_what_speculators_writes_is_read(target, text, tmp_path, kind, changes):
    """The package's model with a drafter's weights computes its logits (test_speculators_parity.py, test_newer_eagles.py);
    its folder, read, does too. The number of steps is the configuration's."""
    package()
    drafter = drafter_for(target, kind, hidden_layers=[0, 2, 3], **changes)
    model_of(drafter, target).save_pretrained(tmp_path)
    again = imported(tmp_path, target)
    assert again.config.imported.startswith("speculators ")
    for name in ("slots", "shifted", "causal", "pairs", "fc_norm", "norm_output", "norm_before_residual", "depth"):
        assert getattr(again.config, name) == getattr(drafter.config, name), name
    torch.testing.assert_close(four_slots(target, again, text), four_slots(target, drafter, text), rtol=1e-5, atol=1e-5)
    if drafter.config.sequential:  # a table that is no function of the target's embedding
        table_VR = load_file(tmp_path / "model.safetensors")[MARKOV[0]]
        rewritten(tmp_path, tensors={MARKOV[0]: table_VR + 0.2 * table_VR.std() * torch.randn(table_VR.shape)})
        refused(tmp_path, target, "has a Markov head of two tables .*, and this one is no function of the embedding")


def test_a_checkpoints_own_mask_row_is_taken_and_other_changed_rows_are_refused(target, text, tmp_path):
    """A table that differs from the target's in MASK's row alone is the target's and a MASK; in another row it is refused."""
    drafter = exported(target, tmp_path, "blockwise", {"learned": True})
    (tmp_path / MASK_FILE).unlink()
    plain = imported(tmp_path, target)
    assert differ(four_slots(target, plain, text), four_slots(target, drafter, text))  # the negative control
    table_VE = target.frozen_head.embedding_VE.clone()
    table_VE[2] = drafter.mask.weight[0].detach()
    rewritten(tmp_path, tensors={"embed_tokens.weight": table_VE})
    assert_same(four_slots(target, imported(tmp_path, target), text), four_slots(target, drafter, text))
    table_VE[7] += 1
    rewritten(tmp_path, tensors={"embed_tokens.weight": table_VE})
    refused(tmp_path, target, "has an embedding of its own: 1 rows are not the target's, such as that of token 7")


def test_a_served_checkpoint_that_does_not_fit_cannot_warm_start_a_drafter(target, tmp_path):
    exported(target, tmp_path / "eagle3", "ttt", {})
    other = drafter_for(target, "ttt", hidden_layers=[0, 2, 3], norm_before_residual=True)
    model_of(other, target).save_pretrained(tmp_path / "norm")
    fits = drafter_for(target, "ttt", hidden_layers=[0, 2, 3]).config
    check_warm_start(str(tmp_path / "eagle3"), fits)
    for folder, changes, message in (
        ("eagle3", {"reuse": "kv"}, "is a checkpoint of EAGLE-3; reuse=kv has nothing to take from it"),
        ("eagle3", {"hidden_layers": [1]}, r"reads hidden states of layers \[0, 2, 3\], not of \[1\]"),
        ("eagle3", {"qk_norm": True}, "EAGLE-3 norms no queries"),
        ("eagle3", {"target_layers": [1, 2]}, "has 1 layer"),
        ("eagle3", {"architecture": replace(target.architecture, intermediate_size=5)}, "has draft layers of intermediate_size"),
        ("norm", {}, "was trained with drafter.norm_before_residual=true"),
    ):
        with pytest.raises(UserError, match=message):
            check_warm_start(str(tmp_path / folder), replace(fits, **changes))
    check_warm_start(str(tmp_path / "norm"), replace(fits, norm_before_residual=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind,format", [("ttt", "eagle3"), ("blockwise", "dflash")])
def test_the_commands_judge_decode_and_train_from_a_served_checkpoint(target, cache, tmp_path, kind, format):
    """Judged, decoded with and trained on by the real commands, beside the target that they name."""
    manifest = json.loads((cache / "manifest.json").read_text())
    identity = {"id": "tiny", "weights_hash": target.weights_hash(), "tokenizer_hash": manifest["tokenizer_hash"]}
    layers = {"hidden_layers": [0, 2, 5], "target_layers": [5]}
    drafter = drafter_for(target, kind, **layers)
    drafter.config = replace(drafter.config, target=identity)
    drafter.save_pretrained(tmp_path / "ours")
    save_export(drafter, target, tmp_path / "served", format)

    def said(*words):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = {}
    few = ["score.documents=4", "score.anchors=4", "score.pack_tokens=256", f"cache.dir={cache}"]
    for name in ("ours", "served"):
        said(ROOT / "eval/main.py", "mode=score", f"drafter={name}", f"out=score/{name}", *few)
        found[name] = json.loads((tmp_path / f"score/{name}/score.json").read_text())
    for ours, served in zip(found["ours"]["sampled"]["conditional"], found["served"]["sampled"]["conditional"]):
        assert served == pytest.approx(ours, rel=1e-3) and 0 < ours < 1
    assert found["served"]["drafter"]["trained_for"] == "unknown (imported)"
    assert found["served"]["target"]["weights_hash"] == found["ours"]["target"]["weights_hash"]

    short = ["suite.count=2", "suite.prompt_tokens=64", "suite.new_tokens=8", "temperatures=[0]", "controls=false"]
    assert "2 of 2 outputs equal" in said(
        ROOT / "eval/main.py", "drafter=served", "out=decoded", "transformers=false", "batch=2", *short
    )
    words = [f"objective={kind}", "reuse=hidden", "drafter.layers=1", f"drafter.qk_norm={str(kind == 'blockwise').lower()}"]
    words += ["drafter.warm_start=served", f"cache.dir={cache}", "run.dir=run"]
    assert "tensors taken, as drafter.start says: none" in said(
        ROOT / "train/main.py", *words, *SMALL, "train.max_steps=1", "train.batch=1"
    )
    said(ROOT / "eval/main.py", "mode=export", "drafter=served", f"format={format}", "out=again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("served", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    other = command(ROOT / "eval/main.py", "drafter=served", "target=smollm2", "out=no", cwd=tmp_path)
    assert other.returncode == 2 and len(other.stderr.strip().splitlines()) == 1
