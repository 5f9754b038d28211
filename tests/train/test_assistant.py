"""Gemma 4's assistants: the same function as transformers' class, as the decode loop, and as a server's drafts.

Shapes: N anchors, J steps, V vocabulary, T positions, E hidden size of the target, H of the assistant, Q rows.
"""

import json
from copy import deepcopy
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, Gemma4TextConfig, Gemma4UnifiedTextConfig

from common import cli
from common.errors import UserError
from data_prep.capture.plan import chosen_layers
from data_prep.target.target import Target
from eval.engine.drafting import StaticTrained
from eval.engine.request import Stops
from eval.oracle.decode import decode
from eval.oracle.drafting import Nobody, Trained
from tests.support.alignment import compared, decoded
from tests.support.assistants import assistant_config, assistant_of, read_layers, sharing_modes, taught, transformers_assistant
from tests.support.commands import ROOT, SMALL, TRAIN, command
from tests.support.engines import engine_of, ragged, triples
from tests.support.families import add_tokenizer, miniature
from tests.support.packs import REFERENCE, cached
from tests.support.runs import losses
from train.attention.choose import BACKENDS
from train.build import drafter_config
from train.data.pack import Pack, PackDocument, make_pack
from train.drafter.assistant import main_directions
from train.drafter.build import load_drafter
from train.drafter.config import DrafterConfig
from train.drafter.formats.assistant_names import assistant_names
from train.drafter.warm_start import check_warm_start, warm_start
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision
from train.recipe import TrainRecipe

# Of heads of two numbers, of layers that share K/V, and of neither.
SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4_text", "gemma4_unified_text"))
FAMILIES = ("gemma4_text_k_eq_v", "gemma4_text_shared", *SLOW)
VOCABULARY = 28
SIZES = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
# Where two layers share the K/V of others, two of each kind are left, so that there is a wrong one to read.
DEEPER = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
WINDOW = 8
LENGTH = 30
STEPS = 4
# Sums in float32 of another order. The smallest fault moves logits by more.
SAME = 1e-4
ANOTHER = 1e-2


