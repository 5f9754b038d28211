"""From a source to token ids and a loss mask: nothing is lost in silence, and the mask marks what the assistant wrote."""

import hashlib
import json
import os
import signal
from collections import Counter
from multiprocessing import connection
from pathlib import PurePosixPath

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.hashing import stable_hash
from common.recipe import ROOT
from data_prep.recipe import DataRecipe
from data_prep.sources.counts import CAPTURED, Counts
from data_prep.sources.documents import Digest, Documents, tokenized, write_documents
from data_prep.sources.records import Record, records
from data_prep.sources.sides import is_validation
from data_prep.sources.tokens import LeftOut, Part, TokenDocument, encode, joined, pieces
from data_prep.target.loading import load_tokenizer
from tests.support.conversations import conversation, write_lines

PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
MARKED += "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
# As Qwen3: the thinking of a turn is dropped once a user speaks again.
FORGETS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last %}{{ m['content'] }}{% else %}"
FORGETS += "{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
FORGETS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def data(**changed):
    return DataRecipe(**{"source": "jsonl", "max_length": 64} | changed)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "data_prep/targets/tiny"))


@pytest.fixture
def with_template(tokenizer):
    """Put another chat template into the tokenizer for one test."""
    kept = tokenizer.chat_template
    yield lambda template: setattr(tokenizer, "chat_template", template) or tokenizer
    tokenizer.chat_template = kept


def everything(source, tokenizer, recipe, workers=1):
    counts = Counts()
    documents = list(tokenized(source, tokenizer, recipe, counts, workers))
    said = counts.said()
    assert said["records"]["read"] == said["records"]["captured"] + said["records"]["held_out"] + sum(said["left_out"].values())
    return documents, Counter(said["left_out"]) + counts.kept


# Sources


def test_heldout_modules_are_never_captured():
    recipe = DataRecipe(source="stdlib", max_length=64)
    sides = {heldout: {r.id for r in records(recipe, heldout)} for heldout in (True, False)}
    for heldout, ids in sides.items():
        names = {PurePosixPath(id).name for id in ids}
        assert len(names) > 50
        assert all((int(hashlib.md5(name.encode()).hexdigest(), 16) % 8 == 0) == heldout for name in names)
    assert not sides[True] & sides[False]
    assert "json/decoder.py" in sides[int(hashlib.md5(b"decoder.py").hexdigest(), 16) % 8 == 0]


@pytest.mark.parametrize("source", ["jsonl", "hub", "stream"])
def test_every_record_is_on_one_side_once(tmp_path, source):
    """The same file through our reader, through `datasets`, and streamed."""
    rows = [{"id": f"doc{i}", "text": f"text {i}"} for i in range(300)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    recipe = data(path=path) if source == "jsonl" else data(source="hub", name="json", files=path, streaming=source == "stream")
    sides = {heldout: list(records(recipe, heldout)) for heldout in (True, False, None)}
    assert {r.id for r in sides[True]} == {r["id"] for r in rows if stable_hash(r["id"]) % 50 == 0} != set()
    assert sorted(r.id for r in sides[True] + sides[False]) == sorted(r.id for r in sides[None]) == sorted(r["id"] for r in rows)
    assert all(r.fields["text"] == f"text {r.id.removeprefix('doc')}" for r in sides[None])


def test_max_tokens_takes_a_sample_of_the_records_not_the_first_ones(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"id": f"d{i}", "text": "word " * 5} for i in range(200)])
    documents, _ = everything(records(data(path=path, max_tokens=60), False), tokenizer, data(path=path, max_tokens=60))
    numbers = [int(d.id[1:].split("#")[0]) for d in documents]
    assert len(numbers) >= 5 and max(numbers) > 100


