"""`mode=chat`: what a person types and sees, through the real command; its conversation, token for token."""

import dataclasses
import io
import os
import re
import signal
import sys
import time

import pytest

from common import cli
from common.errors import UserError
from data_prep.recipe import TargetRecipe
from data_prep.target.loading import load_target
from eval.check import check_evaluation
from eval.live.chat import Chat
from eval.prompts.asking import asked
from eval.recipe import EvalRecipe, room_of
from tests.support.commands import ROOT, command
from tests.support.decoding import generated
from tests.support.terminal import GREEN, Terminal
from tests.support.tiny_drafter import save_tiny_drafter
from train.drafter.build import load_config, load_drafter

LAST = re.compile(r"^\[tau (\d+\.\d\d), (\d+\.\d) tokens/s(.*)\]$", re.MULTILINE)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    return save_tiny_drafter(tmp_path_factory.mktemp("drafter") / "own")


def test_the_chat_command_answers_every_kind_of_line_as_the_target_alone_would(drafter, tmp_path):
    """Every kind of line once. What the drafter says is what the target says alone, and nothing is coloured for a pipe."""
    lines = ["def add(a, b):", "", "/plain", "/new", "def add(a, b):", "/bogus", "x " * 33000, "/plain", "\udcff"]
    lines += ["/new", "def add(a, b):", "/quit", "nobody reads this"]
    words = [ROOT / "eval/main.py", "mode=chat", f"drafter={drafter}", "chat.max_new_tokens=24", "out=report"]
    script = "\n".join(lines).encode(errors="surrogateescape")
    (tmp_path / "script").write_bytes(script)
    with (tmp_path / "script").open() as stdin:
        done = command(*words, cwd=tmp_path, stdin=stdin)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "\x1b" not in done.stdout and [p.name for p in tmp_path.iterdir()] == ["script"]
    said = LAST.findall(done.stdout)
    assert [rest for *_, rest in said] == ["", ", without the drafter", ""]
    assert float(said[1][0]) == 1 and said[0][0] == said[2][0] and all(float(speed) > 0 for _, speed, _ in said)
    for line in (
        "without the drafter\na new conversation\n",
        "there is no /bogus: /plain switches the drafter off and on, /new forgets the conversation, /quit ends\n",
        "=24 exceed the 32764 positions that the target and the drafter have: /new begins another conversation\n"
        "with the drafter\n",
        "\nthat is not valid Unicode\na new conversation\n",
    ):
        assert line in done.stdout, line
    first, plain, again = re.split(LAST, done.stdout)[:-1:4]
    reply = first.split("/quit ends\n")[1]
    assert len(reply) > 20 and plain.endswith("a new conversation\n" + reply) and again.endswith("a new conversation\n" + reply)


def typed_into(chat, text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    chat.run()


def test_replies_are_the_targets_own_behind_the_whole_conversation(drafter, monkeypatch, capsys):
    words = [f"drafter={drafter}", "mode=chat", "chat.max_new_tokens=16", "chat.system=Be brief.", "draft.length=adaptive"]
    recipe = cli.compose("eval", EvalRecipe, words)
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    loaded = load_drafter(drafter)
    target.capture(loaded.config.hidden_layers, loaded.config.kv_layers)
    chat = Chat(recipe, target, loaded)
    long = "import os\n" * 800  # beyond the first caches
    messages = ["def area(width, height):", "class Shape:", long.replace("\n", " ")]
    typed_into(chat, "\n".join(messages), monkeypatch)

    tokenizer = chat._decoders.tokenizer
    expected = [{"role": "system", "content": "Be brief."}]
    for message in messages:
        expected.append({"role": "user", "content": message.strip()})
        tokens = generated(target, asked(tokenizer, expected, None), 16, *target.end_tokens)
        expected.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)})
    assert chat._messages == expected and chat._decoders._room > 1024
    shown = capsys.readouterr().out
    assert all(one["content"] in shown for one in expected if one["role"] == "assistant")
    typed_into(chat, "/new", monkeypatch)
    assert chat._messages == expected[:1]


@pytest.mark.parametrize("colour", [True, False])
def test_at_a_terminal_accepted_tokens_are_coloured_and_ctrl_c_ends_the_reply_alone(drafter, tmp_path, colour):
    words = [ROOT / "eval/main.py", "mode=chat", f"drafter={drafter}", "chat.max_new_tokens=20000", "draft.length=1"]
    terminal = Terminal(*words, cwd=tmp_path, **({} if colour else {"NO_COLOR": "1"}))
    try:
        terminal.until("> ")
        terminal.type("def area(width, height):\n")
        if colour:
            terminal.until(GREEN)
        else:
            terminal.until(r"area[^$]{60}")  # some of the reply
        terminal.type("\x03")
        shown = terminal.until(r"interrupted\][^>]*> ")
        assert colour or "38;2" not in shown
        time.sleep(0.5)  # readline shows its prompt a moment before it would notice a signal
        terminal.type("\x03")  # nothing is being said
        terminal.until(r"/quit ends\)\s*.*> ")
        terminal.type("\x04")  # the end of what is typed
        assert "Traceback" not in terminal.rest() and terminal.code() == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize(
    "words, message",
    [
        (["mode=chat", "verify=partial"], "mode=chat verifies over the whole cache: leave out verify=partial"),
        (["mode=chat", "draft.length=9"], "draft.length=9: .* drafts 1 to 4 tokens"),
        (["mode=chat", "chat.temperature=-1"], "chat.temperature: Input should be greater than or equal to 0"),
        (["mode=demo", "demo.max_new_tokens=32700"], "mode=demo: a prompt of .* exceed the 32764 positions"),
        (["mode=demo", "demo.prompts=[]"], "demo.prompts"),
        (["mode=chat", "chat.max_new_tokens=40000"], "mode=chat: a prompt of .* exceed the 32764 positions"),
        (["mode=chat", "drafter=smollm3"], "smollm3 holds no drafter .*; (released drafters have names|no drafter is released)"),
    ],
)
def test_mistakes_are_one_line_before_the_target_is_loaded(drafter, words, message):
    with pytest.raises(UserError, match=message):
        check_evaluation(cli.compose("eval", EvalRecipe, [f"drafter={drafter}", *words]))


def test_learned_positions_limit_the_length_of_a_conversation(drafter, monkeypatch):
    """Of a language model with learned positions: known before it is asked, by both commands."""
    recipe = cli.compose("eval", EvalRecipe, [f"drafter={drafter}", "mode=demo"])
    config = load_config(drafter)
    assert room_of(recipe, config) == 32768 - config.slots
    assert room_of(recipe, dataclasses.replace(config, positions=64)) == 32768 - config.slots  # turned keys reach farther
    monkeypatch.setattr(type(config), "position_table", True)
    assert room_of(recipe, dataclasses.replace(config, positions=64)) == 64 - config.slots
