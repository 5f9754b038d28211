"""`mode=verify`, `mode=inspect` and `mode=merge`: what one does with a cache that is there."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from common.errors import UserError
from common.files import refuse_unwritable, write_text
from data_prep.cache.codec import decode, paired
from data_prep.cache.manifest import MANIFEST
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import SCHEMA, read_seal, seal, write_seal
from data_prep.recipe import DataPrepRecipe, TargetRecipe, location
from data_prep.sources.documents import Digest
from data_prep.target.loading import load_tokenizer, target_tokenizer, tokenizer_hashes, weights_hash

SAMPLE = 256  # documents whose states are looked at for norms


def verify(recipe: DataPrepRecipe) -> None:
    """Read every byte again, and hold the manifest against the target it names, if that can be loaded here.

    Raises:
        UserError: with the first problems that were found.
    """
    reader = CacheReader(recipe.cache.dir)
    problems = list(reader.problems())
    named = reader.manifest.target
    target = {"path": named["id"], "gguf": None, "fetch": None, "revision": named["revision"]}
    try:
        problems += _against_target(reader, recipe.target.model_copy(update=target))
        compared = f"captured from {named['id']} as it is now"
    except UserError as error:
        compared = f"NOT compared with its target ({error})"
    if problems:
        raise UserError(f"{recipe.cache.dir}: {len(problems)} problem(s): " + "; ".join(problems[:5]))
    print(f"{recipe.cache.dir}: {len(reader):,} documents, {reader.lengths.sum():,} tokens, every byte as written, {compared}")


def _against_target(reader: CacheReader, recipe: TargetRecipe) -> list[str]:
    manifest = reader.manifest
    tokenizer_hash, template_hash = tokenizer_hashes(target_tokenizer(recipe))
    differ = {
        "weights": weights_hash(recipe) != manifest.target["weights_hash"],
        "tokenizer": tokenizer_hash != manifest.tokenizer_hash,
        "chat template": template_hash != manifest.chat_template_hash,
    }
    return [
        f"{MANIFEST}: the {what} of {recipe.path} are no longer those it was captured with" for what, d in differ.items() if d
    ]


def picture_of(out: str) -> Path:
    """The file that `inspect.out` names: without a suffix it is a .png."""
    return Path(out) if Path(out).suffix else Path(f"{out}.png")


def check_picture(out: str) -> None:
    """Raises UserError for a picture that cannot be drawn or written."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    path = picture_of(out)
    if path.suffix[1:].lower() not in formats:
        known = ", ".join(sorted(formats))
        raise UserError(f"inspect.out={out}: '{path.suffix[1:]}' is no format of pictures; these are: {known}")
    refuse_unwritable("inspect.out", str(path), is_file=True)


def inspect(recipe: DataPrepRecipe) -> None:
    """Print a table and a few examples with the supervised tokens marked; draw lengths, supervised share and norms."""
    reader = CacheReader(recipe.cache.dir)
    manifest = reader.manifest
    console = Console()
    size = sum(path.stat().st_size for path in reader.folder.iterdir())
    share = reader.supervised / reader.lengths
    chosen = np.linspace(0, len(reader) - 1, min(SAMPLE, len(reader))).astype(int)
    norms = _norms(reader, chosen)

    table = Table(title=escape(str(reader.folder)))
    for column in ("", "value"):
        table.add_column(column)
    rows = {
        "target": f"{manifest.target['id']}  {manifest.target['revision'] or ''}",
        "source": f"{manifest.source.get('name')}  {manifest.source.get('hash', '')}",
        "layers": f"hidden {manifest.hidden_layers}  kv {manifest.kv_layers}  query {manifest.query_layers}",
        "codec": f"{manifest.codec}, last_hidden {manifest.last_hidden}",
        "documents": f"{len(reader):,} in {len(reader._shards):,} shards",
        "tokens": f"{reader.lengths.sum():,}, of which {reader.supervised.sum():,} supervised ({share.mean():.0%} of a document)",
        "length": "min {:.0f}, median {:.0f}, 95% {:.0f}, max {:.0f}".format(*np.quantile(reader.lengths, [0, 0.5, 0.95, 1])),
        "size": f"{size / 2**30:.3f} GiB, {size / reader.lengths.sum():,.0f} bytes a token",
        **{f"records {how}": f"{n:,}" for how, n in manifest.source.get("records", {}).items()},
        **{reason: f"{n:,}" for reason, n in manifest.source.get("kept", {}).items()},
        **{f"left out: {reason}": f"{n:,}" for reason, n in manifest.source.get("left_out", {}).items()},
        **{f"norm of {name}": "median {:.3g}, 99% {:.3g}".format(*np.quantile(n, [0.5, 0.99])) for name, n in norms.items()},
    }
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    console.print(table)
    picture = picture_of(recipe.inspect.out)
    _draw(picture, reader.lengths, share, norms)
    tokenizer = None
    if recipe.inspect.examples:
        target = manifest.target
        tokenizer = load_tokenizer(location(target["id"]), target["revision"], recipe.target.trust_remote_code)
    for index in np.linspace(0, len(reader) - 1, min(recipe.inspect.examples, len(reader))).astype(int):
        tensors = reader.read(index, ["input_ids", "loss_mask"])
        console.print(
            f"\n[bold]{escape(reader.id(index))}[/bold] ({reader.lengths[index]} tokens; supervised text between » and «)"
        )
        console.print(_marked(tensors["input_ids"].tolist(), tensors["loss_mask"].tolist(), tokenizer))
    print(f"picture: {picture}")


