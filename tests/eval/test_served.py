"""mode=served: what servers tell of their drafts, whether it differs from ours beyond chance, bad servers, and a real vLLM."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
import torch

from common import cli
from common.errors import UserError
from common.ranks import free_port
from data_prep.decoding.sampling import Sampling
from data_prep.target.loading import load_tokenizer, tokenizer_hashes
from data_prep.target.target import Target
from eval.check import check_evaluation
from eval.judging.measure import sampling_p_value
from eval.oracle.decode import decode
from eval.oracle.drafting import Nobody, Trained
from eval.recipe import EvalRecipe, prompts_within
from eval.serving import side_by_side
from eval.serving.counters import sglang_counts, vllm_counts
from eval.serving.find import find_server
from eval.serving.served import _incomparable, ours
from eval.serving.servers import Answer, Asked, ServerRecipe, Sglang, Vllm
from eval.serving.started import interpreter, started, words
from tests.support.assistants import SERVED_SIZES, assistant_of, served_target, taught
from tests.support.commands import ROOT, SMALL, command, deepspeed, fetch_smollm2, without_vllm
from tests.support.served_drafters import drafter_for
from train.attention.choose import attention_backend
from train.drafter.build import load_drafter
from train.drafter.formats.export import save_export

TINY = str(ROOT / "data_prep/targets/tiny")
# /metrics of vLLM 0.32.0 with an EAGLE-3 drafter of four tokens, behind one request of twelve; other metrics are left out.
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="data_prep/targets/tiny"} 6.0
# HELP vllm:spec_decode_num_drafts_created Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="data_prep/targets/tiny"} 1.795667379521534e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="data_prep/targets/tiny"} 24.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="data_prep/targets/tiny"} 6.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="data_prep/targets/tiny",position="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="data_prep/targets/tiny",position="1"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="data_prep/targets/tiny",position="2"} 0.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="data_prep/targets/tiny",position="3"} 0.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_created gauge
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",model_name="data_prep/targets/tiny",position="0"} 1.79e+09
vllm:request_success_total{engine="0",finished_reason="stop",model_name="data_prep/targets/tiny"} 0.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="data_prep/targets/tiny"} 1.0
"""


# What servers tell.


def test_vllm_counts_rounds_and_what_they_accepted_by_position():
    assert vllm_counts(METRICS).tolist() == [6, 5, 1, 0, 0]


def test_vllm_counts_are_those_of_all_engines():
    assert vllm_counts(METRICS + METRICS.replace('engine="0"', 'engine="1"')).tolist() == [12, 10, 2, 0, 0]


def test_a_vllm_without_a_drafter_counts_nothing():
    without = "".join(line + "\n" for line in METRICS.splitlines() if "spec_decode" not in line)
    assert vllm_counts(without) is None


def test_sglang_tells_the_rounds_of_each_request():
    """5 verify steps of which two accepted nothing, one a token, two three tokens."""
    assert sglang_counts({"spec_verify_ct": 5, "spec_correct_drafts_histogram": [2, 1, 0, 2]}, 4).tolist() == [5, 3, 2, 2, 0]
    assert sglang_counts({"spec_verify_ct": 5, "spec_accept_histogram": [2, 1, 0, 2]}, 4).tolist() == [5, 3, 2, 2, 0]
    assert sglang_counts({"completion_tokens": 1}, 2).tolist() == [0, 0, 0]  # it ended before any draft
    with pytest.raises(UserError, match="spec_correct_drafts_histogram"):
        sglang_counts({"spec_verify_ct": 5}, 4)


@pytest.mark.parametrize("chunks", [[[7], [7, 8, 9], [7, 8, 9, 4]], [[7], [8, 9], [4]]], ids=["whole", "only what is new"])
def test_sglang_streams_whole_outputs_or_only_what_is_new(chunks):
    server = Sglang("http://here", "m", None, 2, "")
    answer = Answer([1, 2])
    for chunk, length in zip(chunks, (1, 3, 4)):
        meta = {"completion_tokens": length, "finish_reason": None}
        if length == 4:
            meta |= {"finish_reason": {"type": "length"}, "spec_verify_ct": 2, "spec_correct_drafts_histogram": [1, 1]}
        server._take(answer, {"output_ids": chunk, "meta_info": meta})
    assert answer.tokens == [7, 8, 9, 4] and answer.count_C.tolist() == [2, 1, 0]


