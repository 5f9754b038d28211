"""EAGLE-3.1's norms and P-EAGLE's blocks against the speculators package's own model classes, on random weights.

Shapes: N anchors, J drafted slots, V vocabulary.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.support.models import HIDDEN_LAYERS, drafter_of, random_weights, small_target
from tests.support.packs import document, objective_of
from tests.support.speculators_models import model_of, package
from train.data.pack import PackDocument, make_pack
from train.losses.recipe import LossRecipe

LENGTH = 40
ANCHORS = [1, 2, 9, 20, 35]
MASK_TOKEN = 0  # texts begin at token 3


@pytest.fixture(scope="module", autouse=True)
def speculators():
    return package()


@pytest.fixture(autouse=True)
def unrounded(monkeypatch):
    """transformers' Llama layers, which the package builds on, round to float32 in norms and softmax, by sums whose order depends
    on the processor. Here they keep the model's float64."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def target(request):
    """llama has no norms of queries and keys, qwen3 has; in float64, where the order of sums is of no account."""
    return small_target(request.param, torch.float64)


@pytest.fixture(scope="module")
def text(target):
    """One document as the cache hands it out."""
    return document(target, LENGTH, seed=1)


@torch.no_grad()
def ours(target, drafter, text):
    """[N, J, V]."""
    pack = make_pack([PackDocument("text", text, np.array(ANCHORS))])
    return objective_of(target, drafter, LossRecipe(kl=1)).logits(pack)


def pairs(text):
    """(tokens x_1 .. [1, T], what fc reads of f_0 .. [1, T, I]): row t is the pair at position t + 1."""
    hidden = torch.cat([text[f"hidden.{i}"] for i in HIDDEN_LAYERS], dim=-1)
    return text["input_ids"][None, 1:], hidden[None, :-1]


@torch.no_grad()
def eagle3_logits(target, drafter, text, steps):
    """[N, J, V] of speculators' EAGLE-3 model."""
    model = model_of(drafter, target).eval()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    tokens, hidden = pairs(text)
    model(hidden, tokens, torch.zeros_like(tokens), ttt_steps=steps)
    return torch.stack(seen, dim=1)[torch.tensor(ANCHORS) - 1]


@pytest.mark.parametrize("norms", [("fc_norm", "norm_output"), ("fc_norm",), ("norm_output",), ()], ids="+".join)
@pytest.mark.parametrize("layers", [1, 2])
def test_ttt_with_eagle31_norms_equals_speculators(target, text, layers, norms):
    """The logits of four steps. Negative control: the same weights without one of the norms, or with one more, are another
    function, of the first step already with fc_norm and from the second on with norm_output."""
    drafter = random_weights(drafter_of(target, "ttt", "hidden", layers=layers, **dict.fromkeys(norms, True)))
    mine = ours(target, drafter, text)
    theirs = eagle3_logits(target, drafter, text, 4)
    assert mine.shape == theirs.shape == (len(ANCHORS), 4, 11) and mine.std() > 0.5
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)
    for name, first_step_differs in (("fc_norm", True), ("norm_output", False)):
        changed = drafter_of(target, "ttt", "hidden", layers=layers, **(dict.fromkeys(norms, True) | {name: name not in norms}))
        random_weights(changed, seed=3)
        known = {n: t for n, t in drafter.state_dict().items() if n in changed.state_dict()}
        changed.load_state_dict(known, strict=False)
        apart = (ours(target, changed, text) - theirs).abs().amax(dim=(0, 2))
        assert (apart[0] > 0.1) == first_step_differs and (apart[1:] > 0.1).all()


