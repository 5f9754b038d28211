"""Continuous batching: everybody gets what they would get alone, whoever else is asked, and whenever a place becomes free.

Shapes: P places of a batch, L tokens of a text, R rows, V vocabulary.
"""

import pytest
import torch
from transformers import GenerationConfig, TopPLogitsWarper

from common.errors import UserError
from data_prep.decoding import generate
from data_prep.decoding.dialogues import Answer, Ask
from data_prep.decoding.generate import BatchGenerator
from data_prep.decoding.places import Places
from data_prep.decoding.sampling import nucleus
from tests.support.models import small_target

END = 7


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def target(request):
    return small_target(request.param, torch.float64)


def prompts(count, longest=20, seed=3):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 11, (size,), generator=generator).tolist() for size in sizes]


def asked(tokens, number, temperature=0.0, top_p=1.0, max_tokens=30):
    return Ask(tokens, max_tokens, temperature, top_p, seed=number)


def answers(target, asks, places=None, ends=(END,)):
    """Each request's answer, in the order of `asks`."""
    found: list[Answer | None] = [None] * len(asks)

    def dialogue(number, ask):
        found[number] = yield ask

    BatchGenerator(target, ends, places).run(dialogue(*one) for one in enumerate(asks))
    return found


def of_transformers(target, tokens, max_tokens=30):
    config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=[END], pad_token_id=0)
    ids = torch.tensor([tokens])
    output = target.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(tokens) :].tolist()
    return Answer(output[:-1], True) if output[-1] == END else Answer(output, False)


@pytest.mark.parametrize("places", [1, 3, 16, None])
def test_greedy_answers_are_those_of_generate(target, places):
    """14 requests of all lengths share 3 places: places are taken again, and the last requests close up."""
    asks = [asked(tokens, number, max_tokens=1 + number * 3) for number, tokens in enumerate(prompts(14))]
    expected = [of_transformers(target, ask.tokens, ask.max_tokens) for ask in asks]
    assert answers(target, asks, places) == expected
    assert len({answer.ended for answer in expected}) == 2  # some end by themselves, some are cut


def test_a_fault_in_moving_requests_together_changes_the_answers(target, monkeypatch):
    """Negative control of the above."""
    asks = [asked(tokens, number, max_tokens=1 + number * 3) for number, tokens in enumerate(prompts(14))]
    expected = answers(target, asks, 5)
    move = Places.move
    moved = []

    def forgetful(self, source, destination):
        move(self, source, destination)
        self.text_PL[destination] = self.text_PL[source].roll(1, dims=1)
        moved.extend(destination.tolist())

    monkeypatch.setattr(Places, "move", forgetful)
    assert answers(target, asks, 5) != expected and moved


def test_a_dialogue_gets_greedy_answers_to_each_of_its_turns(target):
    told = {}

    def dialogue(number, tokens):
        first = yield asked(tokens, number, max_tokens=6)
        second = yield asked(tokens + first.tokens + [5], number, max_tokens=9)
        told[number] = (first, second)

    every = dict(enumerate(prompts(9)))
    BatchGenerator(target, [END], 4).run(dialogue(*one) for one in every.items())
    assert sorted(told) == sorted(every)
    for number, tokens in every.items():
        first = of_transformers(target, tokens, 6)
        assert told[number] == (first, of_transformers(target, tokens + first.tokens + [5], 9))


def test_a_sample_depends_on_its_seed_alone(target):
    some = lambda number: {"temperature": 0.5 + number % 3, "top_p": 1 - 0.1 * (number % 2)}
    asks = [asked(tokens, number, **some(number)) for number, tokens in enumerate(prompts(12))]
    alone = [answers(target, [ask])[0] for ask in asks]
    assert answers(target, asks, 5) == alone
    assert answers(target, asks[::-1], 3) == alone[::-1]
    others = [ask._replace(seed=ask.seed + 100) for ask in asks]
    assert answers(target, others, 5) != alone


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6), (1.3, 0.8)])
def test_first_and_second_tokens_follow_the_targets_distribution(target, temperature, top_p):
    """Chi-square against the probabilities of transformers' warpers, for the prompt's token and for one of a step."""
    count = 3000
    tokens = [3, 1, 4]
    asks = [asked(tokens, n, temperature, top_p, max_tokens=2) for n in range(count)]
    texts = [answer.tokens for answer in answers(target, asks, 64, ends=())]
    common = max(range(11), key=lambda token: sum(text[0] == token for text in texts))
    for context, drawn in (
        (tokens, [text[0] for text in texts]),
        (tokens + [common], [text[1] for text in texts if text[0] == common]),
    ):
        p_V = probabilities(target, context, temperature, top_p)
        counts_V = torch.bincount(torch.tensor(drawn), minlength=11).double()
        assert not counts_V[p_V == 0].any()
        kept_V = p_V > 0
        expected_V = p_V[kept_V] * len(drawn)
        statistic = ((counts_V[kept_V] - expected_V) ** 2 / expected_V).sum()
        freedom = torch.tensor((int(kept_V.sum()) - 1) / 2, dtype=torch.float64)
        assert freedom == 0 or float(torch.special.gammaincc(freedom, statistic.double() / 2)) > 1e-4


def probabilities(target, tokens, temperature, top_p):
    scores = target.logits(target.forward(torch.tensor([tokens])).last_hidden[:, -1]) / temperature
    return TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocabulary", [5, 1000])
def test_top_p_keeps_the_tokens_that_transformers_keeps(vocabulary, top_p):
    logits_RV = 4 * torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    kept_RV = nucleus(logits_RV.softmax(-1), torch.full((50,), top_p)) > 0
    assert torch.equal(kept_RV, TopPLogitsWarper(top_p)(None, logits_RV) > -torch.inf)
    if 0.5 <= top_p and vocabulary == 1000:  # negative control
        less_RV = nucleus(logits_RV.softmax(-1), torch.full((50,), 0.9 * top_p)) > 0
        assert not torch.equal(kept_RV, less_RV)


def test_caches_grow_for_a_longer_request(target, monkeypatch):
    monkeypatch.setattr(generate, "ROOM_STEP", 4)
    asks = [asked(tokens, number, max_tokens=8) for number, tokens in enumerate(prompts(6, longest=6))]
    asks.append(asked(list(range(11)) * 9, 99, max_tokens=40))
    assert answers(target, asks, 3) == [of_transformers(target, ask.tokens, ask.max_tokens) for ask in asks]


def test_caches_without_memory_to_grow_wait_for_running_requests_and_may_have_fewer_places(target, monkeypatch):
    """What a GPU does whose memory is short; here the memory is said to be."""
    monkeypatch.setattr(generate, "ROOM_STEP", 4)
    fits = lambda self, room: 5 if room <= 20 else 2
    monkeypatch.setattr(BatchGenerator, "_fitting", fits)
    widths = []
    width = BatchGenerator._width
    monkeypatch.setattr(BatchGenerator, "_width", lambda self, count: widths.append((self._count, count)) or width(self, count))
    asks = [asked(tokens, number, max_tokens=8) for number, tokens in enumerate(prompts(8, longest=6))]
    asks[5:5] = [asked(list(range(11)) * 3, 90 + n, max_tokens=20) for n in range(4)]
    assert answers(target, asks, 5) == [of_transformers(target, ask.tokens, ask.max_tokens) for ask in asks]
    assert {count for count, _ in widths} == {5, 2} and all(used <= count for count, used in widths)
    monkeypatch.setattr(BatchGenerator, "_fitting", lambda self, room: 0)
    with pytest.raises(UserError, match="does not hold a request of"):
        answers(target, asks, 5)