@pytest.fixture(scope="module", params=FAMILIES)
def target(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for config in (Gemma4TextConfig, Gemma4UnifiedTextConfig):
            patch.setattr(config, "kv_sharing_modes", property(sharing_modes), raising=False)
        # With a head that is not its embedding, or it would say the same token for ever.
        changed = SIZES | {"tie_word_embeddings": False} | (DEEPER if request.param == "gemma4_text_shared" else {})
        target = Target(str(miniature(request.param, tmp_path_factory.mktemp("target"), seed=1, **changed)))
        hidden, kv = read_layers(target)
        target.capture(hidden, sorted(set(kv)))
        yield target


def random_text(length: int = LENGTH, seed: int = 2) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pack_of(target: Target, tokens: list[int]) -> Pack:
    """All anchors of a document, which stands behind another."""
    before = PackDocument("before", cached(target, random_text(11, 3), capture=False), np.arange(0))
    return make_pack([before, PackDocument("text", cached(target, tokens, capture=False), np.arange(1, len(tokens) - STEPS))])


def training_logits(target: Target, drafter, pack: Pack) -> Tensor:
    return Objective(drafter, target.frozen_head, REFERENCE, Supervision(LossRecipe(kl=1), torch.ones(STEPS))).logits(pack)


def their_logits(target: Target, assistant, tokens: list[int]) -> Tensor:
    """What transformers' class proposes over the same text [N, J, V], fed as vLLM 0.32 and SGLang 0.5.23 feed theirs: rows at
    a - 1, keys of positions before a, of sliding layers as many as the target's window has."""
    ids_1T = torch.tensor([tokens])
    output = target.model(ids_1T, output_hidden_states=True, return_shared_kv_states=True, use_cache=False)
    token_1TE = target.model.get_input_embeddings()(ids_1T)
    found = []
    for anchor in range(1, len(tokens) - STEPS):
        shown = {}
        for kind, kv in output.shared_kv_states.items():
            first = max(0, anchor - WINDOW) if kind == "sliding_attention" else 0
            shown[kind] = tuple(t[:, :, first:anchor] for t in kv)
        feature_11E = output.hidden_states[-1][:, anchor - 1 : anchor]
        for step in range(STEPS):
            token_11E = token_1TE[:, anchor + step : anchor + step + 1]
            drafted = assistant(
                inputs_embeds=torch.cat([token_11E, feature_11E], dim=-1),
                position_ids=torch.tensor([[anchor - 1]]),
                shared_kv_states=shown,
            )
            feature_11E = drafted.last_hidden_state
            found.append(drafted.logits[0, 0])
    return torch.stack(found).view(-1, STEPS, VOCABULARY)


def apart(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the size of the numbers."""
    return float((mine - theirs).detach().abs().max() / theirs.detach().abs().max())


def test_the_training_forward_is_transformers_own_class_and_so_are_its_gradients(target):
    drafter = assistant_of(target)
    assistant = transformers_assistant(drafter, target)
    tokens = random_text()
    mine = training_logits(target, drafter, pack_of(target, tokens))
    theirs = their_logits(target, assistant, tokens)
    assert mine.shape == theirs.shape and apart(mine, theirs) < 1e-5
    weight_NJV = torch.randn(mine.shape, generator=torch.Generator().manual_seed(4))
    for logits in (mine, theirs):
        (logits * weight_NJV).sum().backward()
    names = assistant_names(drafter.config)
    learned = dict(assistant.named_parameters())
    for name, parameter in drafter.named_parameters():
        assert apart(parameter.grad, learned[names[name]].grad) < 1e-4, name


# Drafts, beside those of transformers' own assisted generation.


def as_served(_, args, kwargs: dict) -> tuple:
    """What vLLM 0.32 and SGLang 0.5.23 show an assistant behind an anchor at a. transformers 5.23 differs in two things.

    It places rows at a, and they at a - 1. It shows the K/V of positions up to a, where a draft stood that was refused; they show
    those before a, in sliding layers as many as the target's window has (transformers: one more).
    """
    anchor = int(kwargs["position_ids"])
    shown = {}
    for kind, kv in kwargs["shared_kv_states"].items():
        first = max(0, anchor - WINDOW) if kind == "sliding_attention" else 0
        shown[kind] = tuple(t[:, :, first:anchor] for t in kv)
    changes = {"position_ids": kwargs["position_ids"] - 1, "shared_kv_states": shown, "attention_mask": None}
    return args, kwargs | changes


def their_drafts(target: Target, drafter, prompt: list[int], new: int, corrected: bool) -> tuple[list[int], list[list[int]]]:
    """(the text behind the prompt, the drafts of each round) of transformers' assisted generation."""
    assistant = transformers_assistant(drafter, target)
    assistant.generation_config.num_assistant_tokens = STEPS
    rounds: dict[int, list[int]] = {}

    def noted(_, args, kwargs: dict, output) -> None:
        rounds.setdefault(int(kwargs["position_ids"]), []).append(int(output.logits.argmax()))

    if corrected:
        assistant.register_forward_pre_hook(as_served, with_kwargs=True)
    assistant.register_forward_hook(noted, with_kwargs=True)
    ids_1T = torch.tensor([prompt])
    # A cache that keeps what windows leave behind, which refused tokens may need again.
    options = {"past_key_values": DynamicCache(), "attention_mask": torch.ones_like(ids_1T), "do_sample": False}
    text = target.model.generate(ids_1T, assistant_model=assistant, max_new_tokens=new, **options)
    return text[0, len(prompt) :].tolist(), list(rounds.values())


@pytest.mark.parametrize("corrected", [True, False])
def test_our_drafts_are_those_of_assisted_generation_as_servers_run_it(target, corrected):
    """With two things corrected (`as_served`) round by round the same tokens, accepted and refused; as it stands others."""
    drafter = assistant_of(target)
    prompt = random_text(12)
    text = decode(target, Nobody(), prompt, 40, 0.0, 0).tokens
    taught(drafter, target, [*prompt, *text], steps=15)
    mine = decode(target, Trained(drafter, target.frozen_head, REFERENCE), prompt, 40, 0.0, 0)
    their_text, theirs = their_drafts(target, drafter, prompt, 40, corrected)
    assert mine.tokens == their_text == text
    whole = [drafts for drafts in theirs if len(drafts) == STEPS]  # the last rounds are cut to what is still to be said
    drafts = [one.drafted_tokens for one in mine.rounds]
    if corrected:
        assert len(whole) > 5 and drafts[: len(whole)] == whole
        kept = [one.kept for one in mine.rounds[: len(whole)]]
        assert sum(kept) > 5 and min(kept) == 0
    else:
        assert drafts[: len(whole)] != whole


# The decode loop.


@pytest.fixture(scope="module")
def decoded_text(target):
    """A drafter, and what was decoded with its help: sampled, so that some of its drafts are kept."""
    drafter = assistant_of(target)
    return drafter, *decoded(target, drafter, temperature=1.0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("flex", marks=pytest.mark.slow)])
def test_the_training_forward_is_the_decode_loop(target, decoded_text, backend):
    found = compared(target, *decoded_text, attend=BACKENDS[backend])
    assert not found.other_vocabulary and found.worst < SAME
    assert found.kept >= 3 and found.refused >= 5, found


class AtTheAnchor(DrafterConfig):
    def row_position(self, anchor: Tensor, slot: Tensor | int) -> Tensor:
        return anchor


def changed(drafter, config: DrafterConfig):
    """The same weights under another configuration."""
    other = deepcopy(drafter)
    other.config = config
    return other


def with_window(drafter, window: int):
    shapes = [shape if shape.window is None else replace(shape, window=window) for shape in drafter.config.kv_shapes]
    return changed(drafter, replace(drafter.config, kv_shapes=shapes))


def at_the_anchor(drafter):
    return changed(drafter, AtTheAnchor(**{f.name: getattr(drafter.config, f.name) for f in fields(drafter.config)}))


def before_the_norm(drafter):
    other = deepcopy(drafter)
    other._feature = lambda hidden_PE: hidden_PE
    return other


FAULTS = {
    "rows at the anchor": at_the_anchor,
    "a window of one more": lambda drafter: with_window(drafter, WINDOW + 1),
    "a window of one less": lambda drafter: with_window(drafter, WINDOW - 1),
    "features before the norm": before_the_norm,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_drafter_that_reads_otherwise_is_seen(target, decoded_text, fault):
    drafter, *decoded = decoded_text
    assert compared(target, FAULTS[fault](drafter), *decoded).worst > ANOTHER


def test_features_of_the_next_position_are_seen(target, decoded_text):
    def tamper(pack: Pack) -> Pack:
        pack.states.hidden = {layer: torch.roll(t, -1, 0) for layer, t in pack.states.hidden.items()}
        return pack

    assert compared(target, *decoded_text, tamper=tamper).worst > ANOTHER


@pytest.fixture(scope="module")
def exact(target):
    """The target in float64, where the order of sums changes no token, and a drafter that some of its tokens taught."""
    target = Target(target.path, dtype=torch.float64)
    hidden, kv = read_layers(target)
    target.capture(hidden, sorted(set(kv)))
    drafter = assistant_of(target)
    text = decode(target, Nobody(), ragged()[0], 24, 0.0, 0).tokens
    taught(drafter, target, [*ragged()[0], *text], steps=10)
    return target, drafter


def test_the_engine_s_rounds_are_the_plain_loop_s_and_nothing_is_kept(exact):
    """Four prompts of several lengths at a time; the target's cache is all that is read."""
    target, drafter = exact
    drafting = StaticTrained(drafter, target.frozen_head)
    found = engine_of(target, drafting, STEPS, prefill_chunk=7).generate(ragged(), 24, [0, 1, 2, 3], Stops())
    plain = Trained(drafter, target.frozen_head, REFERENCE)
    expected = [decode(target, plain, prompt, 24, 0.0, 0) for prompt in ragged()]
    assert [triples(one) for one in found] == [triples(one) for one in expected]
    assert sum(r.kept for g in found for r in g.rounds) > 5
    assert len(drafting.memory.borrowed) == 4 and drafting.memory.nbytes() == 0
    assert {name: drafting.kv_bytes(40)[name] for name in ("kept", "peak")} == {"kept": 0, "peak": 0}


@pytest.mark.slow
def test_compiled_parts_are_the_same_function(target):
    drafter = assistant_of(target)
    pack = pack_of(target, random_text())
    expected = training_logits(target, drafter, pack).detach()
    drafter.compile_parts()
    assert apart(training_logits(target, drafter, pack).detach(), expected) < 1e-5


# The start, and what is saved.


def test_the_head_begins_as_the_target_s_own_in_fewer_dimensions(target):
    """What the head reads is read by the target's head alike, by way of `post_projection`. No other H dimensions hold more of the
    target's head. All dimensions hold the whole."""
    head_VE = target.frozen_head.head_VE
    drafter = assistant_of(target, random=False)
    x_QH = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x_QH @ drafter.head.weight.T, drafter.post_projection(x_QH) @ head_VE.T, rtol=1e-4, atol=1e-4)
    singular = torch.linalg.svdvals(head_VE.double())
    kept = drafter.head.weight.double().square().sum()
    torch.testing.assert_close(kept, singular[:24].square().sum(), rtol=1e-5, atol=0)
    whole_EE = main_directions(head_VE, head_VE.shape[1])
    torch.testing.assert_close(head_VE.double() @ whole_EE @ whole_EE.T, head_VE.double())
    assert torch.equal(drafter.target_norm, target.model.model.norm.weight)


def test_it_goes_through_its_files(target, tmp_path):
    drafter = assistant_of(target)
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    assert again.config == drafter.config and set(load_file(tmp_path / "model.safetensors")) == set(drafter.state_dict())
    pack = pack_of(target, random_text())
    assert torch.equal(training_logits(target, again, pack), training_logits(target, drafter, pack))


def test_a_warm_start_takes_everything_of_another_assistant_and_nothing_of_other_drafters(target, tmp_path):
    one = assistant_of(target)
    one.save_pretrained(tmp_path)
    other = assistant_of(target, random=False, seed=5)
    check_warm_start(str(tmp_path), other.config)
    assert warm_start(other, str(tmp_path), target.frozen_head)[1] == []
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.state_dict().values(), other.state_dict().values()))
    with pytest.raises(UserError, match="is a drafter of drafter.kind=gemma4_assistant, not of layers"):
        check_warm_start(str(tmp_path), replace(other.config, kind="layers"))


