"""Outputs end where plain decoding ends them: at end tokens and stop strings among the tokens that a round keeps.

Shapes: B requests, J drafted tokens, L places of a text.
"""

import pytest
import torch

from data_prep.recipe import TargetRecipe
from data_prep.target.loading import load_target, load_tokenizer
from eval.engine.drafting import Proposal, StaticNobody
from eval.engine.request import Stops
from tests.support.decoding import generated
from tests.support.engines import engine_of, exact_target, ragged


@pytest.fixture(scope="module")
def target():
    return exact_target()


@pytest.fixture(scope="module")
def tiny():
    """The embedded target in float32, and its tokenizer."""
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    return target, load_tokenizer(target.path)


class Known(StaticNobody):
    """Proposes the continuations it was given: all of a draft is kept, as long as they are the target's."""

    def __init__(self, texts):
        self.text_BL = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)

    def propose(self, text_BL, anchor_B, length, sampling, u_BJ):
        place_BJ = anchor_B[:, None] + 1 + torch.arange(length)
        return Proposal(self.text_BL.gather(1, place_BJ.clamp(max=self.text_BL.shape[1] - 1)))


def test_end_tokens_within_kept_drafts_cut_where_generate_does(target):
    prompts = ragged()
    plain = [generated(target, p, 40) for p in prompts]
    engine = engine_of(target, Known([p + t for p, t in zip(prompts, plain)]), 6)
    for end in sorted({t for tokens in plain for t in tokens[:30]}):
        found = engine.generate(prompts, 30, [0] * 4, Stops(frozenset({end})))
        for prompt, one in zip(prompts, found):
            assert one.tokens == generated(target, prompt, 30, end)
            assert all(r.kept == 6 for r in one.rounds)  # the end was among kept tokens


def test_stop_strings_cut_where_generate_does(tiny):
    """Strings that begin in one token and end in another, one that the prompt has already, and one from the prompt's last
    character to the output's first: `generate` looks at prompt and output together and stops there; the engine, as servers do,
    looks at the output alone."""
    target, tokenizer = tiny
    prompt = tokenizer("def read(path):\n    with open(path) as file:\n        return file")["input_ids"]
    plain = generated(target, prompt, 24)
    pieces = [tokenizer.decode([t]) for t in plain]
    text = tokenizer.decode(plain)
    engine = engine_of(target, Known([prompt + plain]), 5, 1, len(prompt), 24)
    run = lambda *strings: engine.generate([prompt], 24, [0], Stops(frozenset(), strings, tokenizer))[0]

    def stopped(*strings):
        ids = target.model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
            stop_strings=list(strings), tokenizer=tokenizer,
        )  # fmt: skip
        return ids[0, len(prompt) :].tolist()

    straddling = [a[-1] + b[:1] for a, b in zip(pieces[4:], pieces[5:]) if a and b]
    straddling = sorted({s for s in straddling if s not in tokenizer.decode(prompt[-4:] + plain[:2])})
    lengths = set()
    assert len(straddling) >= 3
    for strings in ((straddling[0],), (straddling[-1],), tuple(straddling[1:3]), ("no such words",)):
        one = run(*strings)
        assert one.tokens == stopped(*strings) and all(r.kept == 5 for r in one.rounds[:-1])
        lengths.add(len(one.tokens))
    assert len(lengths) >= 3 and max(lengths) == 24
    assert "def read(" not in text and run("def read(").tokens == stopped("def read(") == plain
    across = tokenizer.decode(prompt)[-1] + text[0]
    assert across not in text
    assert stopped(across) == plain[:1] and run(across).tokens == plain


def test_a_stop_string_of_several_tokens_ends_with_its_last_byte(tiny):
    """A character whose bytes are several tokens ends the output with its last byte, wherever the new tokens begin."""
    tokenizer = tiny[1]
    word = tokenizer("x → é\n")["input_ids"]
    arrow = next(n for n in range(len(word)) if "→" in tokenizer.decode(word[:n]))
    assert tokenizer.decode(word[arrow - 1 : arrow]) != "→"  # it is several tokens
    stops = Stops(frozenset(), ("→",), tokenizer)
    assert stops.cut(word) == word[:arrow] and stops.cut(word[: arrow - 1]) == word[: arrow - 1]
    for new in range(1, arrow + 1):  # one byte of the three may be new, or all
        assert stops.found(word[:arrow], new) and stops.found(word, new + len(word) - arrow)
    later = word + tokenizer("aaaa bbbb cccc dddd")["input_ids"]
    assert not stops.found(later, 1)  # out of reach: an earlier call has seen it
    both = Stops(frozenset({word[-1]}), ("é",), tokenizer)
    assert both.cut(word) == word[: next(n for n in range(len(word)) if "é" in tokenizer.decode(word[:n]))]
