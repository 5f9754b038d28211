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
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from common import hydra_private
from common.errors import UserError
from common.files import said_in_one_line
from common.overrides import (
    CONF,
    addressed,
    nearest,
    one_line,
    options_of,
    parsed,
    points,
    search_path_of,
    search_word,
    sweep_words,
)
from common.ranks import rank
from common.recipe import ROOT, keys_at
from common.renamed import refuse_renamed

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
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        try:
            config = hydra.compose(config_name, addressed(config_name, words), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AssertionError) as error:
            raise UserError(one_line(error)) from error  # the last three: Hydra's words for a defaults list that is none
        if search_path := search_path_of(words):  # our own files call nothing optional
            _refuse_unfound(config_name, config, search_path)
    with open_dict(config):
        del config["hydra"]
    checked = validated(recipe, config)
    if "named" in recipe.model_fields:
        checked = checked.model_copy(update={"named": tuple(word.key_or_group for word in words)})
    return checked


def _refuse_unfound(config_name: str, config: DictConfig, search_path: list[str]) -> None:
    """Raises UserError for a group's choice that a defaults list calls optional and that does not exist: Hydra leaves it out."""
    for group, choice in config.hydra.runtime.choices.items():
        if not isinstance(choice, str) or group.startswith("hydra/"):
            continue
        options = options_of(group.split("@")[0], config_name, search_path)
        if options and choice not in options:
            raise UserError(f"{group}={choice}: there are {', '.join(options)}{nearest(choice, options)}")


def validated(recipe: type[BaseModel], config: DictConfig) -> BaseModel:
    """`config` as `recipe`. Raises UserError naming every key that is wrong."""
    try:
        return recipe.model_validate(OmegaConf.to_container(config, resolve=True))
    except ValidationError as error:
        raise UserError("; ".join(_wrong(recipe, one) for one in error.errors())) from error
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def _wrong(recipe: type[BaseModel], one: dict) -> str:
    """What pydantic says of one key, or of a whole section (whose content would fill the line)."""
    where = ".".join(map(str, one["loc"]))
    got = one["input"]
    if one["type"] == "extra_forbidden":
        *section, key = one["loc"]
        return f"{where}: there is no such key{nearest(str(key), keys_at(recipe, section))}"
    message = one["msg"].removeprefix("Value error, ")
    if where:
        message = f"{where}: {message}"
    return message if isinstance(got, dict) else f"{message} (got {repr(got)[:200]})"


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
    """Hydra's own flags and the overrides of this process's command line, which is changed to what Hydra is to read.

    Raises:
        UserError: a flag that Hydra does not have, or that would take another configuration than the program's.
    """

    def refuse(message: str) -> None:
        raise UserError(f"{message}; overrides are written key=value, see --help")

    sys.argv[1:] = without_local_rank(sys.argv[1:])
    found = hydra_private.read_arguments(refuse)
    if found.config_name or found.config_path:
        raise UserError("--config-name and --config-path: a program has one configuration; name an experiment, or a --config-dir")
    if found.config_dir:
        if any(word.startswith("hydra.searchpath=") for word in found.overrides):
            raise UserError("--config-dir and hydra.searchpath say the same; give all folders to hydra.searchpath=[file://A,file://B]")
        found.overrides.append(search_word(found.config_dir))
    words = parsed(found.overrides, found.multirun)
    found.overrides = [word.input_line for word in words]
    return found


def for_hydra(config_name: str, found: argparse.Namespace) -> None:
    """Leave Hydra, which reads `sys.argv`, the words that were checked."""
    words = parsed(found.overrides, found.multirun)
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        sys.argv[1:] = [*hydra_private.flags_of(sys.argv[1:]), *addressed(config_name, words)]


def in_sweep() -> bool:
    """Whether the job that runs is a point of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def internal(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of `sys.excepthook`: an error that is not the user's keeps its traceback, and is called what it is."""
    traceback.print_exception(kind, error, trace)
    if not issubclass(kind, KeyboardInterrupt):
        print("internal error: this is a fault of Understudy's; please report the lines above", file=sys.stderr, flush=True)


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
    sys.excepthook = internal

    # 1. The words of the command line, and every job's recipe, checked.
    recipes: list[BaseModel] = []
    swept = False
    try:
        words = arguments()
        recipes = _checked_recipes(config_name, recipe, check, words)
        for_hydra(config_name, words)
        swept = bool(gather and words.multirun and recipes)
        if swept:
            sys.argv += sweep_words("out", recipes[0].out, words.overrides, ("out", "tracking", "cache.dir"))
    except UserError as error:
        fail(error)

    # 2. Hydra runs the jobs: here, one after the other, or where its launcher starts them.
    os.environ["HYDRA_FULL_ERROR"] = "1"  # an internal error leaves Hydra whole
    hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")(_job(recipe, task, has_out=bool(gather)))()

    # 3. What the points of a sweep say together.
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
    recipes = [compose(config_name, recipe, overrides) for overrides in points(words.overrides, words.multirun)]
    with said_in_one_line("a path"):
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