def test_records_without_an_id_are_numbered(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert {r.id: r.fields["text"] for r in records(data(path=str(tmp_path / "rows.jsonl")), None)} == {"0": "a", "1": "b"}


@pytest.mark.parametrize(
    "lines,message",
    [
        ('{"id": 1, "text": "a"}\nnot json\n', "line 2: not a JSON object"),
        ('{"id": 1, "text": "a"}\n[1]\n', "line 2: not a JSON object"),
        ('{"id": "\\ud800", "text": "a"}\n', "line 1: its 'id' is not valid Unicode"),
        ('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n', "the id '1' stands twice"),
    ],
)
def test_a_malformed_file_is_named_in_the_error(tmp_path, lines, message):
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        list(records(data(path=str(tmp_path / "rows.jsonl")), False))


def test_a_missing_data_set_is_a_one_line_error():
    with pytest.raises(UserError, match="datasets cannot load it"):
        list(records(data(source="hub", name="/no/such/folder"), False))


# Text and stored tokens


@given(st.lists(st.text(max_size=60), max_size=4), st.integers(8, 20), st.integers(3, 80))
@settings(max_examples=100, deadline=None)
def test_the_pieces_of_a_split_document_join_to_the_document(tokenizer, texts, max_length, max_tokens):
    texts = ["def f(x): return x + 1", *texts]
    source = [Record(str(i), {"text": text}) for i, text in enumerate(texts)]
    documents, left_out = everything(source, tokenizer, data(max_length=max_length))
    assert all(3 <= len(d.input_ids) <= max_length for d in documents)
    assert all(d.loss_mask.tolist() == [0] + [1] * (len(d.input_ids) - 1) for d in documents)
    lost = empty = parts = 0
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        joined = [id for d in documents if d.id.split("#")[0] == str(i) for id in d.input_ids.tolist()]
        lone = len(ids) % max_length if len(ids) % max_length < 3 else 0  # a last piece so short has no slot
        assert joined == ids[: len(ids) - lone]
        lost = lost + lone
        part = lone and len(ids) > max_length
        empty = empty + (len(ids) < 3)
        parts = parts + bool(part)
    assert left_out == +Counter({"fewer than three tokens": empty, "kept, but a piece of it has fewer than three tokens": parts})

    whole = np.concatenate([d.input_ids for d in documents])
    limited, _ = everything(source, tokenizer, data(max_length=max_length, max_tokens=max_tokens))
    limited = np.concatenate([d.input_ids for d in limited])
    # The limit counts tokens read; lone last tokens, and one that the limit itself leaves alone, are left out.
    assert min(max_tokens, len(whole)) - lost - 2 <= len(limited) <= max_tokens
    assert np.array_equal(limited, whole[: len(limited)])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(8, 32))
@settings(max_examples=100, deadline=None)
def test_joined_documents_are_the_records_end_to_end(tokenizer, lengths, max_length):
    """Cut every max_length tokens, an end token behind each record; a piece is named after the place where it begins. Records
    that training is judged on are joined by themselves."""
    rows = [[4 + (i + j) % 50 for j in range(n)] for i, n in enumerate(lengths)]
    source = [Record(f"r{i}", {"input_ids": row, "loss_mask": [j % 2 for j in range(len(row))]}) for i, row in enumerate(rows)]
    documents, left_out = everything(source, tokenizer, data(max_length=max_length, long="join"))
    expected = []
    for judged in (False, True):
        mine = [(i, row) for i, row in enumerate(rows) if is_validation(f"r{i}") == judged]
        stream = [(id, j % 2, f"r{i}" + (f"@{j}" if j else "")) for i, row in mine for j, id in enumerate([*row, 0])]
        stream = [(id, 1 if id == 0 else mask, "validation/" * judged + name) for id, mask, name in stream]
        pieces = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
        expected += [piece for piece in pieces if any(mask for _, mask, _ in piece[2:])]
    found = {d.id: (d.input_ids.tolist(), d.loss_mask.tolist()) for d in documents}
    assert len(found) == len(documents)
    assert found == {
        piece[0][2] + "#0": ([id for id, *_ in piece], [0, *(mask for _, mask, _ in piece[1:])]) for piece in expected
    }
    assert sum(left_out.values()) <= len(rows)  # a record ends in one count, however many pieces it is in


