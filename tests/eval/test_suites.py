"""Suites: every one makes its official prompt of its official record, long prompts are cut where they say, conversations keep
their history, and what is wrong with a file is one line before the target is loaded."""

import copy
import dataclasses
import json
import random
import re
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from common import cli
from common.errors import UserError
from data_prep.recipe import TargetRecipe
from data_prep.target.loading import load_target, load_tokenizer, tokenizer_hashes
from eval.check import check_evaluation
from eval.oracle.decode import Generation, Round
from eval.prompts.load import load_prompts
from eval.prompts.suites import Prompt, SuiteRecipe, cut
from eval.recipe import EvalRecipe
from eval.reports.answers import Answers
from eval.reports.sweep import gather
from tests.support.commands import ROOT
from train.drafter.build import load_config, new_drafter
from train.drafter.config import DrafterConfig

LONGBENCH = {"input": "Who?", "context": "Long ago.", "answers": ["x"], "length": 2, "dataset": "d", "language": "en"}
LONGBENCH |= {"all_classes": None, "_id": "3f2a"}
STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite {it}."], "reference": ["x"]}
MATH = {"problem": "$x$?", "solution": "s", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "t/1"}
CODE = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "", "test": "", "entry_point": "f"}
BOOK = {"short_book_title": "T", "publication_date": 1880, "url": "gutenberg.org/1", "text": "He went. She stayed! And so on"}

# A record as the suite's source has it, and (its id, the first turn that it becomes).
OFFICIAL = {
    "jsonl": ({"id": "a", "prompt": "Say {this}."}, "a", "Say {this}."),
    "spec_bench": (QUESTION, "81", "Write."),
    "mt_bench": ({"prompt": ["Write.", "Again."], "prompt_id": 7, "category": "math", "reference": []}, "7", "Write."),
    "gsm8k": ({"question": "1 + {1}?", "answer": "#### 2"}, "0", "1 + {1}?" + STEP),
    "math500": (MATH, "t/1", "$x$?" + STEP),
    "humaneval": (CODE, "HumanEval/0", "Write a solution to the following problem and make sure that it passes the tests:\n"
                  "```python\ndef f():\n\n```"),
    "gov_report": (LONGBENCH, "3f2a", "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
                   "Report:\nLong ago.\n\nNow, write a one-page summary of the report.\n\nSummary:"),
    "qmsum": (LONGBENCH, "3f2a", "You are given a meeting transcript and a query containing a question or instruction. Answer "
              "the query in one or more sentences.\n\nTranscript:\nLong ago.\n\nNow, answer the query based on the above meeting "
              "transcript in one or more sentences.\n\nQuery: Who?\nAnswer:"),
    "narrativeqa": (LONGBENCH, "3f2a", "You are given a story, which can be either a novel or a movie script, and a question. "
                    "Answer the question as concisely as you can, using a single phrase if possible. Do not provide any "
                    "explanation.\n\nStory: Long ago.\n\nNow, answer the question based on the story as concisely as you can, "
                    "using a single phrase if possible. Do not provide any explanation.\n\nQuestion: Who?\n\nAnswer:"),
    "pg19": (BOOK, "gutenberg.org/1", BOOK["text"]),
}  # fmt: skip
SETTINGS = {  # new tokens, truncated side, thinking, prompts, warm-ups
    "jsonl": (256, "left", None, None, 1),
    "spec_bench": (1024, "right", None, None, 3),
    "mt_bench": (2048, "right", False, None, 1),
    "gsm8k": (2048, "right", False, 128, 1),
    "math500": (2048, "right", False, 128, 1),
    "humaneval": (2048, "right", False, 128, 1),
    "gov_report": (512, "middle", None, None, 1),
    "qmsum": (512, "middle", None, None, 1),
    "narrativeqa": (128, "middle", None, None, 1),
    "pg19": (1024, "right", None, None, 1),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TargetRecipe(path="data_prep/targets/tiny").location)


def composed(name, *words) -> SuiteRecipe:
    return cli.compose("eval", EvalRecipe, ["drafter=x", f"suite={name}", *words]).suite


