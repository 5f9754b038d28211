"""What a drafter is made of: sources of K/V, the gate, vocabularies, weights taken from other drafters, and EAGLE-3's format.

Shapes: P positions of a pack, N anchors, R supervised positions, V vocabulary, D draft vocabulary, E hidden size.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from common import cli
from common.errors import UserError
from tests.support.models import drafter_of, random_weights, small_target
from tests.support.packs import document, objective_of, packed
from train.data.pack import PackDocument, make_pack
from train.drafter import warm_start as exchange
from train.drafter.build import load_drafter, new_drafter
from train.drafter.formats.export import save_export
from train.drafter.layers import Rope
from train.gate import parameter_groups
from train.losses.recipe import LossRecipe
from train.recipe import TrainRecipe

KL = LossRecipe(kl=1)


@pytest.fixture(scope="module")
def target():
    return small_target(dtype=torch.float64)


@torch.no_grad()
def logits(target, drafter, pack=None):
    return objective_of(target, drafter, KL).logits(packed(target) if pack is None else pack)


def test_a_drafter_that_reuses_nothing_is_a_language_model(target):
    """ttt, reuse=none: step j of anchor a is step 1 of anchor a + j - 1, whose prefix is then memory instead of earlier steps."""
    drafter = random_weights(drafter_of(target, "ttt", "none", layers=2))
    pack = make_pack([PackDocument("a", document(target, 20, 1), np.arange(1, 16))])
    found = logits(target, drafter, pack)
    for a in range(12):
        for j in range(1, 4):
            torch.testing.assert_close(found[a, j], found[a + j, 0], rtol=1e-9, atol=1e-9)
    other = replace(pack, ids_P=pack.ids_P.clone())
    other.ids_P[3] = 3 + (other.ids_P[3] - 2) % 8
    changed = (logits(target, drafter, other) - found).abs().amax(-1) > 1e-6
    assert not changed[0, :2].any() and changed[0, 2:].all() and changed[3:].all()  # x_3 is step 3's own input


@pytest.mark.parametrize("source", ["native", "head_concat", "projected_rope", "projected"])
def test_only_a_projection_of_rotated_keys_forgets_relative_positions(target, source):
    """Moving a whole document changes nothing, unless keys are mixed after they were rotated: KVShot's reason for (3)."""
    drafter = random_weights(drafter_of(target, "blockwise", f"kv+{source}"))
    pack = packed(target)
    moved = replace(pack, places=replace(pack.places, position=pack.places.position + 100))
    difference = (logits(target, drafter, pack) - logits(target, drafter, moved)).abs().max()
    assert difference > 1e-2 if source == "projected" else difference < 1e-3  # angles are float32


def test_concatenated_heads_start_as_the_average_of_their_layers(target):
    """The branch over two layers' heads gives the mean of what each layer's own attention gives."""
    outputs = {}
    for source, layers in (("head_concat", [1, 2]), ("native", [1]), ("native", [2])):
        drafter = drafter_of(target, "blockwise", f"kv+{source}")
        object.__setattr__(drafter.config, "target_layers", layers[-1:])
        drafter.target_kv[0].layers = layers
        drafter.start(target, target.frozen_head)
        branch = drafter.layers[0].branches["kv"]
        seen = []
        branch.q_norm.weight.data.fill_(1.0), branch.k_norm.weight.data.fill_(1.0)  # the norms of two layers are averaged
        handle = branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
        logits(target, drafter)
        outputs[source, layers[0]] = seen[0]
        handle.remove()
    torch.testing.assert_close(outputs["head_concat", 1], (outputs["native", 1] + outputs["native", 2]) / 2)
    assert (outputs["native", 1] - outputs["native", 2]).abs().max() > 1e-3


