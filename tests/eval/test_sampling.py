"""Sampled output is the target's: the distribution, its draws, verification, and what the engine emits.

Shapes: B requests, J drafted tokens, K = J + 1 positions, R rows, V vocabulary.
"""

from collections import Counter

import pytest
import torch

from data_prep.decoding.sampling import Sampling, distribution, drawn
from eval.engine.drafting import StaticLookup
from eval.engine.request import Stops
from eval.engine.tree import TreeShape
from eval.oracle.verify import accept_sampled, verify
from tests.support.decoding import chi_square_p, exact_pairs
from tests.support.engines import engine_of, ragged, trained, triples
from tests.support.models import HIDDEN_LAYERS, small_target


@pytest.fixture(scope="module")
def target():
    """In float64, where the order of sums changes no token."""
    target = small_target(dtype=torch.float64)
    target.capture(HIDDEN_LAYERS, (1, 2))
    return target


@pytest.mark.parametrize(
    "objective,reuse,tree",
    [
        ("ttt", "hybrid", None),
        ("blockwise", "kv", None),
        ("ttt", "kv", TreeShape(3, 2)),
        ("ttt", "queries+constant", None),
        pytest.param("ttt", "queries+head_concat", TreeShape(3, 2), marks=pytest.mark.slow),
    ],
)
def test_what_a_request_gets_depends_on_its_prompt_and_seed_alone(target, objective, reuse, tree):
    drafting = trained(target, objective, reuse, tree=tree)
    prompts = ragged()
    run = lambda batch, prompts, seeds: [
        (g.tokens, triples(g))
        for g in engine_of(target, drafting, 6 if tree else 3, batch, sampling=Sampling(1.0, 0.95, 8)).generate(
            prompts, 25, seeds, Stops()
        )
    ]
    together = run(4, prompts, [1, 2, 3, 4])
    for at, (prompt, seed) in enumerate(zip(prompts, (1, 2, 3, 4))):
        assert run(1, [prompt], [seed]) == together[at : at + 1]
    assert run(6, prompts[::-1], [4, 3, 2, 1])[::-1] == together  # other places, and two idle ones
    assert all(a != b for a, b in zip(together, run(4, prompts, [5, 6, 7, 8])))  # the control: the seed matters


def test_distribution_is_what_generate_draws_from():
    """`generate`'s own raw logits and scores, with three tokens always tied."""
    target = small_target(dtype=torch.float64)
    with torch.no_grad():
        target.model.get_input_embeddings().weight[[6, 9]] = target.model.get_input_embeddings().weight[[4]].clone()
    differ = 0
    for temperature, top_p, top_k in ((1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 3), (1.3, 0.6, 5), (0.5, 0.3, 2)):
        torch.manual_seed(0)
        cut = dict(temperature=temperature, top_p=top_p, top_k=top_k)
        out = target.model.generate(
            torch.tensor(ragged((6,))), max_new_tokens=40, do_sample=True, eos_token_id=None, pad_token_id=0,
            output_scores=True, output_logits=True, return_dict_in_generate=True, **cut,
        )  # fmt: skip
        logits, scores = torch.cat(out.logits), torch.cat(out.scores)
        assert torch.equal(logits[:, 4], logits[:, 9])
        torch.testing.assert_close(distribution(logits, **cut), scores.softmax(-1), rtol=0, atol=1e-6)
        first = distribution(distribution(logits, temperature, top_p).log(), 1.0, 1.0, top_k)  # the control: the other order
        differ += not torch.allclose(first, scores.softmax(-1), atol=1e-6)
    assert differ > 0


def test_drawn_follows_p_and_never_yields_a_token_without_probability():
    generator = torch.Generator().manual_seed(0)
    edge = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    for p in ([0, 0.5, 0, 0.5, 0], [0.25, 0, 0.25, 0.5, 0], [0, 0, 3, 1, 0], [1e-30, 0, 0, 1, 0], [0, 0.3, 0.2, 0.1, 0]):
        p_V = torch.tensor(p)
        u_R = torch.cat([edge, torch.rand(4000, generator=generator, dtype=torch.float64)])
        tokens = drawn(p_V.expand(len(u_R), -1), u_R)
        assert (p_V[tokens] > 0).all()
        counts = torch.bincount(tokens[len(edge) :], minlength=5).double()
        assert chi_square_p(counts, p_V.double() / p_V.double().sum()) > 1e-3
        if p_V[3] < 1:
            assert chi_square_p(counts, (p_V.double() + 0.1) / (p_V.double() + 0.1).sum()) < 1e-3


def law(p_KV, q_JV):
    """{(tokens emitted): probability} of a round of speculative sampling, by enumeration in plain Python."""
    found = {}
    p, q = (p_KV.tolist(), q_JV.tolist())
    tokens = range(p_KV.shape[1])

    def emit(j, chance, before):
        if j == len(q):
            for v in tokens:
                found[(*before, v)] = found.get((*before, v), 0) + chance * p[j][v]
            return
        rest = [max(a - b, 0) for a, b in zip(p[j], q[j])]
        for d in tokens:
            keeps = min(1, p[j][d] / q[j][d]) if q[j][d] else 0
            emit_next = chance * q[j][d] * keeps
            if emit_next:
                emit(j + 1, emit_next, (*before, d))
            for v in tokens if keeps < 1 else ():
                key = (*before, v, "refused")
                found[key] = found.get(key, 0) + chance * q[j][d] * (1 - keeps) * rest[v] / sum(rest)

    emit(0, 1.0, ())
    return found


