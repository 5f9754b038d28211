"""The shell of every entry point: compose and check the configuration, then let Hydra run.

Hydra runs last. It reports a mistake on many lines, on every rank, with exit code 1. In a sweep, a mistake that only our checks
know would show once the points before it have run. So all jobs of the command line are composed and checked here first. A mistake
is then one line and exit code 2, before a folder is made or a process is started. Hydra composes each job's configuration once
more, which by then is known to be right.

Hydra still does everything that its users know: `-m` and its sweepers and launchers, `--cfg`, `--help`, folders and their logs.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from common import hydra_private
from common.errors import UserError
from common.hashing import stable_hash
from common.ranks import rank
from common.recipe import ROOT
from common.renamed import refuse_renamed

CONF = str(ROOT / "conf")
sys.path.append(str(ROOT / "launchers"))  # Hydra looks for hydra_plugins on the path


def without_local_rank(argv: list[str]) -> list[str]:
    """DeepSpeed's launcher appends `--local_rank=N`; the rank is read from the environment instead."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


def compose(config_name: str, recipe: type[BaseModel], overrides: list[str]) -> BaseModel:
    """The checked recipe of one job.

    Raises:
        UserError: an unknown key, one of an earlier release, a bad value or an unknown choice of a group.
    """
    words = parsed(overrides)
    refuse_renamed(config_name, ((word.key_or_group, word.value()) for word in words))
    try:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            checked = validated(recipe, hydra.compose(config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    if "named" in recipe.model_fields:
        checked = checked.model_copy(update={"named": tuple(word.key_or_group for word in words)})
    return checked


def validated(recipe: type[BaseModel], config: DictConfig) -> BaseModel:
    """`config` as `recipe`. Raises UserError naming every key that is wrong."""
    try:
        return recipe.model_validate(OmegaConf.to_container(config, resolve=True))
    except ValidationError as error:
        raise UserError("; ".join(map(_wrong, error.errors()))) from error


def _wrong(one: dict) -> str:
    """What pydantic says of one key, or of a whole section (whose content would fill the line)."""
    where = ".".join(map(str, one["loc"]))
    got = one["input"]
    message = one["msg"].removeprefix("Value error, ")
    if where:
        message = f"{where}: {message}"
    return message if isinstance(got, dict) else f"{message} (got {got!r})"


def git_revision() -> str | None:
    """The commit of this checkout. None where the code's folder is not the top of a repository that tracks it, as where it was
    copied or installed into another project's."""
    tracked = _git("ls-files", "--error-unmatch", "common/cli.py") is not None
    return _git("rev-parse", "HEAD") if tracked and _git("rev-parse", "--show-prefix") == "" else None


def _git(*words: str) -> str | None:
    """What git says of the code's folder; None: it refuses, or is not here."""
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def arguments() -> argparse.Namespace:
    """Hydra's own flags and the overrides. Raises UserError for a flag that Hydra does not have."""

    def refuse(message: str) -> None:
        raise UserError(f"{message}; overrides are written key=value, see --help")

    return hydra_private.read_arguments(refuse)


def parsed(overrides: list[str]) -> list[Override]:
    """Raises UserError for a word that is no override."""
    try:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(overrides)
    except HydraException as error:
        several = [word for word in overrides if word.count("=") > 1 and "'" not in word]
        advice = f"; a value with '=' in it is quoted twice: \"{several[0].replace('=', '=' + chr(39), 1)}'\"" if several else ""
        raise UserError(_one_line(error) + advice) from error


def jobs_of(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job: one, or under `-m` every point of the sweep."""
    if not multirun:
        return [overrides]
    return hydra_private.points_of(parsed(overrides))


def quoted(text: str) -> str:
    """A value as Hydra's override grammar takes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def folder_name(text: str) -> str:
    """`text` as the name of one folder: no slashes, and within a file name's limit."""
    name = text.replace("/", "_")
    return name if len(name.encode()) <= 200 else f"{name[:150]}-{stable_hash(name):016x}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def sweep_words(key: str, folder: str, overrides: list[str], unnamed: Iterable[str]) -> list[str]:
    """What makes Hydra put every point of a sweep into a folder of `folder`, named after the keys that are swept.

    Raises:
        UserError: the folder itself is swept, `key`.
    """
    words = parsed(overrides)
    swept = {word.key_or_group for word in words if word.is_sweep_override()}
    if key in swept:
        raise UserError(f"{key} is the folder of the whole sweep; every point gets one in it, named after what is swept")
    hidden = {word.key_or_group for word in words} | set(unnamed)
    return [
        f"hydra.sweep.dir={quoted(folder)}",
        "hydra.sweep.subdir='${folder_name:${hydra.job.override_dirname}}'",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(hidden - swept))}]",
    ]


