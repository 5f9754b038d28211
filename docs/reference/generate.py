"""Writes docs/reference/config.md and the comments behind the keys of conf/**/*.yaml, both from the typed recipes; and
docs/reference/targets.md, from what is declared of families of targets.

    python docs/reference/generate.py            write all
    python docs/reference/generate.py --check    exit with 1, naming the files, where one is not what would be written

A key is described once: by the string below it in its recipe. The head of a YAML file, comments on lines of their own and all of
conf/experiment and of the suites' own files (whose comments are about values) are written by hand.
"""

import argparse
import re
import sys
import typing
from pathlib import Path
from types import UnionType

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import hydra  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from data_prep.recipe import DataPrepRecipe  # noqa: E402
from data_prep.target.families import FAMILIES, OTHER, SERVER, Family  # noqa: E402
from eval.read_by import READ_BY  # noqa: E402
from eval.recipe import EvalRecipe  # noqa: E402
from train.recipe import TrainRecipe  # noqa: E402

COMMANDS = {"data_prep": DataPrepRecipe, "train": TrainRecipe, "eval": EvalRecipe}
PAGE = ROOT / "docs/reference/config.md"
TARGETS_PAGE = ROOT / "docs/reference/targets.md"
COLUMN = 25  # where a comment begins, if its key and value leave the room
BY_HAND = ("experiment", "hydra", "deepspeed")  # groups whose comments are not generated
HEAD = """# Configuration

Every key of the three commands. `python docs/reference/generate.py` writes this page from the typed recipes; edit those.

A key is set on the command line as `section.key=value`, whether a file of `conf/` lists it or not. A group, such as `data` or
`reuse`, is a folder of `conf/` with one file per choice: `data=jsonl` takes `conf/data/jsonl.yaml`, whose values may differ from
the defaults below. `--config-dir=FOLDER` (or `hydra.searchpath=[file://FOLDER]`) adds choices of your own, such as
`FOLDER/experiment/mine.yaml`. A path may be written as it is; only under `-m` must one with a comma be quoted.
Defaults are those of the command without any argument. *required* means that there is none;
*unset* means that the chosen file does not list the key and the recipe's own default holds. `eval` warns of a key on the command
line that its mode does not read.
"""

TARGETS_HEAD = f"""# Targets

What each family of targets can do. `python docs/reference/generate.py` writes this page from `data_prep/target/families.py`; edit
that. A family is the `model_type` of a model's `config.json`.

- **Hidden states**: `cache.kinds=[hidden]`, `reuse=hidden`. They come from decoders of transformers with a list of layers,
  an embedding and a head. Whenever a target is loaded, they are compared on six tokens with what transformers hands out.
- **K/V**: `cache.kinds=[kv]`, `reuse=kv`, `reuse=hybrid`. Of a model with linear attention, the other layers have them; where
  layers share keys and values, those that make them.
- **Decoded here**: `mode=regenerate` and `mode=synthesize` without a server, and the modes of `eval` that decode.
- **Served**: {SERVER} runs drafters that read hidden states (EAGLE-3, DFlash, P-EAGLE, DSpark) for this target, as its code
  says. Drafters of ours that read a target's K/V are served nowhere.

Each family is tested on a miniature with random weights (`tests/support/families.py`). So are rotary embeddings of a part of each
head, and of the kinds linear, llama3, yarn, dynamic and longrope. `target.path` takes any of them; `conf/target` has recipes.
"""


def keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys that a command line can set."""
    return {name: field for name, field in model.model_fields.items() if not field.exclude}


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The recipe of a group of keys; None for a key with a value of its own."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def values_of(kind) -> str:
    """The values that a type allows, for a table."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return values_of(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, UnionType):
        return ", ".join(values_of(part) for part in parts)
    if origin in (list, tuple):
        inner = dict.fromkeys(values_of(part) for part in parts if part is not Ellipsis)
        return f"list of {' or '.join(inner)}"
    if origin is dict or kind is dict:
        return "mapping"
    if kind is type(None):
        return "`null`"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "mapping of " + ", ".join(f"`{name}`" for name in kind.model_fields)
    return {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}.get(kind, str(kind))


def range_of(field: FieldInfo) -> str:
    """What else a number has to be, such as `>= 1`."""
    signs = {"ge": "&ge;", "gt": "&gt;", "le": "&le;", "lt": "&lt;"}
    bounds = [f"{signs[name]} {value:g}" for part in field.metadata for name, value in _bounds(part) if name in signs]
    return f" ({', '.join(bounds)})" if bounds else ""


def _bounds(constraint) -> list[tuple[str, float]]:
    names = getattr(constraint, "__slots__", None) or vars(constraint)
    return [(name, getattr(constraint, name)) for name in names if isinstance(getattr(constraint, name), int | float)]


def default_of(field: FieldInfo, composed, name: str) -> str:
    if not isinstance(composed, DictConfig) or name not in composed:
        return "*required*" if field.is_required() else f"*unset*, `{_yaml(field.get_default(call_default_factory=True))}`"
    if OmegaConf.is_missing(composed, name):
        return "*required*"
    value = composed[name]
    long = len(str(value)) > 60
    return "see the file" if long else f"`{_yaml(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)}`"


