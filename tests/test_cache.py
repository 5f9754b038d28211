"""What was captured is what is read, bit for bit; anything else - damage, a kill, another manifest - is noticed."""

import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep.cache.manifest import Manifest
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import CacheWriter
from data_prep.capture import capture
from data_prep.errors import UserError
from data_prep.tokens import TokenDocument
from tests.models import small_target

TINY = {"hidden_size": 4, "kv_heads": 2, "head_dim": 3}


def manifest_of(architecture=TINY, **changed):
    fields = dict(
        format_version=1,
        target={"architecture": architecture},
        tokenizer_hash="k",
        chat_template_hash="c",
        hidden_layers=[0, 2],
        kv_layers=[1],
        codec="fp32",
        max_length=40,
        source={"name": "s"},
        software={},
    )
    return Manifest(**fields | changed)


def document(manifest, mask, seed=0):
    """Random tensors of one document whose supervised tokens are `mask`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "input_ids": torch.randint(0, 1000, (len(mask),), generator=generator, dtype=torch.int32),
        "loss_mask": torch.tensor(mask, dtype=torch.uint8),
    }
    for name, (dtype, row) in manifest.tensors().items():
        rows = sum(mask) if name == "last_hidden" else len(mask)
        tensors.setdefault(name, torch.randn(rows, *row, generator=generator).to(dtype))
    return tensors


def write(folder, manifest, documents, shard_bytes):
    writer = CacheWriter(folder, manifest, shard_bytes)
    for id, tensors in documents.items():
        writer.add(id, tensors)
    writer.finish()


def assert_holds(folder, manifest, documents):
    """The cache holds exactly these documents, each once, with the same bits."""
    reader = CacheReader(folder)
    assert list(reader.problems()) == [] and sorted(reader.ids) == sorted(documents)
    for index, id in enumerate(reader.ids):
        stored, given = reader.read(index, list(manifest.tensors())), documents[id]
        assert (reader.lengths[index], reader.supervised[index]) == (len(given["loss_mask"]), given["loss_mask"].sum())
        for name, tensor in given.items():
            assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(*(t.flatten().view(torch.uint8) for t in (stored[name], tensor)))


MASKS = st.lists(st.integers(0, 1), min_size=1, max_size=39).map(lambda rest: [0, *rest])


@given(
    st.sampled_from(["fp32", "bf16"]),
    st.lists(st.tuples(MASKS, st.integers(0, 99)), min_size=1, max_size=6),
    st.integers(1, 6000),
    st.permutations(range(6)),
)
@settings(max_examples=40, deadline=None)
def test_documents_in_are_documents_out(tmp_path_factory, codec, contents, shard_bytes, order):
    manifest, folder = manifest_of(codec=codec), tmp_path_factory.mktemp("cache")
    documents = {f"doc/{i}": document(manifest, *contents[i]) for i in order if i < len(contents)}
    write(folder, manifest, documents, shard_bytes)
    assert_holds(folder, manifest, documents)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished cache of three shards, to be left as it was found."""
    folder, manifest = tmp_path_factory.mktemp("finished"), manifest_of()
    write(folder, manifest, {str(i): document(manifest, [0, 1, 0, 1, 1, 0][: 2 + i], i) for i in range(5)}, 450)
    assert len(list(folder.glob("shard-*.safetensors"))) == 3
    return folder


def noticed(path, content):
    """What the reader says when `path` holds other bytes (None: is gone). The file is mended afterwards."""
    whole = path.read_bytes()
    path.unlink()
    try:
        if content is not None:
            path.write_bytes(content)
        return list(CacheReader(path.parent).problems())
    except UserError as error:
        return [str(error)]
    finally:
        path.write_bytes(whole)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_is_noticed(finished, data):
    path = data.draw(st.sampled_from(sorted(finished.iterdir())))
    whole = path.read_bytes()
    at, other = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    flipped = whole[:at] + bytes([whole[at] ^ other]) + whole[at + 1 :]
    assert noticed(path, data.draw(st.sampled_from([flipped, whole[:at], None])))
    assert not noticed(path, whole)


@pytest.mark.parametrize("left", [0, 7, 200, -1])
def test_reader_names_a_shard_that_was_cut(finished, tmp_path, left):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="shard-00001.safetensors"):
        CacheReader(tmp_path)