def test_the_gate_can_be_held_floored_and_started_closed(target, tmp_path):
    n, o = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drafter = random_weights(drafter_of(target, "ttt", "hybrid"))
    (fuse,) = drafter.fusions
    by_hand = torch.sigmoid(torch.cat([n, o, o - n], 1) @ fuse.gate.weight.T + fuse.gate.bias)
    torch.testing.assert_close(fuse(n, o), n + by_hand * ((o - n) @ fuse.delta.weight.T))
    fuse.held.fill_(True)
    torch.testing.assert_close(fuse(n, o), n + 0.5 * ((o - n) @ fuse.delta.weight.T))
    drafter.save_pretrained(tmp_path)  # a drafter decodes with the gate that it was saved with
    assert load_drafter(tmp_path).fusions[0].held
    torch.nn.init.zeros_(fuse.delta.weight)
    torch.testing.assert_close(fuse(n, o), n)
    floored = random_weights(drafter_of(target, "ttt", "hybrid", gate_floor=0.25)).fusions[0]
    torch.testing.assert_close(floored.openness(n, o), 0.25 + 0.75 * by_hand)


def test_gates_can_learn_at_a_rate_of_their_own(target):
    drafter = drafter_of(target, "ttt", "hybrid")
    words = ["reuse=hybrid", "train.lr=1e-3", "reuse.gate.lr_ratio=3"]
    plain, gates = parameter_groups(drafter, cli.compose("train", TrainRecipe, words))
    assert gates["lr"] == pytest.approx(3e-3) and "lr" not in plain
    assert {id(p) for p in gates["params"]} == {id(p) for p in drafter.fusions[0].parameters()}
    assert len(plain["params"]) + len(gates["params"]) == len(list(drafter.parameters()))


def test_a_reduced_vocabulary_keeps_the_most_frequent_tokens(target):
    drafter = drafter_of(target, "ttt", "hidden+vocab")
    counts = torch.tensor([5, 0, 9, 9, 1, 1, 1, 1, 1, 7, 0])
    drafter.start(target, target.frozen_head, counts)
    head = drafter.head
    assert head.kept_D.tolist() == [0, 2, 3, 4, 5, 6, 7, 9]  # of the five seen once the first four
    assert head.d2t.tolist() == [0, 1, 1, 1, 1, 1, 1, 2]
    assert head.labels(torch.tensor([0, 1, 2, 8, 9, 10]), 11).tolist() == [0, -1, 1, -1, 7, -1]
    torch.testing.assert_close(head.weight, target.frozen_head.head_VE[head.kept_D])
    found = head.logits(torch.ones(1, 32, dtype=torch.float64), target.frozen_head)
    assert found[0].isinf().nonzero().flatten().tolist() == [1, 8, 10]


def test_a_token_outside_the_draft_vocabulary_ends_an_accepted_run(target):
    """A teacher whose most likely token is outside the draft vocabulary is never matched, and its mass is lost to the overlap."""
    pack = packed(target)
    for kept in (None, list(range(8))):
        drafter = drafter_of(target, "ttt", "hidden" if kept is None else "hidden+vocab")
        if kept:
            drafter.head.d2t.copy_(torch.tensor(kept) - torch.arange(8))
        objective = objective_of(target, drafter, KL)
        # The drafter says what the target says, as far as it can.
        positions = (pack.anchor_N[:, None] + torch.arange(4)).clamp(max=len(pack.ids_P) - 1)
        teacher = pack.last_hidden_RE[pack.teacher_P[positions]]
        objective.draft = lambda pack, memory, teacher=teacher: teacher
        if kept:
            drafter.head.weight.data.copy_(target.frozen_head.head_VE[kept])
        outcome = objective(pack)
        valid, (overlap,), (match,) = outcome.valid, outcome.overlap, outcome.match
        best = target.logits(teacher).argmax(-1)
        p = target.logits(teacher).softmax(-1)
        if kept is None:
            torch.testing.assert_close(overlap[valid], torch.ones(int(valid.sum()), dtype=torch.float64))
            assert match[valid].all()
        else:
            outside = (best > 7) & valid
            assert outside.any() and not match[outside].any() and match[valid & ~outside].all()
            torch.testing.assert_close(overlap[valid], p[..., :8].sum(-1)[valid])


