"""estimate, verify, inspect and merge; training from a cache, from one captured on first use, and from the live target."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import cli
from common.errors import UserError
from common.recipe import ROOT
from data_prep.cache.manifest import FILES, MANIFEST
from data_prep.cache.reader import CacheReader
from data_prep.cache.tools import check_picture, inspect, merge, verify
from data_prep.capture import build
from data_prep.capture.estimate import estimate
from data_prep.capture.live import LiveReader, manifest_of, open_cache
from data_prep.capture.plan import check_capture
from data_prep.recipe import DataPrepRecipe
from data_prep.target.loading import load_target, load_tokenizer
from tests.support.caches import rewrite
from tests.support.commands import SMALL, command
from tests.support.conversations import conversation, write_lines
from train.data.stream import PackStream, StreamSettings
from train.recipe import TrainRecipe

TEXTS = [{"id": f"t{i}", "text": f"def f{i}(x):\n    return x + {i}\n" * (2 + i % 3)} for i in range(12)]


def recipe_of(*words):
    return cli.compose("data_prep", DataPrepRecipe, ["data.max_length=64", "capture.workers=1", "cache.layers=[0,5]", *words])


def captured(tmp_path, name, rows, *words):
    path = write_lines(tmp_path / f"{name}.jsonl", rows)
    recipe = recipe_of("data=jsonl", f"data.path={path}", f"cache.dir={tmp_path / name}", *words)
    build.build(recipe, lambda: None)
    return recipe


def test_verify_holds_the_manifest_against_the_target(tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(ROOT / "data_prep/targets/tiny", target)
    recipe = captured(tmp_path, "cache", TEXTS, f"target.path={target}")
    verify(recipe)
    assert "every byte as written, captured from" in capsys.readouterr().out
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    (target / "chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match="2 problem.*the weights of .* the chat template of"):
        verify(recipe)
    shutil.rmtree(target)
    verify(recipe)
    assert "NOT compared with its target" in capsys.readouterr().out


def test_verify_knows_the_documents_of_its_source(tmp_path):
    recipe = captured(tmp_path, "cache", TEXTS)
    folder = tmp_path / "cache"
    manifest = json.loads((folder / MANIFEST).read_text())
    rewrite(folder, manifest | {"source": manifest["source"] | {"hash": "0" * 32}})
    with pytest.raises(UserError, match="1 problem.*a gap or a change"):
        verify(recipe)


def test_inspect_shows_what_is_supervised(tmp_path, capsys):
    rows = [{"id": f"c{i}", "messages": conversation(["question", "an answer", "again", "so be it"])} for i in range(3)]
    rows.append({"id": "bad", "messages": []})
    rows[0]["id"] = "markup[/bold]"
    path = write_lines(tmp_path / "chat.jsonl", rows)
    words = [
        "data=chat",
        f"data.path={path}",
        f"cache.dir={tmp_path / 'cache'}",
        f"inspect.out={tmp_path / 'p/i'}",
        "cache=fp8",
        "cache.kinds=[hidden,kv,query]",
    ]
    recipe = recipe_of(*words, "inspect.examples=1")
    build.build(recipe, lambda: None)
    capsys.readouterr()
    inspect(recipe)
    shown = capsys.readouterr().out
    reader = CacheReader(tmp_path / "cache")
    assert re.search(rf"tokens.*{reader.lengths.sum()}, of which {reader.supervised.sum()} supervised", shown)
    assert "left out: it has no" in shown and "norm of key.5" in shown and "norm of query.5" in shown and "fp8" in shown
    assert re.findall("»(.*?)«", shown.split("and «)")[1]) == ["an answer<|im_end|>", "so be it<|im_end|>"]
    assert (tmp_path / "p/i.png").stat().st_size > 10_000 and f"picture: {tmp_path / 'p/i.png'}" in shown
    check_picture(recipe.inspect.out)
    with pytest.raises(UserError, match="inspect.out=i.foo: 'foo' is no format of pictures; these are: .*eps, .*png"):
        check_picture("i.foo")
    assert not list(reader.problems())  # nothing was added to the cache
    assert "records read" in shown and "records captured" in shown
    # As caches were before a manifest counted records.
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    older = {key: value for key, value in manifest["source"].items() if key not in ("records", "kept")}
    rewrite(tmp_path / "cache", manifest | {"source": older})
    old = CacheReader(tmp_path / "cache")
    assert old.manifest.hash() == reader.manifest.hash() and not list(old.problems())
    inspect(recipe)
    assert "records read" not in capsys.readouterr().out


@pytest.mark.parametrize("kinds", ["hidden,kv", "query", "hidden,kv,query"])
def test_estimate_announces_what_the_capture_takes(tmp_path, capsys, kinds):
    path = write_lines(tmp_path / "texts.jsonl", TEXTS)
    recipe = recipe_of(
        "data=jsonl", f"data.path={path}", f"cache.dir={tmp_path / 'cache'}", "cache=fp8", "capture.batch_tokens=64",
        f"cache.kinds=[{kinds}]",
    )  # fmt: skip
    estimate(recipe)
    said = capsys.readouterr().out
    assert f"layers [0, 5], {kinds.replace(',', '+')}, fp8" in said
    assert re.search(r"[\d,]+ tokens/s on cpu .*hours on one process", said) and "are free" in said
    assert not (tmp_path / "cache").exists()
    build.build(recipe, lambda: None)
    reader = CacheReader(tmp_path / "cache")
    per_token = int(re.search(r"([\d,]+) bytes a token", said)[1].replace(",", ""))
    stored = sum(t.nbytes for path in reader.folder.glob("*.safetensors") for t in load_file(path).values())
    assert per_token == round(stored / reader.lengths.sum())


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(UserError, match="the cache takes .* are free; make room, or store less: cache=fp8"):
        captured(tmp_path, "cache", TEXTS)
    assert not (tmp_path / "cache").exists()


def test_another_capture_into_a_finished_cache_is_refused_and_leaves_it_alone(tmp_path):
    recipe = captured(tmp_path, "cache", TEXTS)
    changes = {"codec": "fp8"}, {"layers": [0, 2]}, {"last_hidden": "all"}, {"kinds": ["hidden", "kv", "query"]}
    for change in changes:  # known before a document is read
        with pytest.raises(UserError, match=f"these differ: .*{next(iter(change)).replace('kinds', 'query_layers')}"):
            check_capture(recipe.model_copy(update={"cache": recipe.cache.model_copy(update=change)}))
    other = write_lines(tmp_path / "other.jsonl", TEXTS[:3])
    with pytest.raises(UserError, match="these differ: source.documents, source.hash"):  # known after
        build.build(recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": other})}), lambda: None)
    verify(recipe)
    moved = write_lines(tmp_path / "moved.jsonl", TEXTS)  # the same data by another name is the same data
    build.build(recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": moved})}), lambda: None)
    verify(recipe)


def test_merged_caches_are_the_capture_of_both_sources(tmp_path, capsys):
    parts = (("a", TEXTS[:5]), ("b", TEXTS[5:]), ("both", TEXTS))
    first, second, both = (captured(tmp_path, name, rows, "cache.kinds=[hidden,query]") for name, rows in parts)
    recipe = recipe_of(f"cache.dir={tmp_path / 'm'}", f"merge.sources=[{first.cache.dir},{second.cache.dir}]")
    merge(recipe)
    with pytest.raises(UserError, match="is not empty"):
        merge(recipe)
    (tmp_path / "k.merging").mkdir()
    (tmp_path / "k.merging/shard-00000.safetensors").write_bytes(b"of a merge that was killed")
    merge(recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"dir": str(tmp_path / "k")})}))
    assert not list(CacheReader(tmp_path / "k").problems()) and not (tmp_path / "k.merging").exists()
    merged, direct = CacheReader(tmp_path / "m"), CacheReader(both.cache.dir)
    assert not list(merged.problems())
    assert merged.ids == direct.ids and merged.manifest.hash() == direct.manifest.hash()
    for index in range(len(direct)):
        one, other = (r.read(index, ["input_ids", "loss_mask", "hidden.5", "query.5"]) for r in (merged, direct))
        assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["loss_mask"], other["loss_mask"])
        for name in ("hidden.5", "query.5"):
            torch.testing.assert_close(one[name].float(), other[name].float(), rtol=0.02, atol=0.5)  # bf16, other batches
    shutil.rmtree(first.cache.dir)  # links, or copies: they stand alone
    assert not list(CacheReader(tmp_path / "m").problems())

    again = recipe_of(f"cache.dir={tmp_path / 'n'}", f"merge.sources=[{both.cache.dir},{second.cache.dir}]")
    with pytest.raises(UserError, match="document 't.*#0' stands in another"):
        merge(again)
    captured(tmp_path, "fp8", TEXTS[:5], "cache=fp8", "cache.kinds=[hidden,query]")
    other = recipe_of(f"cache.dir={tmp_path / 'n'}", f"merge.sources=[{second.cache.dir},{tmp_path / 'fp8'}]")
    with pytest.raises(UserError, match="cannot be joined .*these differ: codec"):
        merge(other)
    assert not (tmp_path / "n").exists()


def test_on_missing_decides_once_and_refuses_another_cache(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "texts.jsonl", TEXTS)
    words = [f"cache.dir={tmp_path / 'cache'}", "data=jsonl", f"data.path={path}", "data.max_length=64", "capture.workers=1"]
    recipe = lambda *more: cli.compose("train", TrainRecipe, [*words, *more])
    with pytest.raises(UserError, match="is not a cache"):
        manifest_of(recipe("cache.on_missing=fail"))
    assert manifest_of(recipe("cache.on_missing=live")).kv_layers == [0, 2, 5] and not (tmp_path / "cache").exists()
    first = open_cache(recipe("cache.on_missing=capture"), lambda: None)
    assert (tmp_path / "cache" / FILES).exists()
    for how in ("capture", "live", "fail"):  # there is one now: all read it
        assert isinstance(again := open_cache(recipe(f"cache.on_missing={how}"), lambda: None), CacheReader)
        assert again.manifest == first.manifest == manifest_of(recipe(f"cache.on_missing={how}"))
    with pytest.raises(UserError, match="holds another cache .*these differ: codec, kv_layers"):
        manifest_of(recipe("cache.on_missing=live", "cache=fp8", "cache.kinds=[hidden]"))
    with pytest.raises(UserError, match="holds another cache .*these differ: data"):
        manifest_of(recipe("cache.on_missing=capture", "data.max_tokens=50"))
    with pytest.raises(UserError, match="holds another cache .*these differ: target.revision"):
        manifest_of(recipe("cache.on_missing=capture", "target.revision=main"))
    with pytest.raises(UserError, match="capture first"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        manifest_of(recipe("cache.on_missing=live", f"cache.dir={tmp_path / 'x'}", "capture.spread=tp"))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="there is no layer 17"):
        manifest_of(recipe("cache.on_missing=capture", f"cache.dir={tmp_path / 'x'}", "cache.layers=[17]"))


def test_the_live_target_may_be_spread_over_devices(tmp_path):
    """All of it on the only one, here: transformers' placement, and what is read is what the cache holds."""
    pytest.importorskip("accelerate")
    recipe = captured(tmp_path, "cache", TEXTS, "cache=fp32", "capture.spread=device_map")
    readers = CacheReader(recipe.cache.dir), LiveReader(recipe)
    names = ["input_ids", *readers[0].manifest.states]
    for index in range(len(readers[0])):
        kept, live = (reader.read_many([index], names, [(0, 20)])[0] for reader in readers)
        for name in names:
            torch.testing.assert_close(live[name], kept[name], rtol=1e-4, atol=1e-3, check_dtype=False)