@pytest.mark.parametrize(
    "long,lengths,reason",
    [
        ("split", [8, 8, 4], None),
        ("cut", [8], "kept, but cut to data.max_length=8 tokens"),
        ("drop", [], "longer than data.max_length=8 tokens"),
    ],
)
def test_what_is_too_long_is_split_cut_or_dropped_and_counted(tokenizer, long, lengths, reason):
    source = [Record("a", {"input_ids": list(range(20)), "loss_mask": [0, 1] * 10})]
    documents, left_out = everything(source, tokenizer, data(max_length=8, long=long))
    assert [len(d.input_ids) for d in documents] == lengths
    assert dict(left_out) == ({reason: 1} if reason else {})
    assert all(d.loss_mask.tolist() == ([0, 1] * 4)[: len(d.loss_mask)] for d in documents)


@pytest.mark.parametrize(
    "fields,reason",
    [
        ({"input_ids": [1, 2, 3], "loss_mask": [0, 1]}, "not lists of one length"),
        ({"input_ids": [1, 9999999]}, "outside the vocabulary"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "not of 0 and 1"),
        ({"input_ids": [1, 2, 3], "loss_mask": [1, 0, 0]}, "no supervised token"),
        ({"input_ids": [1, 2, 3], "loss_mask": [1, 1, 0]}, "behind the second"),
        ({"input_ids": [1, 2, 3], "labels": [1, 3, 3]}, "neither the input_ids beside them nor -100"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "neither 0 nor 1"),
        ({"input_ids": [1, 2, 3], "train": False}, "marked not to be trained"),
        ({"text": "a b c d", "weight": np.float32(0)}, "marked not to be trained"),
        ({"input_ids": [1]}, "fewer than three tokens"),
        ({"txt": "a b"}, "no 'text'"),
        ({"text": "half a character \ud800"}, "not valid Unicode"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": ["x"]}, "not an object"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "a message of it is not text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": "x"}]}, "is not text"),
        ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}, "not valid Unicode"),
        ({"input_ids": [1, 2], "loss_mask": [[0], 1]}, "not of 0 and 1"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no reply of the assistant"),
        ({"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "x"}]}, "no reply of the assistant"),
    ],
)
def test_what_cannot_be_used_is_counted_by_reason(tokenizer, fields, reason):
    documents, left_out = everything([Record("a", fields), Record("b", {"text": "import os, sys"})], tokenizer, data())
    assert [d.id for d in documents] == ["b#0"] and sum(left_out.values()) == 1
    assert reason in next(iter(left_out))


def test_max_tokens_counts_only_documents_that_are_kept(tokenizer):
    """A document that is dropped costs nothing, and none is cut to fit what would have dropped it."""
    source = [Record(str(i), {"input_ids": list(range(3, 3 + n))}) for i, n in enumerate((50, 6, 50, 7, 6))]
    documents, left_out = everything(source, tokenizer, data(max_length=8, long="drop", max_tokens=16))
    assert [len(d.input_ids) for d in documents] == [6, 7, 3]
    assert dict(left_out) == {"longer than data.max_length=8 tokens": 2, "kept, but cut at data.max_tokens": 1}


def test_rows_without_an_id_are_numbered_and_a_broken_set_is_one_line(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"id": None, "text": "a"}, {"id": "x", "text": "b"}, {"id": None, "text": "c"}])
    for streaming in (False, True):
        recipe = data(source="hub", name="json", files=path, streaming=streaming)
        assert {r.id: r.fields["text"] for r in records(recipe, None)} == {"0": "a", "x": "b", "2": "c"}
    (tmp_path / "rows.jsonl").write_text('{"id": "x", "text": "a"}\n' * 3 + "{broken\n")
    with pytest.raises(UserError, match="cannot be read to its end|cannot load it|stands twice"):
        list(records(data(source="hub", name="json", files=path, streaming=True), None))


def test_a_source_that_gives_nothing_is_refused_with_the_reasons(tmp_path, tokenizer):
    left_out = Counts()
    source = tokenized([Record("a", {"text": ""}), Record("b", {"x": 1})], tokenizer, data(), left_out)
    with pytest.raises(UserError, match="no document to capture: 1 x fewer than three tokens; 1 x it has no 'text'"):
        write_documents(tmp_path / "d.arrow", source, left_out)
    assert not list(tmp_path.iterdir())


