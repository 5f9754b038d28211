"""`deepspeed train/main.py objective=blockwise reuse=hybrid` in a fresh clone: sizes that nobody named, a cache that is made or
used, and documents too few told of before anything is computed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from common import cli
from common.errors import UserError
from common.ranks import free_port
from data_prep.cache.reader import CacheReader
from data_prep.capture.live import manifest_of
from data_prep.recipe import DataPrepRecipe
from data_prep.sources.sides import one_side, validation_side
from eval.recipe import EvalRecipe
from tests.support.commands import ROOT, SMALL, command, deepspeed
from tests.support.conversations import write_lines
from train import sizes
from train.build import check_training
from train.recipe import TrainRecipe

TRAIN = ROOT / "train/main.py"
# A limit on tokens takes records in the order of their ids' hashes: `text` is the first.
LONG = [{"id": "text", "text": "def f(x):\n    return x + 1\n" * 400}, {"id": "other", "text": "import os\n" * 40}]


def compose(*words: str) -> TrainRecipe:
    return cli.compose("train", TrainRecipe, list(words))


def of(recipe: TrainRecipe, keys) -> dict:
    return {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in keys}


def test_default_sizes_depend_on_the_device(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe = compose()
    assert of(recipe, sizes.CPU) == sizes.CPU and set(recipe.chosen) == set(sizes.CPU) == set(sizes.GPU)
    line = sizes.spoken(recipe)
    assert "no GPU" in line and "train.batch=2" in line and "train.lr=0.002" in line and line.count("\n") == 0
    assert sizes.spoken(compose(*(f"{key}={value}" for key, value in sizes.CPU.items()))) == ""
    assert "chosen" not in recipe.model_dump() and "named" not in recipe.model_dump()
    json.dumps(recipe.model_dump(mode="json"))

    monkeypatch.setattr(sizes, "pick_device", lambda device: torch.device("cuda"))  # this machine may have none
    usual = {
        "data.max_tokens": 600_000,
        "train.max_steps": 2000,
        "train.batch": 8,
        "train.pack_tokens": 4096,
        "train.save_every": 200,
        "train.lr": 6e-4,
    }
    assert of(compose(), usual) == usual == sizes.GPU


def test_a_size_given_on_the_command_line_is_kept(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    named = {"train.batch": 8, "train.max_steps": 2000, "data.max_tokens": 600_000}
    recipe = compose(*(f"{key}={value}" for key, value in named.items()))
    assert of(recipe, named) == named and not set(named) & set(recipe.chosen) and recipe.train.pack_tokens == 1024
    assert compose("data.max_tokens=null").data.max_tokens is None
    assert compose("data=jsonl").data.max_tokens is None  # one's own texts are taken whole
    quick = compose("experiment=quickstart")  # it names all but the data
    assert quick.chosen == ("data.max_tokens",) and (quick.train.batch, quick.train.pack_tokens) == (2, 1024)
    assert compose("experiment=eagle3").train.lr == 4e-4


def test_data_prep_and_eval_have_one_default_size(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cli.compose("data_prep", DataPrepRecipe, []).data.max_tokens == 600_000
    assert cli.compose("eval", EvalRecipe, ["drafter=x"]).data.max_tokens == 600_000


@pytest.mark.parametrize("world,batch", [(1, 2), (2, 2), (3, 3), (4, 4), (6, 6)])
def test_the_default_batch_is_divisible_by_any_number_of_ranks(cache, monkeypatch, world, batch):
    """The launcher starts one rank a NUMA node where there is no GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    recipe = compose(f"cache.dir={cache}")
    assert recipe.train.batch == batch
    check_training(recipe)


