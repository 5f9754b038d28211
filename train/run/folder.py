"""A run's folder: who owns it, which run it holds, and its newest checkpoint.

This file imports no DeepSpeed: train/main.py asks here before it has said on which device DeepSpeed is to run.
"""

import fcntl
import json
import os
import time
from pathlib import Path

from common.cli import git_revision
from common.errors import UserError
from common.files import read_json, write_text
from data_prep.cache.manifest import Manifest
from train.recipe import TrainRecipe

RECIPE = "recipe.json"


def lock_run(folder: Path, patience_s: float = 15) -> int:
    """Own the run folder until this process ends. A killed run's ranks need a moment to follow their launcher.

    Raises:
        UserError: another run is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(f"another run is using {folder}; wait for it or choose another run.dir") from error
            time.sleep(0.5)


def checkpoints_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_folders(folder: Path) -> list[Path]:
    """The complete checkpoints. One that is being written, or was when the run was killed, ends in .tmp."""
    return [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint that a run can resume from.

    Raises:
        UserError: there are checkpoints of an earlier format only.
    """
    found = max((path for path in checkpoint_folders(folder) if (path / "engine").exists()), default=None, key=step_of)
    if found is not None:
        return found
    if earlier := [path for path in checkpoint_folders(folder) if (path / "deepspeed").exists()]:
        raise UserError(
            f"{max(earlier, key=step_of)} is of an earlier format, from which this release cannot resume; choose another run.dir "
            "(drafter.warm_start takes the weights of its drafter folder) or remove that folder"
        )
    return None


def begun(run_dir: Path) -> dict:
    """The recipe of a run that goes on; empty where none does. Raises UserError where it cannot be read."""
    path = run_dir / RECIPE
    if not path.exists() or latest(checkpoints_of(run_dir)) is None:
        return {}
    recipe = read_json(path, "without it this run is not known: choose another run.dir")
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not the recipe of a run; choose another run.dir")
    return recipe


def refuse_another_run(recipe: TrainRecipe, run_dir: Path, manifest: Manifest) -> None:
    """Raises UserError when the folder holds checkpoints of another recipe or of another cache."""
    if not (earlier := begun(run_dir)):
        return
    if differences := recipe.resumable_differences(earlier):
        raise UserError(
            f"{run_dir} holds a run of another recipe; these differ: {', '.join(differences)}. "
            "Choose another run.dir or remove that folder"
        )
    if earlier.get("cache_manifest_hash") != manifest.hash():
        raise UserError(f"{run_dir} was trained on another cache than {recipe.cache.dir}")


def write_recipe(recipe: TrainRecipe, run_dir: Path, manifest: Manifest, world_size: int) -> dict:
    """Write down what the run is, for the run that resumes it; what was written."""
    config = {
        **recipe.model_dump(mode="json"),
        "git_revision": git_revision(),
        "cache_manifest_hash": manifest.hash(),
        "world_size": world_size,
    }
    write_text(run_dir / RECIPE, json.dumps(config, indent=1))
    return config