def test_a_centroid_head_says_the_tokens_of_the_likeliest_clusters(target):
    """Of 3 of 7 clusters of 4 tokens that follow no order: the tokens that transformers' class says, and their logits."""
    drafter = assistant_of(target, centroids=7, centroid_top_k=3)
    drafter.head.clusters.ordering.copy_(torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3)))
    tokens = random_text()
    pack = pack_of(target, tokens)
    mine = training_logits(target, drafter, pack)  # by way of `DraftHead.logits`, as decoding
    theirs = their_logits(target, transformers_assistant(drafter, target), tokens).detach()
    said = mine.isfinite()
    assert (said.sum(-1) == 12).all() and len(said.flatten(0, 1).unique(dim=0)) > 5
    assert ((theirs > theirs.amin(-1, keepdim=True)) == said).all() and apart(mine[said], theirs[said]) < 1e-5
    # A loss is over all tokens.
    assert torch.equal(drafter.head.heads(target.frozen_head).draft_DE, drafter.head.weight)


# What a recipe and a cache make of it.


def config_of(target: Target, *words: str, held: tuple[list[int], list[int]] | None = None) -> DrafterConfig:
    """Of the published sizes, over a cache that holds these layers (hidden states, K/V); None: those that cache.layers=assistant
    stores."""
    recipe = cli.compose("train", TrainRecipe, ["experiment=gemma4_assistant", f"target.path={target.path}", *words])
    hidden, kv, _ = chosen_layers(recipe)
    hidden, kv = held or (hidden, kv)
    shapes = {str(layer): asdict(shape) for layer, shape in target.kv_shapes.items() if layer in kv}
    named = {"id": "x", "weights_hash": "0", "architecture": asdict(target.architecture), "kv_shapes": shapes}
    layers = {"hidden_layers": hidden, "kv_layers": kv, "query_layers": []}
    return drafter_config(recipe, SimpleNamespace(target=named, tokenizer_hash="0", max_length=99, **layers))


