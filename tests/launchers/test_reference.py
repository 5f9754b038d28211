"""The reference of keys and the comments of YAML files are what the typed recipes say."""

import importlib.util
import subprocess
import sys

import hydra
import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from common import cli
from common.recipe import Section
from data_prep.target.families import Family
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


def test_targets_page_says_what_is_declared_and_each_reason_once(generate):
    families = {
        "one": Family(),
        "two": Family(decode="too large", served="unknown"),
        "three": Family(kv="has none", decode="too large"),
    }
    table = generate.targets_page(families, Family(kv="has none", decode="has none")).split("| --- |")[-1]
    assert "| `one` | yes | yes | yes | yes |\n| `two` | yes | yes | no (1) | no (2) |\n" in table
    assert "| `three` | yes | no (3) | no (1) | yes |\n" in table
    assert "| any other | yes | no (3) | no (3) | yes |\n" in table
    assert table.endswith("1. too large\n2. unknown\n3. has none\n")


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


# Keys whose default in conf is not the recipe's own, and why: the recipe's own is for files that leave the key out.
TARGET = "tiny has a token of its own; other targets may have none"
TOKENS = "the standard library is cut to a size; other sources are taken whole"
AUTO = "null in view=auto: as the drafter was trained"
HELDOUT = "suite=heldout says how much; a suite of records is taken whole unless its file says so"
DIFFERENT = {
    "data_prep": {"target.mask_token_id": TARGET, "data.max_tokens": TOKENS},
    "train": {
        "target.mask_token_id": TARGET,
        "data.max_tokens": TOKENS,
        "objective.anchors": "null, every position, is for ttt; blockwise, the default objective, draws anchors",
        "loss.kl": "the one term of loss=kl; other files name theirs",
    },
    "eval": {
        "target.mask_token_id": TARGET,
        "data.max_tokens": TOKENS,
        **{f"view.{name}": AUTO for name in ("sink", "chunk", "scorer", "pool", "positions", "refresh")},
        **{f"suite.{name}": HELDOUT for name in ("prompt_tokens", "new_tokens", "count", "warmup_tokens")},
    },
}


def differing(generate, model: type[BaseModel], composed: dict, prefix: str = "") -> set[str]:
    """Keys with a default in the recipe and another one in what is composed."""
    found = set()
    for name, field in generate.keys(model).items():
        if name not in composed:
            continue
        section = generate.section_of(field)
        if section:
            found |= differing(generate, section, composed[name], f"{prefix}{name}.")
        elif not field.is_required() and field.get_default(call_default_factory=True) != composed[name]:
            found.add(f"{prefix}{name}")
    return found


@pytest.mark.parametrize("command", DIFFERENT)
def test_defaults_of_recipes_and_of_conf_agree(generate, command):
    with hydra.initialize_config_dir(cli.CONF, version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose(command))
    assert differing(generate, generate.COMMANDS[command], composed) == set(DIFFERENT[command])


def test_every_setting_of_a_suite_has_the_recipe_s_default(generate):
    composed = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/suite/_keys.yaml"))
    # Suites that others report on are asked as conversations, and each says how long an answer is; held-out text is no chat.
    assert differing(generate, generate.section_of(EvalRecipe.model_fields["suite"]), composed) == {"chat", "new_tokens"}


def test_a_default_that_conf_sets_otherwise_is_found(generate):
    class Inner(Section):
        same: int = 1
        other: int = 2

    class Outer(Section):
        inner: Inner
        needed: int

    assert differing(generate, Outer, {"inner": {"same": 1, "other": 3}, "needed": 4}) == {"inner.other"}
