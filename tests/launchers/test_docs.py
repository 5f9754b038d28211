"""What the documents say: commands compose, links lead somewhere, the picture of a pack is the rule of visibility."""

import re
import shlex

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from common import cli
from common.overrides import parsed, points
from common.recipe import keys_at
from data_prep.recipe import DataPrepRecipe
from eval.recipe import EvalRecipe
from tests.support.commands import ROOT
from train.attention.visibility import DraftRows, Places, Visibility
from train.recipe import TrainRecipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
PROGRAMS = {
    "data_prep/main.py": ("data_prep", DataPrepRecipe),
    "train/main.py": ("train", TrainRecipe),
    "eval/main.py": ("eval", EvalRecipe),
}
FLAGS = ("-m", "--multirun")


def commands(page):
    """The words of every command of a page: lines of its code blocks, continued ones joined, comments left out."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    for line in lines:
        if any(program in line for program in PROGRAMS) and "main.py" in line:
            yield line.strip()


@pytest.mark.parametrize("line", [line for page in GUIDES for line in commands(page)])
def test_every_command_of_the_guides_composes(line):
    words = shlex.split(line, comments=True)
    program = next(word for word in words if word in PROGRAMS)
    config, recipe = PROGRAMS[program]
    after = [word for word in words[words.index(program) + 1 :] if word != "..."]
    multirun = any(word in FLAGS for word in after)
    # Launchers of sweeps and W&B are extras that need not be installed here.
    overrides = [word for word in after if word not in FLAGS and not word.startswith(("hydra", "tracking=wandb"))]
    overrides = ["target=tiny" if word == "target=TARGET" else word for word in overrides]
    for job in points(overrides, multirun):
        cli.compose(config, recipe, job)


def said() -> dict[str, set[str]]:
    """Override -> the files that say it: pages, comments of YAML files, and messages of the programs."""
    files = [page for page in PAGES if not {"research", "extend"} & set(page.parts)] + sorted((ROOT / "conf").rglob("*.yaml"))
    for room in ("common", "data_prep", "train", "eval", "launchers"):
        files += sorted((ROOT / room).rglob("*.py"))
    words = {}
    for path in files:
        for word in re.findall(r"(?<![\w./{])[a-z_]+(?:\.[a-z_]+)*=(?!=)(?:\{[^}`]*\}|\[[^]`]*\]|[\w./@-]*)", path.read_text()):
            if path.name != "renamed.py":  # what is gone
                words.setdefault(word.rstrip("."), set()).add(str(path.relative_to(ROOT)))
    return words


def test_every_override_that_is_written_anywhere_is_one():
    """A key exists in the recipe of a program and takes the value; a choice exists in its group."""
    recipes = [recipe for _, recipe in PROGRAMS.values()]
    sections = {name for recipe in recipes for name in keys_at(recipe, []) if keys_at(recipe, [name])}
    concrete = {}
    for word, files in said().items():
        key, value = word.split("=", 1)
        *section, name = key.split(".")
        group = ROOT / "conf" / key
        in_text = any(not file.endswith(".py") for file in files)  # in code it may be an argument
        if in_text and group.is_dir() and re.fullmatch(r"[a-z][a-z0-9_]+", value):
            assert (group / f"{value}.yaml").exists(), f"there is no {word}: {sorted(files)}"
        if not section or section[0] not in sections:
            continue
        fields = [field for recipe in recipes if (field := keys_at(recipe, section).get(name))]
        assert fields, f"there is no {key}: {sorted(files)}"
        if value and re.fullmatch(r"[a-z0-9.]+|\{[a-z_]+: [a-z0-9]+\}|\[[a-z0-9_,]+\]", value) and "..." not in value:
            concrete[word] = (fields, files)
    for override, (word, (fields, files)) in zip(parsed(list(concrete)), concrete.items()):
        assert any(takes(field, override.value()) for field in fields), f"{word}: {sorted(files)}"
    assert len(concrete) > 100


def takes(field, value) -> bool:
    try:
        TypeAdapter(field.annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def test_every_guide_has_commands():
    for page in GUIDES:
        assert list(commands(page)), page


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {link}"


def test_files_that_the_documents_name_exist():
    """Paths in backquotes that begin with a room of the repository; research/ keeps the names of its
    day, and extend/ names files that are yet to be written."""
    rooms = r"`((?:common|conf|data_prep|train|eval|launchers|tests|docs)/[\w/.-]+)"
    for page in PAGES:
        if not {"research", "extend"} & set(page.parts):
            missing = [path for path in re.findall(rooms, page.read_text()) if not (ROOT / path).exists()]
            assert not missing, f"{page.name}: {missing}"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_picture_of_a_pack_is_the_rule_of_visibility():
    """docs/pack.svg: documents of 8 and 5 tokens, anchors 2 and 4 of the first and 2 of the second, three slots under ttt."""
    memory = Places(torch.tensor([0] * 8 + [1] * 5), torch.tensor([*range(8), *range(5)]))
    where = [(0, 2), (0, 4), (1, 2)]
    rows = [(document, a, group, j, a + j - 1) for group, (document, a) in enumerate(where) for j in (1, 2, 3)]
    rows = DraftRows(*(torch.tensor(column) for column in zip(*rows)))
    cells = re.findall(r'class="(sees|hidden)" data-row="(\d+)" data-key="(\d+)"', (ROOT / "docs/pack.svg").read_text())
    drawn = torch.zeros(9, 22, dtype=torch.bool)
    for kind, row, key in cells:
        drawn[int(row), int(key)] = kind == "sees"
    assert len(cells) == drawn.numel()
    assert torch.equal(drawn, Visibility(rows, memory, rows, causal=True).dense)
