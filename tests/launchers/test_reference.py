"""The reference of keys and the comments of YAML files are what the typed recipes say."""

import importlib.util
import subprocess
import sys

import pytest
from pydantic import BaseModel

from common import cli
from common.recipe import Section
from eval.recipe import OF_FULL_VIEWS, EvalRecipe
from tests.support.commands import ROOT

SCRIPT = ROOT / "docs/reference/generate.py"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def undescribed(generate, model: type[BaseModel], name: str) -> list[str]:
    """Keys without a description, those of groups in groups too."""
    found = []
    for key, field in generate.keys(model).items():
        section = generate.section_of(field)
        if section:
            found += undescribed(generate, section, f"{name}.{key}")
        elif not field.description:
            found.append(f"{name}.{key}")
    return found


def test_page_and_yaml_comments_are_generated():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_view_of_drafters_of_the_full_view_is_view_topk_chunk():
    assert cli.compose("eval", EvalRecipe, ["view=topk_chunk"]).view == OF_FULL_VIEWS


def test_every_key_is_described(generate):
    assert [key for command, model in generate.COMMANDS.items() for key in undescribed(generate, model, command)] == []


def test_a_key_without_a_description_is_found(generate):
    class Inner(Section):
        told: int = 1
        """What it is."""
        untold: int = 2

    class Outer(Section):
        inner: Inner

    assert undescribed(generate, Outer, "eval") == ["eval.inner.untold"]


def test_a_comment_that_says_something_else_is_replaced(generate):
    class Group(Section):
        sizes: list[int] = [1]
        """How many."""

    head = "# head\n# sizes: written by hand\n"
    found = generate.commented(head + "sizes: [1, 2]  # something else\n", Group)
    assert found == head + "sizes: [1, 2]".ljust(generate.COLUMN) + "# How many.\n"
