"""The target's own replies: through transformers here, and through a real OpenAI-compatible server."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import httpx
import pytest
import torch

from common import cli
from common.errors import UserError
from common.ranks import free_port
from common.recipe import ROOT
from data_prep.recipe import DataPrepRecipe
from data_prep.synthesis.regenerate import check_regeneration, regenerate
from data_prep.target.loading import load_tokenizer
from data_prep.target.target import Target
from tests.support.commands import command

TINY = str(ROOT / "data_prep/targets/tiny")


def conversations(path, count=6):
    rows = []
    for i in range(count):
        turns = [{"role": "user", "content": f"def f{i}(x):"}, {"role": "assistant", "content": "nobody wants this"}]
        rows.append({"id": f"c{i}", "messages": [{"role": "system", "content": "code"}, *turns * (1 + i % 2)]})
    rows[-1]["messages"].append({"role": "user", "content": "and then"})  # a prompt that nobody has answered
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def recipe_of(tmp_path, *words):
    words = [f"data.path={tmp_path / 'in.jsonl'}", f"regenerate.out={tmp_path / 'out.jsonl'}", *words]
    return cli.compose("data_prep", DataPrepRecipe, ["mode=regenerate", "data=chat", "regenerate.max_tokens=12", *words])


def run(recipe):
    check_regeneration(recipe)
    regenerate(recipe, lambda: None)
    return [json.loads(line) for line in Path(recipe.regenerate.out).read_text().splitlines()]


def assert_answers(given, answered):
    """Every conversation once, its prompts as they were, every reply the target's."""
    assert sorted(r["id"] for r in answered) == sorted(r["id"] for r in given)
    prompts = {r["id"]: [m for m in r["messages"] if m["role"] != "assistant"] for r in given}
    for record in answered:
        told = [m for m in record["messages"] if m["role"] != "assistant"]
        assert told == prompts[record["id"]][: len(told)] and record["messages"][-1]["role"] == "assistant"
        assert record["finish"] == "length" or told == prompts[record["id"]]
        assert all("nobody wants this" not in m["content"] for m in record["messages"])


def test_greedy_replies_are_the_targets_own(tmp_path):
    """Batched and padded on the left, against the target decoding each conversation alone, token by token."""
    given = conversations(tmp_path / "in.jsonl")
    answered = run(recipe_of(tmp_path, "regenerate.temperature=0", "regenerate.batch=4"))
    assert_answers(given, answered)
    target = Target(TINY)
    tokenizer = load_tokenizer(TINY)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for record in answered:
        history = []
        for message in record["messages"]:
            if message["role"] == "assistant":
                ids = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)["input_ids"]
                reply = []
                while len(reply) < 12 and not {end, *target.end_tokens} & set(reply):
                    last = target.forward(torch.tensor([ids + reply])).last_hidden[0, -1]
                    reply.append(int(target.logits(last).argmax()))
                assert message["content"] == tokenizer.decode(reply, skip_special_tokens=True)
            history.append(message)


def test_a_second_run_answers_only_missing_ids_and_replaces_a_truncated_line(tmp_path, capsys):
    given = conversations(tmp_path / "in.jsonl")
    recipe = recipe_of(tmp_path)
    out = tmp_path / "out.jsonl"
    run(recipe)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:-9])
    capsys.readouterr()
    answered = run(recipe)
    assert_answers(given, answered)
    assert "6 records: 6 answered" in capsys.readouterr().out
    assert [json.dumps(r, ensure_ascii=False) + "\n" for r in answered[:2]] == lines[:2]  # what was whole stays
    before = out.read_bytes()
    run(recipe)
    assert out.read_bytes() == before
    given[0]["messages"][1]["content"] = "another prompt"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    with pytest.raises(UserError, match="other prompts of conversation 'c0'"):
        run(recipe)
    with pytest.raises(UserError, match="other settings; these differ: temperature"):
        run(recipe_of(tmp_path, "regenerate.temperature=0.5"))
    for foreign in ('{"id": "x"}\n', '{"some": "json"}', "one\ntwo"):
        out.write_text(foreign)
        with pytest.raises(UserError, match="not written by mode=regenerate"):
            run(recipe)
        assert out.read_text() == foreign
    with pytest.raises(UserError, match="is the source itself"):
        run(recipe_of(tmp_path, f"regenerate.out={tmp_path / 'in.jsonl'}"))