# Weights from other drafters


def named(drafter):
    return {name: tensor.clone() for name, tensor in drafter.state_dict().items()}


def test_hybrid_starts_from_a_hidden_checkpoint(target, tmp_path):
    """KVShot: self-attention, input, MLP and norms are the checkpoint's; the rest stays as it was."""
    hidden = random_weights(drafter_of(target, "ttt", "hidden"))
    hidden.save_pretrained(tmp_path)
    hybrid = random_weights(drafter_of(target, "ttt", "hybrid"), seed=4)
    before = named(hybrid)
    exchange.check_warm_start(str(tmp_path), hybrid.config)
    taken, left = exchange.warm_start(hybrid, str(tmp_path), target.frozen_head)
    assert set(taken) == set(named(hidden)) and {name.split(".")[2] for name in left} == {"branches", "fuse"}
    for name, tensor in named(hybrid).items():
        torch.testing.assert_close(tensor, named(hidden)[name] if name in taken else before[name])


@pytest.mark.parametrize("reuse", ["hidden", "kv", "hybrid"])
def test_block_wise_and_ttt_start_from_each_other(target, tmp_path, reuse):
    """There and back is the same drafter: half a projection for token and feature, and their sum."""
    block = random_weights(drafter_of(target, "blockwise", reuse))
    block.save_pretrained(tmp_path / "block")
    ttt = random_weights(drafter_of(target, "ttt", reuse), seed=4)
    exchange.warm_start(ttt, str(tmp_path / "block"), target.frozen_head)
    q = [d.layers[0].branches[d.config.branches[0]].q.weight for d in (block, ttt)]
    if reuse != "kv":
        torch.testing.assert_close(q[1], torch.cat([q[0], q[0]], dim=1) / 2)
    ttt.save_pretrained(tmp_path / "ttt")
    again = random_weights(drafter_of(target, "blockwise", reuse), seed=5)
    _, left = exchange.warm_start(again, str(tmp_path / "ttt"), target.frozen_head)
    assert set(left) <= {"mask.weight", "hidden_norm.weight"}  # what only blocks have
    for name, tensor in named(again).items():
        if name not in left:
            torch.testing.assert_close(tensor, named(block)[name])


def test_a_block_over_pairs_starts_from_eagle3_s_input_path_and_back(target, tmp_path):
    """The same weights under the same names; only what stands for undrafted slots is the block's own."""
    ttt = random_weights(drafter_of(target, "ttt", "hidden", layers=2))
    ttt.save_pretrained(tmp_path / "ttt")
    block = random_weights(drafter_of(target, "blockwise_pairs", "hidden", layers=2), seed=4)
    exchange.check_warm_start(str(tmp_path / "ttt"), block.config)
    taken, left = exchange.warm_start(block, str(tmp_path / "ttt"), target.frozen_head)
    assert set(taken) == set(named(ttt)) and set(left) == {"mask.weight", "mask_hidden.weight"}
    pack = packed(target)
    torch.testing.assert_close(logits(target, block, pack)[:, 0], logits(target, ttt, pack)[:, 0])  # the anchor's own pair
    block.save_pretrained(tmp_path / "block")
    again = random_weights(drafter_of(target, "ttt", "hidden", layers=2), seed=5)
    assert exchange.warm_start(again, str(tmp_path / "block"), target.frozen_head)[1] == []
    torch.testing.assert_close(named(again), named(ttt))