def _norms(reader: CacheReader, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Euclidean norm of every token's state in the chosen documents (of a head, for Q, K and V), by tensor."""
    found: dict[str, list] = {name: [] for name in reader.manifest.states}
    for index in chosen:
        for name, stored in paired(reader.read(index, list(found))).items():
            found[name].append(decode(stored).float().norm(dim=-1).flatten())
    return {name: torch.cat(parts).numpy() for name, parts in found.items() if sum(map(len, parts))}


def _marked(ids: list[int], mask: list[int], tokenizer, limit: int = 400) -> Text:
    """The document's text, its supervised runs between » and «, in bold green."""
    text = Text()
    start = 0
    for end in range(1, min(len(ids), limit) + 1):
        if end == min(len(ids), limit) or mask[end] != mask[start]:
            run = tokenizer.decode(ids[start:end])
            text.append(f"»{run}«" if mask[start] else run, style="bold green" if mask[start] else "dim")
            start = end
    return text.append(" …") if len(ids) > limit else text


def _draw(path: Path, lengths: np.ndarray, share: np.ndarray, norms: dict[str, np.ndarray]) -> None:
    import matplotlib

    # Draws into files, and needs no screen.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    left.hist(lengths, bins=40)
    left.set(xlabel="tokens of a document", ylabel="documents", title=f"{len(lengths):,} documents")
    middle.hist(share, bins=np.linspace(0, 1, 41))
    middle.set(xlabel="supervised share of a document", ylabel="documents", title=f"mean {share.mean():.0%}")
    right.boxplot(list(norms.values()), orientation="horizontal", tick_labels=list(norms), showfliers=False)
    right.set(xscale="log", xlabel="norm of a state (Q, K, V: of a head)", title="states")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def merge(recipe: DataPrepRecipe) -> None:
    """Join finished caches whose manifests differ in nothing but the data. Shards are hard links where the disk allows it.

    Raises:
        UserError: the manifests differ otherwise, a document stands in two of them, or cache.dir is not empty.
    """
    readers = [CacheReader(folder) for folder in recipe.merge.sources]
    first = readers[0].manifest
    for reader in readers[1:]:
        if fields := [f for f in first.differs(reader.manifest) if not f.startswith("source.")]:
            raise UserError(f"{reader.folder} cannot be joined to {readers[0].folder}; these differ: {', '.join(fields)}")
    sources = [reader.manifest.source for reader in readers]
    source = {
        "name": "+".join(sorted({s["name"] for s in sources})),
        "hash": Digest.joined([s["hash"] for s in sources]),
        **{key: sum(s[key] for s in sources) for key in ("documents", "tokens", "supervised")},
        **{key: dict(sum((Counter(s.get(key, {})) for s in sources), Counter())) for key in ("left_out", "kept")},
    }
    if all("records" in s for s in sources):  # older manifests do not say
        source["records"] = {key: sum(s["records"][key] for s in sources) for key in sources[0]["records"]}
    seen: set[str] = set()
    for reader in readers:
        ids = reader.ids.to_pylist()
        if again := seen.intersection(ids):
            raise UserError(f"{reader.folder}: document '{min(again)}' stands in another of these caches too; nothing is written")
        seen.update(ids)
    folder = Path(recipe.cache.dir)
    manifest = first.model_copy(update={"source": source})
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another cache.dir")
    # Built beside its place and renamed once it is whole, so that no reader finds half a cache. The rename replaces an empty
    # folder.
    building = folder.with_name(folder.name + ".merging")
    shutil.rmtree(building, ignore_errors=True)  # of a merge that was killed
    building.mkdir(parents=True)
    for number, path in enumerate(p for reader in readers for p in sorted(reader.folder.glob("shard-*.parquet"))):
        name = f"shard-{number:05d}"
        rows = read_seal(path)
        _link(path.with_suffix(".safetensors"), building / f"{name}.safetensors")
        columns = [tuple(row.get(name) for name in SCHEMA.names) for row in rows.to_pylist()]
        write_seal(building / f"{name}.parquet", columns, rows.schema.metadata[b"xxh3"].decode())
    # First, because `seal` records the manifest's checksum too.
    write_text(building / MANIFEST, manifest.model_dump_json(indent=1))
    seal(building, manifest)
    building.rename(folder)
    print(f"cache: {folder} ({source['documents']:,} documents, {source['tokens']:,} tokens, manifest {manifest.hash()})")


def _link(source: Path, to: Path) -> None:
    try:
        # Two names of one file. That is safe, because no shard is changed in place: one that is damaged is removed and written
        # anew.
        os.link(source, to)
    except OSError:  # another disk
        shutil.copyfile(source, to)
        with open(to, "rb+") as file:
            os.fsync(file.fileno())