def written(folder, *records, name="suite.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(recipe: SuiteRecipe, tokenizer, room=32000):
    return load_prompts(recipe, None, tokenizer, room)


def chat(*turns):
    """The embedded target's own format, written by hand: the user speaks first."""
    said = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(["user", "assistant"] * len(turns), turns)]
    return "".join(said) + "<|im_start|>assistant\n"


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "conf/suite").glob("*.yaml") if path.stem[0] != "_"])
def test_every_suite_makes_its_official_prompt(tokenizer, tmp_path, name):
    head = [line for line in (ROOT / f"conf/suite/{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert len(head) >= 2
    if name == "heldout":
        return
    assert name == "jsonl" or any(line.startswith("# Departs: ") for line in head)
    record, id, text = OFFICIAL[name]
    recipe = composed(name, f"suite.path={written(tmp_path, record)}", *["suite.short=keep"] * (name == "pg19"))
    (prompt,), said = load(recipe, tokenizer)
    system = f"<|im_start|>system\n{recipe.system}<|im_end|>\n" if recipe.system else ""
    assert prompt.id == id and tokenizer.decode(prompt.tokens) == system + chat(text)
    assert (said["max_new_tokens"], said["truncate"], said["thinking"], recipe.count, said["warmup"]) == SETTINGS[name]
    assert said["suite"] == name and said["format"] == "chat template" and said["ids"] == [id] and said["truncated"] == 0
    assert said["count"] == 1 and said["tokens"] == said["least_tokens"] == said["most_tokens"] == len(prompt.tokens)
    with pytest.raises(UserError, match="suite.jsonl, line 2: no field '.*', which suite=.* needs; it has other"):
        load(recipe.model_copy(update={"path": str(written(tmp_path, record, {"other": 1}, name="x.suite.jsonl"))}), tokenizer)


def test_spec_bench_is_counted_by_category_and_by_turn(tokenizer, tmp_path):
    records = [QUESTION, {"question_id": 161, "category": "rag", "turns": ["Why?"]}, QUESTION | {"question_id": 82}]
    prompts, said = load(composed("spec_bench", f"suite.path={written(tmp_path, *records)}"), tokenizer)
    assert said["categories"] == {"writing": 2, "rag": 1} and said["conversation_turns"] == 5 and said["count"] == 3
    assert said["positions"] == max(len(tokenizer(chat("Write.", "", "Rewrite {it}."))["input_ids"]) + 2 * 1024,
                                    len(prompts[1].tokens) + 1024)  # fmt: skip
    assert "split" not in said and said["source"].endswith("suite.jsonl")


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_cutting_a_prompt_keeps_the_chosen_side(side):
    for length in range(9):
        for limit in range(2, 10):
            tokens = list(range(length))
            kept = {
                "left": [i for i in tokens if length - i <= limit],
                "right": [i for i in tokens if i < limit],
                "middle": [i for i in tokens if length <= limit or i < limit // 2 or length - i <= limit // 2],
            }
            assert cut(tokens, limit, side) == kept[side]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("format", ["chat", "plain"])
def test_a_long_prompt_loses_text_and_keeps_its_format(tokenizer, tmp_path, side, format):
    """Exactly as many tokens as asked for; the chat template's own are all there, and of the text what `cut` keeps."""
    text = " ".join(f"word{i}" for i in range(99))
    words = [f"suite.path={written(tmp_path, {'prompt': 'short'}, {'prompt': text})}", f"suite.truncate={side}"]
    words += ["suite.prompt_tokens=40", f"suite.chat={format == 'chat'}"]
    (short, long), said = load(composed("jsonl", *words), tokenizer)
    assert said["truncated"] == 1 and said["most_tokens"] == len(long.tokens) == 40 and said["prompt_tokens"] == 40
    assert said["format"].startswith("chat" if format == "chat" else "plain text")
    before, behind = chat("@").split("@") if format == "chat" else ("", "")
    before, behind = (tokenizer(part)["input_ids"] for part in (before, behind))
    assert long.tokens[: len(before)] == before and long.tokens[len(long.tokens) - len(behind) :] == behind
    room = 40 - len(before) - len(behind)
    assert long.tokens[len(before) : 40 - len(behind)] == cut(tokenizer(text)["input_ids"], room, side)
    assert tokenizer.decode(short.tokens) == (chat("short") if format == "chat" else "short")


def test_a_book_ends_with_a_sentence_and_short_ones_are_left_out(tokenizer, tmp_path):
    text = "It was so.  " + "Then he said that it was not. She said nothing! " * 9
    path = written(tmp_path, BOOK, BOOK | {"url": "b", "text": text}, BOOK | {"url": "c", "text": "no sentence " * 50})
    (book, endless), said = load(composed("pg19", f"suite.path={path}", "suite.prompt_tokens=70"), tokenizer)
    assert said["left_out_as_short"] == 1 and said["truncated"] == 2 and said["ids"] == ["b", "c"]
    story_of = lambda prompt: (
        tokenizer.decode(prompt.tokens).split("user\n")[1].removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    )
    (whole, _), _ = load(composed("pg19", f"suite.path={path}", "suite.prompt_tokens=70", "suite.cut_after=null"), tokenizer)
    story = story_of(book)
    rest = story_of(whole).removeprefix(story_of(book))
    assert text.startswith(story + rest) and story[-1] in ".!" and not re.search(r"[.!?]\s*[A-Z]", rest)
    assert len(book.tokens) <= len(whole.tokens) == len(endless.tokens) == 70
    with pytest.raises(UserError, match="no prompt has 5000 tokens"):
        load(composed("pg19", f"suite.path={path}", "suite.prompt_tokens=5000"), tokenizer)
    with pytest.raises(UserError, match="9 tokens leave no room for a prompt"):
        load(composed("pg19", f"suite.path={path}", "suite.prompt_tokens=9"), tokenizer)


def test_a_conversation_goes_on_from_the_reply(tokenizer, tmp_path):
    path = written(tmp_path, QUESTION | {"turns": ["One?", "Two?", "Three?"]})
    recipe = composed("spec_bench", f"suite.path={path}")
    (first,), _ = load(recipe, tokenizer)
    second = first.after(tokenizer("Yes.")["input_ids"] + tokenizer("<|im_end|>")["input_ids"])  # as decoding ends it
    third = second.after(tokenizer("No.")["input_ids"])
    assert tokenizer.decode(first.tokens) == chat("One?") and tokenizer.decode(second.tokens) == chat("One?", "Yes.", "Two?")
    assert tokenizer.decode(third.tokens) == chat("One?", "Yes.", "Two?", "No.", "Three?")
    assert third.after([5]) is None and third.id == "81" and third.category == "writing"
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    (first,), said = load(recipe, bare)
    assert said["format"] == "plain text, turns joined by blank lines: the target has no chat template"
    assert bare.decode(first.after(bare("Yes.")["input_ids"]).tokens) == "One?\n\nYes.\n\nTwo?"
    takes = len(tokenizer(chat("One?", "", "Two?", "", "Three?"))["input_ids"]) + 3 * 1024
    (first,), _ = load(recipe, tokenizer, room=takes)
    assert first.after([5] * 3000) is None  # beyond the positions
    with pytest.raises(UserError, match=f"'81' of 3 turns may take {takes} positions with suite.new_tokens=1024"):
        load(recipe, tokenizer, room=takes - 1)


def test_suite_thinking_is_passed_to_the_chat_template(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    path = written(tmp_path, {"prompt": "x"})
    tokenizer.chat_template += "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    for flag, end in (("null", "assistant\n"), ("true", "True"), ("false", "False")):
        (prompt,), said = load(composed("jsonl", f"suite.path={path}", f"suite.thinking={flag}"), tokenizer)
        assert tokenizer.decode(prompt.tokens).endswith(end) and str(said["thinking"]) == {"null": "None"}.get(flag, end)
    tokenizer.chat_template = "{{ raise_exception('no such thing') }}"
    with pytest.raises(UserError, match="suite=jsonl: the chat template refuses it .*no such thing"):
        load(composed("jsonl", f"suite.path={path}"), tokenizer)


def test_count_and_shuffle_choose_the_prompts(tokenizer, tmp_path):
    path = written(tmp_path, *({"id": i, "prompt": f"p{i}"} for i in range(9)))
    ids = lambda *words: load(composed("jsonl", f"suite.path={path}", *words), tokenizer)[1]["ids"]
    every = [str(i) for i in range(9)]
    drawn = list(every)
    random.Random(0).shuffle(drawn)  # DFlash's own draw
    assert ids() == every == ids("suite.shuffle=0", "suite.count=9") and ids("suite.count=3") == every[:3]
    assert ids("suite.shuffle=0", "suite.count=3") == drawn[:3] != every[:3]


def test_a_balanced_draw_takes_equally_many_prompts_of_each_kind(tokenizer, tmp_path):
    """Spec-Bench's own numbers: 480 records of thirteen categories, six kinds; 80 of them, drawn evenly."""
    suite = composed("spec_bench")
    sizes = dict.fromkeys(suite.kinds["mt_bench"], 10) | dict.fromkeys(("translation", "summarization", "qa", "rag", "x"), 80)
    every = [category for category, size in sizes.items() for _ in range(size)]
    path = written(tmp_path, *({"question_id": i, "category": one, "turns": ["a"]} for i, one in enumerate(every)))
    draw = lambda *words: load(composed("spec_bench", f"suite.path={path}", "suite.count=80", *words), tokenizer)
    kinds = lambda prompts: Counter(suite.kind_of(p.category) for p in prompts)
    assert set(kinds(draw()[0])) == {"mt_bench"} and len(kinds(draw("suite.shuffle=0")[0])) == 6
    prompts, said = draw("suite.shuffle=0", "suite.balanced=true")
    assert sorted(kinds(prompts).values()) == [13] * 4 + [14] * 2 and said["count"] == 80 and said["balanced"]
    assert prompts == draw("suite.shuffle=0", "suite.balanced=true")[0] != draw("suite.shuffle=1", "suite.balanced=true")[0]
    assert suite.kind_of("x") == "x" and suite.kind_of(None) == "no category"


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".txt"])
def test_json_parquet_and_text_files_are_read_as_prompts(tokenizer, tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    match suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".txt":
            path.write_text("one\n\ntwo\n")
    prompts, _ = load(composed("jsonl", f"suite.path={path}"), tokenizer)
    assert [tokenizer.decode(p.tokens) for p in prompts] == [chat("one"), chat("two")]
    if suffix != ".parquet":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark is no part of the first prompt
        assert load(composed("jsonl", f"suite.path={path}", "suite.split=marked"), tokenizer)[0] == prompts
    path.write_bytes(b"\xff{")
    with pytest.raises(UserError, match=f"prompts{suffix}(, line 1)?: not "):
        load(composed("jsonl", f"suite.path={path}", "suite.split=again"), tokenizer)


def test_a_conversation_may_be_a_list_of_messages(tokenizer, tmp_path):
    """In the prompt's own field: its system message and its user's turns are asked, its replies are not."""
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, ["Why?", "So.", "How?"])]
    sharegpt = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}, {"from": "human", "value": "How?"}]
    columns = {key: [message[key] for message in messages] for key in messages[0]}
    asked = [["Why?", "How?"], messages, sharegpt, columns, [{"role": "system", "content": "Be brief."}, *messages]]
    path = written(tmp_path, *({"prompt": one} for one in asked))
    (*alike, brief), _ = load(composed("jsonl", f"suite.path={path}"), tokenizer)
    assert all(tokenizer.decode(p.tokens) == chat("Why?") and p.waiting == ("How?",) for p in alike)
    assert tokenizer.decode(brief.tokens) == "<|im_start|>system\nBe brief.<|im_end|>\n" + chat("Why?")
    assert brief.waiting == ("How?",)
    (one,), _ = load(composed("jsonl", f"suite.path={written(tmp_path, {'prompt': 'x', 'n': 2.5}, name='n.jsonl')}",
                              "suite.template='{prompt} {n}'"), tokenizer)  # fmt: skip
    assert tokenizer.decode(one.tokens) == chat("x 2.5")