def in_sweep() -> bool:
    """Whether the job that runs is a point of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def fail(error: UserError, code: int = 2) -> None:
    """Rank 0 prints one line and leaves with `code`; a launcher then ends the others, which wait for that so that none of
    them is the first to go and takes rank 0's line with it."""
    if rank() != 0:
        time.sleep(20)  # whoever is still here then saw something that rank 0 did not, and says so
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # not sys.exit: a collective's threads must not keep a failed rank alive


def main(
    config_name: str, recipe: type[BaseModel], check: Callable[[BaseModel], None], task: Callable[[BaseModel], None], gather=None
) -> None:
    """Run `task` under Hydra (`-m`, `--cfg`, `--help` included) once every job's recipe has passed `check`.

    `gather`: where a recipe has a folder `out`, every point of a sweep gets one in it, and `gather`(folder) looks at them all.
    """
    # 1. The words of the command line. Hydra reads `sys.argv` too, so that they are changed there.
    sys.argv[1:] = without_local_rank(sys.argv[1:])

    # 2. Every job's recipe, checked.
    recipes: list[BaseModel] = []
    swept = False
    try:
        words = arguments()
        recipes = _checked_recipes(config_name, recipe, check, words)
        swept = bool(gather and words.multirun and recipes)
        if swept:
            sys.argv += sweep_words("out", recipes[0].out, words.overrides, ("out", "tracking", "cache.dir"))
    except UserError as error:
        fail(error)

    # 3. Hydra runs the jobs: here, one after the other, or where its launcher starts them.
    hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")(_job(recipe, task, has_out=bool(gather)))()

    # 4. What the points of a sweep say together.
    if swept:
        try:
            gather(Path(recipes[0].out))
        except UserError as error:
            fail(error)


def _checked_recipes(
    config_name: str, recipe: type[BaseModel], check: Callable[[BaseModel], None], words: argparse.Namespace
) -> list[BaseModel]:
    """The recipe of each job. None where Hydra is only asked to show something: help, or a configuration, even a wrong one."""
    if words.help or words.hydra_help or words.cfg or words.info:
        return []
    recipes = [compose(config_name, recipe, overrides) for overrides in jobs_of(words.overrides, words.multirun)]
    for one in recipes:
        check(one)
    return recipes


def _job(recipe: type[BaseModel], task: Callable[[BaseModel], None], has_out: bool) -> Callable[[DictConfig], None]:
    """What Hydra calls for each job. `has_out`: in a sweep the recipe's `out` is the folder that Hydra made for the point."""

    def job(config: DictConfig) -> None:
        # An error that left this function would become Hydra's many lines.
        try:
            checked = validated(recipe, config)
            if has_out and in_sweep():
                checked = checked.model_copy(update={"out": HydraConfig.get().runtime.output_dir})
            task(checked)
        except UserError as error:
            fail(error)

    return job


def _one_line(error: Exception) -> str:
    """Hydra's message without its search path and its stack of causes."""
    return " ".join(str(error).split("Config search path")[0].split())