def test_sampled_verification_has_the_law_of_speculative_sampling():
    """The batched rule and the plain one, against all outcomes enumerated; another q fails."""
    generator = torch.Generator().manual_seed(0)
    count = 20000
    p_KV = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    q_JV = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.4, 0.1, 0.1, 0.4]])
    exact = {key: chance for key, chance in law(p_KV, q_JV).items() if chance > 0}
    keys = sorted(exact, key=str)

    def p_value(drafts, kept, following):
        counts = Counter((*d[:n], v, *["refused"] * (n < 2)) for d, n, v in zip(drafts, kept, following))
        counts[keys[0]] += 0 if counts.keys() <= exact.keys() else 10**9  # what cannot be
        return chi_square_p(torch.tensor([counts[k] for k in keys]), torch.tensor([exact[k] for k in keys]))

    draft_BJ = torch.stack([torch.multinomial(q_V, count, True, generator=generator) for q_V in q_JV], dim=1)
    u_BK = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    inputs = (draft_BJ, q_JV.expand(count, -1, -1), p_KV.expand(count, -1, -1))
    kept_B, next_B = accept_sampled(*inputs, u_BK)
    assert p_value(draft_BJ.tolist(), kept_B.tolist(), next_B.tolist()) > 1e-3
    same = [verify(d, q_JV, p_KV, generator) for d in draft_BJ[:3000].tolist()]
    assert p_value(draft_BJ[:3000].tolist(), *zip(*same)) > 1e-3
    first = torch.bincount(torch.where(kept_B > 0, draft_BJ[:, 0], next_B), minlength=4)
    assert first[3] == 0 and chi_square_p(first, p_KV[0]) > 1e-3 and chi_square_p(first, q_JV[0]) < 1e-3
    kept_B, next_B = accept_sampled(draft_BJ, None, inputs[2], u_BK)  # the control: as if the drafter had been certain
    assert p_value(draft_BJ.tolist(), kept_B.tolist(), next_B.tolist()) < 1e-3


def test_sampled_verification_of_certain_guesses_by_hand():
    """q None: a guess is kept with the target's own probability; `count_B` says how many guesses there are."""
    p_KV = torch.tensor([[0.2, 0.6, 0.2], [0.5, 0.1, 0.4], [0.0, 0.0, 1.0]], dtype=torch.float64)
    u_BK = torch.tensor([[0.5, 0.3, 0.9], [0.5, 0.6, 0.9], [0.7, 0.0, 0.4], [0.5, 0.3, 0.9], [0.1, 0.1, 0.7]]).double()
    draft_BJ = torch.tensor([[1, 0]]).expand(5, -1)
    count_B = torch.tensor([2, 2, 2, 1, 0])
    kept_B, next_B = accept_sampled(draft_BJ, None, p_KV.expand(5, -1, -1), u_BK, count_B)
    # Row 0 keeps both; 1 refuses token 0, draws of (0, .1, .4); 2 refuses token 1, draws of (.2, 0, .2); 3 and 4 ran out of
    # guesses and draw of all of p.
    assert kept_B.tolist() == [2, 1, 0, 1, 0] and next_B.tolist() == [2, 2, 0, 2, 1]


SAMPLED = {
    "chain": lambda target: (trained(target, "ttt", "hybrid"), 4),
    "block": lambda target: (trained(target, "blockwise_shifted", "kv"), 4),
    "lookup": lambda target: (StaticLookup(), 3),
    "tree": lambda target: (trained(target, "ttt", "hybrid", tree=TreeShape(3, 2)), 8),
    "queries": lambda target: (trained(target, "ttt", "queries+constant"), 4),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "queries")) for name in SAMPLED])
def test_sampled_pairs_have_the_target_s_distribution(name):
    """The second and third token (the first comes from the prefill), at top_p 0.9; a wrong temperature is noticed."""
    target = small_target(vocab=7)
    target.capture(HIDDEN_LAYERS, (2,))
    prompt = [3, 4, 5, 6, 3, 4]
    drafting, length = SAMPLED[name](target)
    batch = 100
    cut = (1.3, 0.9)
    engine = engine_of(target, drafting, length, batch, 6, 3, Sampling(*cut))
    counts = torch.zeros(7, 7)
    kept = 0
    for n in range(5):
        for one in engine.generate([prompt] * batch, 3, list(range(n * batch, (n + 1) * batch)), Stops()):
            counts[one.tokens[1], one.tokens[2]] += 1
            kept += sum(r.kept for r in one.rounds)
    right, wrong = exact_pairs(target, prompt, *cut), exact_pairs(target, prompt, 1.0, 0.9)
    assert kept > 100 and counts[right == 0].sum() == 0
    assert chi_square_p(counts.flatten(), right.flatten()) > 1e-3
    assert chi_square_p(counts.flatten(), wrong.flatten()) < 1e-3
