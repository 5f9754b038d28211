"""Small caches of random documents: manifests, what is written, and whether a folder holds it."""

import json

import torch

from common.hashing import file_hash
from data_prep.cache.codec import encode
from data_prep.cache.manifest import FILES, FORMAT_VERSION, INDEX, MANIFEST, Manifest, canonical
from data_prep.cache.reader import CacheReader, crop
from data_prep.cache.writer import CacheWriter

SIZES = {"hidden_size": 4, "heads": 4, "kv_heads": 2, "head_dim": 3}
TEACHERS = ("last_hidden", "query.")  # what has a row a supervised token


def manifest_of(architecture=SIZES, **changed):
    """A manifest of a target of these sizes; `changed`: other fields."""
    fields = dict(
        format_version=FORMAT_VERSION,
        target={"architecture": architecture},
        tokenizer_hash="k",
        chat_template_hash="c",
        hidden_layers=[0, 2],
        kv_layers=[1],
        codec="fp32",
        last_hidden="supervised",
        max_length=40,
        source={"name": "s"},
        software={},
    )
    return Manifest(**fields | changed)


def rewrite(folder, manifest):
    """Another manifest, sealed as if it had been captured so."""
    (folder / MANIFEST).write_text(json.dumps(manifest))
    sealed = json.loads((folder / FILES).read_text()) | {name: file_hash(folder / name) for name in (MANIFEST, INDEX)}
    (folder / FILES).write_text(canonical(sealed))


def document(manifest, mask, seed=0):
    """Random tensors of one document whose supervised tokens are `mask`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "input_ids": torch.randint(0, 1000, (len(mask),), generator=generator, dtype=torch.int32),
        "loss_mask": torch.tensor(mask, dtype=torch.uint8),
    }
    for name, row in manifest.states.items():
        rows = sum(mask) if name.startswith(TEACHERS) and manifest.last_hidden == "supervised" else len(mask)
        tensors |= encode(name, torch.randn(rows, *row, generator=generator), manifest.codec)
    return tensors


def write(folder, manifest, documents, shard_bytes):
    """A finished cache of these documents, by their ids."""
    writer = CacheWriter(folder, manifest, shard_bytes)
    for id, tensors in documents.items():
        writer.add(id, tensors)
    writer.finish()


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_holds(folder, manifest, documents):
    """The cache holds exactly these documents, each once, with the same bits."""
    reader = CacheReader(folder)
    assert list(reader.problems()) == [] and reader.ids.to_pylist() == sorted(documents)
    for index, id in enumerate(reader.ids.to_pylist()):
        names = ["input_ids", "loss_mask", *manifest.states]
        stored = reader.read(index, names)
        given = dict(documents[id])
        third = len(stored["input_ids"]) // 3
        for span in ((third, len(stored["input_ids"])), (0, third + 1), (third, 2 * third + 1)):
            part = reader.read(index, names, span)
            expected = crop(stored, *span)
            assert part.keys() == expected.keys() and all(torch.equal(bits(part[n]), bits(expected[n])) for n in part)
        mask = given["loss_mask"].bool()
        assert (reader.lengths[index], reader.supervised[index]) == (len(mask), mask.sum())
        if manifest.last_hidden == "all":  # stored for every token, handed out for the teachers
            teachers = mask[1:].nonzero().squeeze(1)
            given |= {name: given[name][teachers] for name in given if name.startswith(TEACHERS)}
        assert stored.keys() == given.keys()
        for name, tensor in given.items():
            assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(stored[name]), bits(tensor))