def test_what_the_template_refuses_is_counted_not_fatal(tmp_path, capsys):
    """Also a tokenizer without a padding token, as Llama 3's."""
    target = tmp_path / "target"
    shutil.copytree(TINY, target)
    template = (target / "chat_template.jinja").read_text()
    refuses = "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    (target / "chat_template.jinja").write_text(refuses + template)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    given = conversations(tmp_path / "in.jsonl")
    given[2]["messages"][1]["content"] = "no"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    answered = run(recipe_of(tmp_path, f"target.path={target}"))
    assert sorted(r["id"] for r in answered) == ["c0", "c1", "c3", "c4", "c5"]
    said = capsys.readouterr().out
    assert "6 records: 5 answered" in said and "left out: 1 x the chat template refuses it (not this)" in said


def test_another_seed_gives_other_replies_and_the_output_can_be_captured(tmp_path):
    """Another seed gives other replies, the same seed the same, and the output is a source again."""
    conversations(tmp_path / "in.jsonl")
    replies = {}
    for seed in (0, 0, 1):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        answered = run(recipe_of(tmp_path, f"regenerate.seed={seed}"))
        found = [m["content"] for r in answered for m in r["messages"] if m["role"] == "assistant"]
        assert replies.setdefault(seed, found) == found
    assert replies[0] != replies[1]
    done = command(
        ROOT / "data_prep/main.py", "data=chat", f"data.path={tmp_path / 'out.jsonl'}", "cache.dir=c", "data.max_length=512",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


class Server(ThreadingHTTPServer):
    """The embedded target behind HTTP, unreliable on purpose: every request fails once with 503 or a dropped line, a prompt
    that says `too long` is refused with 400. It counts how many requests are under way at a time."""

    def __init__(self, fails=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fails = fails
        self.seen = Counter()
        self.underway = 0
        self.most = 0
        self.lock = Lock()
        self.target = Target(TINY)
        self.tokenizer = load_tokenizer(TINY)
        self.bodies = []
        Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, body):
        ids = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with self.lock:
            out = self.target.model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=1)
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.underway += 1
            server.most = max(server.most, server.underway)
            key = json.dumps(body["messages"])
            server.seen[key] += 1
            first = server.seen[key] == 1
            server.bodies.append((self.path, body, self.headers.get("Authorization")))
        try:
            time.sleep(0.05)
            if server.fails == "always" or (server.fails and first):
                if len(key) % 2:
                    return  # the connection ends without an answer
                return self.reply(503, {"error": "busy"})
            if "too long" in key:
                return self.reply(400, {"error": "maximum context length"})
            choice = {"message": {"role": "assistant", "content": server.answer(body)}, "finish_reason": "stop"}
            self.reply(200, {"choices": [choice]})
        finally:
            with server.lock:
                server.underway -= 1

    def reply(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


@pytest.fixture
def impatient(monkeypatch):
    """Retries wait up to half a minute; here they need not."""
    import tenacity

    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda **_: tenacity.wait_fixed(0.01))