def test_a_resumed_run_keeps_its_first_default_sizes(monkeypatch):
    """One of an earlier release, or of another machine; named keys are the line's."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    earlier = compose("train.batch=8", "train.max_steps=2000", "train.pack_tokens=4096", "train.lr=6e-4", "train.save_every=200")
    earlier = earlier.model_dump(mode="json")
    assert set(compose().resumable_differences(earlier)) >= {"train.batch", "train.max_steps"}
    assert compose().going_on(earlier).resumable_differences(earlier) == []
    assert compose("train.batch=4").going_on(earlier).resumable_differences(earlier) == ["train.batch"]
    # `fixed` was a word for what view.budget says alone.
    budget = compose("objective=budgetdraft", "view.budget=256")
    earlier = budget.model_dump(mode="json")
    earlier["objective"]["budgets"] = "fixed"
    assert budget.resumable_differences(earlier) == []
    assert "view.budget" in compose("objective=budgetdraft", "view.budget=128").resumable_differences(earlier)
    assert compose().going_on({}) == compose()


def test_an_existing_cache_is_used_unless_the_command_line_names_another(cache):
    """It is float32 and of 12,000 tokens in pieces of 128, which no default is."""
    used = manifest_of(compose(f"cache.dir={cache}"))
    assert used == CacheReader(cache).manifest == manifest_of(compose(f"cache.dir={cache}", "cache.on_missing=fail"))
    assert used == manifest_of(compose(f"cache.dir={cache}", "cache=fp32", "cache.on_missing=live", "train.batch=2"))
    assert used == manifest_of(compose(f"cache.dir={cache}", "data=stdlib", "data.max_length=128", "data.max_tokens=12000"))
    for words, field in (
        (["data=jsonl", "data.path=mine.jsonl"], "data"),
        (["cache=fp8"], "codec"),
        (["cache.kinds=[hidden]"], "kv_layers"),
        (["data.max_tokens=600000"], "data"),
    ):
        with pytest.raises(UserError, match=f"holds another cache .* differ: .*{field}"):
            manifest_of(compose(f"cache.dir={cache}", *words))
        assert used == manifest_of(compose(f"cache.dir={cache}", "cache.on_missing=fail", *words))


def told(tmp_path, *words):
    """What `data_prep/main.py` says of LONG."""
    path = write_lines(tmp_path / "texts.jsonl", LONG)
    words = ["data=jsonl", f"data.path={path}", "data.max_length=64", "capture.workers=1", "cache.dir=cache", *words]
    return command(ROOT / "data_prep/main.py", *words, cwd=tmp_path)


def test_capturing_a_single_text_warns_before_the_target_is_loaded(tmp_path):
    done = told(tmp_path, "data.max_tokens=500")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("WARNING: ")]
    warning = lines[at]
    assert "data=jsonl gives 1 source document(s); training needs one to train on and one to judge on" in warning
    assert "data.max_tokens=500 ends within the first; make it larger" in warning and "data.long=cut" in warning
    assert at < next(number for number, line in enumerate(lines) if "forwards will take about" in line)
    # Said in a later training too, before its first step and without a folder for it.
    refused = command(TRAIN, "cache.dir=cache", "run.dir=run", cwd=tmp_path)
    assert refused.returncode == 2 and not (tmp_path / "run").exists()
    assert "error: cache holds 1 source document(s)" in refused.stderr and refused.stderr.count("\n") == 1
    # What it advises is right.
    for words in (["data.max_tokens=null"], ["data.max_tokens=500", "data.long=cut"]):
        again = told(tmp_path, f"cache.dir=with_{len(words)}", *words)
        assert again.returncode == 0 and "WARNING" not in again.stdout, again.stdout


@pytest.mark.parametrize("on_missing", ["capture", "live"])
def test_training_refuses_one_text_before_the_first_forward(tmp_path, on_missing):
    path = write_lines(tmp_path / "texts.jsonl", LONG)
    words = ["data=jsonl", f"data.path={path}", "data.max_length=64", "data.max_tokens=500", "capture.workers=1"]
    done = command(TRAIN, *words, f"cache.on_missing={on_missing}", "cache.dir=cache", "run.dir=run", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert "gives 1 source document(s)" in line and "data.max_tokens=500 ends within the first" in line
    assert "capture:" not in done.stdout and not (tmp_path / "cache").exists()


def test_training_and_validation_need_a_source_document_each():
    import pyarrow as pa

    def said(*ids):
        array = pa.array(ids, pa.string())
        return one_side(array, validation_side(array))

    assert "1 source document(s); " in said("a#0", "a#1") and "1 source" in said("a#0", "a@64#0")
    assert "2 source document(s), all of them on one side" in said("validation/a#0", "validation/b#0")
    assert said("a#0", "b#0") is None and said("a#0", "validation/b@9#0") is None


def test_ranks_without_a_document_are_refused_before_anything_is_loaded(tmp_path):
    """By the capture, and by the training from its cache. With as many documents as ranks both go on."""
    path = write_lines(tmp_path / "texts.jsonl", LONG)
    capture = [ROOT / "data_prep/main.py", "data=jsonl", f"data.path={path}", "data.max_length=8192", "cache.dir=cache"]
    done = command(*capture, ranks=3, cwd=tmp_path)
    assert "error: data=jsonl gives 2 document(s) for 3 ranks; start 2 at most\n" in done.stderr and "forwards" not in done.stdout
    assert not (tmp_path / "cache").exists()

    done = command(*capture, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = int(CacheReader(tmp_path / "cache").lengths.sum())
    assert f"capture: {tokens:,} of {tokens:,} tokens" in done.stdout  # one rank has both documents, the other none

    for ranks, code in ((2, 2), (1, 0)):
        done = command(
            TRAIN, *SMALL, "train.max_steps=1", "train.batch=2", "cache.dir=cache", "run.dir=run", ranks=ranks, cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
        refused = "error: cache holds 1 training document(s) for 2 ranks; start 1 at most\n"
        assert done.stderr == (ranks == 2) * refused
        assert (tmp_path / "run").exists() == (ranks == 1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launcher would start a rank a GPU")
def test_a_first_training_needs_no_cache_no_gpu_and_no_number_of_ranks(tmp_path):
    """No cache, no GPU, no DS_ACCELERATOR, no number of ranks. Then the same line again, and by python."""
    small = [*SMALL, "train.max_steps=4", "train.pack_tokens=256", "data.max_tokens=12000", "data.max_length=128"]
    line = [TRAIN, "objective=blockwise", "reuse=hybrid", *small]
    env = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {"OMP_NUM_THREADS": "1"}
    port = deepspeed(1, free_port())[-2:]  # other tests run at the same time

    def say(*launcher):
        done = subprocess.run([*launcher, *map(str, line)], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = say(deepspeed(1, 0)[0], *port)
    order = ["no GPU here", "no finished cache at cache", "12,000 tokens, ", "forwards will take", "capture: 12,000 of 12,000"]
    places = [said.index(part) for part in [*order, "step 4/4", "held-out tau"]]
    assert places == sorted(places)
    (run,) = (tmp_path / "runs").iterdir()
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["train"]["batch"] == 2 and (run / "checkpoints/best/model.safetensors").exists()
    again = say(sys.executable)
    assert "is finished: 4 steps" in again and "capture" not in again.replace("captured", "")