def test_the_first_forward_of_a_live_target_is_looked_at(tmp_path):
    live = LiveReader(captured(tmp_path, "cache", TEXTS))
    with torch.no_grad():
        live._target.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="its weights are damaged"):
        live.read_many([0], ["input_ids"], [(0, 20)])


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("last_hidden", ["supervised", "all"])
def test_queries_from_a_cache_are_those_of_the_live_target_in_packs(tmp_path, codec, last_hidden):
    """Rows as last_hidden's, of a cropped document too: all but the last token of a piece predict one (plain text)."""
    words = [f"cache={codec}", f"cache.last_hidden={last_hidden}", "cache.kinds=[query]"]
    recipe = captured(tmp_path, "cache", TEXTS, *words)
    readers = CacheReader(recipe.cache.dir), LiveReader(recipe)
    everything = np.arange(len(readers[0]))
    names = ["input_ids", "loss_mask", "last_hidden", "query.0", "query.5"]
    target = load_target(recipe.target)
    target.capture([], [], [0, 5])
    for pack_tokens in (4096, 20):  # all in one pack; every document cropped
        packs = [PackStream(r, everything, names, StreamSettings(pack_tokens, 4, seed=0)).read(everything) for r in readers]
        for pack in (p.to(torch.device("cpu")) for p in packs):
            assert pack.query.keys() == {0, 5} and not pack.states.query and pack.mask_P.sum() == len(pack.last_hidden_RE)
            starts = pack.places.position[pack.places.document.diff(prepend=torch.tensor([-1])).nonzero().squeeze(1)]
            for number, index in enumerate(everything):
                mine = (pack.places.document == number).nonzero().squeeze(1)
                whole = target.forward(readers[0].read(index, ["input_ids"])["input_ids"].long()[None])
                expected = whole.query[5][0, starts[number] :][: len(mine) - 1]
                found = pack.query[5][pack.teacher_P[mine[:-1]]].float()
                assert (found - expected).norm() < {"fp32": 1e-4, "bf16": 0.01, "fp8": 0.05}[codec] * expected.norm()
                assert found.shape == (len(mine) - 1, 4, 64)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "fp8"])
