"""What the documents say: commands compose, links lead somewhere, the picture of a pack is the rule of visibility."""

import re
import shlex

import pytest
import torch

from common import cli
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
    for job in cli.jobs_of(overrides, multirun):
        cli.compose(config, recipe, job)


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