def test_it_reads_the_target_s_last_layers_of_each_kind(target):
    small = ["drafter.hidden_size=24", "drafter.intermediate_size=40"]
    found = config_of(target, *small)
    mine = assistant_config(target)
    for name in ("kind", "target_layers", "hidden_layers", "kv_shapes", "architecture", "own_sizes", "target_hidden"):
        assert getattr(found, name) == getattr(mine, name), name
    assert found.constant_positions and found.slots == STEPS and not found.own_kv and found.own_head
    assert (found.output_size, found.feature_size, found.state_size) == (24, 32, 32)
    # As many layers as are said: the last one reads the full layer.
    assert config_of(target, *small, "drafter.layers=2").target_layers == found.target_layers[2:]
    assert config_of(target, *small, "drafter.layers=1").target_layers == found.target_layers[3:]


def test_what_a_cache_or_a_target_cannot_give_is_a_line(target):
    hidden, kv = read_layers(target)
    for held in (([0], kv), (hidden, kv[:1]), ([], kv)):
        with pytest.raises(UserError, match="hidden states of layer . and K/V of .*: capture it with cache.layers=assistant"):
            config_of(target, held=held)
    small = ("drafter.hidden_size=24", "drafter.heads=2")
    assert config_of(target, *small, "drafter.layers=1", held=(hidden, kv[-1:])).target_layers == kv[-1:]
    other = next(layer for layer in range(len(target.layers)) if layer not in kv)
    with pytest.raises(UserError, match=rf"needs kv states of layer.s. .{other}.; the cache"):
        config_of(target, *small, "drafter.layers=2", f"drafter.target_layers=[{other},{kv[-1]}]")
    with pytest.raises(UserError, match="3 query heads cannot share"):
        config_of(target, "drafter.hidden_size=24", "drafter.heads=3")
    with pytest.raises(UserError, match="drafter.hidden_size=256 exceeds the target's 32"):
        config_of(target)


