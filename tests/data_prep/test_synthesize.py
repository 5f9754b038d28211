"""Conversations that the target writes itself: the file is what its definition says, however it is made."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import cli, ranks
from common.errors import UserError
from common.recipe import ROOT
from data_prep.decoding.dialogues import Answer
from data_prep.decoding.sampling import distribution, drawn
from data_prep.recipe import DataPrepRecipe, KindRecipe
from data_prep.sources.sides import is_heldout
from data_prep.synthesis import filters, journal
from data_prep.synthesis.candidates import Author, Draws, Texts, passage
from data_prep.synthesis.filters import looping, repeats, shingles, similarity
from data_prep.synthesis.journal import Journal
from data_prep.synthesis.synthesize import check_synthesis, synthesize
from data_prep.synthesis.turns import Turns
from data_prep.target.loading import load_tokenizer
from data_prep.target.target import Target
from tests.support.commands import command

TINY = str(ROOT / "data_prep/targets/tiny")
CHATML = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
be kind<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WORDS = "the old river ran past seven quiet houses where nobody had lived since winter and people asked what became of them all"


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A random Llama over a small BPE, which writes words of letters and ends its turns now and then."""
    folder = tmp_path_factory.mktemp("target")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(set(WORDS + "\nĠĊ"))
    trainer = trainers.BpeTrainer(vocab_size=110, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([WORDS, "system\nuser\nassistant\nbe kind\n"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[0] = 0
    model.lm_head.weight.data[1] *= 1.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """250 texts of three paragraphs of sentences, no two of them alike."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    draw = random.Random(0)
    sentence = lambda: " ".join(draw.choices(WORDS.split(), k=draw.randint(4, 12))).capitalize() + "."
    paragraph = lambda: " ".join(sentence() for _ in range(4))
    rows = [{"id": f"t{n}", "text": "\n\n".join(paragraph() for _ in range(3))} for n in range(250)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(target, out, *words):
    words = [f"target.path={target}", "target.dtype=float64", "target.device=cpu", f"synthesize.out={out}", *words]
    small = ["synthesize.most_tokens=400", "synthesize.user.max_tokens=60", "synthesize.reply.max_tokens=80"]
    return cli.compose("data_prep", DataPrepRecipe, ["mode=synthesize", *small, *words])


def run(recipe, barrier=lambda: None):
    check_synthesis(recipe)
    synthesize(recipe, barrier)
    return [json.loads(line) for line in Path(recipe.synthesize.out).read_text().splitlines()]


def about(out):
    return json.loads(Path(f"{out}.json").read_text())


def only(*kinds):
    names = cli.compose("data_prep", DataPrepRecipe, []).synthesize.kinds
    return [f"synthesize.kinds.{name}.share={int(name in kinds)}" for name in names]


def by_definition(recipe):
    """The same file the slow way: one candidate after the other, token by token without a cache, each message compared with every
    earlier one. Also the account of it."""
    ask = recipe.synthesize
    target = Target(recipe.target.path, dtype=torch.float64)
    turns = Turns(load_tokenizer(recipe.target.path), recipe.target.path, {})
    author = Author(ask, turns, Texts(ask.texts) if ask.texts else None)

    def answer(question):
        u = torch.rand(question.max_tokens, generator=torch.Generator().manual_seed(question.seed), dtype=torch.float64)
        tokens = []
        for step in range(question.max_tokens):
            last = target.forward(torch.tensor([question.tokens + tokens])).last_hidden[0, -1]
            p_V = distribution(target.logits(last), question.temperature, question.top_p)
            tokens.append(int(drawn(p_V[None], u[step : step + 1])))
            if tokens[-1] == 1:
                return Answer(tokens[:-1], True)
        return Answer(tokens, False)

    kept = []
    left_out = Counter()
    n = 0
    while len(kept) < ask.count:
        found = []
        dialogue = author.dialogue(n, found.append)
        try:
            question = next(dialogue)
            while True:
                question = dialogue.send(answer(question))
        except StopIteration:
            pass
        record = {key: value for key, value in found[0].items() if key != "n"}
        if "left_out" not in record:
            firsts = [other["messages"][0]["content"] for other in kept]
            own = record["messages"][0]["content"]
            if own in firsts:
                record["left_out"] = "a first message that another conversation has"
            elif any(similarity(shingles(own), shingles(other)) >= ask.filters.near for other in firsts):
                record["left_out"] = "a first message nearly as another conversation's"
        if "left_out" in record:
            left_out[record["left_out"]] += 1
        else:
            kept.append(record)
        n += 1
    return kept, left_out, n


@pytest.fixture(scope="module")
def plain(target, texts, tmp_path_factory):
    """One file of all kinds, and the recipe that others are compared with."""
    out = tmp_path_factory.mktemp("plain") / "out.jsonl"
    recipe = recipe_of(target, out, "synthesize.count=16", f"synthesize.texts={texts}", "synthesize.turns={1:3,2:1}")
    run(recipe)
    return recipe, out.read_bytes()


def again(recipe, out, **changes):
    section = recipe.synthesize.model_copy(update={"out": str(out), **changes})
    return recipe.model_copy(update={"synthesize": section})


def test_the_synthesized_file_equals_its_plain_definition(plain):
    recipe, written = plain
    kept, left_out, candidates = by_definition(recipe)
    assert [json.loads(line) for line in written.splitlines()] == kept
    told = about(recipe.synthesize.out)
    assert (told["left_out"], told["candidates"], told["conversations"]) == (left_out, candidates, len(kept))
    assert told["tokens"] == sum(record["tokens"] for record in kept)
    assert told["kinds"] == Counter(record["kind"] for record in kept) and len(told["kinds"]) > 4
    assert {len(record["messages"]) for record in kept} == {2, 4} and len(left_out) > 2
    tokenizer = load_tokenizer(recipe.target.path)
    for record in kept:
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * (len(record["messages"]) // 2)
        assert record["tokens"] == len(tokenizer.apply_chat_template(record["messages"])["input_ids"])


@pytest.mark.parametrize("batch", [1, 8])
def test_the_batch_size_does_not_change_the_file(plain, tmp_path, batch):
    recipe, written = plain
    run(again(recipe, tmp_path / "out.jsonl", batch=batch))
    assert (tmp_path / "out.jsonl").read_bytes() == written


def test_another_seed_gives_another_file(plain, tmp_path):
    recipe, written = plain
    records = run(again(recipe, tmp_path / "out.jsonl", seed=1, count=5))
    messages = [json.loads(line)["messages"] for line in written.splitlines()]
    assert all(record["id"].startswith("1-") and record["messages"] not in messages for record in records)


def process(recipe, rank=0, world=1, port=0, flush_s=0.0):
    """The command's work in a process of its own."""

    def work():
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ["DS_ACCELERATOR"] = "cpu"
        journal.FLUSH_S = flush_s
        check_synthesis(recipe)
        with ranks.together() as barrier:
            synthesize(recipe, barrier)

    started = multiprocessing.get_context("fork").Process(target=work)
    started.start()
    return started


@pytest.mark.parametrize("spread", ["none", pytest.param("tp", marks=pytest.mark.slow)])
def test_two_processes_write_the_file_of_one(plain, tmp_path, spread):
    """Each the candidates that are its own; or, with half of each layer, all of them together."""
    recipe, written = plain
    port = ranks.free_port()
    recipe = recipe.model_copy(update={"capture": recipe.capture.model_copy(update={"spread": spread})})
    both = [process(again(recipe, tmp_path / "out.jsonl"), rank, 2, port) for rank in range(2)]
    for one in both:
        one.join()
        assert one.exitcode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == written
    assert about(tmp_path / "out.jsonl") == about(recipe.synthesize.out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.json"]


def test_a_killed_synthesis_resumes_to_the_same_file(plain, tmp_path):
    """Twice, the second time by two processes; a line that the kill cut short does not count."""
    recipe, written = plain
    recipe = again(recipe, tmp_path / "out.jsonl", batch=2)
    partial = tmp_path / "out.jsonl.partial"
    port = ranks.free_port()
    done = 0
    for world in (1, 2):
        started = [process(recipe, rank, world, port) for rank in range(world)]
        while (lines := partial.read_bytes().count(b"\n") if partial.exists() else 0) < done + 6:
            assert any(one.is_alive() for one in started)
            time.sleep(0.005)
        for one in started:
            os.kill(one.pid, signal.SIGKILL)
            one.join()
        assert not (tmp_path / "out.jsonl").exists()
        done = lines
        with open(partial, "ab") as file:
            file.write(b'{"n": 3, "kind": "fr')
    held = {record["n"] for record in map(json.loads, partial.read_bytes().splitlines()[:-1]) if "n" in record}
    written_now = []
    append = Journal.append
    try:
        Journal.append = lambda self, record: (written_now.append(record.get("n")), append(self, record))
        run(recipe)
    finally:
        Journal.append = append
    assert (tmp_path / "out.jsonl").read_bytes() == written and not partial.exists()
    assert len(held) >= 10 and not held & set(written_now)  # what was there was not done again


def test_a_finished_synthesis_says_so_and_a_larger_count_continues_it(plain, tmp_path, capsys):
    recipe, written = plain
    out = tmp_path / "out.jsonl"
    run(again(recipe, out, count=9))
    first = out.read_bytes()
    assert written.startswith(first) and first.count(b"\n") == 9
    for count in (9, 5):
        run(again(recipe, out, count=count))
        assert out.read_bytes() == first and "holds 9 conversations" in capsys.readouterr().out
    run(again(recipe, out))
    assert out.read_bytes() == written and about(out) == about(recipe.synthesize.out)


def test_synthesize_tokens_stops_at_the_first_conversation_that_reaches_it(plain, tmp_path):
    recipe, written = plain
    budget = about(recipe.synthesize.out)["tokens"] // 2
    records = run(again(recipe, tmp_path / "out.jsonl", count=None, tokens=budget))
    sums = np.cumsum([record["tokens"] for record in records])
    assert sums[-2] < budget <= sums[-1] and written.startswith((tmp_path / "out.jsonl").read_bytes())


def test_other_settings_are_refused_and_nothing_changes(plain, tmp_path, texts):
    recipe, _ = plain
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    recipe = again(recipe, out, count=3)
    run(recipe)
    before = out.read_bytes()
    for key, value in (("seed", 5), ("most_tokens", 300), ("filters", recipe.synthesize.filters.model_copy(update={"loop": 1}))):
        with pytest.raises(UserError, match=f"other settings; these differ: {key}. Choose"):
            run(again(recipe, out, **{key: value}))
    texts_now = tmp_path / "texts.jsonl"
    texts_now.write_text(texts.read_text() + '{"text": "one more"}\n')
    with pytest.raises(UserError, match="these differ: texts. Choose"):
        run(again(recipe, out, texts=str(texts_now)))
    assert out.read_bytes() == before and not partial.exists()
    out.write_bytes(before[:-20])
    with pytest.raises(UserError, match="was changed since"):
        run(again(recipe, out, count=5))
    for foreign in (out, partial):
        for path in (out, partial, Path(f"{out}.json")):
            path.unlink(missing_ok=True)
        foreign.write_text('{"id": "x"}\n')
        with pytest.raises(UserError, match="not written by mode=synthesize"):
            run(recipe)
        assert foreign.read_text() == '{"id": "x"}\n'


def test_a_synthesized_file_can_be_captured_and_evaluated_on(plain, tmp_path):
    """Through the real command: what trains is all but the held-out conversations."""
    recipe, _ = plain
    early = (seed for seed in range(200) if sum(is_heldout(f"{seed}-{n}") for n in range(12)))
    for seed in early:  # until one of them is kept, too
        records = run(again(recipe, tmp_path / f"{seed}.jsonl", count=8, seed=seed))
        if heldout := [record for record in records if is_heldout(record["id"])]:
            break
    words = ["data=chat", f"data.path={seed}.jsonl", f"target.path={recipe.target.path}", "target.mask_token_id=null"]
    words += ["cache.dir=cache", "cache=fp32", "data.max_length=512"]
    done = command(ROOT / "data_prep/main.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = [record for record in records if record not in heldout]
    tokens = sum(record["tokens"] for record in trained)
    assert f"{len(trained)} documents, {tokens:,} tokens" in done.stdout and "left out" not in done.stdout


def test_no_passage_stands_on_both_sides_of_the_held_out_split(target, texts, tmp_path):
    words = [f"synthesize.texts={texts}", *only("summarise"), "synthesize.kinds.summarise.passage=[40,200]"]
    recipe = recipe_of(target, "x", *words)
    found = Texts(str(texts))
    kind = recipe.synthesize.kinds["summarise"]
    used = {True: set(), False: set()}
    for n in range(3000):
        used[is_heldout(f"0-{n}")].add(found.passage(f"0-{n}", kind, recipe.synthesize.filters, Draws(0, n))[0])
    assert all(map(is_heldout, used[True])) and not any(map(is_heldout, used[False]))
    assert len(used[True]) > 3 and len(used[False]) > 200
    path = tmp_path / "one.jsonl"  # no text is held out: such conversations do without, and say so
    path.write_text(texts.read_text().splitlines()[0])
    assert not is_heldout("t0")
    n = next(n for n in range(1000) if is_heldout(f"0-{n}"))
    author = Author(recipe.synthesize, Turns(load_tokenizer(str(target)), "x", {}), Texts(str(path)))
    left_out = []
    assert list(author.dialogue(n, left_out.append)) == []
    assert left_out[0]["left_out"] == "no text on its side of the held-out split"


def test_every_kind_asks_what_its_templates_say(texts):
    """What the target is first asked: a template filled with a piece of a text, of the lengths that the kind says, and with words
    of its lists; behind it either the assistant's turn begins, or the target writes on as the user."""
    tokenizer = load_tokenizer(TINY)
    whole = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    shorter = "synthesize.kinds.retrieve.passage=[200,700]"  # the texts here are short
    recipe = recipe_of(TINY, "x", f"synthesize.texts={texts}", shorter).synthesize
    author = Author(recipe, Turns(tokenizer, "x", {}), Texts(str(texts)))
    seen = set()
    shares = Counter()
    words_seen = set()
    for n in range(1200):
        left_out = []
        ask = next(author.dialogue(n, left_out.append), None)
        if ask is None:
            assert left_out[0]["left_out"].startswith("none of 8 passages")
            continue
        asked = tokenizer.decode(ask.tokens).removeprefix("<|im_start|>user\n")
        matches = [
            (name, template, match)
            for name, kind in recipe.kinds.items()
            for template in kind.templates
            if (match := re.fullmatch(pattern(template, kind), asked, re.DOTALL))
        ]
        name, template, match = max(matches, key=lambda found: len(found[1]))  # all begin as the free one does
        seen.add((name, template))
        shares[name] += 1
        found = match.groupdict()
        if piece := found.pop("passage", None):
            fewest, most = recipe.kinds[name].passage
            text = next(text for text in whole if piece in text)
            assert fewest <= len(piece) <= most
            assert piece[-1] == "." and (text.startswith(piece) or f". {piece}" in text or f"\n\n{piece}" in text)
        words_seen |= {(name, *word) for word in found.items()}
    assert seen == {(name, template) for name, kind in recipe.kinds.items() for template in kind.templates}
    assert words_seen == {(n, w, v) for n, kind in recipe.kinds.items() for w, values in kind.words.items() for v in values}
    total = sum(kind.share for kind in recipe.kinds.values())
    assert all(abs(shares[name] / shares.total() - kind.share / total) < 0.05 for name, kind in recipe.kinds.items())


def pattern(template, kind):
    """What the target reads behind the user's header."""
    end = "" if template.endswith("{user}") else re.escape("<|im_end|>\n<|im_start|>assistant\n")
    parts = []
    for part in re.split(r"({\w+})", template.removesuffix("{user}").rstrip(" ") if not end else template):
        name = part.strip("{}")
        if part == "{passage}":
            parts.append("(?P<passage>.+)")
        elif part.startswith("{"):
            parts.append(f"(?P<{name}>{'|'.join(map(re.escape, kind.words[name]))})")
        else:
            parts.append(re.escape(part))
    return "".join(parts) + end


def test_a_passage_begins_behind_a_sentence_and_ends_with_one():
    text = "One two three. Four five six seven! Eight nine?\n\nTen eleven twelve thirteen. Fourteen fifteen."
    found = {passage(text, 10, 40, a / 10, b / 40) for a in range(11) for b in range(41)}
    assert {"One two three.", "Four five six seven!", "Eight nine?\n\nTen eleven twelve thirteen."} <= found
    assert all(piece in text and 10 <= len(piece) <= 40 for piece in found)
    assert passage("short", 10, 40, 0.5, 0.5) == "short"  # the caller sees that it is
    assert passage("no mark anywhere " * 9, 10, 40, 1.0, 0.0) == "no mark anywhere no mark anywhere no"
    assert passage("一二三四五六七八九十。甲乙丙丁戊己庚辛壬癸。", 10, 20, 0.5, 0.9) == "甲乙丙丁戊己庚辛壬癸。"


def test_loops_are_told_from_lists_and_prose():
    prose = (ROOT / "LICENSE").read_text()[1500:4000]
    listed = "Ingredients:\n" + "\n".join(f"{n}. {word}, {n * 10} g" for n, word in enumerate(WORDS.split()))
    assert looping(prose) < 0.15 and looping(listed) < 0.15 and looping("") == looping("one word") == 0
    sentence = "I am here to help you with whatever you need. "
    for loop in (sentence * 4, "ha " * 30, "he" * 60, "- " * 40, prose + sentence * 12):
        assert looping(loop) > 0.3, loop
    assert looping(prose + sentence * 2) < 0.3
    # The loop behind a long text is a tenth of it: only a stretch of its own shows it.
    assert filters._repeated(list(zip(*[filters.MARKED.findall(prose * 1 + sentence * 12)[k:] for k in range(4)]))) < 0.3


def some_texts(count, seed=0):
    """Texts of 1 to 30 words, of which many are others with a few words changed."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words = draw.choice(made).split() if made and draw.random() < 0.7 else draw.choices(WORDS.split(), k=draw.randint(1, 30))
        for _ in range(draw.randint(0, 2)):
            words[draw.randrange(len(words))] = draw.choice(WORDS.split())
        made.append(" ".join(words))
    return made


def compared_with_all(texts, near):
    outcome, kept = [], []
    for text in texts:
        if text in kept:
            outcome.append("exact")
        elif any(similarity(shingles(text), shingles(other)) >= near for other in kept):
            outcome.append("near")
        else:
            outcome.append(None)
            kept.append(text)
    return outcome


@pytest.mark.parametrize("near", [0.3, 0.5, 0.6, 0.7, 0.9, 1.0])
def test_repeats_are_those_that_comparing_all_with_all_finds(near, monkeypatch):
    texts = some_texts(400)
    expected = compared_with_all(texts, near)
    assert repeats(texts, near) == expected and {None, "exact"} < {*expected, "near"}
    # A few shingles fewer to look a text up by, and repeats are missed.
    rarest = filters._rarest
    monkeypatch.setattr(filters, "_rarest", lambda own, spread, near: rarest(own, spread, min(1.0, near + 4 / len(own))))
    assert near == 1.0 or ("near" in expected and repeats(texts, near) != expected)


def test_exact_and_near_repeats_are_told_from_new_messages():
    first = "Can you give me some tips on how to sleep better at night?"
    bread = "Can you give me some tips on how to bake bread?"
    others = [first.replace(" ", "\n"), first.upper(), "Please, " + first, bread, "", ""]
    assert repeats([first, *others], 0.6) == [None, "exact", "near", "near", None, None, "exact"]
    assert repeats([], 0.6) == []


def test_many_repeats_are_found_in_little_time():
    """10,000 texts that all share their wording; each with each would be fifty million comparisons."""
    draw = random.Random(1)
    tail = lambda: " ".join(f"w{draw.randrange(100000)}" for _ in range(draw.randint(10, 60)))
    texts = [f"Can you please help me to understand what this text is about? {tail()}" for _ in range(10000)]
    began = time.monotonic()
    outcome = repeats(texts + texts[:10], 0.6)
    assert outcome == [None] * 10000 + ["exact"] * 10
    assert time.monotonic() - began < 20


MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]\
{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""
NO_HEADER = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
NO_END = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
REFUSES = "{{ raise_exception('not today') }}"


def with_template(template, special=()):
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *special]})
    return tokenizer


def test_where_a_turn_begins_and_ends_is_read_off_the_template():
    turns = Turns(load_tokenizer(TINY), "x", {})
    turns.refuse_without_user()
    end = turns.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turns.user_end == turns.reply_end == end
    assert turns.tokenizer.decode(turns.before_user([])) == "<|im_start|>user\n"
    # The same whatever follows, with a blank left to the next word's token.
    before = turns.before_user([], "Question: ")
    assert turns.tokenizer.decode(before) == "<|im_start|>user\nQuestion:"
    for question in ("who?", "Am I", "(a)"):
        assert turns.whole([{"role": "user", "content": f"Question: {question}"}])[: len(before)] == before
    turns = Turns(with_template(MISTRAL, ["[INST]", "[/INST]"]), "x", {})
    turns.refuse_without_user()
    assert turns.tokenizer.decode(turns.before_user([])).rstrip() == "[INST]"
    assert turns.tokenizer.convert_ids_to_tokens([turns.user_end, turns.reply_end]) == ["[/INST]", "<|endoftext|>"]
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert turns.tokenizer.decode(turns.before_user(history)).rstrip() == "[INST] a[/INST] b<|endoftext|>[INST]"


def saved(target, folder, template):
    """The target with another template."""
    for path in target.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    if not template:
        (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    "template,message",
    [
        ("", "the tokenizer of target .* has no chat template"),
        (NO_HEADER, "puts no header before a user's message, so the target cannot write one"),
        (NO_END, "ends a user's message with no special token"),
        (REFUSES, "cannot be used: the chat template refuses it .not today."),
    ],
)
def test_templates_that_cannot_work_are_refused(target, texts, tmp_path, template, message):
    (tmp_path / "target").mkdir()
    folder = saved(target, tmp_path / "target", template)
    with pytest.raises(UserError, match=message):
        check_synthesis(recipe_of(folder, tmp_path / "out.jsonl", "synthesize.count=3"))
    assert not list(tmp_path.glob("out*"))
    if template == NO_HEADER:  # nobody has to write as the user
        words = [f"synthesize.texts={texts}", *only("summarise", "translate"), "synthesize.count=3"]
        check_synthesis(recipe_of(folder, tmp_path / "out.jsonl", *words))
        with pytest.raises(UserError, match="no header"):
            check_synthesis(recipe_of(folder, tmp_path / "out.jsonl", *words, "synthesize.turns=2"))


@pytest.mark.parametrize(
    "words,message",
    [
        (["synthesize.out=null"], "needs synthesize.out=FILE.jsonl"),
        (["synthesize.out=/tmp"], "is a folder"),
        (["synthesize.count=null"], "needs either synthesize.count=CONVERSATIONS or synthesize.tokens=TOKENS"),
        (["synthesize.tokens=5"], "needs either"),
        (["synthesize.texts=absent"], "synthesize.texts=absent is not a file"),
        (["synthesize.most_tokens=513"], "exceeds the target's 512 positions"),
        ([f"synthesize.kinds.{n}.share=0" for n in ("free", "ask", "calculate")], "no kind has a share above 0; those that need"),
        (["synthesize.turns={1:0}"], "needs a share above 0"),
        (["capture.spread=tp"], "needs a launcher with several processes"),
        (["capture.spread=device_map"], "which capture.spread=device_map does not"),
    ],
)
def test_settings_of_synthesis_that_cannot_work_are_refused(target, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        check_synthesis(recipe_of(target, tmp_path / "out.jsonl", "synthesize.count=3", *words))


@pytest.mark.parametrize(
    "words,message",
    [
        (["+synthesize.kinds.x={share: 1, templates: ['{what} {user}']}"], "which is neither passage, user nor a key of words"),
        (["+synthesize.kinds.x={share: 1, templates: ['{user} now']}"], "can only be the end of a template"),
        (["+synthesize.kinds.x={share: 1, templates: ['{passage}']}"], "need passage"),
        (["synthesize.kinds.extract.passage=[9,3]"], "fewest characters exceed the most"),
        (["synthesize.reply.top_p=0"], "synthesize.reply.top_p"),
        (["synthesize.base_url=x"], "base_url"),
    ],
)
def test_values_outside_the_recipe_are_refused(target, words, message):
    with pytest.raises(UserError, match=message):
        recipe_of(target, "x", *words)


def test_a_refusal_is_one_line_and_leaves_nothing(target, tmp_path):
    (tmp_path / "target").mkdir()
    folder = saved(target, tmp_path / "target", "")
    words = [f"target.path={folder}", "target.mask_token_id=null", "synthesize.count=3", "synthesize.out=out.jsonl"]
    words.append("synthesize.most_tokens=400")
    done = command(ROOT / "data_prep/main.py", "mode=synthesize", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("has no chat template") and done.stderr.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(
    "line,message", [("[]", "line 251: not a JSON object"), ('{"id": "t3", "text": "x"}', "'t3' stands twice; make ids unique")]
)
def test_bad_texts_are_refused_before_the_target_is_loaded(target, texts, tmp_path, line, message, monkeypatch):
    bad = tmp_path / "texts.jsonl"
    bad.write_text(texts.read_text() + line + "\n")
    recipe = recipe_of(target, tmp_path / "out.jsonl", f"synthesize.texts={bad}", "synthesize.count=3")
    monkeypatch.setattr("data_prep.synthesis.synthesize.load_target", None)
    with pytest.raises(UserError, match=message):
        run(recipe)
    bad.write_text('{"id": 1, "body": "x"}\n')
    with pytest.raises(UserError, match="record '1' has no 'text'"):
        run(recipe)
    bad.write_text("\n")
    with pytest.raises(UserError, match="has no text"):
        run(recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_synthesis_stops_when_hardly_any_candidate_is_kept(target, texts, tmp_path):
    words = ["synthesize.count=2000", "synthesize.filters.user_characters=5000", f"synthesize.texts={texts}", *only("summarise")]
    message = "of the last 1,000 candidates 0 could be kept .1000 x a user's message is too short.; nothing was written"
    with pytest.raises(UserError, match=message):
        run(recipe_of(target, tmp_path / "out.jsonl", *words))
    assert not list(tmp_path.iterdir())


def test_when_texts_run_out_the_error_names_a_count_that_can_be_reached(target, texts, tmp_path, monkeypatch):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(texts.read_text().splitlines(keepends=True)[:2]))
    words = [f"synthesize.texts={few}", *only("translate"), "synthesize.filters.near=0.3", "synthesize.reply.max_tokens=12"]
    words += ["synthesize.kinds.translate.templates=['Translate: {passage}']", "synthesize.filters.reply_characters=1"]
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("data_prep.synthesis.synthesize.WINDOW", 100)
    with pytest.raises(UserError, match=r"of the last 100 candidates . could be kept \(") as refused:
        run(recipe_of(target, out, "synthesize.count=150", *words))
    count = int(re.search(r"synthesize.count=(\d+)", str(refused.value))[1])
    assert count > 1 and not out.exists()
    assert len(run(recipe_of(target, out, f"synthesize.count={count}", *words))) == count


def test_each_filter_reports_what_it_left_out(plain, tmp_path, capsys):
    """Each filter by itself, so tight that it finds something."""
    recipe, _ = plain
    loops = KindRecipe(share=9, templates=["no " * 40])
    alike = KindRecipe(share=9, templates=["where did the people of the old houses past the quiet river go in winter {user}"])
    for kind, near, reason in (
        (loops, 1.0, "a user's message runs in circles"),
        (alike, 0.1, "a first message nearly as another conversation's"),
    ):
        kinds = {**recipe.synthesize.kinds, "new": kind}
        limits = recipe.synthesize.filters.model_copy(update={"near": near})
        run(again(recipe, tmp_path / f"{near}.jsonl", count=4, kinds=kinds, filters=limits))
        assert about(tmp_path / f"{near}.jsonl")["left_out"][reason]
    tight = {
        "user.max_tokens": (4, "a user's message was cut off at synthesize.user.max_tokens"),
        "reply.max_tokens": (4, "a reply was cut off at synthesize.reply.max_tokens"),
        "filters.reply_characters": (40, "a reply is too short"),
        "most_tokens": (60, "a reply was cut off at synthesize.most_tokens"),
    }
    for key, (value, reason) in tight.items():
        section, _, name = key.rpartition(".")
        part = getattr(recipe.synthesize, section).model_copy(update={name: value}) if section else value
        out = tmp_path / f"{name}-{section}.jsonl"
        run(again(recipe, out, count=6, **{section or name: part}))
        count = about(out)["left_out"][reason]
        assert count and f"left out: {count:,} x {reason}" in capsys.readouterr().out


def test_until_cuts_a_message_behind_its_mark(plain, tmp_path):
    """`until`: what the target writes on behind it is dropped, and a message that was cut off behind it is whole."""
    recipe, _ = plain
    outcome, cut = {}, {}
    for until in (None, "e"):
        kinds = {"ask": KindRecipe(share=1, templates=["so {user}"], until=until)}
        out = tmp_path / f"{until}.jsonl"
        records = run(again(recipe, out, count=6, kinds=kinds, user=recipe.synthesize.user.model_copy(update={"max_tokens": 20})))
        outcome[until] = [record["messages"][0]["content"] for record in records]
        told = about(out)
        cut[until] = told["left_out"]["a user's message was cut off at synthesize.user.max_tokens"] / told["candidates"]
    assert all(re.fullmatch("so [^e]*e", message) for message in outcome["e"])
    assert not any(re.fullmatch("so [^e]*e", message) for message in outcome[None])
    assert cut["e"] < cut[None] / 3  # those without an e are cut off still


def test_a_reply_that_was_cut_off_is_kept_if_asked_for_and_is_the_last(plain, tmp_path):
    recipe, _ = plain
    reason = "a reply was cut off at synthesize.reply.max_tokens"
    outcome = {}
    for must_end in (True, False):
        reply = recipe.synthesize.reply.model_copy(update={"max_tokens": 16, "must_end": must_end})
        out = tmp_path / f"{must_end}.jsonl"
        records = run(again(recipe, out, count=12, reply=reply, turns={2: 1}))
        outcome[must_end] = Counter(len(record["messages"]) for record in records), about(out)["left_out"].get(reason, 0)
    assert outcome[True][0] == {4: 12} and outcome[True][1]
    assert outcome[False][0].keys() == {2, 4} and not outcome[False][1]


def test_a_turn_cut_off_inside_a_character_drops_that_character():
    turns = Turns(load_tokenizer(TINY), "x", {})
    words = ["synthesize.reply.must_end=false", "synthesize.reply.max_tokens=80"]
    author = Author(recipe_of(TINY, "x", *words).synthesize, turns, None)
    tokens = turns.tokenizer("so 日本", add_special_tokens=False)["input_ids"]
    halves = [tokens[:count] for count in range(1, len(tokens)) if turns.text(tokens[:count]).endswith("\ufffd")]
    assert halves
    for half in halves:
        writing = author._written("reply", [5], 0.0, 0)
        next(writing)
        with pytest.raises(StopIteration) as end:
            writing.send(Answer(half, False))
        text, ended = end.value.value
        assert text in ("so ", "so 日") and not ended


def test_several_temperatures_are_mixed(plain, tmp_path):
    recipe, _ = plain
    user = recipe.synthesize.user.model_copy(update={"temperature": [0.5, 1.5]})
    records = run(again(recipe, tmp_path / "out.jsonl", count=12, user=user))
    drawn_ones = Counter(record["temperature"]["user"] for record in records)
    assert set(drawn_ones) == {0.5, 1.5} and {record["temperature"]["reply"] for record in records} == {0.8}


def test_a_journal_keeps_whole_lines(tmp_path):
    path = tmp_path / "log"
    log, other = Journal(path), Journal(path)
    log.append({"n": 1})
    assert path.read_bytes() == b""  # within a second
    log.flush()
    os.write(other._file, b'{"n": 2')
    assert [line for _, line in log.lines()] == [b'{"n": 1}\n']
    other.append({"n": "ä"})
    other.flush()
    assert path.read_text() == '{"n": 1}\n{"n": "ä"}\n'
    assert [place for place, _ in log.lines()] == [0, 9]
    log.lock()
    with pytest.raises(UserError, match="is being written by another process"):
        other.lock()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25, limit[1]))  # the disk takes half of the line
        log.append({"n": "far too long"})
        with pytest.raises(UserError, match="make room"):
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == '{"n": 1}\n{"n": "ä"}\n'