def test_training_is_the_same_from_a_new_cache_an_existing_one_and_the_live_target(tmp_path, codec):
    """The real command: from a cache that two ranks capture on first use, from that cache, and from the live target."""
    runs = {}
    for how, folder in (("capture", "cache"), ("fail", "cache"), ("live", "none")):
        words = [f"cache={codec}", f"cache.on_missing={how}", f"cache.dir={folder}", f"run.dir={how}", "train.max_steps=4"]
        done = command(
            ROOT / "train/main.py", *words, "reuse=hybrid", "train.batch=2", "data.max_tokens=12000", "data.max_length=128",
            "cache.kinds=[hidden,kv,query]", "loss.query_align=0.1", "drafter.vocabulary=3000", *SMALL,
            cwd=tmp_path, ranks=2 if how == "capture" else 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in (tmp_path / how / "metrics.jsonl").read_text().splitlines()]
        runs[how] = [line["loss"] for line in lines if "loss" in line]
    assert len(runs["fail"]) == 4 and not (tmp_path / "none").exists()
    assert runs["capture"] == pytest.approx(runs["fail"], abs=1e-4)
    assert runs["live"] == pytest.approx(runs["fail"], abs=1e-4)


def test_the_ten_lines_of_the_documentation_read_a_cache(tmp_path, monkeypatch):
    """docs/reference/cache.md's reader, run as it stands there, on an fp8 cache of the embedded target."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reference/cache.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10 and "data_prep" not in code
    captured(tmp_path, "cache", TEXTS, "cache=fp8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    reader = CacheReader(tmp_path / "cache")
    ours = reader.read(0, ["input_ids", "key.0", "last_hidden"])
    assert torch.equal(names["ids"], ours["input_ids"]) and load_tokenizer(str(ROOT / "data_prep/targets/tiny")).decode(
        names["ids"]
    )
    assert torch.equal(names["keys"], ours["key.0"].float() * ours["key.0.scale"][..., None]) and names["keys"].dim() == 3
    assert torch.equal(names["last_hidden"], ours["last_hidden"].float() * ours["last_hidden.scale"][..., None])
