"""`mode=demo` on the embedded target, and `make demo`'s script, whole, on the real one."""

import html
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import cli
from data_prep.recipe import TargetRecipe
from data_prep.target.loading import load_target, load_tokenizer, tokenizer_hashes
from eval.live import demo
from eval.live.stream import Decoders
from eval.prompts.asking import asked
from eval.recipe import EvalRecipe
from tests.support.commands import ROOT, command, fetch_smollm2
from tests.support.decoding import generated
from tests.support.terminal import GREEN, Terminal
from tests.support.tiny_drafter import save_tiny_drafter
from train.drafter.build import load_drafter, new_drafter
from train.drafter.config import DrafterConfig, released

NUMBER = r"\d+\.\d+"
ROW = re.compile(rf"^│ (\S.*?) +│ +({NUMBER}) │ +(\d+) │ +({NUMBER}) │ +({NUMBER}) │ +({NUMBER})x │ +(yes|NO) │$", re.MULTILINE)
TWO = ["demo.prompts=[{kind:one,text:'def area(width, height):'},{kind:two,text:'class Shape:'}]"]
TWO += ["demo.max_new_tokens=24", "demo.warmup_tokens=4"]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    return save_tiny_drafter(tmp_path_factory.mktemp("drafter") / "own")


@pytest.fixture(scope="module")
def loaded(drafter):
    """(recipe, target, drafter) of a demo of two prompts."""
    recipe = cli.compose("eval", EvalRecipe, [f"drafter={drafter}", "mode=demo", *TWO])
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    own = load_drafter(drafter)
    target.capture(own.config.hidden_layers, own.config.kv_layers)
    return recipe, target, own


def promised(out: str, folder: Path, kinds: list[str]) -> dict:
    """The figures, once everything that is promised of a demo without a terminal was seen: a table with a row for each prompt and
    one for all, equal texts, and a picture of the figures that were printed, which needs nothing from elsewhere."""
    assert "\x1b" not in out and "\r" not in out
    rows = ROW.findall(out)
    assert [name for name, *_ in rows] == [*kinds, "total"] and {same for *_, same in rows} == {"yes"}
    said = json.loads((folder / "demo.json").read_text())
    assert [one["kind"] for one in said["prompts"]] == kinds
    assert f"picture: {folder / 'demo.svg'}" in out
    svg = (folder / "demo.svg").read_text()
    assert re.findall(r"https?://[^\"\s]+", svg) == ["http://www.w3.org/2000/svg"] and "#2a9d6f" in svg
    drawn = html.unescape(re.sub(r"<[^>]+>", " ", svg.split("</style>")[1])).replace("\xa0", " ")
    for (name, *cells), one in zip(rows, [*said["prompts"], said["total"]]):
        assert cells == demo.row(name, one)[1:] or cells == [c.rstrip("x") for c in demo.row(name, one)[1:]]
        assert re.search(rf"{name} +" + " +".join(map(re.escape, demo.row(name, one)[1:])), drawn), name
    return said


def test_the_demo_command_shows_and_saves_two_prompts(drafter, loaded, tmp_path):
    words = [ROOT / "eval/main.py", "mode=demo", f"drafter={drafter}", "out=shown", "draft.length=adaptive", *TWO]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    out = done.stdout.replace("shown/", f"{tmp_path / 'shown'}/")
    said = promised(out, tmp_path / "shown", ["one", "two"])
    recipe, target, _ = loaded
    tokenizer = load_tokenizer(target.path)
    for prompt, one in zip(recipe.demo.prompts, said["prompts"]):
        tokens = generated(target, asked(tokenizer, prompt.messages, None), 24, *target.end_tokens)
        assert one["text"] == tokenizer.decode(tokens, skip_special_tokens=True) and one["tokens"] == len(tokens)
        assert one["speedup"] == pytest.approx(one["drafted"] / one["plain"]) and 1 <= one["tau"] <= 5
        both = out.split(prompt.kind + ": ")[1].split("tokens/s plain")[0]
        shown = [" ".join(text.split()) for text in re.split("plain:|drafter:", both)[1:]]
        assert " ".join(one["text"].split()) == shown[0] and shown[1].startswith(shown[0])


def test_at_a_terminal_both_sides_stream_in_columns(drafter, tmp_path):
    terminal = Terminal(ROOT / "eval/main.py", "mode=demo", f"drafter={drafter}", "out=shown", *TWO, cwd=tmp_path)
    out = terminal.rest()
    assert terminal.code() == 0, out
    frames = re.findall(rf"plain: ({NUMBER}) tokens/s.*?drafter: ({NUMBER}) tokens/s, tau", out)
    assert "-1" not in re.findall(r"plain: (-?\d*)", out)  # before the first token there is no speed
    assert len(set(frames)) > 6 and GREEN in out and (tmp_path / "shown/demo.svg").exists()


