"""Tokens -> the target's forward -> the cache."""

from dataclasses import asdict

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_prep.cache.manifest import DTYPES, FORMAT_VERSION, Manifest, software_versions
from data_prep.cache.writer import CacheWriter
from data_prep.recipe import DataPrepRecipe
from data_prep.target import States, Target, load_tokenizer, tokenizer_hashes
from data_prep.tokens import TokenDocument, source_hash


def auto_layers(num_layers: int, count: int = 3) -> list[int]:
    """`count` layers spaced uniformly (KVShot), the first and the last among them: a drafter that starts as the target
    with its middle layers left out is the best start measured (docs/log.md)."""
    return sorted(set(torch.linspace(0, num_layers - 1, count).round().long().tolist()))


def make_manifest(recipe: DataPrepRecipe, target: Target, pieces: list[TokenDocument]) -> Manifest:
    tokenizer_hash, template_hash = tokenizer_hashes(load_tokenizer(target.path, target.revision))
    layers = auto_layers(len(target.layers)) if recipe.cache.layers == "auto" else sorted(set(recipe.cache.layers))
    return Manifest(
        format_version=FORMAT_VERSION,
        target={
            "id": recipe.target.path,
            "revision": recipe.target.revision,
            "weights_hash": target.weights_hash(),
            "architecture": asdict(target.architecture),
            "mask_token_id": recipe.target.mask_token_id,
        },
        tokenizer_hash=tokenizer_hash,
        chat_template_hash=template_hash,
        hidden_layers=layers if "hidden" in recipe.cache.kinds else [],
        kv_layers=layers if "kv" in recipe.cache.kinds else [],
        codec=recipe.cache.codec,
        max_length=recipe.data.max_length,
        source={
            "name": recipe.data.source,
            "hash": source_hash(pieces),
            "documents": len(pieces),
            "tokens": sum(len(p.input_ids) for p in pieces),
        },
        software=software_versions(),
    )


def batches(pieces: list[TokenDocument], batch_tokens: int) -> list[list[TokenDocument]]:
    """Documents of like length together, at most `batch_tokens` with padding (or one document alone)."""
    grouped: list[list[TokenDocument]] = []
    for piece in sorted(pieces, key=lambda p: (-len(p.input_ids), p.id)):
        if grouped and len(grouped[-1][0].input_ids) * (len(grouped[-1]) + 1) <= batch_tokens:
            grouped[-1].append(piece)
        else:
            grouped.append([piece])
    return grouped


def document_tensors(states: States, piece: TokenDocument, row: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One row of a padded batch as the cache's tensors: padding dropped, last_hidden only at teachers."""
    length = len(piece.input_ids)
    mask = torch.from_numpy(piece.loss_mask)
    teachers = mask[1:].nonzero().squeeze(1)  # position i teaches the token at i + 1

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[row, :length].to(dtype).cpu()

    return {
        "input_ids": torch.from_numpy(piece.input_ids),
        "loss_mask": mask,
        "last_hidden": stored(states.last_hidden)[teachers],
        **{f"hidden.{layer}": stored(t) for layer, t in states.hidden.items()},
        **{f"key.{layer}": stored(t) for layer, t in states.key.items()},
        **{f"value.{layer}": stored(t) for layer, t in states.value.items()},
    }


def capture(target: Target, pieces: list[TokenDocument], writer: CacheWriter, batch_tokens: int) -> None:
    """Run the target over every document that the cache does not hold yet, then seal the cache."""
    manifest = writer.manifest
    target.capture(manifest.hidden_layers, manifest.kv_layers)
    todo = [piece for piece in pieces if piece.id not in writer.done]
    columns = (
        TextColumn("capture"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("capture", total=sum(len(p.input_ids) for p in todo), rate="-")
        for batch in batches(todo, batch_tokens):
            longest = len(batch[0].input_ids)
            ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, piece in enumerate(batch):
                ids_BT[row, : len(piece.input_ids)] = torch.from_numpy(piece.input_ids)
            states = target.forward(ids_BT.to(target.device))
            for row, piece in enumerate(batch):
                writer.add(piece.id, document_tensors(states, piece, row, DTYPES[manifest.codec]))
            progress.advance(task, sum(len(p.input_ids) for p in batch))
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:,.0f}" if speed else "-")
    writer.finish()
