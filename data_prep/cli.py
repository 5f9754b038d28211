"""The shell of every entry point: compose and check the configuration, then let Hydra run.

Hydra reports a mistake on many lines, on every rank, with exit code 1. Here the configuration of every job of the
command line is composed and checked *before* Hydra runs, and a mistake is one line and exit code 2.
"""

import os
import sys
from collections.abc import Callable

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from data_prep.errors import UserError
from data_prep.recipe import ROOT

CONF = str(ROOT / "conf")


def without_local_rank(argv: list[str]) -> list[str]:
    """DeepSpeed's launcher appends `--local_rank=N`; the rank is read from the environment instead."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


def compose(config_name: str, recipe: type[BaseModel], overrides: list[str]) -> BaseModel:
    """The checked recipe of one job.

    Raises:
        UserError: an unknown key, a bad value or an unknown choice of a group.
    """
    try:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            return validated(recipe, hydra.compose(config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error


def validated(recipe: type[BaseModel], config: DictConfig) -> BaseModel:
    """`config` as `recipe`. Raises UserError naming every key that is wrong."""
    try:
        return recipe.model_validate(OmegaConf.to_container(config, resolve=True))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" if e["loc"] else e["msg"] for e in error.errors()
        ]
        raise UserError("; ".join(wrong)) from error


def jobs_of(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job: one, or under `-m` every point of the sweep."""
    if not multirun:
        return [overrides]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(_one_line(error)) from error
    return [job for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def fail(error: UserError, speaks: bool = True) -> None:
    """Print one line (on the rank that speaks) and leave with code 2."""
    if speaks:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)  # not sys.exit: a collective's threads must not keep a failed rank alive


def main(
    config_name: str, recipe: type[BaseModel], check: Callable[[BaseModel], None], task: Callable[[BaseModel], None]
) -> None:
    """Run `task` under Hydra (`-m`, `--cfg`, `--help` included) once every job's recipe has passed `check`."""
    sys.argv[1:] = without_local_rank(sys.argv[1:])
    arguments = get_args_parser().parse_args()

    def job(config: DictConfig) -> None:
        try:
            task(validated(recipe, config))
        except UserError as error:
            fail(error)

    try:
        if not (arguments.help or arguments.hydra_help or arguments.cfg or arguments.info):
            for overrides in jobs_of(arguments.overrides, arguments.multirun):
                check(compose(config_name, recipe, overrides))
    except UserError as error:
        fail(error)
    hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")(job)()


def _one_line(error: Exception) -> str:
    """Hydra's message without its search path and its stack of causes."""
    return " ".join(str(error).split("Config search path")[0].split())