# Beyond chance.


def rounds_of(rng, rates, prompts=20, rounds=30):
    """Counts [P, C] of prompts that differ widely: in some nearly every draft is accepted, in others hardly any."""
    ease = rng.beta(0.4, 0.6, prompts)
    return drawn(rng, ease, rates, rounds)


def drawn(rng, ease, rates, rounds=30):
    length = 1 + len(rates)
    found = np.zeros((len(ease), length), int)
    for p, one in enumerate(ease):
        accepted = (rng.random((rounds, len(rates))) < one * np.array(rates)).cumprod(1)
        found[p] = [rounds, *accepted.sum(0)]
    return found


def test_the_permutation_test_equals_enumerating_all_exchanges():
    """Of six prompts there are 64 exchanges: the share of them in which any position lies apart as far, in its own standard
    deviations."""
    rng = np.random.default_rng(3)
    a, b = rounds_of(rng, [0.9, 0.8], prompts=6), rounds_of(rng, [0.7, 0.3], prompts=6)

    def apart(swaps):
        first = sum(one if not swap else other for swap, one, other in zip(swaps, a, b))
        second = sum(other if not swap else one for swap, one, other in zip(swaps, a, b))
        return [abs(first[j] / first[0] - second[j] / second[0]) for j in (1, 2)]

    every = np.array([apart(swaps) for swaps in product([0, 1], repeat=6)])
    every /= np.sqrt((every**2).mean(0))
    expected = [(every.max(1) >= seen - 1e-9).mean() for seen in every[0]]
    found = side_by_side.exchanged(a, b, seed=0)
    assert 0.02 < min(expected) < 0.9  # something to tell apart
    assert np.abs(found - expected).max() < 0.02


def test_the_permutation_test_seldom_reports_a_difference_of_equal_drafters():
    """Both sides decode each prompt anew, as at temperature 1. A test of two binomials over all rounds knows no prompts. Here
    every prompt has an ease of its own on each side: what differs is the text, not the drafter."""
    rng = np.random.default_rng(0)
    ours, binomial, cases = 0, 0, 200
    for seed in range(cases):
        a, b = rounds_of(rng, [0.9]), rounds_of(rng, [0.9])
        ours += side_by_side.exchanged(a, b, seed)[0] < 0.05
        n, x = a.sum(0)
        m, y = b.sum(0)
        pooled = (x + y) / (n + m)
        z = (x / n - y / m) / math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        binomial += math.erfc(abs(z) / math.sqrt(2)) < 0.05
    assert ours / cases < 0.09
    assert binomial / cases > 0.3  # the negative control


def test_another_drafter_is_reported_at_the_position_where_it_differs():
    """Position 1 is as good as ever; position 2 is not."""
    rng = np.random.default_rng(1)
    ease = rng.beta(2, 2, 20)
    p_J = side_by_side.exchanged(drawn(rng, ease, [0.8, 0.9]), drawn(rng, ease, [0.8, 0.1]), seed=0)
    assert p_J[0] > 0.01 and p_J[1] < 0.001


def test_equal_counts_are_no_difference():
    a = rounds_of(np.random.default_rng(2), [0.8, 0.5, 0.0])
    assert side_by_side.exchanged(a, a, seed=0).tolist() == [1, 1, 1]


def figures_of(joint, **more):
    return {"joint": joint, "requests": 20, "per_prompt_count": {}, **more}


def said_of(server, temperature="0", positions=1000, p=0.5, sampling_p=None):
    sampled = {} if sampling_p is None else {"sampling_p": sampling_p}
    result = {
        "temperatures": {temperature: {"ours": figures_of([0.4, 0.2]), "1": figures_of(server, **sampled)}},
        "tested": {temperature: [{"position": 2, "ours": 0.2, "server": server[1], "p": p}]},
        "server": {"kind": "vLLM", "positions": positions, "slots": len(server)},
        "prompts": {"positions": 300},
    }
    return side_by_side.conclusions(result, temperature, prompts=20)


