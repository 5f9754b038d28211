"""Checkpoints: `step-N/deepspeed` (the engine's own state) and `step-N/drafter` (a plain folder that
`Drafter.from_pretrained` loads). Written aside, then renamed; `best` and `last` are links to a `drafter` folder.
"""

import contextlib
import os
import shutil
from pathlib import Path

import deepspeed
import torch.distributed as dist

from data_prep.errors import UserError
from train.drafter.model import Drafter


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max(folder.glob("step-*"), default=None, key=lambda path: int(path.name.removeprefix("step-")))


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together."""

    def __init__(self, folder: Path, engine, drafter: Drafter, rank: int, keep_last: int):
        self.folder, self._engine, self._drafter, self._rank, self._keep_last = folder, engine, drafter, rank, keep_last
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        dist.barrier()

    def save(self, step: int, state: dict, best: bool) -> None:
        """Write checkpoint `step` with the caller's own `state`, and let `best` and `last` point where they should."""
        aside, final = self.folder / f"step-{step:06d}.tmp", self.folder / f"step-{step:06d}"
        self._engine.save_checkpoint(str(aside), tag="deepspeed", client_state=state, save_latest=False)
        parameters = list(self._drafter.parameters())
        sharded = any(hasattr(p, "ds_id") for p in parameters)
        with deepspeed.zero.GatheredParameters(parameters) if sharded else contextlib.nullcontext():
            if self._rank == 0:
                self._drafter.save_pretrained(aside / "drafter")
        dist.barrier()
        if self._rank == 0:
            _sync_tree(aside)
            if final.exists():  # a run resumed from before it
                shutil.rmtree(final)
            os.replace(aside, final)
            for name in ["last", *(["best"] if best else [])]:
                link = self.folder / f"{name}.tmp"
                link.symlink_to(Path(final.name) / "drafter")
                os.replace(link, self.folder / name)
            self._prune()
        dist.barrier()

    def load(self) -> dict | None:
        """Resume the engine from the newest checkpoint; the `state` saved with it, or None when there is none.

        Raises:
            UserError: the engine cannot read it.
        """
        path = latest(self.folder)
        if path is None:
            return None
        loaded, state = self._engine.load_checkpoint(str(path), tag="deepspeed")
        if loaded is None:
            raise UserError(f"{path} cannot be resumed from; remove it to go on from the checkpoint before it")
        return state

    def _prune(self) -> None:
        steps = sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        best = (self.folder / "best").resolve().parent if (self.folder / "best").exists() else None
        for path in steps[: -self._keep_last]:
            # The best drafter stays; the engine's state beside it is of no more use.
            shutil.rmtree(path / "deepspeed", ignore_errors=True) if path.resolve() == best else shutil.rmtree(path)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
