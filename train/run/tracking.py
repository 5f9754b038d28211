"""Where figures go: `metrics.jsonl` in the run folder always, Weights & Biases when asked for."""

import json
import math
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import UserError, first_line
from common.files import parsed_json, write_text
from data_prep.cache.manifest import flatten
from train.recipe import TrackingRecipe


class Tracker:
    """Rank 0's log. Other ranks have none."""

    def __init__(self, recipe: TrackingRecipe, folder: Path, group: str | None, config: dict, resumed_at: int):
        self._path = folder / "metrics.jsonl"
        kept = []
        if self._path.exists():  # what a killed run logged after its last checkpoint will be logged again
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= resumed_at]
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._file = open(self._path, "a", buffering=1)
        self._wandb = _wandb_run(recipe, folder, group, config) if recipe.kind == "wandb" else None

    def log(self, step: int, figures: dict) -> None:
        """Numbers and lists of numbers of one optimizer step; nested names are joined with dots."""
        self._file.write(json.dumps(_as_json({"step": step, **figures}), allow_nan=False) + "\n")
        self._to_wandb(lambda run: run.log(_one_by_one(figures), step=step))

    def picture(self, step: int, name: str, path: Path) -> None:
        def send(run) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, step=step)

        self._to_wandb(send)

    def page(self, step: int, name: str, path: Path) -> None:
        """An HTML file, as it is: W&B's own style sheet would be fetched from a network."""

        def send(run) -> None:
            import wandb

            run.log({name: wandb.Html(str(path), inject=False)}, step=step)

        self._to_wandb(send)

    def close(self) -> None:
        self._file.close()
        self._to_wandb(lambda run: run.finish())

    def _to_wandb(self, send: Callable) -> None:
        """W&B lost on the way (its service is killed, its folder full) costs its own figures and never the run."""
        if self._wandb is None:
            return
        import wandb

        try:
            send(self._wandb)
        except (OSError, wandb.errors.Error) as error:
            print(f"W&B is lost ({first_line(error)}); the figures go on in {self._path}", file=sys.stderr, flush=True)
            self._wandb = None
            with suppress(OSError, wandb.errors.Error):
                wandb.teardown()  # else it tries once more when the process ends


def _as_json(value):
    """JSON has no NaN and no infinity: a figure that is none is null."""
    if isinstance(value, dict):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_by_one(figures: dict) -> dict:
    """Names joined with dots -> numbers. A list becomes a number for each slot, from 1 on: W&B draws numbers alone."""
    found = {}
    for name, value in flatten(figures).items():
        if isinstance(value, list):
            found |= {f"{name}/{slot}": one for slot, one in enumerate(value, start=1)}
        else:
            found[name] = value
    return found


def _step(line: str) -> float:
    """The step that a line of the log is of."""
    try:
        return float(parsed_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the line that was being written when the run was killed


def _wandb_run(recipe: TrackingRecipe, folder: Path, group: str | None, config: dict):
    """Online where a key is known and the host answers within half a minute, else offline; never a prompt. A host that is lost
    later costs another half a minute at the end: what was not sent stays on disk, for `wandb sync`."""
    import wandb

    known = folder / "wandb-id"  # a resumed run goes on under its id
    if not known.exists():
        write_text(known, secrets.token_hex(8))

    def start(mode: str):
        return wandb.init(
            project=recipe.project,
            entity=recipe.entity,
            group=group,
            name=folder.name,
            dir=str(folder),
            config=config,
            id=known.read_text(),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(init_timeout=30, finish_timeout=30, console="off", silent=True),
        )

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    try:
        return start(mode)
    except (wandb.errors.UsageError, ValueError) as error:  # the second: pydantic's, of a setting such as WANDB_MODE
        said = " ".join(str(error).split())[:300]
        raise UserError(f"W&B refuses tracking.project, tracking.entity or a WANDB_* variable: {said}") from error
    except wandb.errors.Error as error:
        print(f"W&B cannot be reached ({str(error).splitlines()[0]}); logging offline to {folder}", file=sys.stderr)
        wandb.teardown()  # its service still holds the id of the run that could not start
        return start("offline")