def _yaml(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("'", "") if value != "" else '""'


def readers_of(model: type[BaseModel], key: str) -> str:
    """Which modes of eval read a key or a group; empty where all do, or where its group says so. Other commands have no such
    table."""
    return f" Modes: {', '.join(READ_BY[key])}." if model is EvalRecipe and key in READ_BY else ""


def table(title: str, model: type[BaseModel], prefix: str, composed, command: type[BaseModel]) -> str:
    """The keys of one group of a command, and those of the groups in it."""
    rows, inner = [], []
    for name, field in keys(model).items():
        part = section_of(field)
        below = composed[name] if isinstance(composed, DictConfig) and name in composed else None
        if part:
            inner.append(table(f"{title}.{name}" if prefix else name, part, f"{prefix}{name}.", below, command))
        else:
            allowed = values_of(field.annotation) + range_of(field)
            said = field.description + readers_of(command, f"{prefix}{name}")
            cells = (f"`{prefix}{name}`", allowed, default_of(field, composed, name), said)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    about = " ".join((model.__doc__ or "").split()) + readers_of(command, prefix[:-1]) if prefix else "Those of no group."
    head = f"### {title}\n\n{about.strip()}\n\n| key | values | default | what it is |\n|---|---|---|---|\n"
    own = head + "\n".join(rows) + "\n" if rows else ""
    return "\n".join([part for part in (own, *inner) if part])


def page() -> str:
    parts = [HEAD]
    for command, model in COMMANDS.items():
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = hydra.compose(command)
        said = " ".join(model.__doc__.split())
        parts.append(f"## {command}\n\n{said}\n\n" + table("no group", model, "", composed, model))
    return "\n".join(parts)


def targets_page(families: dict[str, Family], other: Family) -> str:
    """A row for each family and one for all others; each reason why not stands once, below."""
    reasons: list[str] = []

    def cell(reason: str | None) -> str:
        if reason is None:
            return "yes"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    rows = [("family", "hidden states", "K/V", "decoded here", f"served by {SERVER}"), ("---",) * 5]
    for name, family in [*((f"`{name}`", family) for name, family in families.items()), ("any other", other)]:
        rows.append((name, "yes", cell(family.kv), cell(family.decode), cell(family.served)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    why = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{TARGETS_HEAD}\n{table}\n\nWhy not:\n\n{why}\n"


def said_of(field: FieldInfo) -> str:
    """The comment behind a key: its choices, then what it is."""
    parts = (field.annotation, *typing.get_args(field.annotation))
    choices = next((typing.get_args(part) for part in parts if typing.get_origin(part) is typing.Literal), ())
    if all(choice in field.description for choice in choices):
        return field.description
    return f"{' | '.join(choices)}. {field.description}"


def commented(text: str, model: type[BaseModel]) -> str:
    """The YAML of a group with the description of each key behind it. Other lines are left alone."""
    out, stack = [], [(-1, model)]  # (indent, recipe) of the mappings around a line; recipe None: not described
    for line in text.split("\n"):
        found = re.match(r"( *)(\w+):(?= |$)(.*)", line)
        if not found:
            out.append(line)
            continue
        indent, name, rest = len(found[1]), found[2], found[3]
        while stack[-1][0] >= indent:
            stack.pop()
        around = stack[-1][1]
        field = keys(around).get(name) if around else None
        stack.append((indent, section_of(field) if field else None))
        value = re.split(r"\s+#\s", rest)[0].rstrip()
        whole = value.count('"') % 2 == 0 and value.count("'") % 2 == 0 and value.strip() not in ("|-", ">-", "|", ">")
        if field is None or field.description is None or not whole or value.strip()[:1] == "{" and section_of(field):
            out.append(line)
            continue
        out.append(f"{found[1]}{name}:{value}".ljust(COLUMN - 2).rstrip("\n") + f"  # {said_of(field)}")
    return "\n".join(out)


def yaml_files() -> dict[Path, type[BaseModel]]:
    """Every YAML file whose comments are generated, with its recipe."""
    found = {ROOT / f"conf/{command}.yaml": model for command, model in COMMANDS.items()}
    for model in COMMANDS.values():
        for name, field in keys(model).items():
            group = section_of(field)
            if group and name not in BY_HAND:
                choices = sorted((ROOT / "conf" / name).glob("*.yaml"))
                choices = [path for path in choices if name != "suite" or path.stem in ("_keys", "heldout")]
                found = {path: group for path in choices} | found  # of `cache`, what data_prep knows: eval reads its folder alone
    return found


def written() -> dict[Path, str]:
    """Each generated file, as it has to be."""
    pages = {PAGE: page(), TARGETS_PAGE: targets_page(FAMILIES, OTHER)}
    return pages | {path: commented(path.read_text(), model) for path, model in yaml_files().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differing = [path for path, text in written().items() if not path.exists() or path.read_text() != text]
    for path in differing:
        print(f"{path.relative_to(ROOT)} is not what the recipes say" if check else path.relative_to(ROOT))
        if not check:
            path.write_text(written()[path])
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