# Chat

WORDS = st.text("abc (\n:=", min_size=1, max_size=12).filter(lambda t: t == t.strip())
TURNS = st.lists(WORDS, min_size=2, max_size=8)


def oracle(tokenizer, messages, which):
    """ids and mask put together by hand: special tokens part the text, so that its parts are tokenised alone."""
    text = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    ids, mask = [], []
    for i, message in enumerate(messages):
        header = [*(text("\n") if i else []), start, *text(f"{message['role']}\n")]
        body = [*text(f"{message['role']}\n{message['content']}")[len(header) - 1 - (i > 0) :], end]
        supervised = which == "none" or (message["role"] == "assistant" and (which == "all_turns" or i == last))
        ids += header + body
        mask += [int(which == "none")] * len(header) + [int(supervised)] * len(body)
    return ids + text("\n"), mask + [int(which == "none")]


@given(TURNS, st.sampled_from(["all_turns", "last_turn", "none"]), st.sampled_from([None, "be brief"]))
@settings(max_examples=100, deadline=None)
def test_prefix_differences_mark_what_the_assistant_wrote(tokenizer, turns, which, system):
    messages = conversation(turns, system)
    assert encode(Record("a", {"messages": messages}), tokenizer, data(loss_mask=which)) == oracle(tokenizer, messages, which)


@given(TURNS, st.sampled_from(["all_turns", "last_turn"]))
@settings(max_examples=50, deadline=None)
def test_generation_marks_and_prefix_differences_agree(tokenizer, turns, which):
    record = Record("a", {"messages": conversation(turns)})
    kept = tokenizer.chat_template
    by_prefix = encode(record, tokenizer, data(loss_mask=which))
    try:
        tokenizer.chat_template = MARKED
        assert encode(record, tokenizer, data(loss_mask=which)) == by_prefix
    finally:
        tokenizer.chat_template = kept


def test_sharegpt_is_messages_by_another_name(tokenizer):
    messages = conversation(["hi", "hello", "how", "so"], "be brief")
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}
    assert encode(Record("a", sharegpt), tokenizer, data()) == encode(Record("a", {"messages": messages}), tokenizer, data())


def test_a_template_that_breaks_its_prefixes_is_noticed(with_template):
    tokenizer = with_template(FORGETS)
    two = Record("two", {"messages": conversation(["q", "<think>x</think>a", "q", "<think>y</think>b"])})
    one = Record("one", {"messages": conversation(["q", "<think>x</think>a"])})
    documents, left_out = everything([two, one], tokenizer, data())
    assert [d.id for d in documents] == ["one#0"]
    assert len(left_out) == 1 and "writes a turn differently" in next(iter(left_out)) and "all_turns" in next(iter(left_out))
    ids, mask = encode(two, tokenizer, data(loss_mask="last_turn"))
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "<think>y</think>b<|im_end|>"


def test_an_end_that_the_target_never_wrote_is_not_supervised(tokenizer):
    fields = {"messages": conversation(["q", "a", "q", "cut off"])}
    (ids, whole), (_, cut) = (encode(Record("a", fields | {"finish": how}), tokenizer, data()) for how in ("stop", "length"))
    (changed,) = [i for i, (a, b) in enumerate(zip(whole, cut)) if a != b]
    assert (whole[changed], cut[changed], tokenizer.decode(ids[changed])) == (1, 0, "<|im_end|>")
    assert changed == max(i for i, m in enumerate(whole) if m)


