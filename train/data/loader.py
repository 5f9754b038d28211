"""Packs on the device, read ahead while the step before is still running."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch

from train.data.pack import Pack
from train.data.stream import PackStream


def loaded(stream: PackStream, numbers: Iterable[int], device: torch.device, workers: int) -> Iterator[Pack]:
    """Packs `numbers` of the stream on `device`. Threads read ahead, two packs each, sharing the reader and its index; on a
    GPU the next pack is copied, from pinned memory and on a stream of its own, while this one is being used.

    `workers=0`: everything happens when a pack is asked for.
    """
    if workers == 0:
        for number in numbers:
            yield stream[number].to(device)
        return
    on_gpu = device.type == "cuda"
    read = _read_pinned if on_gpu else _read
    pool = ThreadPoolExecutor(workers)
    try:
        # Where a pack lies is found here, in one thread: the stream keeps notes of the passes that it has seen.
        jobs = (pool.submit(read, stream, *stream.locate(number)) for number in numbers)
        packs = _in_order(jobs, 2 * workers)
        yield from _copied_ahead(packs, device) if on_gpu else packs
    finally:
        # Also when the consumer stops early, as after an error of a step: nothing more is read.
        pool.shutdown(wait=False, cancel_futures=True)


def _read(stream: PackStream, documents, pass_number: int, step: int) -> Pack:
    # `to` decodes what an fp8 cache holds: here that is work of the reading thread.
    return stream.read(documents, pass_number, step).to(torch.device("cpu"))


def _read_pinned(stream: PackStream, documents, pass_number: int, step: int) -> Pack:
    return stream.read(documents, pass_number, step).pin()


def _in_order(jobs: Iterator[Future[Pack]], count: int) -> Iterator[Pack]:
    """The results of jobs, of which `count` are always begun. What a job raises is raised here."""
    begun = deque(islice(jobs, count))
    while begun:
        pack = begun.popleft().result()
        begun.extend(islice(jobs, 1))
        yield pack


def _copied_ahead(packs: Iterator[Pack], device: torch.device) -> Iterator[Pack]:
    """Packs on the GPU, each copied while the one before it is being used."""
    side = torch.cuda.Stream(device)
    copied: deque[Pack] = deque()

    def handed_over() -> Pack:
        pack = copied.popleft()
        current = torch.cuda.current_stream(device)
        # The consumer's kernels must not read what is still being copied.
        current.wait_stream(side)
        # The tensors were made on `side`. Unless the allocator knows that `current` uses them too, it gives their memory to the
        # next copy as soon as Python drops the pack, while kernels of this step still read it.
        pack.record_stream(current)
        return pack

    for pack in packs:
        with torch.cuda.stream(side):
            copied.append(pack.to(device))
        if len(copied) == 2:
            yield handed_over()
    while copied:
        yield handed_over()