# The real commands.


def words(folder, name: str) -> list[str]:
    """A miniature and random documents that say one half twice, as words of a command line."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(2, 25, (24, 30), generator=generator).tolist()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"input_ids": half + half}) + "\n" for half in halves))
    path = add_tokenizer(miniature(name, folder))
    texts = ["data=tokens", "data.max_length=64", f"data.path={folder / 'texts.jsonl'}"]
    return [f"target.path={path}", "target.mask_token_id=null", *texts, "cache=fp32", f"cache.dir={folder / 'cache'}"]


def training(folder) -> list[str]:
    small = ["drafter.hidden_size=24", "drafter.intermediate_size=40", "train.max_steps=8", "train.lr=1e-2"]
    return ["experiment=gemma4_assistant", *SMALL, *small, f"run.dir={folder / 'run'}", "tracking=none"]


@pytest.mark.slow
@pytest.mark.parametrize("name,ranks,precision", [("gemma4_text_shared", 1, "bf16"), ("gemma4_text_k_eq_v", 2, "fp32")])
def test_an_assistant_trains(tmp_path, name, ranks, precision):
    source = words(tmp_path, name)
    done = command(ROOT / "data_prep/main.py", *source, "cache.layers=assistant", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    kv = {"gemma4_text_shared": [0, 1], "gemma4_text_k_eq_v": [2, 3]}[name]
    assert (manifest["hidden_layers"], manifest["kv_layers"]) == ([3], kv)
    line = [*source, *training(tmp_path), "deepspeed=zero2", f"train.precision={precision}"]
    done = command(TRAIN, *line, ranks=ranks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = losses(tmp_path / "run")
    assert len(found) == 8 and found[-1] < 0.8 * found[0]
    drafter = load_drafter(tmp_path / "run/checkpoints/best")
    assert drafter.config.is_assistant and drafter.config.target_layers == [kv[0]] * 3 + [kv[1]]
