"""The target's forward over documents, and its states on their way to the disk.

Shapes: P tokens of a batch, documents back to back without padding; B documents, T the longest; E hidden size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from common.progress import Progress
from data_prep.cache.codec import encode
from data_prep.cache.manifest import Manifest, is_teacher
from data_prep.cache.writer import CacheWriter
from data_prep.capture.first_batch import check_first_batch
from data_prep.sources.documents import Documents
from data_prep.sources.tokens import TokenDocument
from data_prep.target.served import ServedTarget
from data_prep.target.states import States, to_device
from data_prep.target.target import Target

UNDERWAY = 2  # batches whose states exist beside those that are being computed


class Batch:
    """Documents of one forward. `ids_P` int32 and `mask_P` uint8, back to back; `teacher_P` bool: the position's
    prediction is supervised, so that its last hidden state is a teacher (and its queries are the teacher's)."""

    def __init__(self, documents: Sequence[TokenDocument]):
        self.names = [document.id for document in documents]
        self.lengths = [len(document.input_ids) for document in documents]
        self.ids_P = torch.from_numpy(np.concatenate([d.input_ids for d in documents]))
        self.mask_P = torch.from_numpy(np.concatenate([d.loss_mask for d in documents]))
        self.teacher_P = self.mask_P.roll(-1).bool()  # position 0 of a document is never supervised: none wraps into another

    def forward(self, target: Target | ServedTarget) -> States:
        """States [P, ...] of every token, on the target's device."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        if target.packs:
            return target.forward_packed(self.ids_P.long(), lengths).map(lambda t: t[0])
        # Without packing, documents are padded on the right. Under causal attention no real token sees the padding behind it.
        ids_BT = torch.zeros(len(lengths), max(self.lengths), dtype=torch.long)
        real_BT = torch.arange(ids_BT.shape[1]) < lengths[:, None]
        ids_BT[real_BT] = self.ids_P.long()
        states = target.forward(to_device(ids_BT, target.device))
        if real_BT.all():
            return states.map(lambda t: t.flatten(0, 1))
        real = real_BT.flatten().nonzero().squeeze(1)
        return states.map(lambda t: t.flatten(0, 1)[to_device(real, t.device)])

    def tensors(self, states: States, manifest: Manifest) -> dict[str, Tensor]:
        """What the cache stores of this batch, on the devices where the states are."""
        named = {
            "last_hidden": states.last_hidden,
            **{f"{kind}.{i}": t for kind in ("hidden", "key", "value", "query") for i, t in getattr(states, kind).items()},
        }
        out = {"input_ids": self.ids_P, "loss_mask": self.mask_P}
        teachers = self.teacher_P.nonzero().squeeze(1)
        for name in manifest.states:
            state = named[name]
            if is_teacher(name) and manifest.last_hidden == "supervised":
                state = state[to_device(teachers, state.device)]
            out |= encode(name, state, manifest.codec)
        return out


def batches(indices: np.ndarray, lengths: np.ndarray, batch_tokens: int, packed: bool) -> list[np.ndarray]:
    """`indices`, longest first, cut into batches of at most `batch_tokens`, padding included (or one document alone)."""
    cuts = []
    longest = 0
    tokens = 0
    # In the order of length, neighbours have like lengths and little is padded.
    for place, index in enumerate(indices):
        length = int(lengths[index])
        size = tokens + length if packed else longest * (place - (cuts[-1] if cuts else 0) + 1)
        if not cuts or size > batch_tokens:
            cuts.append(place)
            longest = tokens = length
        else:
            tokens += length
    return np.split(indices, cuts[1:]) if len(indices) else []


class Outbox:
    """Brings states to the host and to the writer while the next forward runs: copies on a stream of their own, checksums
    and writes on a thread. At most `UNDERWAY` batches wait; the shard being collected aside, that
    bounds the memory."""

    def __init__(self, writer: CacheWriter):
        self.writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._pending = deque[Future]()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, batch: Batch, states: States) -> None:
        """Raises the error of an earlier batch that could not be written."""
        # A forward is faster than many disks. Without this wait the states that wait to be written would fill the memory.
        while len(self._pending) >= UNDERWAY:
            self._pending.popleft().result()
        on_gpu = states.last_hidden.device.type == "cuda"
        tensors, arrived = self._to_host(batch, states) if on_gpu else (batch.tensors(states, self.writer.manifest), None)
        self._pending.append(self._thread.submit(self._write, batch, tensors, arrived))

    def close(self) -> None:
        while self._pending:
            self._pending.popleft().result()
        self._thread.shutdown()

    def _write(self, batch: Batch, tensors: dict[str, Tensor], arrived: Callable[[], None] | None) -> None:
        if arrived:
            arrived()
        self.writer.add_batch(batch.names, batch.lengths, tensors)

    def _to_host(self, batch: Batch, states: States) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Pinned tensors that are being filled, and a function that returns once they are."""
        devices = {t.device for kind in (states.hidden, states.key, states.value, states.query) for t in kind.values()}
        host: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for device in {states.last_hidden.device, *devices}:
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                # The copies must not begin before the forward has written the states.
                self._streams[device].wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(self._streams[device]))
            states.map(lambda t: t.record_stream(self._streams[t.device]) or t)  # not reused before it is copied
            for name, tensor in batch.tensors(states, self.writer.manifest).items():
                if tensor.device.type == "cuda":
                    # Only a copy into pinned memory runs beside the next forward; any other makes the host wait.
                    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    tensor = pinned.copy_(tensor, non_blocking=True)
                host[name] = tensor
            events = [side.record_event() for side in self._streams.values()]
        return host, lambda: [event.synchronize() for event in events]


def forwards(target: Target | ServedTarget, batches: Iterable[Batch]) -> Iterator[tuple[Batch, States]]:
    """Each batch with its states, in order. Of a server, `target.ahead` further ones are asked for meanwhile."""
    if not target.ahead:
        for batch in batches:
            yield batch, batch.forward(target)
        return
    underway = deque[tuple[Batch, Future]]()
    with ThreadPoolExecutor(1 + target.ahead) as threads:
        for batch in batches:
            underway.append((batch, threads.submit(batch.forward, target)))
            if len(underway) > target.ahead:
                first, states = underway.popleft()
                yield first, states.result()
        for first, states in underway:
            yield first, states.result()


def capture(
    target: Target | ServedTarget, documents: Documents, writer: CacheWriter, batch_tokens: int, share: bool = True
) -> None:
    """Run the target over this process's share of the documents that the cache does not hold yet, then seal the cache.
    `share=False`: every process runs every document (tensor parallelism) and rank 0 alone writes."""
    target.capture(writer.manifest.hidden_layers, writer.manifest.kv_layers, writer.manifest.query_layers)
    todo = batches(documents.missing(writer.done), documents.lengths, batch_tokens, target.packs)
    mine = todo[writer.rank :: writer.world] if share else todo
    outbox = Outbox(writer)
    tokens, own = (sum(int(documents.lengths[batch].sum()) for batch in part) for part in (todo, mine))
    with Progress("tokens", silent=writer.rank != 0) as progress:
        task = progress.add_task("capture", total=tokens)
        done = 0
        for number, (batch, states) in enumerate(
            forwards(target, (Batch([documents[i] for i in indices]) for indices in mine))
        ):
            if number == 0:
                check_first_batch(target, batch, states)
            if share or writer.rank == 0:
                outbox.put(batch, states)
            done += sum(batch.lengths)
            progress.update(task, completed=done * tokens // own)  # rank 0 counts for all, who are about as far
    outbox.close()
    writer.finish()
