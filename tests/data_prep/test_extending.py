"""A source and a codec that the project does not have, added as docs/extend/{source,codec}.md say."""

import pytest
import torch
from safetensors.torch import load_file

from common import tensor_files
from common.errors import UserError
from common.hashing import stable_hash
from common.recipe import ROOT
from data_prep.cache import codec
from data_prep.cache.codec import Codec, Scaled, decode, encode, paired
from data_prep.cache.reader import CacheReader
from data_prep.recipe import DataRecipe
from data_prep.sources import records as sources
from data_prep.sources.counts import Counts
from data_prep.sources.documents import tokenized
from data_prep.sources.records import Record, Source, check_source, records
from data_prep.target.loading import load_tokenizer
from tests.support.caches import assert_holds, document, manifest_of, write


def poems(data, whole):
    for number in sorted(range(300), key=lambda n: stable_hash(str(n))):
        yield Record(str(number), {"text": f"Rose number {number} is a rose."})


def check_poems(data):
    if data.name != "roses":
        raise UserError("data=poems needs data.name=roses")


def test_a_new_source_is_an_entry_of_the_table(monkeypatch):
    """From the table to token documents, on the sides that are asked for; and refused where it cannot be there."""
    monkeypatch.setitem(sources.SOURCES, "poems", Source(poems, check_poems))
    # model_copy does not look at the list of values in the recipe, which is the other file that a new source touches.
    recipe = DataRecipe(source="jsonl", max_length=64).model_copy(update={"source": "poems", "name": "roses"})
    check_source(recipe)
    with pytest.raises(UserError, match="needs data.name=roses"):
        check_source(recipe.model_copy(update={"name": None}))
    sides = {heldout: {record.id for record in records(recipe, heldout)} for heldout in (True, False, None)}
    assert sides[True] and sides[None] == sides[True] | sides[False] and len(sides[None]) == 300
    counts = Counts()
    tokenizer = load_tokenizer(str(ROOT / "data_prep/targets/tiny"))
    documents = list(tokenized(records(recipe, False), tokenizer, recipe, counts))
    assert {document.id.split("#")[0] for document in documents} == sides[False] and not counts.said()["left_out"]
    assert all(f"number {document.id.split('#')[0]} is" in tokenizer.decode(document.input_ids) for document in documents)


def int8(state):
    scale = (state.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return Scaled((state / scale[..., None]).round().to(torch.int8), scale)


@pytest.mark.parametrize("name,new,error", [("fp16", Codec(torch.float16), 2**-11), ("int8", Codec(torch.int8, int8), 1 / 127)])
def test_a_new_codec_is_an_entry_of_the_table(monkeypatch, tmp_path, name, new, error):
    """A cache is written with it, sealed and read back, and a state comes back as exactly as the codec is."""
    monkeypatch.setitem(codec.CODECS, name, new)
    monkeypatch.setitem(tensor_files.SAFETENSORS, torch.int8, "I8")  # a dtype that no cache has had
    manifest = manifest_of(codec=name)
    documents = {f"doc/{number}": document(manifest, [0, 1, 0, 1, 1, 0], number) for number in range(5)}
    write(tmp_path, manifest, documents, 450)
    assert_holds(tmp_path, manifest, documents)
    assert CacheReader(tmp_path).manifest.codec == name
    stored = load_file(next(iter(sorted(tmp_path.glob("shard-*.safetensors")))))
    assert stored["key.1"].dtype == new.dtype and ("key.1.scale" in stored) == (new.scaled is not None)
    state = torch.randn(7, 2, 8, generator=torch.Generator().manual_seed(0))
    (found,) = paired(encode("key.0", state, name)).values()
    largest = state.abs().amax(-1, keepdim=True)
    assert ((decode(found).float() - state).abs() / largest).max() < error + 2**-8 * (new.scaled is not None)