def test_loss_mask_last_turn_supervises_thinking_and_answer_of_the_last_turn(with_template):
    """A template that marks thinking and answer apart: both belong to the turn."""
    twice = MARKED.replace(
        "{{ m['content'] }}<|im_end|>{% endgen",
        "{{ m['t'] }}{% endgeneration %}|{% generation %}{{ m['content'] }}<|im_end|>{% endgen",
    )
    tokenizer = with_template(twice + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    messages = [m | {"t": f"why{i}"} for i, m in enumerate(conversation(["q", "no", "q", "yes"]))]
    ids, mask = encode(Record("a", {"messages": messages}), tokenizer, data(loss_mask="last_turn"))
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "why3yes<|im_end|>"


def test_parts_of_text_are_text_and_tools_reach_the_template(with_template):
    tokenizer = with_template("{% if tools %}tools: {{ tools[0]['name'] }}{% endif %}" + PLAIN)
    plain = conversation(["q", "two parts"])
    parts = [plain[0], {"role": "assistant", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]}]
    assert encode(Record("a", {"messages": parts}), tokenizer, data()) == encode(
        Record("a", {"messages": plain}), tokenizer, data()
    )
    ids, _ = encode(Record("a", {"messages": plain, "tools": [{"name": "calculator"}]}), tokenizer, data())
    assert tokenizer.decode(ids).startswith("tools: calculator<|im_start|>")


def test_a_template_that_writes_the_date_always_writes_the_same_one(with_template):
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + PLAIN)
    ids, _ = encode(Record("a", {"messages": conversation(["q", "a"])}), tokenizer, data())
    assert tokenizer.decode(ids).startswith("01 Jan 2026<|im_start|>")


def test_a_reply_whose_first_token_merges_with_its_header_is_left_out(tokenizer):
    """A newline that begins the reply joins the header's into one token: no mask could be right."""
    with pytest.raises(LeftOut, match="writes a turn differently"):
        encode(Record("a", {"messages": conversation(["q", "\n\nfoo"])}), tokenizer, data())


def test_a_template_without_marks_for_this_conversation_is_counted(with_template):
    tokenizer = with_template(PLAIN + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    documents, left_out = everything([Record("a", {"messages": conversation(["q", "a"])})], tokenizer, data())
    assert not documents and dict(left_out) == {"no supervised token": 1}


def test_what_the_template_refuses_is_counted_and_its_options_reach_it(with_template):
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    _, left_out = everything([Record("a", {"messages": conversation(["q", "a"])})], tokenizer, data())
    assert "roles must alternate" in next(iter(left_out))
    tokenizer = with_template("{{ note }}" + PLAIN)
    ids, _ = encode(Record("a", {"messages": conversation(["q", "a"])}), tokenizer, data(template={"note": "attention"}))
    assert tokenizer.decode(ids).startswith("attention<|im_start|>")


def test_a_tokenizer_without_a_template_cannot_chat(with_template):
    with pytest.raises(UserError, match="no chat template"):
        encode(Record("a", {"messages": conversation(["q", "a"])}), with_template(None), data())


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("mark", ["weight", "loss_mask", "train", "training"])
def test_a_turn_that_is_marked_is_not_supervised(with_template, template, mark):
    messages = conversation(["q", "not this", "q", "this"])
    messages[1][mark], messages[3][mark] = 0, True
    ids, mask = encode(Record("a", {"messages": messages}), with_template(template), data())
    assert with_template(template).decode([i for i, m in zip(ids, mask) if m]) == "this<|im_end|>"


def test_masks_beside_stored_tokens_say_what_is_supervised(tokenizer):
    fields = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "completion_mask": [0, 0, 1, 0, 1]}
    assert encode(Record("a", fields), tokenizer, data()) == ([5, 6, 7, 8, 9], [0, 0, 1, 0, 1])
    padded = {"input_ids": [0, 6, 7, 8, 0], "attention_mask": [0, 1, 1, 1, 0]}
    assert encode(Record("a", padded), tokenizer, data()) == ([6, 7, 8], [1, 1, 1])


