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
    return max(_steps(folder), default=None, key=_number)


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.suffix != ".tmp"]


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together."""

    def __init__(self, folder: Path, engine, drafter: Drafter, rank: int, keep_last: int):
        self.folder, self._engine, self._drafter, self._rank, self._keep_last = folder, engine, drafter, rank, keep_last
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        dist.barrier()

    def save(self, step: int, state: dict) -> None:
        """Write checkpoint `step` with the caller's own `state`, whose `best_step` names the checkpoint that `best` means."""
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
            os.replace(aside, final)
            self._link(step, state["best_step"])
            self._prune(state["best_step"])
        dist.barrier()

    def load(self) -> dict | None:
        """Resume the engine from the newest checkpoint; the `state` saved with it, or None when there is none.

        Raises:
            UserError: the engine cannot read it.
        """
        path = latest(self.folder)
        if path is None:
            return None
        try:
            loaded, state = self._engine.load_checkpoint(str(path), tag="deepspeed")
        except Exception as error:  # whatever torch and DeepSpeed raise for a file that is cut or gone
            loaded, reason = None, f" ({str(error).strip().splitlines()[0]})"
        else:
            reason = ""
        if loaded is None:
            raise UserError(f"{path} cannot be resumed from{reason}; remove it to go on from the checkpoint before it")
        if self._rank == 0:
            self._link(_number(path), state["best_step"])  # a run killed between a checkpoint and its links
        return state

    def _link(self, last: int, best: int) -> None:
        for name, step in (("last", last), ("best", best)):
            link = self.folder / f"{name}.tmp"
            link.symlink_to(Path(f"step-{step:06d}") / "drafter")
            os.replace(link, self.folder / name)

    def _prune(self, best: int) -> None:
        for path in sorted(_steps(self.folder), key=_number)[: -self._keep_last]:
            # The best drafter stays; the engine's state beside it is of no more use.
            shutil.rmtree(path / "deepspeed", ignore_errors=True) if _number(path) == best else shutil.rmtree(path)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
