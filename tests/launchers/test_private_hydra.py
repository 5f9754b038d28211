"""What is used of Hydra beyond its promises is there, stands in one file, and does what that file says."""

import sys
from pkgutil import resolve_name

import pytest

from common import hydra_private
from common.errors import UserError
from common.overrides import points
from tests.support.private_names import uses


@pytest.mark.parametrize("name", hydra_private.PRIVATE)
def test_hydra_still_has_the_name(name):
    assert callable(resolve_name(name)), hydra_private.PRIVATE[name]


def test_a_name_that_went_is_noticed():
    with pytest.raises((AttributeError, ImportError)):
        resolve_name(next(iter(hydra_private.PRIVATE)) + "_gone")


def test_no_other_file_uses_a_private_name_of_hydra():
    assert uses("hydra._internal") == {"common/hydra_private.py"}


def test_flags_and_overrides_are_read_without_running_hydra(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "-m", "a=1", "b=2,3"])

    def refuse(message):
        raise UserError(message)

    words = hydra_private.read_arguments(refuse)
    assert words.multirun and not words.help and words.overrides == ["a=1", "b=2,3"]
    monkeypatch.setattr(sys, "argv", ["main.py", "--no-such-flag"])
    with pytest.raises(UserError, match="--no-such-flag"):
        hydra_private.read_arguments(refuse)


def test_a_sweep_is_all_of_its_points():
    assert points(["train.lr=1,2", "seed=3,4"], multirun=True) == [
        ["train.lr=1", "seed=3"],
        ["train.lr=1", "seed=4"],
        ["train.lr=2", "seed=3"],
        ["train.lr=2", "seed=4"],
    ]