def test_arrays_are_the_lists_that_they_stand_for(tokenizer):
    messages = conversation(["q", "not this", "q", "this"])
    messages[1]["weight"] = np.int64(0)
    of_arrays = messages[:3] + [messages[3] | {"content": np.array([{"type": "text", "text": "this"}])}]
    plain = encode(Record("a", {"messages": messages}), tokenizer, data())
    assert encode(Record("a", {"messages": np.array(of_arrays), "tools": np.array([])}), tokenizer, data()) == plain
    columns = {"role": np.array([m["role"] for m in messages]), "content": np.array([m["content"] for m in messages])}
    columns["weight"] = np.array([m.get("weight", 1) for m in messages])
    assert encode(Record("a", {"conversations": columns}), tokenizer, data()) == plain
    stored = {"input_ids": np.arange(5), "loss_mask": np.array([0, 0, 1, 1, 0], dtype=bool)}
    assert encode(Record("a", stored), tokenizer, data()) == ([0, 1, 2, 3, 4], [0, 0, 1, 1, 0])


def test_what_looks_like_a_mark_and_is_not_understood_is_counted(tokenizer):
    source = [Record("a", {"text": "import os, sys", "loss": 1.7, "constraint": "x", "label": 3})]
    source += [Record("b", {"messages": [m | {"mask": 0, "train": None} for m in conversation(["q", "a b c"])]})]
    source += [Record("c", {"input_ids": [1, 2, 3], "weights": [0, 1, 1]})]
    documents, said = everything(source, tokenizer, data())
    named = {f"kept, but '{name}' of a {what} is not understood" for name, what in
             (("loss", "record"), ("label", "record"), ("mask", "message"), ("weights", "record"))}  # fmt: skip
    assert len(documents) == 3 and said == dict.fromkeys(named, 1)


def test_an_empty_record_is_counted_where_joining_puts_no_end_token(tokenizer):
    source = [Record("a", {"text": ""}), Record("b", {"text": "a longer text, so that it is kept"})]
    counts = Counts()
    parts = [Part(record.id, *encode(record, tokenizer, data()), [counts.read()]) for record in source]
    for part in joined(parts, 64, None):
        for document in pieces(part, data()):
            counts.end(part.records, document if isinstance(document, str) else CAPTURED)
    assert counts.said()["left_out"] == {"fewer than three tokens": 1}


def test_calls_that_the_template_does_not_write_are_refused_by_name(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": {}}}]}
    record = Record("a", {"messages": [*conversation(["q"]), call, *conversation(["q", "a"])]})
    with pytest.raises(LeftOut, match="does not write 'tool_calls'"):
        encode(record, tokenizer, data())


def test_values_that_nothing_reads_are_not_looked_at(with_template):
    messages = [m | {"timestamp": b"\xff"} for m in conversation(["q", "a b c"])]
    encode(Record("a", {"messages": messages}), with_template(PLAIN), data())
    with pytest.raises(LeftOut, match="'timestamp' of a message is nothing that JSON can hold"):
        encode(Record("a", {"messages": messages}), with_template(PLAIN + "{{ messages[0].timestamp }}"), data())


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_one_array_is_read_as_lines_are(tmp_path, mark):
    rows = [{"id": f"é{i}", "text": "ü, ]" * i} for i in range(5)]
    (tmp_path / "a.json").write_bytes(mark + json.dumps(rows, ensure_ascii=False, indent=1).encode())
    assert sorted((r.id, r.fields) for r in records(data(path=str(tmp_path / "a.json")), None)) == [(r["id"], r) for r in rows]
    (tmp_path / "a.json").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="compressed by gzip and not JSON lines: gunzip -c"):
        list(records(data(path=str(tmp_path / "a.json")), None))


def test_every_record_ends_in_one_count_held_out_ones_too(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a document of words" * (i % 3)} for i in range(120)])
    counts = Counts()
    source = tokenized(records(data(path=path), None), tokenizer, data(), counts, 2)
    said = write_documents(tmp_path / "d.arrow", source, counts)
    assert said["records"]["captured"] == said["documents"] and said["records"]["held_out"] == 2
    assert said["records"]["captured"] + 2 + sum(said["left_out"].values()) == said["records"]["read"] == 120
    alone = write_lines(tmp_path / "one.jsonl", [{"id": 63, "text": "one document that is long enough"}])
    counts = Counts()
    with pytest.raises(UserError, match="1 x held out for evaluation"):
        write_documents(tmp_path / "d.arrow", tokenized(records(data(path=alone), None), tokenizer, data(), counts), counts)


# A whole source


def test_several_workers_give_the_documents_of_one(tokenizer):
    source = [Record(str(i), {"text": "x = 1\n" * (i % 7)}) for i in range(500)]
    source += [Record(f"c{i}", {"messages": conversation(["q", "a"] * (i % 3))}) for i in range(100)]
    for recipe in (data(), data(max_tokens=2000)):
        (one, counted), (many, counted_too) = (everything(source, tokenizer, recipe, workers) for workers in (1, 3))
        assert counted == counted_too and len(one) == len(many) > 50
        assert all(
            a.id == b.id and np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.loss_mask, b.loss_mask)
            for a, b in zip(one, many)
        )