def pair(decoders, prompt):
    return [decoders.answer(prompt, 24, 0, drafted) for drafted in (False, True)]


def test_side_by_side_decoders_are_timed_apart_and_the_slower_one_is_next(loaded):
    recipe, target, drafter = loaded
    decoders = Decoders(recipe, target, drafter, 0.0, side_by_side=True)
    prompt = asked(decoders.tokenizer, recipe.demo.prompts[0].messages, None)
    demo.take_turns(*pair(decoders, prompt), lambda: None)  # the first forwards take longer
    plain, drafted = pair(decoders, prompt)
    leads, shows = [], []

    def show() -> None:
        time.sleep(0.05)
        shows.append(None)
        if not plain.done and not drafted.done and plain.so_far.rounds and drafted.so_far.rounds:
            leads.append(plain.so_far.decode_s - drafted.so_far.decode_s)

    begun = time.perf_counter()
    demo.take_turns(plain, drafted, show)
    wall = time.perf_counter() - begun
    assert plain.so_far.tokens == drafted.so_far.tokens == generated(target, prompt, 24, *target.end_tokens)
    assert len(plain.so_far.rounds) == 23 > len(drafted.so_far.rounds)
    assert plain.so_far.decode_s + drafted.so_far.decode_s < wall - 0.05 * len(shows)
    assert min(leads) < 0 < max(leads)  # neither is always ahead


def test_a_differing_answer_is_shown_as_not_the_same_text(loaded):
    """The negative control of `same text`: one token of one of two answers."""
    recipe, target, drafter = loaded
    decoders = Decoders(recipe, target, drafter, 0.0, side_by_side=True)
    pairs = [pair(decoders, asked(decoders.tokenizer, one.messages, None)) for one in recipe.demo.prompts]
    for one in pairs:
        demo.take_turns(*one, lambda: None)
    assert demo.row("", demo.figures(pairs))[-1] == "yes"
    answer = pairs[1][1]
    answer.so_far = replace(answer.so_far, tokens=[*answer.so_far.tokens[:-1], answer.so_far.tokens[-1] + 1])
    assert demo.row("", demo.figures(pairs))[-1] == "NO" and demo.figures(pairs[:1])["same"]


def test_side_by_side_decoders_need_a_cache_each(loaded):
    """Why a side-by-side pair has a cache each: drafts that one refused stand where the other reads."""
    recipe, target, drafter = loaded
    texts = {}
    for apart in (True, False):
        decoders = Decoders(recipe, target, drafter, 0.0, side_by_side=apart)
        plain, drafted = pair(decoders, asked(decoders.tokenizer, recipe.demo.prompts[0].messages, None))
        for _ in range(10):
            plain.step()
        while not plain.done:
            drafted.step()
            plain.step()
        texts[apart] = plain.so_far.tokens
        same = min(len(plain.so_far.tokens), len(drafted.so_far.tokens))
        assert not apart or drafted.so_far.tokens[:same] == plain.so_far.tokens[:same]
    assert texts[False] != texts[True]


KINDS = ["conversation", "translation", "summarisation", "question answering", "mathematical reasoning"]
KINDS += ["retrieval-augmented answer"]


def stand_in(folder: Path) -> str:
    """A drafter of SmolLM2 that began as two of its layers and learned nothing: for a checkout without released ones."""
    target = load_target(TargetRecipe(path=str(ROOT / "data_prep/targets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), device="cpu"))
    about = {"id": "smollm2", "weights_hash": target.weights_hash()}
    about["tokenizer_hash"] = tokenizer_hashes(load_tokenizer(target.path))[0]
    config = DrafterConfig("ttt", "kv", [0, 29], [], 5, False, False, 0, "target", 16, target.architecture, about)
    new_drafter(config).start(target, target.frozen_head).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_make_demo_runs_every_released_drafter(tmp_path, monkeypatch):
    """The script that `make demo` runs. Released drafters are worth something on every kind of prompt; a checkout
    without any tries a start without training, which is not."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    environment = {**os.environ, "PYTHON": sys.executable, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["DS_ACCELERATOR"] = "cpu"
    fetch_smollm2()
    names = [name for name in released() if name.startswith("smollm2-")] or [stand_in(tmp_path / "drafter")]
    for name in names:
        out = tmp_path / "shown" / Path(name).name
        words = ["bash", str(ROOT / "launchers/demo.sh"), name, str(out)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said = promised(done.stdout, out, KINDS)
        assert re.search(r"^demo: \d+ s$", done.stdout, re.MULTILINE)
        if released():
            assert said["total"]["tau"] > 1.5 and min(one["tau"] for one in said["prompts"]) > 1.1