def test_a_checkpoint_that_does_not_fit_cannot_warm_start_a_drafter(target, tmp_path):
    def saved(name, **changes):
        drafter = drafter_of(target, "ttt", "hidden", layers=2)
        drafter.config = replace(drafter.config, **changes)
        drafter.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    config = drafter_of(target, "ttt", "hidden", layers=2).config
    exchange.check_warm_start(saved("fits"), config)
    save_export(eagle3(target), target, tmp_path / "served", "eagle3")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/config.json").write_text("{")
    (tmp_path / "torn/model.safetensors").write_bytes(b"")
    for folder, message in (
        (str(tmp_path), "holds no checkpoint"),
        (saved("other", target={"weights_hash": "x", "id": "other", "tokenizer_hash": "x"}), "a drafter of another target"),
        (saved("deeper", target_layers=[1]), "has 1 layer"),
        (saved("elsewhere", hidden_layers=[2]), "reads hidden states of layers"),
        (saved("normless", qk_norm=False), "differs in drafter.qk_norm"),
        (str(tmp_path / "torn"), "is not readable JSON"),
    ):
        with pytest.raises(UserError, match=message):
            exchange.check_warm_start(folder, config)
    served = [({"hidden_layers": [1]}, "reads hidden states of layers"), ({"reuse": "kv"}, "nothing to take")]
    served.append(({"hidden_layers": [0, 1, 2]}, "EAGLE-3 norms no queries"))
    for changes, message in served:
        with pytest.raises(UserError, match=message):
            exchange.check_warm_start(str(tmp_path / "served"), replace(config, **changes))


def test_weights_of_equal_shape_with_another_meaning_are_not_taken(target, tmp_path):
    """Weights of equal shape that another source of K/V, another sequential head or another vocabulary gave their meaning."""
    numbers = iter(range(99))

    def taken(theirs, mine):
        folder = tmp_path / str(next(numbers))
        random_weights(drafter_of(target, *theirs)).save_pretrained(folder)
        return exchange.warm_start(random_weights(drafter_of(target, *mine), seed=4), str(folder), target.frozen_head)[0]

    assert not any("kv" in n for n in taken(("ttt", "kv+projected"), ("ttt", "kv+projected_rope")))
    assert not any("kv" in n for n in taken(("ttt", "kv+head_concat"), ("ttt", "kv")))
    assert any("kv" in n for n in taken(("ttt", "kv+projected"), ("blockwise", "kv+projected")))
    assert not any("sequential" in n for n in taken(("blockwise+gru", "kv"), ("blockwise+markov", "kv")))
    assert any("sequential" in n for n in taken(("blockwise+gru", "kv"), ("blockwise+gru", "hybrid")))
    assert not any("head." in n for n in taken(("ttt", "hidden+vocab"), ("ttt", "hidden")))
    assert "fc.weight" not in taken(("ttt", "hidden"), ("ttt", "hidden+norms"))  # of states that were not normed
    assert {"fc.weight", "fc_norm.0.weight"} <= set(taken(("ttt", "hidden+norms"), ("ttt", "hybrid+norms")))
    assert {"head.d2t", "head.weight"} <= set(taken(("ttt", "hidden+vocab"), ("ttt", "hybrid+vocab")))


# EAGLE-3's format


def eagle3(target, **changes):
    options = {"qk_norm": False, "draft_vocab": 8, "own_head": True, "hidden_layers": [2, 0, 1], "start": "random"} | changes
    drafter = drafter_of(target, "ttt", "hidden")
    drafter = new_drafter(replace(drafter.config, **options)).double()
    return random_weights(drafter.start(None, target.frozen_head, torch.arange(11)))


def served(folder, target, pack, steps):
    """Logits [N, K, V] of an exported checkpoint as a server computes them: written from the format's description, in plain
    tensors, one anchor after the other, with a growing list of keys instead of masks."""
    w = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    norm = lambda x, name: F.rms_norm(x, (x.shape[-1],), w[name], config["rms_norm_eps"])
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    inv_freq = config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    assert sorted(config["eagle_aux_hidden_state_layer_ids"]) == config["eagle_aux_hidden_state_layer_ids"]
    aux = torch.cat([pack.states.hidden[i - 1] for i in config["eagle_aux_hidden_state_layer_ids"]], dim=-1)
    feature = aux @ w["fc.weight"].T
    embed = lambda i: target.frozen_head.embedding_VE[pack.ids_P[i]]

    def layer(token, hidden, position, keys, values):
        x = torch.cat([norm(token, "midlayer.input_layernorm.weight"), norm(hidden, "midlayer.hidden_norm.weight")])
        q, k, v = ((w[f"midlayer.self_attn.{n}_proj.weight"] @ x).view(-1, size) for n in "qkv")
        rope = Rope(torch.tensor([position]), inv_freq, 1.0, torch.float64)
        q, k = rope(q[None])[0], rope(k[None])[0]
        keys, values = [*keys, k], [*values, v]
        k, v = (torch.stack(t).repeat_interleave(heads // groups, dim=1) for t in (keys, values))
        a = torch.einsum("thd,hd->ht", k, q).div(size**0.5).softmax(-1)
        h = hidden + w["midlayer.self_attn.o_proj.weight"] @ torch.einsum("ht,thd->hd", a, v).flatten()
        y = norm(h, "midlayer.post_attention_layernorm.weight")
        mlp = F.silu(w["midlayer.mlp.gate_proj.weight"] @ y) * (w["midlayer.mlp.up_proj.weight"] @ y)
        return h + w["midlayer.mlp.down_proj.weight"] @ mlp, keys, values

    out = torch.full((len(pack.anchor_N), steps, config["vocab_size"]), -torch.inf, dtype=torch.float64)
    whole = config["draft_vocab_size"] is None  # then the target's head, which can say every token
    said = torch.arange(config["vocab_size"]) if whole else torch.arange(config["draft_vocab_size"]) + w["d2t"]
    assert ("t2d" not in w and "d2t" not in w) if whole else w["t2d"].nonzero().flatten().tolist() == said.tolist()
    head_DE = target.frozen_head.head_VE if whole else w["lm_head.weight"]
    for n, a in enumerate(pack.anchor_N.tolist()):
        keys, values = [], []
        start = a - int(pack.places.position[a])
        for i in range(start, a - 1):  # prefill: the pair (x_{i+1}, f_i), at any constant offset of positions
            _, keys, values = layer(embed(i + 1), feature[i], i - start, keys, values)
        hidden = feature[a - 1]
        for j in range(steps):
            if a + j >= len(pack.ids_P):
                break
            hidden, keys, values = layer(embed(a + j), hidden, a - 1 - start + j, keys, values)
            out[n, j, said] = head_DE @ norm(hidden, "norm.weight")
    return out


@pytest.mark.parametrize("whole", [False, True], ids=["reduced vocabulary", "whole vocabulary, the target's head"])
def test_an_exported_eagle3_checkpoint_gives_the_same_logits(target, tmp_path, whole):
    """Served as its format says, and read back into a drafter of ours."""
    drafter = eagle3(target, **({"draft_vocab": None, "own_head": False} if whole else {}))
    save_export(drafter, target, tmp_path, "eagle3")
    pack = packed(target)
    mine = logits(target, drafter)
    valid = pack.valid(4)
    said = mine[valid].isfinite()
    torch.testing.assert_close(served(tmp_path, target, pack, 4)[valid][said], mine[valid][said], rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    again = eagle3(target, hidden_layers=[0, 1, 2], draft_vocab=drafter.config.draft_vocab, own_head=not whole)
    random_weights(again, seed=9)
    exchange.check_warm_start(str(tmp_path), again.config)
    _, left = exchange.warm_start(again, str(tmp_path), target.frozen_head)
    assert left == []
    found = logits(target, again)
    torch.testing.assert_close(found[found.isfinite()], mine[mine.isfinite()], rtol=1e-9, atol=1e-9)