def test_a_worker_that_is_killed_ends_the_work_with_one_line(tokenizer):
    documents = tokenized(
        (Record(str(i), {"text": "x = 1\n" * 50}) for i in range(10**6)), tokenizer, data(), Counts(), workers=2
    )
    next(documents)
    psutil.Process().children()[-1].kill()
    with pytest.raises(UserError, match="a process that tokenises was killed"):
        list(documents)


def test_a_worker_that_is_killed_within_its_answer_ends_the_work_with_one_line(tokenizer, monkeypatch):
    parent = os.getpid()
    send = connection.Connection._send

    def half(pipe, message, *rest):
        if os.getpid() == parent or len(message) < 10_000:
            return send(pipe, message, *rest)
        os.write(pipe.fileno(), message[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(connection.Connection, "_send", half)  # forked processes have it too
    texts = (Record(str(i), {"text": "x = 1\n" * 50}) for i in range(10**6))
    with pytest.raises(UserError, match="a process that tokenises was killed"):
        list(tokenized(texts, tokenizer, data(), Counts(), workers=2))


class NotSent(BaseException):
    """As the tokenizers' Rust code raises, and with something that no pipe takes."""

    def __init__(self):
        super().__init__(lambda: None)


@pytest.mark.parametrize(
    "error,expected,said",
    [(UserError("no template"), UserError, "^no template$"), (NotSent(), RuntimeError, "(?s)in _encode_chunk.*NotSent")],
)
def test_what_goes_wrong_in_a_worker_is_said(tokenizer, monkeypatch, error, expected, said):
    def raising(*_):
        raise error

    before = psutil.Process().children()
    monkeypatch.setattr("data_prep.sources.documents.encode", raising)
    with pytest.raises(expected, match=said):
        list(tokenized((Record(str(i), {"text": "x = 1"}) for i in range(200)), tokenizer, data(), Counts(), workers=2))
    assert psutil.Process().children() == before


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_documents_written_to_disk_are_read_back_with_their_counts(tmp_path_factory, lengths, random):
    documents = [
        TokenDocument(f"d{i}", np.arange(n, dtype=np.int32) + i, (np.arange(n) % 2).astype(np.uint8))
        for i, n in enumerate(lengths)
    ]
    random.shuffle(documents)
    path = tmp_path_factory.mktemp("documents") / "d.arrow"
    counts = Counts()
    counts.end([counts.read()], "why")
    source = write_documents(path, documents, counts)
    stored = Documents(path)
    assert (source["documents"], source["tokens"], source["left_out"]) == (len(lengths), sum(lengths), {"why": 1})
    assert source["supervised"] == sum(n // 2 for n in lengths) and stored.lengths.tolist() == [
        len(d.input_ids) for d in documents
    ]
    for index, given_ in enumerate(documents):
        assert all(np.array_equal(a, b) for a, b in zip(stored[index], given_))
    half, rest, whole = Digest(), Digest(), Digest()
    for i, document in enumerate(sorted(documents)):
        (half if i % 2 else rest).add(document)
        whole.add(document)
    assert whole.hex() == source["hash"] == Digest.joined([half.hex(), rest.hex()])
    changed = Digest()
    for document in documents:
        changed.add(document._replace(loss_mask=np.ones_like(document.loss_mask)))
    assert changed.hex() != source["hash"]
    assert [len(documents[i].input_ids) for i in stored.by_length()] == sorted(lengths, reverse=True)
