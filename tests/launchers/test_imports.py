"""Imports run one way, and never in a circle. All files are parsed; imports inside functions count as well."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from common.recipe import ROOT

# Each room may import itself and those before it.
ROOMS = ("common", "data_prep", "train", "eval")
# The same inside a room. What is not in a table (recipes, builders, entry points) is held by the order of rooms and by the
# test of circles.
INSIDE = {
    "data_prep": ("sources", "target", "cache", "capture", "synthesis"),
    "train": (
        "attention",
        "precision",
        "losses",
        "schedules",
        "drafter",
        "views",
        "data",
        "objectives",
        "measure",
        "run",
    ),
    "eval": ("prompts", "caches", "oracle", "engine", "judging", "serving", "live"),
}
WITHOUT_CIRCLES = ("common", "data_prep", "train", "eval")
# A schedule is given a drafter and names its type, while the drafter's configuration looks its schedule up. In these rooms
# imports for type checkers alone (`if TYPE_CHECKING:`) may go against the order, because they never run.
TYPES_ASIDE = ("train",)
Graph = dict[str, set[str]]  # module -> the modules of ours that it imports


def imports_of(root: Path, types_aside: tuple[str, ...] = ()) -> Graph:
    """The graph of all modules under `root` that lie in one of the rooms. Of `types_aside`, rooms, without the imports that are
    there for type checkers alone."""
    files = {_name(file.relative_to(root)): file for room in ROOMS for file in sorted((root / room).rglob("*.py"))}
    graph: Graph = {}
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(file.read_text())
        if _place(module, types_aside) is not None:
            _remove_types(tree)
        graph[module] = {found for found in _imported(tree, package, files.keys()) if found != module}
    return graph


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _remove_types(tree: ast.Module) -> None:
    """Empty every `if TYPE_CHECKING:`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []


def _imported(tree: ast.AST, package: str, modules) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from a import b`: b is a module, or a name in module a
                name = f"{base}.{alias.name}"
                if name in modules:
                    yield name
                elif base in modules:
                    yield base


def against(graph: Graph, order: tuple[str, ...]) -> set[str]:
    """Imports from a place in `order` of a later one."""
    return {
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if (mine := _place(module, order)) is not None and (theirs := _place(other, order)) is not None and theirs > mine
    }


def _place(module: str, order: tuple[str, ...]) -> int | None:
    return next((number for number, room in enumerate(order) if module == room or module.startswith(room + ".")), None)


def circle(graph: Graph) -> list[str]:
    """The modules of one circle of imports; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def imports_of_test_files(root: Path) -> set[str]:
    """Imports of a test file, or of conftest.py, anywhere under `root`/tests."""
    files = {_name(file.relative_to(root)): file for file in sorted((root / "tests").rglob("*.py"))}
    found = set()
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for other in _imported(ast.parse(file.read_text()), package, files.keys()):
            if other.rpartition(".")[2].startswith(("test_", "conftest")):
                found.add(f"{module} imports {other}")
    return found


@pytest.fixture(scope="module")
def graph() -> Graph:
    graph = imports_of(ROOT)
    assert len(graph) > 100 and sum(map(len, graph.values())) > 400  # the parser saw the tree
    return graph


@pytest.fixture(scope="module")
def running() -> Graph:
    """Without what `TYPES_ASIDE` allows."""
    return imports_of(ROOT, TYPES_ASIDE)


def test_rooms_import_earlier_rooms_alone(graph):
    assert against(graph, ROOMS) == set()


@pytest.mark.parametrize("room", INSIDE)
def test_inside_a_room_imports_run_one_way(running, room):
    assert against(running, tuple(f"{room}.{part}" for part in INSIDE[room])) == set()


@pytest.mark.parametrize("room", WITHOUT_CIRCLES)
def test_no_modules_import_each_other_in_a_circle(running, room):
    assert circle({module: others for module, others in running.items() if _place(module, (room,)) is not None}) == []


def test_imports_for_type_checkers_are_left_aside_where_that_is_said(tmp_path):
    text = "from typing import TYPE_CHECKING\nimport train.b\nif TYPE_CHECKING:\n    import train.c\nelse:\n    import train.d\n"
    files = {"train/a.py": text, "train/b.py": "", "train/c.py": "", "train/d.py": "", "eval/a.py": text}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    graph = imports_of(tmp_path, ("train",))
    assert graph["train.a"] == {"train.b", "train.d"}
    assert graph["eval.a"] == {"train.b", "train.c", "train.d"}
    assert imports_of(tmp_path)["train.a"] == {"train.b", "train.c", "train.d"}


def test_no_test_file_imports_another():
    """What tests share lies in tests/support. Else a test file cannot change without a look at those that borrow from it."""
    assert imports_of_test_files(ROOT) == set()


def test_an_import_of_a_test_file_is_found(tmp_path):
    files = {
        "conftest.py": "",
        "support/packs.py": "",
        "train/test_a.py": "from tests.support import packs\nfrom tests.support.packs import document\n",
        "train/test_b.py": "def f():\n    from .test_a import packs\n",
        "train/test_c.py": "from tests.train import test_b\n",
        "train/test_d.py": "import tests.conftest\n",
    }
    for name, text in files.items():
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).write_text(text)
    assert imports_of_test_files(tmp_path) == {
        "tests.train.test_b imports tests.train.test_a",
        "tests.train.test_c imports tests.train.test_b",
        "tests.train.test_d imports tests.conftest",
    }


def test_what_runs_against_the_order_is_found(tmp_path):
    """A tree with one import of each forbidden kind: written in a function, relative, and in a circle."""
    files = defaultdict(str) | {
        "common/files.py": "def f():\n    from train import loop\n",
        "train/__init__.py": "",
        "train/loop.py": "from .attention import mask\nimport data_prep.cache\n",
        "train/attention/__init__.py": "from . import mask\n",
        "train/attention/mask.py": "from train.run.engine import Engine\n",
        "train/run/engine.py": "import train.attention.mask\n",
        "data_prep/cache.py": "import common.files\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = imports_of(tmp_path)
    assert against(graph, ROOMS) == {"common.files imports train.loop"}
    order = ("train.attention", "train.run")
    assert against(graph, order) == {"train.attention.mask imports train.run.engine"}
    assert set(circle({m: o for m, o in graph.items() if m != "common.files"})) == {"train.attention.mask", "train.run.engine"}
    assert graph["train.attention"] == {"train.attention.mask"}  # relative
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