def test_failed_requests_are_retried_with_limited_concurrency(tmp_path, impatient, monkeypatch, capsys):
    given = conversations(tmp_path / "in.jsonl", 12)
    given[3]["messages"][1]["content"] = "too long"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = Server()
    words = [f"regenerate.base_url=http://127.0.0.1:{server.server_port}/v1", "regenerate.concurrency=4", "regenerate.attempts=4"]
    recipe = recipe_of(tmp_path, *words, "regenerate.thinking=false", "regenerate.temperature=0.7", "regenerate.model=m")
    answered = run(recipe)
    assert_answers([g for g in given if g["id"] != "c3"], answered)
    assert 'left out: 1 x the server refuses it (400: {"error": "maximum context length"})' in capsys.readouterr().out
    assert 2 <= server.most <= 4 and min(server.seen.values()) >= 2
    path, body, key = server.bodies[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret") and "secret" not in (tmp_path / "out.jsonl").read_text()
    wanted = {"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 12, "seed": 0}
    assert body == wanted | {"chat_template_kwargs": {"enable_thinking": False}, "messages": body["messages"]}
    asked = len(server.bodies)
    run(recipe)
    assert len(server.bodies) == asked + 1  # the refused one is tried again, the others are not
    given = [{"id": "x", "messages": [{"role": "user", "content": "too long"}]}]
    (tmp_path / "in.jsonl").write_text(json.dumps(given[0]))
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(UserError, match="not one conversation could be answered: the server refuses it"):
        run(recipe)
    server.shutdown()


def test_an_unreachable_server_is_a_one_line_error_and_finished_answers_stay(tmp_path, impatient):
    conversations(tmp_path / "in.jsonl", 3)
    for url, message in (
        (f"http://127.0.0.1:{free_port()}/v1", "cannot be reached"),
        (f"http://127.0.0.1:{Server('always').server_port}/v1", "cannot be reached|answers 503"),
        ("nonsense", "cannot be reached"),
    ):
        with pytest.raises(UserError, match=message):
            run(recipe_of(tmp_path, f"regenerate.base_url={url}", "regenerate.attempts=2"))


@pytest.mark.slow
def test_processes_that_share_the_target_answer_as_one(tmp_path):
    """Two processes with half of each layer, in step; one of them writes."""
    conversations(tmp_path / "in.jsonl")
    words = ["mode=regenerate", "data=chat", "data.path=in.jsonl", "regenerate.max_tokens=12", "regenerate.batch=4"]
    found = {}
    for spread, ranks in (("none", 1), ("tp", 2)):
        more = [f"capture.spread={spread}", f"regenerate.out={spread}.jsonl"]
        done = command(ROOT / "data_prep/main.py", *words, *more, ranks=ranks, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        found[spread] = sorted((tmp_path / f"{spread}.jsonl").read_text().splitlines())
    assert len(found["none"]) == 6 and found["tp"] == found["none"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["regenerate.out=null"], "needs regenerate.out"),
        (["data.format=text"], "has none. Try data=chat"),
        (["data.path=absent"], "data.path=absent is not a file"),
        (["regenerate.out=/tmp"], "is a folder"),
        (["capture.spread=tp"], "needs a launcher with several processes"),
        (["capture.spread=device_map"], "which capture.spread=device_map does not"),
    ],
)
def test_settings_of_regeneration_that_cannot_work_are_refused(tmp_path, words, message):
    conversations(tmp_path / "in.jsonl")
    with pytest.raises(UserError, match=message):
        check_regeneration(recipe_of(tmp_path, *words))


@pytest.mark.slow
def test_the_command_regenerates_with_the_server_of_transformers(tmp_path):
    """`transformers serve`, as a user would start it, asked by the real command."""
    given = conversations(tmp_path / "in.jsonl", 3)
    port = free_port()
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", TINY, "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        words = ["mode=regenerate", "data=chat", "data.path=in.jsonl", "regenerate.out=out.jsonl", "regenerate.max_tokens=12"]
        words += [f"regenerate.base_url=http://127.0.0.1:{port}/v1", f"regenerate.model={TINY}"]
        done = command(ROOT / "data_prep/main.py", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + (tmp_path / "server.log").read_text()[-2000:]
        assert_answers(given, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()])
    finally:
        server.kill()
        server.wait()
