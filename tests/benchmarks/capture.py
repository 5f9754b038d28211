"""Capture throughput as a share of the bare prefill of the same target over the same batches, in the same run.

    python -m tests.benchmarks.capture shape=tiny
    python -m tests.benchmarks.capture shape=qwen3_8b codec=fp8 kinds=[hidden,kv] tokens=400000 batch_tokens=32768
    python -m tests.benchmarks.capture shape=qwen3_30b_a3b codec=fp8 kinds=[hidden] tokens=400000 batch_tokens=32768

`prefill` is the target's forward alone, nothing kept. `capture` is what the command does after loading: forward, states
to the host, checksums, shards, fsync, index.
"""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import numpy as np
import torch

from data_prep.cache.manifest import FORMAT_VERSION, Manifest
from data_prep.cache.writer import CacheWriter
from data_prep.capture.capture import Batch, batches, capture
from data_prep.capture.plan import auto_layers
from data_prep.sources.counts import Counts
from data_prep.sources.documents import Documents, write_documents
from data_prep.sources.tokens import TokenDocument
from tests.benchmarks import line, options, target_of

LONGEST = {"tiny": 512, "qwen3_8b": 4096, "qwen3_30b_a3b": 4096}


def random_documents(tokens: int, longest: int, vocabulary: int, supervised: float):
    """Lengths as chat data has them: log-normal around a quarter of the longest; the last part of each is supervised."""
    random = np.random.default_rng(0)
    left = tokens
    number = 0
    while left > 8:
        length = int(np.clip(random.lognormal(np.log(longest / 4), 0.7), 8, min(longest, left)))
        mask = (np.arange(length) >= max(1, round(length * (1 - supervised)))).astype(np.uint8)
        yield TokenDocument(f"{number}#0", random.integers(0, vocabulary, length, dtype=np.int32), mask)
        left = left - length
        number = number + 1


def main() -> None:
    o = options(
        shape="tiny",
        depth=None,
        codec="bf16",
        kinds=["hidden", "kv"],
        tokens=200_000,
        batch_tokens=8192,
        supervised=0.5,
        attention="auto",
        shard_bytes=2**30,
        repeats=3,
        out=None,
    )
    target = target_of(o.shape, o.attention, o.depth)
    folder = Path(o.out or mkdtemp(prefix="understudy-capture-"))
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = target.architecture.vocab_size
    documents = random_documents(o.tokens, LONGEST[o.shape], vocabulary, o.supervised)
    source = write_documents(folder / "documents.arrow", documents, Counts())
    documents = Documents(folder / "documents.arrow")
    layers = auto_layers(len(target.layers))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        target={"architecture": asdict(target.architecture)},
        tokenizer_hash="",
        chat_template_hash="",
        hidden_layers=layers if "hidden" in o.kinds else [],
        kv_layers=layers if "kv" in o.kinds else [],
        codec=o.codec,
        last_hidden="supervised",
        max_length=LONGEST[o.shape],
        source=source,
        software={},
    )
    synchronize = torch.cuda.synchronize if target.device.type == "cuda" else (lambda: None)

    def prefill() -> float:
        target.capture([], [])
        synchronize()
        began = time.perf_counter()
        for indices in batches(documents.by_length(), documents.lengths, o.batch_tokens, target.packs):
            Batch([documents[i] for i in indices]).forward(target)
        synchronize()
        return time.perf_counter() - began

    def captured() -> float:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        began = time.perf_counter()
        capture(target, documents, CacheWriter(folder / "cache", manifest, o.shard_bytes), o.batch_tokens)
        return time.perf_counter() - began

    prefill(), captured()  # warm-up: kernels, pinned memory
    times = [(prefill(), captured()) for _ in range(o.repeats)]  # in turn, so that a machine's moods meet both
    bare, full = (median(column) for column in zip(*times))
    size = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    line(
        "capture",
        **{k: o[k] for k in ("shape", "codec", "batch_tokens", "supervised")},
        kinds=list(o.kinds),
        depth=len(target.layers),
        layers=layers,
        attention=target.model.config._attn_implementation,
        tokens=source["tokens"],
        tokens_per_s=round(source["tokens"] / full),
        prefill_tokens_per_s=round(source["tokens"] / bare),
        share_of_prefill=round(bare / full, 3),
        gb_per_s=round(size / full / 1e9, 3),
        bytes_per_token=round(size / source["tokens"], 1),
        seconds=[[round(t, 3) for t in pair] for pair in times],
    )
    if not o.out:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
