"""Everything of Hydra that this project uses and that Hydra does not promise to keep.

Hydra has no public way to read its own command line, or to list the points of a sweep, without running them. Both are needed
before Hydra runs: a mistake is then one line and exit code 2.
"""

import argparse
from collections.abc import Callable

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override

PRIVATE = {
    "hydra._internal.utils.get_args_parser": "every command: flags and overrides are read before Hydra runs",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper.split_arguments": "sweeps (-m): the points, each of "
    "which is checked before any of them runs",
}


def read_arguments(refuse: Callable[[str], None]) -> argparse.Namespace:
    """Hydra's own flags and the overrides of this process's command line. `refuse`(message) is called, and raises, for a flag
    that Hydra does not have; argparse itself would leave the process with several lines."""
    parser = get_args_parser()
    parser.error = refuse
    return parser.parse_args()


def flags_of(words: list[str]) -> list[str]:
    """Hydra's own flags among the words of a command line, and their values, without the folder of configurations."""
    found = get_args_parser().parse_args(words)
    said = {name: value for name, value in vars(found).items() if value and name not in ("overrides", "config_dir")}
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in said.items()]


def points_of(overrides: list[Override]) -> list[list[str]]:
    """The overrides of every point of a sweep."""
    batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [point for batch in batches for point in batch]