@pytest.fixture(scope="module")
def drafter(tmp_path_factory, tokenizer):
    """An untrained drafter of the embedded target."""
    folder = tmp_path_factory.mktemp("drafter")
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    about = {"id": "tiny", "weights_hash": target.weights_hash(), "tokenizer_hash": tokenizer_hashes(tokenizer)[0]}
    config = DrafterConfig("blockwise", "kv", [0], [], 4, False, False, 0, "target", 2, target.architecture, about)
    new_drafter(config).start(target, target.frozen_head).save_pretrained(folder)
    return folder


ONE, TWO = '{"prompt": "a"}\n', '{"prompt": "a"}\n{"prompt": "b"}\n'


@pytest.mark.parametrize(
    "content,words,message",
    [
        ('{"prompt": "a"}\n{"promt": "b", "id": 2}\n', [], r"suite.jsonl, line 2: no field 'prompt', .*; it has promt, id"),
        ('{"prompt": "a"}\n\n{"prompt": null}\n', [], r"suite.jsonl, line 3: no field 'prompt'"),
        ('{"prompt": "a"}\nnot json\n', [], r"suite.jsonl, line 2: not a JSON object"),
        ('["prompt"]\n', [], r"suite.jsonl, record 1: not a JSON object"),
        ('{"prompt": ["a", 1]}\n', [], r"line 1: 'prompt' is neither a list of the user's turns nor of messages"),
        ('{"prompt": [{"role": "tool", "content": "a"}]}\n', [], "line 1: 'prompt' has messages of tool: a suite asks"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}\n', [], "a message of it is not text"),
        ('{"prompt": ["a"]}\n', ["suite.template='Say {prompt}'"], "filled .*'prompt' is neither text nor a number"),
        ('{"prompt": true}\n', [], "'prompt' is neither text nor a number"),
        ("\n", [], r"suite.jsonl: no record is in it"),
        ('{"prompt": "\\ud800"}\n', [], r"suite.jsonl, line 1: its text is not valid Unicode"),
        ('{"prompt": " "}\n', [], r"line 1: '\{prompt\}' is not a list of the user's turns, none of them empty"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', [], r"line 2: the id '1' stands twice \(.*line 1\)"),
        (ONE, [], "has one prompt.*controls=false"),
        (TWO, ["suite.prompt_tokens=32700"], "exceed the 32764 positions"),
        (TWO, ["prompts.count=2"], "prompts.count is now suite.count"),
        (TWO, ["suite.turns=prompt"], "give suite.turns.*or suite.template"),
        (ONE, ["suite.turns=prompt", "suite.template=null"], "line 1: 'prompt' is not a list of the user's turns"),
        (ONE, ["suite.template='{prompt[x]}'"], "line 1: suite.template cannot be filled"),
        (ONE, ["suite.truncate=up"], "suite.truncate: Input should be 'left', 'right' or 'middle'"),
        (ONE, ["suite.cut_after=x"], "suite.truncate=left keeps its end"),
        (ONE, ["suite.cut_after='('", "suite.truncate=right"], "suite.cut_after=.* is no pattern"),
        (ONE, ["suite.kinds={a:[b]}"], "suite.kinds and suite.balanced need suite.category"),
        (ONE, ["suite.category=c", "suite.kinds={a:[b],c:[b]}"], "suite.kinds names the category 'b' twice"),
        (ONE, ["suite.path=absent.jsonl"], "suite.path=absent.jsonl is not a file"),
        (ONE, ["suite.path=suite.csv"], "a suite's file is .jsonl, .json, .parquet or .txt"),
        (None, [], "suite=jsonl needs suite.path=FILE; the head of conf/suite/jsonl.yaml says of what"),
    ],
)  # fmt: skip
def test_a_wrong_suite_is_a_one_line_error_before_the_target_is_loaded(drafter, tmp_path, content, words, message):
    path = tmp_path / "suite.jsonl"
    named = []
    if content is not None:
        path.write_text(content)
        named = [f"suite.path={path}"]
    with pytest.raises(UserError, match=message):
        check_evaluation(cli.compose("eval", EvalRecipe, [f"drafter={drafter}", "suite=jsonl", *named, *words]))


def test_a_data_set_that_cannot_be_downloaded_is_a_one_line_error(drafter):
    with pytest.raises(
        UserError, match="suite.name=openai/gsm8k, suite.split=test: datasets cannot load it .*give suite.path=FILE"
    ):
        check_evaluation(cli.compose("eval", EvalRecipe, [f"drafter={drafter}", "suite=gsm8k"]))


def test_prompts_beyond_what_a_drafter_knows_are_judged_apart(drafter, tmp_path, capsys):
    """A warning before the target is loaded; then tau of either kind in the table, the page and report.json."""
    from eval.main import run

    long = {"id": "long", "prompt": "a b c " * 30}
    short = tmp_path / "short"
    path = written(tmp_path, long, {"id": "1", "prompt": "a"}, {"id": "2", "prompt": "b"})
    short.mkdir()
    (short / "model.safetensors").write_bytes((drafter / "model.safetensors").read_bytes())
    config = dataclasses.asdict(load_config(drafter)) | {"positions": 100}
    (short / "config.json").write_text(json.dumps(config))
    compose = lambda *words: cli.compose("eval", EvalRecipe, [f"drafter={short}", "suite=jsonl", f"suite.path={path}", *words])
    check_evaluation(compose("suite.new_tokens=8", "suite.prompt_tokens=60"))
    assert "warning" not in capsys.readouterr().out
    recipe = compose("suite.new_tokens=8", "temperatures=[0]", f"out={tmp_path / 'out'}")
    check_evaluation(recipe)
    (said,) = capsys.readouterr().out.splitlines()
    assert re.match("warning: .* knows positions below 100, and 1 of 3 prompts reach up to 1[0-9]{2}:", said)
    run(recipe)
    figures = json.loads((tmp_path / "out/report.json").read_text())["temperatures"]["0"]
    within, beyond = (figures["by_positions"][f"{which} 100 positions"] for which in ("within", "beyond"))
    assert figures["lossless"] and within["requests"] == 2 and beyond["requests"] == 1
    tokens = [count + 1 for count, _ in figures["per_prompt_s"]]  # of each prompt's output, the prefill's included
    assert beyond["tokens"] == tokens[0] and within["tokens"] == sum(tokens[1:])
    (long_emitted, long_rounds), *others = figures["per_prompt"]
    emitted, rounds = (sum(column) for column in zip(*others))
    assert within["tau"] == pytest.approx(emitted / rounds) and beyond["tau"] == pytest.approx(long_emitted / long_rounds)
    assert figures["controls"]["prompt_lookup"]["by_positions"].keys() == figures["by_positions"].keys()
    shown = capsys.readouterr().out
    assert "beyond 100 positions" in shown and "beyond 100 positions" in (tmp_path / "out/report.html").read_text()


def test_learned_positions_refuse_longer_prompts_and_rotary_ones_accept_them(drafter, tmp_path):
    """Rotary positions go on; learned ones do not."""
    configs = ({"a": {"rope_type": "default"}}, {})
    rotary, table = ({"path": "lm", "layers": 1, "positions": 100, "config": one} for one in configs)
    config = dataclasses.asdict(load_config(drafter)) | {"positions": 100}
    (tmp_path / "model.safetensors").write_bytes(b"")
    words = [f"drafter={tmp_path}", "suite=jsonl", f"suite.path={written(tmp_path, {'prompt': 'a b c ' * 30}, {'prompt': 'a'})}"]
    for lm, refused in ((rotary, False), (table, True)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"lm": lm}))
        recipe = cli.compose("eval", EvalRecipe, [*words, "suite.new_tokens=8"])
        if not refused:
            check_evaluation(recipe)
            continue
        with pytest.raises(UserError, match="has a table of 100 positions, and 1 of 2 prompts need up to 1"):
            check_evaluation(recipe)


