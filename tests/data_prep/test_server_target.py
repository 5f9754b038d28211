"""target.server: states that a vLLM on this machine's CPU writes are those of a capture in this process.

vLLM needs an environment of its own, `.venv-serving` (`make serving` makes it): it pins transformers below ours.
"""

import shutil
from pathlib import Path

import pytest
import torch

from common import cli
from common.errors import UserError
from common.ranks import free_port
from common.servers import started, vllm_command
from data_prep.cache.reader import CacheReader
from data_prep.capture import build
from data_prep.capture.plan import check_capture
from data_prep.recipe import DataPrepRecipe
from data_prep.target.extraction import flags, interpreter_of_vllm, layer_ids
from data_prep.target.parts import TargetParts
from data_prep.target.target import Target
from tests.support.commands import ROOT, SMALL, command, without_vllm
from tests.support.families import miniature

TINY = str(ROOT / "data_prep/targets/tiny")
MAIN = ROOT / "data_prep/main.py"
LAYERS = [0, 2, 5]
LENGTH = 96
WORDS = ["cache=fp32", "cache.kinds=[hidden]", f"data.max_length={LENGTH}", "data.max_tokens=3000", "capture.batch_tokens=500"]


def recipe_of(*words):
    return cli.compose("data_prep", DataPrepRecipe, [*WORDS, "capture.workers=1", *words])


def furthest(mine: CacheReader, theirs: CacheReader) -> float:
    """Largest relative distance of a token's state. The documents, their order, tokens and masks have to be equal."""
    assert mine.ids.equals(theirs.ids)
    distance = 0.0
    for index in range(len(mine)):
        a, b = (reader.read(index, ["input_ids", "loss_mask", *reader.manifest.states]) for reader in (mine, theirs))
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["loss_mask"], b["loss_mask"])
        for x, y in zip(list(a.values())[2:], list(b.values())[2:], strict=True):
            if len(x):
                distance = max(distance, float(((x - y).norm(dim=-1) / x.norm(dim=-1)).max()))
    return distance


# Without a server.


@pytest.mark.parametrize("name", ["tiny", "gpt2", "granite", "gemma3", "qwen3_5"])
@torch.no_grad()
def test_the_last_hidden_state_is_made_of_the_last_layers_output(name, tmp_path):
    path = TINY if name == "tiny" else str(miniature(name, tmp_path))
    target, parts = Target(path), TargetParts(path)
    target.capture([target.architecture.num_layers - 1], [])
    states = target.forward(torch.arange(3, 20)[None])
    (last,) = states.hidden.values()
    torch.testing.assert_close(parts.final_norm(last) * parts.logit_scale, states.last_hidden, rtol=1e-6, atol=1e-6)


def test_a_server_that_is_not_there_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="target.server: http://127.0.0.1:.* cannot be reached") as refused:
        check_capture(recipe_of(f"target.server=http://127.0.0.1:{free_port()}/v1", f"cache.dir={tmp_path / 'cache'}"))
    assert "\n" not in str(refused.value) and not (tmp_path / "cache").exists()


def test_a_server_has_to_be_vllm_or_an_address():
    with pytest.raises(UserError, match="target.server"):
        recipe_of("target.server=here")


# With a real one.


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> CacheReader:
    """A capture in this process."""
    folder = tmp_path_factory.mktemp("here") / "cache"
    build.build(recipe_of(f"cache.dir={folder}"), lambda: None)
    return CacheReader(folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """(address, storage folder) of a vLLM as a user starts one. Longer documents are read in two parts."""
    if why := without_vllm():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("vllm")
    words = vllm_command(interpreter_of_vllm(), TINY, "float32", cpu=True)
    words += ["--max-model-len", str(LENGTH + 1), "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
    words += flags(layer_ids(LAYERS, 6), str(folder / "states"), cpu=True)
    with started("this test", words, folder / "log", 300, environment={"PYTHONPATH": str(ROOT)}) as url:
        yield f"{url}/v1", folder / "states"


def told(running, out: Path, *words, ranks=1):
    """What a capture through the server said, at its end."""
    done = command(MAIN, *WORDS, f"target.server={running[0]}", f"cache.dir={out}", *words, ranks=ranks, cwd=out.parent)
    assert done.returncode in (0, 2), done.stderr
    return done.stderr if done.returncode else ""


@pytest.mark.slow
def test_states_of_a_server_are_those_of_this_process(running, here, tmp_path):
    assert told(running, tmp_path / "cache") == ""
    theirs = CacheReader(tmp_path / "cache")
    assert furthest(here, theirs) < 1e-4
    # One cache as well as the other: training and merging see no difference.
    assert theirs.manifest.hash() == here.manifest.hash()
    assert theirs.manifest.target["server"]["kind"] == "vLLM" and "server" not in here.manifest.target
    assert not list(running[1].iterdir())
    # The fault that nobody notices: each state of the layer before.
    build.build(recipe_of("cache.layers=[1,3,4]", f"cache.dir={tmp_path / 'shifted'}"), lambda: None)
    assert furthest(CacheReader(tmp_path / "shifted"), theirs) > 0.1

    words = ["experiment=dflash", "cache=fp32", f"cache.dir={tmp_path / 'cache'}", "cache.on_missing=fail", "tracking=none"]
    done = command(ROOT / "train/main.py", *words, *SMALL, "train.max_steps=3", f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_share_a_server(running, here, tmp_path):
    assert told(running, tmp_path / "cache", ranks=2) == ""
    assert furthest(here, CacheReader(tmp_path / "cache")) < 1e-4


@pytest.mark.slow
def test_a_server_of_other_states_is_refused(running, tmp_path):
    out = tmp_path / "cache"
    fewer = told(running, out, "cache.layers=[0,5]")
    assert "writes 3 states of each of 4 tokens, and 2 of 4 are wanted; start vLLM with" in fewer
    assert '"eagle_aux_hidden_state_layer_ids": [1, 6]' in fewer
    assert "sends layer 2's output in the place of layer 3's; start vLLM with" in told(running, out, "cache.layers=[0,3,5]")
    assert f"start vLLM with --max-model-len {2 * LENGTH + 1}" in told(running, out, f"data.max_length={2 * LENGTH}")
    # Another model, of the same shape and name.
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    assert "serves" in told(running, out, f"target.path={other}")
    assert not out.exists() and not list(running[1].iterdir())


@pytest.mark.slow
@pytest.mark.skipif(bool(without_vllm()), reason=str(without_vllm()))
def test_a_server_is_started_and_stopped(here, tmp_path):
    words = [*WORDS, "target.server=vllm", "target.server_args=[--max-num-seqs,8]", f"cache.dir={tmp_path / 'cache'}"]
    done = command(MAIN, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert furthest(here, CacheReader(tmp_path / "cache")) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # neither states nor a log
    # What vLLM says when it does not start is said, and the log stays.
    done = command(MAIN, *words, "target.server_args=[--no-such-flag]", f"cache.dir={tmp_path / 'second'}", cwd=tmp_path)
    assert done.returncode == 2 and "did not start" in done.stderr and "no-such-flag" in done.stderr, done.stderr
    assert (tmp_path / "second.vllm.log").exists() and not (tmp_path / "second").exists()