@pytest.mark.parametrize("added", range(6))
def test_a_killed_capture_goes_on(tmp_path, added):
    manifest = manifest_of()
    documents = {str(i): document(manifest, [0, 1, 1], i) for i in range(6)}
    two_documents = 2 * sum(t.nbytes for t in documents["0"].values())
    killed = CacheWriter(tmp_path, manifest, two_documents)
    for id in list(documents)[:added]:
        killed.add(id, documents[id])
    os.close(killed._lock)  # as the kernel does for a process that dies
    (tmp_path / "shard-00007.safetensors.tmp").write_bytes(b"half a shard")
    (tmp_path / f"shard-{added // 2:05d}.safetensors").write_bytes(b"tensors without their seal")
    writer = CacheWriter(tmp_path, manifest, two_documents)
    assert not list(tmp_path.glob("*.tmp")) and writer.done == set(list(documents)[: added - added % 2])
    for id in sorted(documents.keys() - writer.done):
        writer.add(id, documents[id])
    with pytest.raises(UserError, match="has not finished"):
        CacheReader(tmp_path)
    writer.finish()
    assert_holds(tmp_path, manifest, documents)


@pytest.mark.parametrize(
    "changed,fields",
    [
        (dict(codec="bf16"), "codec"),
        (dict(codec="bf16", hidden_layers=[0, 1]), "codec, hidden_layers"),
        (dict(architecture=TINY | {"head_dim": 2}), "target.architecture.head_dim"),
    ],
)
def test_another_manifest_is_refused_by_its_fields(finished, changed, fields):
    with pytest.raises(UserError, match=f"these differ: {fields}\\."):
        CacheWriter(finished, manifest_of(**changed), 1)


def test_one_writer_at_a_time_and_only_in_a_cache(tmp_path):
    manifest = manifest_of()
    first = CacheWriter(tmp_path / "cache", manifest, 1)
    with pytest.raises(UserError, match="is being written"):
        CacheWriter(tmp_path / "cache", manifest, 1)
    first.add("a", document(manifest, [0, 1]))
    first.finish()
    assert CacheWriter(tmp_path / "cache", manifest_of(software={"torch": "2"}), 1).done == {"a"}  # free again
    with pytest.raises(UserError, match="holds no cache"):
        CacheWriter(tmp_path, manifest, 1)


def test_a_stranger_reads_it(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    row = pq.read_table(finished / "index.parquet").to_pylist()[3]
    tokens = slice(row["offset"], row["offset"] + row["length"])
    teachers = slice(row["teacher_offset"], row["teacher_offset"] + row["supervised"])
    names = ["input_ids", *(f"hidden.{i}" for i in manifest["hidden_layers"]), *(f"key.{i}" for i in manifest["kv_layers"])]
    with safe_open(finished / f"{row['shard']}.safetensors", framework="numpy") as shard:
        read = {name: shard.get_slice(name)[tokens] for name in names}
        read["last_hidden"] = shard.get_slice("last_hidden")[teachers]
    ours = CacheReader(finished).read(3, list(read))
    assert row["id"] == "3" and all(np.array_equal(read[name], ours[name]) and read[name].size for name in read)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_the_size_that_is_announced_is_the_size(tmp_path, codec):
    manifest = manifest_of(codec=codec)
    write(tmp_path, manifest, {"a": document(manifest, [0, 1, 0]), "b": document(manifest, [0, 1, 1, 1])}, 1)
    real = sum(t.nbytes for path in tmp_path.glob("*.safetensors") for t in load_file(path).values())
    assert manifest.bytes_of(tokens=7, supervised=4) == real


def test_padding_and_batching_leave_no_trace(tmp_path):
    # In float64 the order of sums does not show, so 1e-5 is there for a real leak (and for storing float32).
    target, random = small_target(dtype=torch.float64), np.random.default_rng(0)
    pieces = []
    for length in (40, 3, 29, 17, 2):
        mask = np.array([0, *random.integers(0, 2, length - 1)], dtype=np.uint8)
        pieces.append(TokenDocument(str(length), random.integers(0, 11, length, dtype=np.int32), mask))
    writer = CacheWriter(tmp_path, manifest_of(architecture=asdict(target.architecture)), 4000)
    capture(target, pieces, writer, batch_tokens=120)  # 40, 29 and 17 share a forward, then 3 and 2
    reader = CacheReader(tmp_path)
    for id, ids, mask in pieces:
        alone = target.forward(torch.from_numpy(ids).long()[None]).map(lambda t: t[0])
        teachers = [i for i in range(len(ids) - 1) if mask[i + 1]]
        expected = {
            "input_ids": torch.from_numpy(ids),
            "loss_mask": torch.from_numpy(mask),
            "key.1": alone.key[1],
            "value.1": alone.value[1],
            "hidden.0": alone.hidden[0],
            "hidden.2": alone.hidden[2],
            "last_hidden": alone.last_hidden[teachers],
        }
        for name, tensor in reader.read(reader.ids.index(id), list(expected)).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, check_dtype=False)