def test_an_answer_is_in_the_file_before_the_next_is_asked_for(tmp_path):
    with Answers(tmp_path / "out", {"drafter": {}}) as answers:
        for count in (1, 2):
            answers.write(1.0, [Prompt("a", [1, 2])], {"trained": [Generation([5, 6, 7], [Round(1, 4, 1)])]})
            lines = (tmp_path / "out/answers.jsonl").read_text().splitlines()
            assert len(lines) == 1 + count and json.loads(lines[-1])["answers"]["trained"]["kept"] == [1]


def test_decode_judges_each_turn_of_a_suite_of_conversations(drafter, tmp_path, capsys):
    """The whole of mode=decode: a request a turn, each against plain decoding, and the report says what was asked and how."""
    from eval.main import run

    path = written(tmp_path, QUESTION, {"question_id": 1, "category": "rag", "turns": ["Why?"]})
    words = [f"drafter={drafter}", "suite=spec_bench", f"suite.path={path}", "suite.new_tokens=6", f"out={tmp_path / 'out'}"]
    recipe = cli.compose("eval", EvalRecipe, [*words, "suite.warmup=1", "temperatures=[0]", "seed=3"])
    check_evaluation(recipe)
    answers = lambda: [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    # An error behind the last answer: a folder stands where the report is to be. What was heard is there.
    (tmp_path / "out/report.json").mkdir(parents=True)
    few = ["temperatures=[0]", "suite.warmup=0", "controls=false", "transformers=false"]
    with pytest.raises(UserError, match="Is a directory"):
        run(cli.compose("eval", EvalRecipe, [*words, *few]))
    _, *late = answers()
    (tmp_path / "out/report.json").rmdir()
    run(recipe)
    report = json.loads((tmp_path / "out/report.json").read_text())
    # The same line begins it anew, and it says what the report says.
    judged, *lines = answers()
    rows = report["temperatures"]["0"]["controls"] | {"trained": report["temperatures"]["0"]}
    assert judged["drafter"] == report["drafter"] and {"baseline", "transformers", *rows} == lines[0]["answers"].keys()
    assert [line["id"] for line in late] == [line["id"] for line in lines] == rows["trained"]["per_prompt_id"]
    for name, row, heard in [("trained", rows["trained"], late), *((name, row, lines) for name, row in rows.items())]:
        kept = [line["answers"][name]["kept"] for line in heard]
        assert sum(sum(one) + len(one) for one in kept) / sum(map(len, kept)) == pytest.approx(row["tau_micro"])
        assert [len(line["answers"][name]["tokens"]) - 1 for line in heard] == [count for count, _ in row["per_prompt_s"]]
    assert lines[0]["temperature"] == 0 and lines[0]["answers"]["trained"]["decode_s"] > 0
    assert report["prompts"]["seed"] == 3 and report["prompts"]["conversation_turns"] == 3 and report["context"] is None
    figures = report["temperatures"]["0"]
    assert figures["lossless_by"].startswith("3 of 3 outputs equal") and len(figures["per_prompt"]) == 3
    assert {len(control["per_prompt"]) for control in figures["controls"].values()} == {3}
    # MT-Bench's eight categories count as one.
    apart = figures["by_category"]
    lookup = figures["controls"]["prompt_lookup"]["by_category"]
    assert {name: one["requests"] for name, one in apart.items()} == {"mt_bench": 2, "rag": 1} and lookup.keys() == apart.keys()
    ids = figures["per_prompt_id"]
    belongs = {"mt_bench": "81", "rag": "1"}
    for row, parts in ((figures, apart), (figures["controls"]["prompt_lookup"], lookup)):
        for name, part in parts.items():
            mine = [i for i, id in enumerate(ids) if id == belongs[name]]
            emitted, rounds = (sum(row["per_prompt"][i][at] for i in mine) for at in (0, 1))
            tokens, seconds = (sum(row["per_prompt_s"][i][at] for i in mine) for at in (0, 1))
            plain_tokens, plain_seconds = (sum(figures["baseline_per_prompt_s"][i][at] for i in mine) for at in (0, 1))
            assert part["tau"] == pytest.approx(emitted / rounds) and part["tokens"] == tokens + len(mine)
            assert part["speedup"] == pytest.approx(tokens / seconds / (plain_tokens / plain_seconds))
    html = (tmp_path / "out/report.html").read_text().split("speed apart")[1]
    cells = re.findall("<td[^>]*>([^<]*)</td>", html.split("</table>")[0])
    bench = apart["mt_bench"]
    assert cells[:6] == ["0", "mt_bench", "2", str(bench["tokens"]), f"{bench['tau']:.2f}", f"{bench['speedup']:.2f}x"]
    assert re.search(r"mt_bench +\S+ +2 ", capsys.readouterr().out)
    (tmp_path / "other").mkdir()
    report["prompts"]["suite"] = "mt_bench"
    (tmp_path / "other/report.json").write_text(json.dumps(report))
    gather([tmp_path], tmp_path)
    rows = (tmp_path / "sweep.md").read_text()
    assert "blockwise kv, full view only, suite spec_bench |" in rows and "prompt lookup, suite mt_bench |" in rows
