"""Decoding is lossless: whoever drafts, greedy output is the target's own and sampled output its own distribution."""

import pytest
import torch

from data_prep.decoding.sampling import Sampling
from eval.judging import measure
from eval.judging.controls import OtherMemory, zero_memory
from eval.oracle.decode import Generation, Round, decode
from eval.oracle.drafting import Draft, Nobody, PromptLookup, Trained
from eval.oracle.verify import verify
from tests.support.decoding import chi_square_p, exact_pairs, generated
from tests.support.models import HIDDEN_LAYERS, drafter_of, small_target
from train.attention.choose import BACKENDS
from train.views.recipe import View

CELLS = [
    (objective, reuse)
    for objective in ("ttt", "blockwise", "blockwise_shifted", "blockwise_causal")
    for reuse in ("hidden", "kv", "hybrid")
]
CELLS.append(("blockwise_pairs", "hidden"))
REFERENCE = BACKENDS["reference"]


def prompts(count, length=12, vocab=11, seed=0):
    return torch.randint(3, vocab, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def exact_target(request):
    target = small_target(request.param, torch.float64)
    target.capture(HIDDEN_LAYERS, (1, 2))
    return target


@pytest.mark.parametrize("objective,reuse", CELLS)
def test_greedy_output_is_generate_s_in_float64(exact_target, objective, reuse):
    drafter = drafter_of(exact_target, objective, reuse, layers=2)
    kept = 0
    for prompt in prompts(1, seed=4):
        result = decode(exact_target, Trained(drafter, exact_target.frozen_head, REFERENCE), prompt, 40, 0.0, seed=0)
        assert result.tokens == generated(exact_target, prompt, 40)
        kept += sum(r.kept for r in result.rounds)
    assert kept > 0  # else nothing but the bonus token was tested


@pytest.mark.slow
def test_greedy_output_is_generate_s_on_twenty_prompts_in_float32():
    """The embedded target, 20 prompts of its held-out text, a drafter and prompt lookup (test_engine.py: in batches)."""
    from data_prep.recipe import DataRecipe, TargetRecipe
    from data_prep.target.loading import load_target, load_tokenizer
    from eval.prompts.load import heldout_prompts
    from eval.prompts.suites import SuiteRecipe
    from train.drafter.build import new_drafter
    from train.drafter.config import DrafterConfig

    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    found = heldout_prompts(
        DataRecipe(source="stdlib", max_length=512),
        SuiteRecipe(kind="heldout", count=20, prompt_tokens=64, new_tokens=24),
        load_tokenizer(target.path),
    )
    assert len({p.id for p in found}) == 20
    target.capture([0, 2], [0, 5])
    config = DrafterConfig("blockwise", "hybrid", [0, 5], [0, 2], 4, True, False, 0, "target", 2, target.architecture, {})
    drafter = new_drafter(config).start(target, target.frozen_head)
    kept = 0
    for drafting in (Trained(drafter, target.frozen_head, REFERENCE), PromptLookup(4)):
        for prompt in found:
            result = decode(target, drafting, prompt.tokens, 24, 0.0, seed=0)
            assert result.tokens == generated(target, prompt.tokens, 24), prompt.id
            kept += sum(r.kept for r in result.rounds)
    assert kept > 100


def sampled_pairs(target, drafting, prompt, count, temperature):
    """Counts [V, V] of the second and third token of `count` sampled continuations (the first comes from the prefill)."""
    vocab = target.architecture.vocab_size
    counts = torch.zeros(vocab, vocab)
    for seed in range(count):
        tokens = decode(target, drafting, prompt, 3, temperature, seed).tokens
        counts[tokens[1], tokens[2]] += 1
    return counts


SLOWLY = [pytest.param(*cell, marks=pytest.mark.slow) for cell in (("ttt", "hybrid"), ("blockwise_shifted", "kv"))]


@pytest.mark.parametrize("objective,reuse", [("lookup", ""), *SLOWLY])
def test_sampled_output_has_the_target_s_distribution(objective, reuse):
    target = small_target(vocab=7)
    target.capture(HIDDEN_LAYERS, (2,))
    prompt = [3, 4, 5, 6, 3, 4]
    drafting = (
        PromptLookup(3) if objective == "lookup" else Trained(drafter_of(target, objective, reuse), target.frozen_head, REFERENCE)
    )
    counts = sampled_pairs(target, drafting, prompt, 600, temperature=1.3)
    p = exact_pairs(target, prompt, 1.3)
    assert chi_square_p(counts.flatten(), p.flatten()) > 1e-3
    wrong = exact_pairs(target, prompt, 1.0)  # the control: the test can tell 1.3 from 1.0
    assert chi_square_p(counts.flatten(), wrong.flatten()) < 1e-3


def test_verify_emits_p_whatever_q_is():
    """First emitted token over many rounds: distributed as p; and as q when the rule is broken (the control)."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4]), torch.tensor([[0.1, 0.1, 0.4, 0.4]])
    first = torch.zeros(4)
    for _ in range(4000):
        token = int(torch.multinomial(q[0], 1, generator=g))
        kept, following = verify([token], q, p, g)
        first[token if kept else following] += 1
    assert chi_square_p(first, p[0]) > 1e-3
    assert first[3] == 0  # what the target gives no chance is never emitted
    assert chi_square_p(first, torch.tensor([0.4, 0.3, 0.2, 0.1])) < 1e-3


def test_sampling_at_another_temperature_fails_the_losslessness_check():
    target = small_target()
    texts = prompts(6)
    honest = [decode(target, Nobody(), p, 60, 1.0, seed=i) for i, p in enumerate(texts)]
    assert measure.sampling_p_value(target, texts, honest, Sampling(1.0)) > 1e-3
    cold = [decode(target, Nobody(), p, 60, 0.6, seed=i) for i, p in enumerate(texts)]
    assert measure.sampling_p_value(target, texts, cold, Sampling(1.0)) < 1e-3


def test_end_token_and_limit_cut_where_plain_decoding_would(exact_target):
    prompt = prompts(1)[0]
    plain = generated(exact_target, prompt, 40)
    drafter = drafter_of(exact_target, "ttt", "kv", layers=2)
    trained = Trained(drafter, exact_target.frozen_head, REFERENCE)
    end = plain[7]
    assert decode(exact_target, trained, prompt, 40, 0.0, 0, end_tokens=frozenset({end})).tokens == plain[: plain.index(end) + 1]
    for limit in (1, 2, 5):
        assert decode(exact_target, trained, prompt, limit, 0.0, 0).tokens == plain[:limit]


def test_prompt_lookup_continues_the_last_longest_match():
    lookup = PromptLookup(3)
    assert lookup.draft([1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3], 0.0, None) == Draft([5, 9, 2])
    assert lookup.draft([1, 2, 3], 0.0, None) == Draft([])


def test_controls_change_what_the_drafter_sees(exact_target):
    states = exact_target.forward(torch.tensor(prompts(1))).map(lambda t: t[0])
    other = exact_target.forward(torch.tensor(prompts(1, length=5, seed=1))).map(lambda t: t[0])
    place_P = torch.arange(4, 7)
    assert zero_memory(states, place_P).hidden[1].abs().sum() == 0
    memory = OtherMemory(2, 16)
    memory.fill(0, states)
    memory.fill(1, other)
    few = states.map(lambda t: t[:3])
    shown = memory.of(1)(few, place_P)
    both = memory(few.map(lambda t: torch.stack([t, t])), torch.stack([place_P, place_P]))
    for got, of_two, row in zip(shown.key[2], both.key[2][1], (4, 0, 1)):
        assert torch.equal(got, other.key[2][row]) and torch.equal(of_two, got)
    assert torch.equal(both.key[2][0], states.key[2][4:7])


def test_tau_and_acceptance_by_hand():
    """Rounds that kept 2, 0 and 1 of 2 drafted tokens: 6 tokens in 3 verify steps."""
    one = Generation([0] * 7, [Round(0, 2, 2), Round(3, 2, 0), Round(4, 2, 1)], decode_s=2.0, prefill_s=1.0)
    found = measure.acceptance([one])
    assert found.joint == pytest.approx([2 / 3, 1 / 3]) and found.conditional == pytest.approx([2 / 3, 1 / 2])
    assert found.tau == pytest.approx(2.0) and measure.tau([one]) == (2.0, 2.0)
    assert measure.tokens_per_s([one], prefill=False) == 3.0
    assert measure.repetition([Generation([1, 2, 3, 4, 1, 2, 3, 4])]) == pytest.approx(1 / 5)


VIEWS = {
    "sink_recent": View(kind="sink_recent", budget=12, sink=2),
    "chunks": View(kind="topk_chunk", budget=16, sink=4, recent=4, chunk=4),
    "chunks in cache, never": View(
        kind="topk_chunk", budget=16, sink=4, recent=4, chunk=4, positions="in_cache", refresh="never"
    ),
    "h2o, every 5 tokens": View(kind="h2o", budget=12, refresh=5),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("objective,reuse", [("ttt", "none"), ("ttt", "kv"), ("blockwise", "hybrid")])
def test_a_view_changes_what_is_drafted_and_never_what_is_emitted(objective, reuse, view):
    """Greedy output is `generate`'s; the keys that a round reads are as many as the budget allows, in measured bytes; and what no
    later selection can ask for is gone."""
    exact_target = small_target(dtype=torch.float64)
    exact_target.capture(HIDDEN_LAYERS, (1, 2))
    view = VIEWS[view]
    drafter = drafter_of(exact_target, objective, reuse, layers=2)
    prompt = prompts(1, length=20)[0]
    results = [
        decode(exact_target, Trained(drafter, exact_target.frozen_head, REFERENCE, v), prompt, 60, 0.0, 0)
        for v in (None, view)
    ]
    assert results[0].tokens == results[1].tokens == generated(exact_target, prompt, 60)
    whole, sparse = (result.kv_bytes for result in results)
    assert whole["kept"] == whole["read"] <= whole["peak"] and whole["searched"] == 0
    drafts = [[r.draft.logits_JV[0] for r in result.rounds] for result in results]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(*drafts))  # the view hid something
    # Bytes of a position: two heads of eight numbers, float64, K and V, two layers, each branch.
    position = 2 * 8 * 8 * 2 * 2 * len(drafter.config.branches)
    assert sparse["read"] <= view.budget * position and whole["read"] > 60 * position
    assert (sparse["searched"] == 0) == (view.kind == "sink_recent")
    if sparse["searched"]:  # keys alone are scored; queries of the second layer take reading the first one's K and V
        assert sparse["searched"] >= 20 * position
    settled = view.refresh == "never" or view.kind == "sink_recent"
    if settled and reuse != "none":
        # The prompt's keys are gone; what came since is the tail's, and gives way once the budget is full of it.
        assert sparse["kept"] <= 2 * view.budget * position and sparse["peak"] >= 20 * position
    else:  # a later selection, or memory that is made by reading memory, asks for all of it
        assert sparse["kept"] >= whole["kept"]