def test_the_verdict_names_the_position_and_the_likely_cause():
    blame, none = "the server does not run this drafter as it was trained", "no position differs beyond chance"
    assert [one for one in said_of([0.4, 0.2]) if none in one] and blame not in said_of([0.4, 0.2])
    found = said_of([0.4, 0.02], p=0.0005)
    assert found == ["position 2: server 0.02, ours 0.20 (p < 0.001)", blame]
    wrong = said_of([0.1, 0.0], "1", p=0.0005, sampling_p=1e-9)  # the fault is not the drafter's
    assert "no samples of the target" in wrong[0] and blame not in wrong
    assert "cuts drafts short" in said_of([0.4, 0.2], positions=310)[0]
    assert "compare positions, not tau" in said_of([0.4, 0.2, 0.1])[0]


def test_our_side_decodes_plainly_and_counts_as_the_oracle_does():
    """Greedy: outputs and counts of the oracle (decode.py). At temperature 1 drafts are the likeliest tokens, outputs samples."""
    target = Target(TINY)
    drafter = drafter_for(target, "ttt").start(target, target.frozen_head).eval()
    target.capture(drafter.config.hidden_layers, drafter.config.kv_layers)
    words = ["suite.count=6", "suite.prompt_tokens=40", "suite.new_tokens=24", "temperatures=[0,1]", "compile=false"]
    recipe = cli.compose("eval", EvalRecipe, ["mode=served", "server.url=http://here", f"target.path={TINY}", *words])
    prompts, said = prompts_within(recipe, 400, load_tokenizer(TINY))
    runs = ours(recipe, target, drafter, prompts, said, slots=3)
    total_C = np.zeros(4, int)
    attend = attention_backend("reference", target.device, training=False)
    for prompt in prompts:
        one = decode(target, Trained(drafter, target.frozen_head, attend), prompt.tokens, 24, 0.0, 0, target.end_tokens)
        assert runs[0].answers[prompt.id, 0].tokens == one.tokens
        counts = [len(one.rounds), *(sum(r.kept >= j for r in one.rounds) for j in (1, 2, 3))]
        assert runs[0].by_prompt()[prompt.id].tolist() == counts
        total_C += counts
    assert runs[0].count_C.tolist() == total_C.tolist() and total_C[1] > 0
    answers = list(runs[1].answers.values())
    texts = [answer.prompt for answer in answers]
    assert sampling_p_value(target, texts, answers, Sampling(1.0)) > 1e-3
    assert sampling_p_value(target, texts, list(runs[0].answers.values()), Sampling(1.0)) < 1e-3  # the negative control


# Bad servers, played by one of the standard library's.


