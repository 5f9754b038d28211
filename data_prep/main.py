"""python data_prep/main.py target=tiny data=stdlib cache.dir=CACHE [mode=capture|verify]"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder: no module here may hide another

from data_prep import cli  # noqa: E402
from data_prep.cache.reader import CacheReader  # noqa: E402
from data_prep.cache.writer import CacheWriter  # noqa: E402
from data_prep.capture import capture, make_manifest  # noqa: E402
from data_prep.errors import UserError  # noqa: E402
from data_prep.recipe import DataPrepRecipe  # noqa: E402
from data_prep.sources import documents  # noqa: E402
from data_prep.target import load_target, load_tokenizer  # noqa: E402
from data_prep.tokens import tokenized  # noqa: E402


def check(recipe: DataPrepRecipe) -> None:
    """What can be refused before the target is loaded."""
    if recipe.mode == "verify":
        CacheReader(recipe.cache.dir)
        return
    cli.refuse_file("cache.dir", recipe.cache.dir)
    if recipe.data.source == "jsonl" and not Path(recipe.data.path or "").is_file():
        raise UserError(f"data.path={recipe.data.path} is not a file")


def run(recipe: DataPrepRecipe) -> None:
    if recipe.mode == "verify":
        reader = CacheReader(recipe.cache.dir)
        if problems := list(reader.problems()):
            raise UserError(f"{recipe.cache.dir}: {len(problems)} problem(s): " + "; ".join(problems[:5]))
        print(f"{recipe.cache.dir}: {len(reader):,} documents, {sum(reader.lengths):,} tokens, every byte as written")
        return
    tokenizer = load_tokenizer(recipe.target.location, recipe.target.revision)
    pieces, short = tokenized(documents(recipe.data, heldout=False), tokenizer, recipe.data.max_length, recipe.data.max_tokens)
    target = load_target(recipe.target)
    if recipe.data.max_length > target.architecture.max_positions:
        raise UserError(
            f"data.max_length={recipe.data.max_length} exceeds the target's {target.architecture.max_positions} positions"
        )
    manifest = make_manifest(recipe, target, pieces)
    target.capture(manifest.hidden_layers, manifest.kv_layers)
    writer = CacheWriter(recipe.cache.dir, manifest, recipe.cache.shard_bytes)
    supervised = sum(int(p.loss_mask.sum()) for p in pieces)
    tokens = manifest.source["tokens"]
    size = manifest.bytes_of(tokens, supervised)
    print(
        f"{len(pieces):,} documents, {tokens:,} tokens, {supervised:,} supervised ({short} pieces of one token left out); "
        f"layers {manifest.hidden_layers or manifest.kv_layers}, {'+'.join(recipe.cache.kinds)}, {manifest.codec}: "
        f"{size / 2**30:.2f} GiB, {size / tokens:,.0f} bytes a token; {len(writer.done):,} documents there already"
    )
    capture(target, pieces, writer, recipe.capture.batch_tokens)
    print(f"cache: {recipe.cache.dir} (manifest {manifest.hash()})")


if __name__ == "__main__":
    cli.main("data_prep", DataPrepRecipe, check, run)
