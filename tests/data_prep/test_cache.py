"""What was captured is what is read, bit for bit; anything else - damage, a kill, another manifest - is noticed or mended."""

import json
import os
import resource
import shutil
import threading
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from common.errors import UserError
from common.recipe import ROOT
from common.tensor_files import offsets_of
from data_prep.cache import writer
from data_prep.cache.codec import Scaled, decode, encode, paired
from data_prep.cache.manifest import INDEX, MANIFEST, Manifest, canonical, each_document, read_manifest
from data_prep.cache.reader import CacheReader, crop
from data_prep.cache.writer import CacheWriter, claim, read_seal, seal
from data_prep.capture.capture import Batch, Outbox, batches, capture
from data_prep.sources.counts import Counts
from data_prep.sources.documents import Documents, write_documents
from data_prep.sources.tokens import TokenDocument
from data_prep.target.target import Target
from tests.support.caches import SIZES, assert_holds, document, manifest_of, write
from tests.support.models import small_target

MASKS = st.lists(st.integers(0, 1), min_size=1, max_size=39).map(lambda rest: [0, *rest])


@given(
    st.sampled_from(["fp32", "bf16", "fp8"]),
    st.sampled_from(["supervised", "all"]),
    st.sampled_from([[], [0, 2]]),
    st.lists(st.tuples(MASKS, st.integers(0, 99)), min_size=1, max_size=6),
    st.integers(1, 6000),
    st.permutations(range(6)),
)
@settings(max_examples=40, deadline=None)
def test_documents_are_read_back_bit_for_bit(tmp_path_factory, codec, last_hidden, queries, contents, shard_bytes, order):
    manifest = manifest_of(codec=codec, last_hidden=last_hidden, query_layers=queries)
    folder = tmp_path_factory.mktemp("cache")
    documents = {f"doc/{i}": document(manifest, *contents[i]) for i in order if i < len(contents)}
    write(folder, manifest, documents, shard_bytes)
    assert_holds(folder, manifest, documents)


FINISHED = {str(i): ([0, 1, 0, 1, 1, 0][: 2 + i], i) for i in range(5)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished cache of three shards, to be left as it was found."""
    folder = tmp_path_factory.mktemp("finished")
    manifest = manifest_of(source={"name": "s", "documents": 5})
    write(folder, manifest, {id: document(manifest, *content) for id, content in FINISHED.items()}, 450)
    assert len(list(folder.glob("shard-*.safetensors"))) == 3
    return folder


@pytest.mark.parametrize("other", [None, b"", "shorter", "of the same size"])
def test_a_shard_removed_or_replaced_after_it_was_opened_is_reported_by_the_next_read(finished, tmp_path, other):
    """Removed, cut or replaced: what was read stays whole, and the next read says what happened. A mapped file that is cut ends
    the process with SIGBUS, and another file's bytes at the old places would pass for states."""
    folder = tmp_path / "cache"
    shutil.copytree(finished, folder)
    reader = CacheReader(folder)
    names = ["input_ids", "hidden.0"]
    before = reader.read(0, names)
    expected = CacheReader(finished).read(0, names)
    for path in folder.glob("shard-*.safetensors"):
        whole = path.read_bytes()
        path.unlink()
        if other is not None:
            path.write_bytes({"shorter": whole[:300], "of the same size": whole[::-1]}.get(other, other))
    assert all(torch.equal(before[name], expected[name]) for name in names)
    with pytest.raises(UserError, match=r"shard-0000\d.safetensors was removed, cut or replaced since it was opened; run data_"):
        reader.read(0, names)


def test_a_changed_state_is_noticed_where_it_is_read_and_named(finished, tmp_path):
    """By the read that a training does, whichever tensor it is in. Without sums nothing would be seen."""
    folder = tmp_path / "cache"
    shutil.copytree(finished, folder)
    (path, *_) = sorted(folder.glob("shard-*.safetensors"))
    whole = path.read_bytes()
    reader = CacheReader(folder)
    with open(path, "rb") as file:
        begins = offsets_of(file, reader.manifest.tensors())
    names = ["input_ids", "loss_mask", *reader.manifest.states]
    index = next(i for i in range(len(reader)) if reader._offset[i] == 0 and reader._shards[reader._shard[i]].path == path)
    for name in names:
        path.write_bytes(whole[: begins[name]] + bytes([whole[begins[name]] ^ 1]) + whole[begins[name] + 1 :])
        with pytest.raises(UserError, match=rf"{path.name}: {name} of document {reader.id(index)} is damaged; run"):
            CacheReader(folder).read(index, names)
    older = CacheReader(folder)  # the last state is the damaged one
    older._checked[:] = True
    older.read(index, names)
    path.write_bytes(whole)
    CacheReader(folder).read(index, names)


def test_shards_of_an_earlier_release_have_no_sums_and_are_completed_and_read(finished, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(finished, folder)
    (path, *_) = sorted(folder.glob("shard-*.parquet"))
    table = read_seal(path).drop_columns("sums")
    own = xxhash.xxh3_128_hexdigest(canonical(table.to_pylist()).encode())
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"rows": own.encode()}), path)
    seal(folder, read_manifest(folder))
    manifest = read_manifest(folder)
    assert_holds(folder, manifest, {id: document(manifest, *content) for id, content in FINISHED.items()})
    reader = CacheReader(folder)
    assert reader._checked.all(1).sum() == len(table) and not reader._checked.all()