class Played(BaseHTTPRequestHandler):
    pages: dict[str, tuple[int, str]] = {}
    broken = ""  # what a stream begins with before it breaks off

    def do_GET(self):
        status, text = self.pages.get(self.path, (404, "no such page"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")  # which never come
        self.end_headers()
        self.wfile.write(self.broken.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def play():
    """Starts a server of these pages; its URL."""
    running = []

    def start(pages, broken=""):
        handler = type("Handler", (Played,), {"pages": pages, "broken": broken})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def models(name=TINY, **more):
    return {"/v1/models": (200, json.dumps({"data": [{"id": name, **more}]}))}


def refusal(url, *words):
    recipe = cli.compose("eval", EvalRecipe, ["mode=served", f"server.url={url}", f"target.path={TINY}", *words])
    with pytest.raises(UserError) as refused:
        check_evaluation(recipe)
    return str(refused.value)


def test_an_unreachable_server_is_refused():
    assert "no server answers there" in refusal(f"http://127.0.0.1:{free_port()}")


def test_an_address_without_a_scheme_is_refused():
    assert "no server answers there" in refusal("localhost:8000")


def test_a_server_that_is_neither_vllm_nor_sglang_is_refused(play):
    assert "/v1/models answers 404" in refusal(play({}))
    assert "does not answer as vLLM or SGLang would" in refusal(play({"/v1/models": (200, "<html>")}))
    assert "no server answers there" in refusal("'http://[::1'")


@pytest.mark.parametrize(
    "pages",
    [
        {"/v1/models": (200, json.dumps({"data": [{"root": "x"}]}))},
        models() | {"/metrics": (200, METRICS), "/version": (200, "0.32")},
        models() | {"/metrics": (200, METRICS.replace("position", "place"))},
        models() | {"/metrics": (200, "vllm:spec_decode_num_drafts_total NaN")},
        models() | {"/server_info": (200, "speculative_algorithm")},
        models() | {"/server_info": (200, json.dumps({"speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": None}))},
    ],
    ids=["a model without a name", "no version", "no positions", "no numbers", "no JSON", "no length of a draft"],
)
def test_malformed_answers_of_a_server_are_refused_in_one_line(play, pages):
    said = refusal(play(pages))
    assert "does not answer as vLLM or SGLang would" in said and "\n" not in said


def test_blocks_of_another_length_are_not_compared():
    """Slots of a bidirectional block see each other: at another length they are another function, and no fault of the server."""
    block = drafter_for(Target(TINY), "blockwise").config
    server = Vllm("x", TINY, None, block.draft_length, "")
    assert _incomparable(server, block, 0) is None
    server.slots += 1
    assert "another function" in _incomparable(server, block, 0)
    assert _incomparable(server, replace(block, causal=True), 0) is None
    assert _incomparable(server, replace(block, objective="ttt"), 0) is None
    sglang = Sglang("x", TINY, None, block.draft_length, "")
    sglang.samples_drafts = True
    assert _incomparable(sglang, block, 0) is None and "samples its drafts" in _incomparable(sglang, block, 1)


def test_a_server_of_another_model_is_refused(play):
    said = refusal(play(models("somebody/else")))
    assert "serves somebody/else, and the target is" in said and "server.model=" in said


def test_a_vllm_server_without_a_drafter_is_refused(play):
    pages = models() | {"/metrics": (200, 'vllm:request_success_total{engine="0"} 3.0\n')}
    assert "does not draft" in refusal(play(pages))


def test_a_server_without_metrics_is_refused_with_the_flag_to_drop(play):
    said = refusal(play(models()))
    assert "tells nothing of its drafts" in said and "--disable-log-stats" in said


def test_an_sglang_server_without_a_drafter_is_refused_with_the_flag_to_add(play):
    pages = models() | {"/server_info": (200, json.dumps({"speculative_algorithm": None}))}
    assert "--speculative-algorithm" in refusal(play(pages))


def test_an_sglang_that_drafts_is_known_by_what_it_was_started_with(play):
    info = {"speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": 5, "speculative_eagle_topk": 1}
    info["version"] = "0.5.23"
    url = play(models() | {"/server_info": (200, json.dumps(info))})
    found = find_server(url + "/v1", [TINY])
    assert (found.kind, found.slots, found.version, found.url) == ("SGLang", 4, "0.5.23", url)
    tree = info | {"speculative_eagle_topk": 8, "speculative_num_steps": 3, "speculative_num_draft_tokens": 16}
    assert find_server(play(models() | {"/server_info": (200, json.dumps(tree))}), [TINY]).slots == 3


def test_prompts_longer_than_the_servers_positions_are_refused(play):
    url = play(models(max_model_len=100) | {"/metrics": (200, METRICS), "/version": (200, '{"version": "0.32.0"}')})
    said = refusal(url, "suite.prompt_tokens=80", "suite.new_tokens=32", "suite.count=2")
    assert "has 100 positions" in said and "take up to 112" in said


def test_a_server_that_stops_in_the_middle_of_an_answer_is_reported(play):
    url = play({}, broken='data: {"choices": [{"token_ids": [5]}]}\n\n')
    server = Vllm(url, TINY, None, 4, "")

    async def ask():
        async with server.client() as client:
            await server.ask(client, [1, 2, 3], Asked(8, 0), seed=0)

    with pytest.raises(UserError, match="stopped answering in the middle"):
        asyncio.run(ask())


def test_settings_of_mode_served_that_cannot_work_are_refused():
    def said(*words):
        with pytest.raises(UserError) as refused:
            check_evaluation(cli.compose("eval", EvalRecipe, ["mode=served", f"target.path={TINY}", *words]))
        return str(refused.value)

    assert "server.url=http://HOST:PORT" in said()
    assert "server.url=http://HOST:PORT" in said("server.url=http://here", "server.start=vllm")
    assert "serves a drafter" in said("server.start=vllm")
    with pytest.raises(UserError, match="concurrency"):
        cli.compose("eval", EvalRecipe, ["mode=served", "server.concurrency=[0]"])


def test_a_refusal_of_mode_served_is_one_line_and_leaves_no_files(tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    done = command(ROOT / "eval/main.py", "mode=served", f"server.url={address}", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


# Starting one.


def recipe_of_server(**changes):
    return ServerRecipe(**{"concurrency": [1], "wait_s": 60, "start": "vllm"} | changes)


def test_an_interpreter_without_vllm_is_refused():
    with pytest.raises(UserError, match="has no vllm"):
        interpreter(recipe_of_server(python=sys.executable))
    with pytest.raises(UserError, match="is no program"):
        interpreter(recipe_of_server(python="/nowhere/python"))


def test_a_server_that_does_not_start_says_why(tmp_path):
    dies = [sys.executable, "-c", "print('ValueError: there is no such weight\\nand more'); raise SystemExit(3)"]
    with pytest.raises(UserError, match="did not start; vLLM ended with code 3: ValueError: there is no such weight"):
        with started(recipe_of_server(), dies, tmp_path / "log"):
            pass


# A server and a child of it that does not listen to a polite end. "sharing": with shared memory, as an engine of vLLM has it.
STUBBORN = """
import os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
share = '''
import mmap, os
file = open(f"/dev/shm/psm_{os.getpid()}", "w+b")
file.truncate(4096)
memory = mmap.mmap(file.fileno(), 4096)
'''
if sys.argv[1] != "never":
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    words = (share if sys.argv[1] == "sharing" else "") + deaf
    child = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(f"/dev/shm/psm_{child.pid}", flush=True)
    HTTPServer(("127.0.0.1", int(sys.argv[3])), Healthy).serve_forever()
import time
time.sleep(600)
"""


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited `mark`, other than this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and mark in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def left_of(mark: str, seconds: float = 10) -> list[psutil.Process]:
    until = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.1)
    return marked(mark)


def test_a_started_server_leaves_no_process_and_no_shared_memory(tmp_path, monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MARK", mark)
    with pytest.raises(RuntimeError, match="in the middle"):
        with started(recipe_of_server(), [sys.executable, "-c", STUBBORN, "sharing"], tmp_path / "log") as url:
            assert url.startswith("http://127.0.0.1:") and len(marked(mark)) == 2
            shared = Path((tmp_path / "log").read_text().split()[0])
            assert shared.exists()
            raise RuntimeError("in the middle")
    assert not left_of(mark) and not shared.exists()
    with pytest.raises(UserError, match="not healthy within server.wait_s=1"):
        with started(recipe_of_server(wait_s=1), [sys.executable, "-c", STUBBORN, "never"], tmp_path / "log"):
            pass
    assert not left_of(mark)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was


def test_killing_the_command_ends_its_server(tmp_path):
    mark = uuid.uuid4().hex
    ready = tmp_path / "ready"
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    script = f"""
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {str(ROOT)!r})
from eval.serving.servers import ServerRecipe
from eval.serving.started import started
command = [sys.executable, {str(tmp_path / "stubborn.py")!r}, "healthy"]
with started(ServerRecipe(concurrency=[1], wait_s=60), command, Path({str(tmp_path / "log")!r})):
    Path({str(ready)!r}).touch()
    time.sleep(600)
"""
    for ends_by, left in ((signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1)):  # 1: the deaf child, no vLLM's
        ready.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"MARK": mark}, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert len(marked(mark)) == 3
        process.send_signal(ends_by)
        process.wait(60)
        until = time.monotonic() + 10
        while len(marked(mark)) > left and time.monotonic() < until:
            time.sleep(0.1)
        remaining = marked(mark)
        assert len(remaining) == left, (ends_by, remaining)
        for one in remaining:
            one.kill()


# A real one.


needs_vllm = pytest.mark.skipif(bool(without_vllm()), reason=str(without_vllm()))
PROMPTS = ["suite.count=12", "suite.prompt_tokens=96", "suite.new_tokens=32", "temperatures=[0]"]


@pytest.fixture(scope="module")
def drafter(cache, tmp_path_factory) -> Path:
    """An EAGLE-3 drafter that has learned a little, with a vocabulary of its own."""
    run = tmp_path_factory.mktemp("served") / "run"
    done = command(
        ROOT / "train/main.py",
        *("experiment=eagle3", "drafter.start=target", "drafter.vocabulary=500", "drafter.own_head=true", f"cache.dir={cache}"),
        *(*SMALL, "objective.anchors=32", "train.lr=2e-3", "train.max_steps=150", "tracking=none", f"run.dir={run}"),
        launcher=deepspeed(1, free_port()),
        cwd=run.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return run / "checkpoints/last"


@pytest.mark.slow
@needs_vllm
def test_vllm_accepts_what_our_engine_accepts(drafter, tmp_path):
    mark = uuid.uuid4().hex
    out = tmp_path / "out"
    done = command(
        *(ROOT / "eval/main.py", "mode=served", f"drafter={drafter}", "server.start=vllm", "server.concurrency=[1,4]"),
        *(*PROMPTS, f"out={out}"),
        env={"MARK": mark},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not left_of(mark)
    report = json.loads((out / "served.json").read_text())
    rows = report["temperatures"]["0"]
    assert rows["ours"]["tau_micro"] > 1.1  # something is accepted
    for concurrency in ("1", "4"):
        assert rows[concurrency]["equal"] == rows[concurrency]["requests"] == 12
        assert np.allclose(rows[concurrency]["joint"], rows["ours"]["joint"], atol=0.02)
        assert rows[concurrency]["tokens_per_s"] > 0 and rows[concurrency]["ttft_ms"]["median"] > 0
    for concurrency in ("1", "4"):  # the same server without the drafter
        plain = rows[f"plain, {concurrency}"]
        assert plain["equal"] == 12 and plain["tau_micro"] == 1 and plain["rounds"] == 0
    assert all(one["p"] >= 0.01 for one in report["tested"]["0"])
    assert "no position differs beyond chance" in done.stdout
    about, *answers = (json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines())
    assert about["drafter"]["path"] == str(drafter) and len(answers) == 12 * len(rows)
    for who, row in rows.items():
        counts = {one["id"]: one["count"] for one in answers if one["run"] == who and one["count"]}
        assert counts == row["per_prompt_count"]
    page = (out / "served.html").read_text()
    assert "vLLM, 4 at a time" in page and "<svg" in page and "<script" not in page


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("form", ["ours", "exported"])
def test_vllm_accepts_of_an_assistant_what_our_engine_accepts(tmp_path, form):
    """A drafter of ours, and one that is read from its export, by the commands."""
    target = served_target(tmp_path / "target")
    assistant = assistant_of(target, random=False, sizes=SERVED_SIZES)
    target.capture(assistant.config.hidden_layers, assistant.config.kv_layers)
    said = decode(target, Nobody(), [5, 9, 14], 60, 0, 0).tokens
    taught(assistant, target, [5, 9, 14, *said])
    tokenizer = tokenizer_hashes(load_tokenizer(target.folder))[0]
    identity = {"id": target.folder, "weights_hash": target.weights_hash(), "tokenizer_hash": tokenizer}
    assistant.config = replace(assistant.config, target=identity)
    assistant.save_pretrained(tmp_path / "ours")
    words = [f"target.path={target.folder}", "target.mask_token_id=null"]
    done = command(
        *(ROOT / "eval/main.py", *words, "drafter=ours", "mode=export", "format=gemma4_assistant", "out=exported"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    asked = [{"prompt": " ".join(f"w{token}" for token in tokens)} for tokens in ([5, 9, 14], said[:20], said[7:11])]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    words += [f"drafter={form}", "mode=served", "server.start=vllm", "server.concurrency=[1]", "out=out"]
    words += ["suite=jsonl", "suite.path=asked.jsonl", "suite.new_tokens=40", "temperatures=[0]"]
    done = command(ROOT / "eval/main.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out/served.json").read_text())["temperatures"]["0"]
    assert rows["1"]["equal"] == rows["plain, 1"]["equal"] == rows["1"]["requests"] == 3
    assert rows["1"]["per_prompt_count"] == rows["ours"]["per_prompt_count"] and rows["ours"]["tau_micro"] > 1.2


@pytest.mark.slow
@needs_vllm
def test_a_server_with_another_drafter_is_reported_as_different(drafter, tmp_path):
    """The negative control: what fc makes of the target's states is shifted in what the server gets. Outputs are the target's all
    the same, and only the counts tell. (Exchanging the columns of two layers costs this drafter too little to be told from chance
    by twelve prompts.)"""
    target = Target(TINY)
    damaged = load_drafter(drafter)
    with torch.no_grad():
        damaged.fc.weight.copy_(damaged.fc.weight.roll(damaged.fc.weight.shape[0] // 2, 0))
    save_export(damaged, target, tmp_path / "damaged", "eagle3")
    server = recipe_of_server(concurrency=[4], wait_s=300)
    speculative = {"method": "eagle3", "model": str(tmp_path / "damaged"), "num_speculative_tokens": 4}
    start = words(server, interpreter(server), TINY, speculative, 256, "float32", cpu=True)
    ask = [ROOT / "eval/main.py", "mode=served", f"target.path={TINY}", "server.concurrency=[1]", *PROMPTS]
    with started(server, start, tmp_path / "server.log") as url:
        done = command(*ask, f"drafter={drafter}", f"server.url={url}", f"out={tmp_path / 'out'}", cwd=tmp_path)
        alone = command(*ask, f"server.url={url}", f"out={tmp_path / 'alone'}", cwd=tmp_path)
        other = command(*ask, f"server.url={url}", "server.model=somebody/else", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 of 12 as ours" in done.stdout and "does not run this drafter as it was trained" in done.stdout
    assert any(one["p"] < 0.01 for one in json.loads((tmp_path / "out/served.json").read_text())["tested"]["0"])
    assert alone.returncode == 0 and "the server's figures stand alone" in alone.stdout, alone.stderr[-2000:]
    assert other.returncode == 2 and "serves" in other.stderr


@pytest.mark.slow
@needs_vllm
def test_a_real_model_is_served_with_the_acceptance_that_we_measure(tmp_path):
    """SmolLM2 and its released EAGLE-3 drafter: every prompt's counts in vLLM are those of our engine, token for token."""
    fetch_smollm2()
    asked = [{"prompt": "Name three rivers of Europe and say where each of them ends."}]
    asked += [{"prompt": "What is 17 times 23? Explain."}]
    asked += [{"prompt": "Write a short letter to a neighbour who plays music at night."}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    words = ["mode=served", "target=smollm2", "drafter=smollm2-eagle3", "server.start=vllm", "server.concurrency=[1]", "out=out"]
    words += ["suite=jsonl", "suite.path=asked.jsonl", "suite.new_tokens=48", "temperatures=[0]"]
    done = command(ROOT / "eval/main.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out/served.json").read_text())["temperatures"]["0"]
    assert rows["1"]["equal"] == rows["plain, 1"]["equal"] == rows["1"]["requests"] == 3
    assert rows["1"]["per_prompt_count"] == rows["ours"]["per_prompt_count"]
    assert rows["ours"]["tau_micro"] > 1.4
    assert "the counts of every prompt are exactly ours" in done.stdout
