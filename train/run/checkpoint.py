"""Checkpoints: `step-N/engine` (what a run resumes from) and `step-N/drafter` (a plain folder that `load_drafter`
loads). Written aside, fsynced, then renamed; `best` and `last` are links to a `drafter` folder.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError
from common.files import write_text
from train.drafter.base import Drafter
from train.run.folder import checkpoint_folders, latest, step_of
from train.run.state import KINDS, WEIGHTS, EngineState


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together."""

    def __init__(self, folder: Path, engine, drafter: Drafter, rank: int, keep_last: int):
        self.folder = folder
        self._drafter = drafter
        self._rank = rank
        self._keep_last = keep_last
        self._state = EngineState(engine)
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        # No rank may look for checkpoints while rank 0 still removes the halves of old ones.
        dist.barrier()

    def save(self, step: int, state: dict) -> None:
        """Write checkpoint `step` with the caller's own `state` (JSON), whose `best_step` names the checkpoint that `best` means,
        or is 0. Rank 0 holds one float32 set of the parameters on the host at a time.

        Raises:
            UserError: it cannot be written, as on a full disk; the checkpoints before it stay as they are.
        """
        final = self.folder / f"step-{step:06d}"
        aside = final.with_suffix(".tmp")

        def begin() -> None:
            (aside / "engine").mkdir(parents=True)
            write_text(aside / "engine/state.json", json.dumps(state | {"engine": self._state.counters()}))

        self._on_rank_0(begin, final)
        for kind in KINDS:
            self._write(kind, aside, final)

        def finish() -> None:
            # In this order: when the name is there, all that it names is on the disk; when an older checkpoint goes, the links no
            # longer point to it.
            _sync(*aside.rglob("*"), aside)
            os.replace(aside, final)
            self._link(step, state["best_step"])
            self._prune(state["best_step"])

        self._on_rank_0(finish, final)

    def _write(self, kind: str, aside: Path, final: Path) -> None:
        """One set of the parameters, and with the weights the drafter's own folder, which is made of them."""
        tensors = self._state.gather(kind, keep=self._rank == 0)
        self._on_rank_0(lambda: save_file(tensors, aside / f"engine/{kind}.safetensors"), final)
        if kind == WEIGHTS:
            self._on_rank_0(lambda: self._drafter.save_pretrained(aside / "drafter", _of(self._drafter, tensors)), final)

    def load(self) -> dict | None:
        """Resume the engine from the newest checkpoint; the `state` saved with it, or None when there is none.

        Raises:
            UserError: it cannot be read, or not by all ranks.
        """
        # Each rank looks for itself. On a file system that they do not share they would resume at different steps.
        path = latest(self.folder)
        seen: list = [None] * dist.get_world_size()
        dist.all_gather_object(seen, path and path.name)
        if len(set(seen)) > 1:
            raise UserError(
                f"{self.folder} is not the same folder on all hosts; run.dir must be on a file system that they share"
            )
        if path is None:
            return None
        try:
            state = json.loads((path / "engine/state.json").read_text())
            self._state.load(path / "engine", state.pop("engine"))
            with safe_open(path / "drafter/model.safetensors", framework="pt") as file:
                for name in file.keys() & dict(self._drafter.named_buffers()).keys():  # such as a reduced vocabulary
                    self._drafter.get_buffer(name).copy_(file.get_tensor(name))
        except (OSError, SafetensorError, ValueError, LookupError) as error:  # a file that is cut or gone
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{path} cannot be resumed from ({reason}); remove it to go on from the checkpoint before it"
            ) from error
        if self._rank == 0:
            self._link(step_of(path), state["best_step"])  # a run killed between a checkpoint and its links
        return state

    def _on_rank_0(self, work: Callable[[], None], final: Path) -> None:
        """Rank 0 works and the others wait; if it fails, all of them end alike. Without the broadcast the others would go on to
        their next collective, and wait there for a rank that has left."""
        failure = [None]
        if self._rank == 0:
            try:
                work()
            except (OSError, SafetensorError) as error:
                failure = [getattr(error, "strerror", None) or str(error)]
                shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)
        dist.broadcast_object_list(failure)
        if failure[0]:
            raise UserError(
                f"{final} cannot be written ({failure[0]}); the checkpoints before it are intact. Make room, then run the same "
                "command again"
            )

    def _link(self, last: int, best: int) -> None:
        for name, step in (("last", last), ("best", best)):
            if not step:
                continue  # no checkpoint was judged yet
            link = self.folder / f"{name}.tmp"
            link.symlink_to(Path(f"step-{step:06d}") / "drafter")
            os.replace(link, self.folder / name)
        _sync(self.folder)  # before an older checkpoint goes

    def _prune(self, best: int) -> None:
        for path in sorted(checkpoint_folders(self.folder), key=step_of)[: -self._keep_last]:
            # The best drafter stays; what a run resumes from beside it is of no more use.
            old = path / "engine" if step_of(path) == best else path
            gone = path.with_suffix(".tmp")
            if old.exists():
                os.replace(old, gone)  # at once: a run killed on the way leaves no half of a checkpoint
                shutil.rmtree(gone)


def _of(drafter: Drafter, tensors: dict) -> dict:
    """The drafter's own weights, in the precision in which the engine computes, from the engine's float32 ones."""
    return {name: tensors[f"drafter.{name}"].to(p.dtype) for name, p in drafter.named_parameters()}


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