def test_a_shard_that_cannot_be_read_says_why(finished):
    reader = CacheReader(finished)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match=r"shard-0000\d.safetensors cannot be read: Too many open files"):
            reader.read(0, ["input_ids"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


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
    damaged = data.draw(st.sampled_from([flipped, whole[:at], None]))
    said = noticed(path, damaged)
    assert said
    begins = 8 + int.from_bytes(whole[:8], "little")
    if path.suffix == ".safetensors" and damaged == flipped and at >= begins:  # a state or a mask: every check goes on to its end
        assert f"{path.name}: checksum differs" in said
    assert not noticed(path, whole)


def test_a_damaged_loss_mask_is_reported_and_does_not_end_the_search(finished, tmp_path):
    """It says which rows are a document's: a look at it must not end the search."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in sorted(tmp_path.glob("shard-*.safetensors")):
        whole = path.read_bytes()
        begins = 8 + int.from_bytes(whole[:8], "little")
        start, stop = (begins + at for at in json.loads(whole[8:begins])["loss_mask"]["data_offsets"])
        for at in range(start, stop):
            for other in (0x01, 0x80):
                said = noticed(path, whole[:at] + bytes([whole[at] ^ other]) + whole[at + 1 :])
                assert f"{path.name}: checksum differs" in said and any("its length or loss mask" in one for one in said)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_next_run_mends_whatever_was_damaged(finished, tmp_path_factory, data):
    """Any file but the manifest, flipped, cut or gone: a writer finds out, and asks for what it no longer holds."""
    folder = tmp_path_factory.mktemp("mended")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    manifest = CacheReader(folder).manifest
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.name != MANIFEST)))
    whole = path.read_bytes()
    at, other = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    damaged = data.draw(st.sampled_from([whole[:at] + bytes([whole[at] ^ other]) + whole[at + 1 :], whole[:at], None]))
    path.unlink() if damaged is None else path.write_bytes(damaged)
    writer = CacheWriter(folder, manifest, 450)
    missing = FINISHED.keys() - set(writer.done.to_pylist())
    # Only what was damaged is asked for again (a seal has bytes that mean nothing).
    assert path.name.startswith("shard-") if missing else path.suffix != ".safetensors"
    for id in sorted(missing):
        writer.add(id, document(manifest, *FINISHED[id]))
    writer.finish()
    assert_holds(folder, manifest, {id: document(manifest, *content) for id, content in FINISHED.items()})


def test_any_flipped_bit_of_a_seal_leaves_a_checksum_or_is_refused(finished, tmp_path):
    """Bits that may turn the text of a checksum into none (those of the metadata, which Arrow wraps in base 64), and before them
    bits that may turn a column of texts into one of bytes or times."""
    whole = (finished / "shard-00000.parquet").read_bytes()
    path = tmp_path / "shard-00000.parquet"
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    metadata = whole.index(b"ARROW:schema")
    refused = 0
    for at in range(footer, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 if at >= metadata else 8)]) + whole[at + 1 :])
        try:
            assert len(read_seal(path).schema.metadata[b"xxh3"].decode()) == 32
        except UserError:
            refused += 1
    assert 0 < refused < len(whole) - footer


def test_a_cache_with_a_missing_or_a_duplicate_document_is_never_sealed(tmp_path):
    manifest = manifest_of(source={"name": "s", "documents": 2})
    for name, ids in (("gap", ["a"]), ("duplicate", ["a", "a"]), ("both", ["a", "a", "b"])):
        writer = CacheWriter(tmp_path / name, manifest, 1)
        for id in ids:
            writer.add(id, document(manifest, [0, 1]))
        with pytest.raises(UserError, match="of a source of 2"):
            writer.finish()
        with pytest.raises(UserError, match="has not finished"):
            CacheReader(tmp_path / name)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_of_one_capture_share_a_folder(tmp_path, world):
    """Each with a writer and shards of its own; afterwards it cannot be told how many there were."""
    manifest = manifest_of()
    documents = {f"d{i:02d}": document(manifest, [0, 1, 1], i) for i in range(20)}
    barrier = threading.Barrier(world)
    removed = []

    def process(rank):
        writer = CacheWriter(tmp_path, manifest if rank == 0 else None, 500, rank, world, barrier.wait)
        removed.extend(writer.removed)
        for number, (id, tensors) in enumerate(documents.items()):
            if number % world == rank and id not in writer.done.to_pylist():
                writer.add(id, tensors)
        writer.finish()

    def run():
        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        assert_holds(tmp_path, manifest, documents)

    run()
    assert not removed
    index = (tmp_path / INDEX).read_bytes()
    damaged = sorted(tmp_path.glob("shard-*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run()  # only that shard is written again
    assert removed == [damaged.name] and (tmp_path / INDEX).read_bytes() != index


@pytest.mark.parametrize("left", [0, 7, 200, -1])
def test_reader_names_a_shard_that_was_cut(finished, tmp_path, left):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="shard-00001.safetensors"):
        CacheReader(tmp_path)


@pytest.mark.parametrize("added", range(6))
def test_a_killed_capture_resumes_and_ends_with_all_documents(tmp_path, added):
    manifest = manifest_of()
    documents = {str(i): document(manifest, [0, 1, 1], i) for i in range(6)}
    two_documents = 2 * sum(t.nbytes for t in documents["0"].values())
    killed = CacheWriter(tmp_path, manifest, two_documents)
    for id in list(documents)[:added]:
        killed.add(id, documents[id])
    killed._wait()
    os.close(killed._lock)  # as the kernel does for a process that dies
    (tmp_path / "shard-00007.safetensors.tmp").write_bytes(b"half a shard")
    (tmp_path / f"shard-{added // 2:05d}.safetensors").write_bytes(b"tensors without their seal")
    writer = CacheWriter(tmp_path, manifest, two_documents)
    assert not list(tmp_path.glob("*.tmp")) and writer.done.to_pylist() == list(documents)[: added - added % 2]
    for id in sorted(documents.keys() - set(writer.done.to_pylist())):
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
        (dict(query_layers=[1]), "query_layers"),
        (dict(architecture=SIZES | {"head_dim": 2}), "target.architecture.head_dim"),
    ],
)
def test_another_manifest_is_refused_by_its_fields(finished, changed, fields):
    with pytest.raises(UserError, match=f"these differ: {fields}\\."):
        CacheWriter(finished, manifest_of(source={"name": "s", "documents": 5}, **changed), 1)


def test_a_manifest_without_queries_keeps_its_old_fields_and_hash(tmp_path):
    manifest = manifest_of()
    fields = json.loads(manifest.model_dump_json())
    assert "query_layers" not in fields  # and so releases from before read it too
    assert manifest.hash() == "993239c63c693acc29ae59ec29b8c9bc"  # as bdf9824 computed it
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    assert read_manifest(tmp_path) == manifest
    queries = manifest_of(query_layers=[1])
    assert Manifest.model_validate_json(queries.model_dump_json()) == queries and queries.hash() != manifest.hash()


def test_one_writer_at_a_time_and_only_in_a_cache(tmp_path):
    manifest = manifest_of()
    first = CacheWriter(tmp_path / "cache", manifest, 1)
    with pytest.raises(UserError, match="is being written"):
        CacheWriter(tmp_path / "cache", manifest, 1)
    first.add("a", document(manifest, [0, 1]))
    first.finish()
    assert CacheWriter(tmp_path / "cache", manifest_of(software={"torch": "2"}), 1).done.to_pylist() == ["a"]  # free again
    with pytest.raises(UserError, match="holds no cache"):
        claim(tmp_path)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("last_hidden", ["supervised", "all"])
def test_the_announced_size_equals_the_bytes_on_disk(tmp_path, codec, last_hidden):
    manifest = manifest_of(codec=codec, last_hidden=last_hidden, query_layers=[1])
    write(tmp_path, manifest, {"a": document(manifest, [0, 1, 0]), "b": document(manifest, [0, 1, 1, 1])}, 1)
    real = sum(t.nbytes for path in tmp_path.glob("*.safetensors") for t in load_file(path).values())
    assert manifest.bytes_of(tokens=7, supervised=4) == real


@pytest.mark.parametrize("last_hidden", ["supervised", "all"])
def test_batched_and_padded_captures_store_what_single_ones_store(tmp_path, last_hidden):
    # In float64 the order of sums does not show, so 1e-5 is there for a real leak (and for storing float32).
    target = small_target(dtype=torch.float64)
    random = np.random.default_rng(0)
    pieces = []
    for length in (40, 3, 29, 17, 2):
        mask = np.array([0, 1, *random.integers(0, 2, length - 2)], dtype=np.uint8)
        pieces.append(TokenDocument(str(length), random.integers(0, 11, length, dtype=np.int32), mask))
    source = write_documents(tmp_path / "documents.arrow", pieces, Counts())
    sizes = asdict(target.architecture)
    manifest = manifest_of(architecture=sizes, source=source, last_hidden=last_hidden, query_layers=[0, 2])
    documents = Documents(tmp_path / "documents.arrow")
    batched = batches(documents.by_length(), documents.lengths, 120, packed=False)
    assert [[pieces[i].id for i in batch] for batch in batched] == [["40", "29", "17"], ["3", "2"]]
    capture(target, documents, CacheWriter(tmp_path / "cache", manifest, 4000), batch_tokens=120)
    reader = CacheReader(tmp_path / "cache")
    assert list(reader.problems()) == []
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
            "query.0": alone.query[0][teachers],
            "query.2": alone.query[2][teachers],
        }
        for name, tensor in reader.read(reader.ids.to_pylist().index(id), list(expected)).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, check_dtype=False)


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="flash-attn runs on a GPU")
@pytest.mark.parametrize("attention", [None, "flash_attention_2"])
def test_states_leave_a_gpu_without_the_host_waiting_for_the_forward_and_are_what_it_gives(tmp_path, attention, monkeypatch):
    """Padded and packed; PyTorch raises where the host would wait. transformers waits in its forward, so there it is left out."""
    target = Target(str(ROOT / "data_prep/targets/tiny"), dtype=torch.bfloat16, device="cuda", attention=attention)
    random = np.random.default_rng(0)
    lengths = random.integers(100, 400, 60)
    pieces = [
        TokenDocument(f"{i:02}", random.integers(3, 8000, n, dtype=np.int32), (np.arange(n) > 0).astype(np.uint8))
        for i, n in enumerate(lengths)
    ]
    source = write_documents(tmp_path / "documents.arrow", pieces, Counts())
    manifest = manifest_of(architecture=asdict(target.architecture), source=source, query_layers=[2], codec="fp8", max_length=400)
    documents = Documents(tmp_path / "documents.arrow")
    target.capture([0, 2], [1], [2])
    made = [
        Batch([documents[i] for i in group]) for group in batches(documents.by_length(), documents.lengths, 1024, target.packs)
    ]

    def captured(name):
        writer = CacheWriter(tmp_path / name, manifest, 10**6)
        outbox = Outbox(writer)
        for batch in made:
            outbox.put(batch, batch.forward(target))
        outbox.close()
        writer.finish()

    captured("real")
    run = target._run
    states = []
    monkeypatch.setattr(target, "_run", lambda **inputs: states.append(run(**inputs)) or states[-1])
    given = {}
    for batch in made:
        tensors = {name: tensor.cpu() for name, tensor in batch.tensors(batch.forward(target), manifest).items()}
        given |= zip(batch.names, (one for *_, one in each_document(tensors, batch.lengths, manifest.last_hidden)))
    monkeypatch.setattr(target, "_run", lambda **inputs: states.pop(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured("without forwards")
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros(3).to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("real", "without forwards"):
        assert_holds(tmp_path / name, manifest, given)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120), st.booleans())
def test_batches_hold_every_document_once_within_their_tokens(lengths, batch_tokens, packed):
    lengths = np.array(sorted(lengths, reverse=True), dtype=np.int64)
    made = batches(np.arange(len(lengths)), lengths, batch_tokens, packed)
    assert [i for batch in made for i in batch] == list(range(len(lengths)))
    sizes = [lengths[b].sum() if packed else lengths[b].max() * len(b) for b in made]
    assert all(size <= batch_tokens or len(batch) == 1 for size, batch in zip(sizes, made))
    for size, batch, after in zip(sizes, made, made[1:]):  # none is cut short
        more = lengths[after[0]] if packed else lengths[batch[0]]
        assert size + more > batch_tokens


def test_teachers_of_a_batch_never_reach_into_the_next_document():
    batch = Batch([TokenDocument("a", *2 * [np.array([0, 1, 1], dtype=np.uint8)])] * 2)
    assert batch.teacher_P.tolist() == [True, True, False, True, True, False]


@given(st.integers(0, 9), st.sampled_from([1e-3, 1.0, 1e4]), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_fp8_keeps_every_value_to_a_sixteenth(seed, spread, width):
    """e4m3: half a unit of 3 bits of mantissa, 2^-4; below 2^-6 of the scale's unit, half of 2^-9 of it; then bf16, 2^-9."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(7, 2, width, generator=generator) * torch.logspace(0, -6, width) * spread
    state[3] = 0
    (stored,) = paired(encode("key.0", state, "fp8")).values()
    assert isinstance(stored, Scaled) and (stored.values.itemsize, stored.scale.shape) == (1, (7, 2))
    error = (decode(stored).float() - state).abs()
    assert (error <= state.abs() * (2**-4 + 2**-8) + stored.scale[..., None] * 2**-10).all()
    assert decode(stored)[3].eq(0).all()
    top = state.abs().amax(-1, keepdim=True)
    assert (error[state.abs() == top] <= (state.abs() * 2**-8)[state.abs() == top]).all()  # the scale fits the largest


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp8"])
def test_what_is_not_a_number_is_not_written_and_verify_names_it(tmp_path, codec, bad, monkeypatch):
    manifest = manifest_of(codec=codec)
    tensors = document(manifest, [0, 1, 1])
    state = torch.ones(3, 2, 3)
    state[1, 0, 2] = bad
    documents = {"fine": document(manifest, [0, 1]), "ill": tensors | encode("key.1", state, codec)}
    with pytest.raises(UserError, match=r"states of document ill are not finite \(key.1\)"):
        write(tmp_path / "refused", manifest, documents, 1)
    monkeypatch.setattr(writer, "finite", lambda tensor: True)  # as caches were written once
    tmp_path = tmp_path / "written"
    write(tmp_path, manifest, documents, 1)
    (problem,) = CacheReader(tmp_path).problems()
    assert "document ill: NaN or Inf in key.1" in problem


@given(MASKS, st.data())
@settings(max_examples=60, deadline=None)
def test_a_crop_keeps_each_teacher_with_its_token(mask, data):
    """Values are their own positions, so that a shift by one shows."""
    start = data.draw(st.integers(0, len(mask) - 1))
    stop = data.draw(st.integers(start + 1, len(mask)))
    place = torch.arange(len(mask))
    teachers = [i - 1 for i, m in enumerate(mask) if m]
    whole = {"input_ids": place, "loss_mask": torch.tensor(mask, dtype=torch.uint8)}
    rows = dict.fromkeys(("last_hidden", "last_hidden.scale", "query.0", "query.0.scale"), torch.tensor(teachers))
    part = crop(whole | rows, start, stop)
    assert part["input_ids"].tolist() == list(range(start, stop)) and part["loss_mask"][0] == 0
    supervised = [start + i for i, m in enumerate(part["loss_mask"].tolist()) if m]
    assert supervised == [i for i in range(start + 1, stop) if mask[i]]
    assert all(part[name].tolist() == [i - 1 for i in supervised] for name in rows)
    assert whole["loss_mask"].tolist() == mask
