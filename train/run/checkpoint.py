"""Checkpoints: `step-N/engine` (what a run resumes from) and `step-N/drafter` (a plain folder that `load_drafter`
loads). Written aside by all ranks, fsynced, then renamed; `best` and `last` are links to a `drafter` folder.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import write_text
from common.hashing import file_hash, is_changed, read_sums, write_sums
from common.tensor_files import write_safetensors
from train.drafter.base import Drafter
from train.run.folder import checkpoint_folders, latest, step_of
from train.run.state import KINDS, WEIGHTS, EngineState, file_name

Result = TypeVar("Result")
STATE = "state.json"
FILE_BYTES = 128 * 1024**2  # of float32 parameters: small enough that ranks share the files of most drafters


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together."""

    def __init__(self, folder: Path, engine, drafter: Drafter, rank: int, keep_last: int):
        self.folder = folder
        self._drafter = drafter
        self._rank = rank
        self._keep_last = keep_last
        self._served = {f"drafter.{name}" for name, _ in drafter.named_parameters()}  # as the engine calls them
        self._state = EngineState(engine)
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        # No rank may look for checkpoints while rank 0 still removes the halves of old ones.
        dist.barrier()

    def save(self, step: int, state: dict) -> None:
        """Write checkpoint `step` with the caller's own `state` (JSON), whose `best_step` names the checkpoint that `best` means,
        or is 0. The ranks write the files in turn: each holds its share of one float32 set of the parameters on the host at a
        time, and rank 0, which writes the drafter's folder, the whole of it.

        Raises:
            UserError: it cannot be written, as on a full disk; the checkpoints before it stay as they are.
        """
        final = self.folder / f"step-{step:06d}"
        aside = final.with_suffix(".tmp")

        def begin() -> dict[str, str]:
            (aside / "engine").mkdir(parents=True)
            write_text(aside / "engine" / STATE, json.dumps(state | {"engine": self._state.counters()}))
            return {STATE: file_hash(aside / "engine" / STATE)}

        sums = self._on_rank_0(begin, final)
        for kind in KINDS:
            sums |= self._write(kind, aside, final)

        def finish() -> None:
            write_sums(aside / "engine", sums)
            # In this order: when the name is there, all that it names is on the disk; when an older checkpoint goes, the links no
            # longer point to it.
            _sync(*aside.rglob("*"), aside)
            os.replace(aside, final)
            self._link(step, state["best_step"])
            self._prune(state["best_step"])

        self._on_rank_0(finish, final)

    def _write(self, kind: str, aside: Path, final: Path) -> dict[str, str]:
        """One set of the parameters, and with the weights the drafter's own folder, which is made of them. The checksums of all
        ranks' files."""
        mine = list(enumerate(self._state.files(FILE_BYTES)))[self._rank :: dist.get_world_size()]
        serves = kind == WEIGHTS and self._rank == 0
        tensors = self._state.gather(kind, {name for _, names in mine for name in names} | (self._served if serves else set()))

        def write() -> dict[str, str]:
            sums = {}
            for index, names in mine:
                path = aside / "engine" / file_name(kind, index)
                sums[path.name] = write_safetensors(path, {name: [tensors[name]] for name in names if name in tensors})
                _sync(path)  # on a file system of the network nobody else can
            if serves:
                self._drafter.save_pretrained(aside / "drafter", _of(self._drafter, tensors))
            return sums

        return {name: one for sums in self._together(write, final) for name, one in sums.items()}

    def load(self) -> dict | None:
        """Resume the engine from the newest checkpoint; the `state` saved with it, or None when there is none.

        Raises:
            UserError: it cannot be read, or not by all ranks.
        """
        # Each rank looks for itself. On a file system that they do not share they would resume at different steps.
        path = latest(self.folder)
        if len(set(_from_all(path and path.name))) > 1:
            raise UserError(
                f"{self.folder} is not the same folder on all hosts; run.dir must be on a file system that they share"
            )
        if path is None:
            return None
        try:
            self._check(path)
            state = json.loads((path / "engine" / STATE).read_text())
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

    def _check(self, path: Path) -> None:
        """Raises ValueError or OSError, on all ranks, where a file of the checkpoint is not as it was written."""
        engine, drafter = path / "engine", path / "drafter"
        files = [*(engine / name for name in sorted(read_sums(engine))), *(drafter / name for name in sorted(read_sums(drafter)))]
        # Each rank reads its share: reading a file takes longer than anything else here.
        mine = files[self._rank :: dist.get_world_size()]
        if damaged := [name for name in _from_all(next((one.name for one in mine if _is_damaged(one)), None)) if name]:
            raise ValueError(f"{damaged[0]} is not as it was written")

    def _on_rank_0(self, work: Callable[[], Result], final: Path) -> Result:
        """Rank 0 works and the others wait for what it returns."""
        return self._together(lambda: work() if self._rank == 0 else None, final)[0]

    def _together(self, work: Callable[[], Result], final: Path) -> list[Result]:
        """What `work` returns on each rank; if one fails, all of them end alike. Without this exchange the others would go on to
        their next collective, and wait there for a rank that has left."""
        result = failure = None
        try:
            result = work()
        except (OSError, SafetensorError) as error:
            failure = getattr(error, "strerror", None) or str(error)
        found = _from_all((result, failure))
        if failures := [failure for _, failure in found if failure]:
            if self._rank == 0:
                shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)
            raise UserError(
                f"{final} cannot be written ({failures[0]}); the checkpoints before it are intact. Make room, then run the same "
                "command again"
            )
        return [result for result, _ in found]

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


def _from_all(mine: Result) -> list[Result]:
    """Each rank's."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _of(drafter: Drafter, tensors: dict) -> dict:
    """The drafter's own weights, in the precision in which the engine computes, from the engine's float32 ones."""
    return {name: tensors[f"drafter.{name}"].to(p.dtype) for name, p in drafter.named_parameters()}


def _is_damaged(path: Path) -> bool:
    try:
        return is_changed(path)
    except OSError:  # such as a file that is gone
        return True


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