@torch.no_grad()
def peagle_logits(target, drafter, text, monkeypatch, tamper=None):
    """[N, J, V] of speculators' P-EAGLE model: whole blocks behind the anchors instead of those that its sampling keeps."""
    import speculators.models.peagle.core as core

    slots = drafter.config.slots
    tokens, hidden = pairs(text)
    length = tokens.shape[1]
    row_N = torch.tensor(ANCHORS) - 1  # row t is the pair at position t + 1
    model = model_of(drafter, target).eval()
    model.verifier_lm_head.weight.zero_()  # its loss is not looked at

    def whole_blocks(seq_length, **_):
        """(anchors, depths): depth 0 everywhere, then each depth of every anchor."""
        everywhere = torch.arange(seq_length)
        depth = torch.arange(1, slots).repeat_interleave(len(row_N))
        return torch.cat([everywhere, row_N.repeat(slots - 1)]), torch.cat([torch.zeros_like(everywhere), depth])

    monkeypatch.setattr(core, "generate_cod_sample_indices", whole_blocks)
    if tamper:
        tamper(model, monkeypatch)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    last = torch.zeros(1, length, model.hidden_size, dtype=hidden.dtype)
    model(hidden, tokens, torch.zeros_like(tokens), verifier_last_hidden_states=last, num_depths=slots)
    (logits,) = seen
    return torch.stack([logits[row_N], *logits[length:].unflatten(0, (slots - 1, -1))], dim=1)


def pair_block(target, layers=1, **options):
    drafter = random_weights(drafter_of(target, "blockwise_pairs", "hidden", layers=layers, **options))
    drafter.config = replace(drafter.config, mask_token_id=MASK_TOKEN)
    return drafter


@pytest.mark.parametrize("fc_norm", [False, True], ids=["", "fc_norm"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_block_over_pairs_equals_the_p_eagle_of_speculators(target, text, monkeypatch, layers, fc_norm):
    drafter = pair_block(target, layers, fc_norm=fc_norm)
    mine = ours(target, drafter, text)
    theirs = peagle_logits(target, drafter, text, monkeypatch)
    assert mine.shape == theirs.shape == (len(ANCHORS), 4, 11) and mine.std() > 0.5
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)


def no_mask_hidden(model, monkeypatch):
    model.mask_hidden.zero_()


def another_mask(model, monkeypatch):
    model.embed_tokens.weight[MASK_TOKEN] = 1.0


def rule(further=0, backward=False):
    """speculators' rule of visibility, written anew, for pairs `further` on, and with later rows of a block in view or not."""

    def made(anchor_pos, depth, document_ids, sliding_window=None):
        def sees(_b, _h, q, k):
            memory = (depth[k] == 0) & (anchor_pos[k] <= anchor_pos[q] + further)
            block = (anchor_pos[k] == anchor_pos[q]) & ((depth[k] <= depth[q]) | backward)
            return memory | block

        return sees

    def tamper(model, monkeypatch):
        monkeypatch.setattr("speculators.models.peagle.core.create_peagle_mask_mod", made)

    return tamper


CONTROLS = {
    "the rule as it is": (rule(), []),
    "one pair more": (rule(further=1), [0, 1, 2, 3]),
    "the anchor's own pair as its block's alone": (rule(further=-1), []),  # as we have it
    "one pair less": (rule(further=-2), [0, 1, 2, 3]),
    "a bidirectional block": (rule(backward=True), [0, 1, 2]),  # the last row sees all of its block anyway
    "zeros for mask_hidden": (no_mask_hidden, [1, 2, 3]),
    "another MASK": (another_mask, [1, 2, 3]),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_faults_in_p_eagle_change_the_logits(target, text, monkeypatch, control):
    """Negative controls, each of the slots that it must change and of those that it cannot."""
    tamper, changed = CONTROLS[control]
    drafter = pair_block(target)
    theirs = peagle_logits(target, drafter, text, monkeypatch, tamper)
    # Without the first anchor, which has no pair before its own.
    apart = (ours(target, drafter, text) - theirs)[1:].abs().amax(dim=(0, 2))
    assert [j for j in range(4) if apart[j] > 0.05] == changed
    assert all(apart[j] < 1e-5 for j in range(4) if j not in changed)
