"""Reader throughput as a share of a plain sequential read of the same bytes, in the same run.

    python -m tests.benchmarks.reader shape=qwen3_8b gib=8 workers=4

One pass of training's own stream (shuffled, packed, every layer, on the device) over a cache of random states, against
`readinto` of the same shards in 8 MiB blocks and against a pass that holds no document against its checksum; each with the page
cache dropped (`cold`) and full (`warm`).
"""

import os
import shutil
import time
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import numpy as np
import torch

from data_prep.cache.codec import encode
from data_prep.cache.manifest import FORMAT_VERSION, Manifest
from data_prep.cache.reader import CacheReader
from data_prep.cache.writer import CacheWriter
from data_prep.target.loading import pick_device
from tests.benchmarks import architecture_of, line, options
from train.data.loader import loaded
from train.data.stream import PackStream, StreamSettings


def write_random(folder: Path, manifest: Manifest, size: int, shard_bytes: int) -> None:
    writer = CacheWriter(folder, manifest, shard_bytes)
    number = 0
    written = 0
    random = np.random.default_rng(0)
    block = {}
    while written < size:
        length = int(random.integers(200, 2048))
        mask = (torch.arange(length) > 0).to(torch.uint8)
        tensors = {"input_ids": torch.arange(length, dtype=torch.int32), "loss_mask": mask}
        for name, row in manifest.states.items():
            if name not in block:
                block[name] = encode(name, torch.randn(2048, *row), manifest.codec)
            tensors |= {n: t[: length - (name == "last_hidden")] for n, t in block[name].items()}
        writer.add(f"{number}#0", tensors)
        number = number + 1
        written = written + sum(t.nbytes for t in tensors.values())
    writer.finish()


def drop(folder: Path) -> None:
    """Out of the page cache."""
    for path in folder.glob("shard-*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def sequential(folder: Path) -> float:
    block = bytearray(8 << 20)
    began = time.perf_counter()
    for path in sorted(folder.glob("shard-*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - began


def main() -> None:
    o = options(shape="tiny", codec="bf16", gib=1.0, workers=2, pack_tokens=4096, repeats=3, shard_bytes=2**30, out=None)
    folder = Path(o.out or mkdtemp(prefix="understudy-reader-"))
    layers = [0, 1, 2]
    device = pick_device()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        target={"architecture": architecture_of(o.shape)},
        tokenizer_hash="",
        chat_template_hash="",
        hidden_layers=layers,
        kv_layers=layers,
        codec=o.codec,
        last_hidden="supervised",
        max_length=2048,
        source={},
        software={},
    )
    if not (folder / "files.json").exists():
        write_random(folder, manifest, int(o.gib * 2**30), o.shard_bytes)
    size = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))

    def one_pass(checks: bool) -> float:
        reader = CacheReader(folder)
        if not checks:
            reader._checked[:] = True
        names = ["input_ids", "loss_mask", *manifest.states]
        stream = PackStream(reader, np.arange(len(reader)), names, StreamSettings(o.pack_tokens, 32, seed=0))
        began = time.perf_counter()
        for _ in loaded(stream, range(len(stream.passes(0))), device, o.workers):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    tokens = int(CacheReader(folder).lengths.sum())
    for state in ("cold", "warm"):
        times = []
        for _ in range(o.repeats):
            pair = []
            for read in (lambda: sequential(folder), lambda: one_pass(checks=False), lambda: one_pass(checks=True)):
                if state == "cold":
                    drop(folder)
                pair.append(read())
            times.append(pair)
        plain, unchecked, ours = (median(column) for column in zip(*times))
        line(
            "reader",
            page_cache=state,
            **{k: o[k] for k in ("shape", "codec", "workers", "pack_tokens")},
            gib=round(size / 2**30, 2),
            tokens_per_s=round(tokens / ours),
            gb_per_s=round(size / ours / 1e9, 2),
            sequential_gb_per_s=round(size / plain / 1e9, 2),
            share_of_sequential=round(plain / ours, 3),
            share_of_unchecked=round(unchecked / ours, 3),
            bytes_per_token=round(size / tokens, 1),
            seconds=[[round(t, 3) for t in pair] for pair in times],
        )
    if not o.out:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
