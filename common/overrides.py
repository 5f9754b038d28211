"""The words of a command line, as Hydra's grammar reads them, and what its grammar would refuse or pass over in silence.

Three things differ from Hydra's own reading:
- `key=value` sets every key of a recipe, also one that the chosen file does not list. A key that no recipe has is refused.
- A value that is no valid Hydra value, such as a path with `=` in it, is taken as the text that it is.
- A group's choice is looked up before Hydra composes, also where a defaults list calls it optional.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from common import hydra_private
from common.errors import UserError
from common.hashing import stable_hash
from common.recipe import ROOT

CONF = str(ROOT / "conf")
KEY_AND_VALUE = re.compile(r"(\+{0,2}[A-Za-z_][\w.]*)=(.*)", re.DOTALL)


def parsed(overrides: list[str], multirun: bool = False) -> list[Override]:
    """What the words say. Raises UserError for a word that is no override."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        return [_parsed(parser, word, multirun) for word in overrides]


def _parsed(parser: OverridesParser, word: str, multirun: bool) -> Override:
    try:
        return parser.parse_overrides([word])[0]
    except HydraException as error:
        found = KEY_AND_VALUE.fullmatch(word)
        if not found:
            raise UserError(f"{one_line(error)}; overrides are written key=value") from error
        key, value = found.groups()
        literal = f"{key}={quoted(os.path.expanduser(value))}"
        if multirun and "," in value:
            advice = f'its commas may part points of a sweep or belong to the value; quote what belongs together: "{literal}"'
            raise UserError(f"{word}: {advice}") from error
        try:
            return parser.parse_overrides([literal])[0]
        except HydraException as again:  # such as a line break
            raise UserError(f"{word!r}: {one_line(again)}") from again


def one_line(error: Exception) -> str:
    """Hydra's message without its search path and its stack of causes, and with the nearest choice of a group."""
    text = str(error).split("Config search path")[0]
    missing = re.search(r"Could not find '([\w/-]+)'.*Available options in '[\w/-]+':(.*)", text, re.DOTALL)
    advice = nearest(missing[1].rsplit("/", 1)[-1], missing[2].split()) if missing else ""
    return " ".join(text.split()) + advice


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no name is near."""
    names = list(names)
    near = difflib.get_close_matches(name, names, 1) or [one for one in names if name and one.endswith(name)]  # 3: zero3
    return f"; did you mean {near[0]}?" if near else ""


def points(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job: one, or under `-m` every point of the sweep."""
    words = parsed(overrides, multirun)
    return hydra_private.points_of(words) if multirun else [[word.input_line for word in words]]


def search_path_of(words: list[Override]) -> list[str]:
    """The words that name folders of the user's own configurations."""
    return [word.input_line for word in words if word.key_or_group == "hydra.searchpath"]


def options_of(group: str, config_name: str, search_path: list[str]) -> list[str]:
    """The choices of a group, none where there is no such group. To be asked inside `hydra.initialize_config_dir`."""
    loader = GlobalHydra.instance().config_loader()
    found = loader.get_group_options(group, ObjectType.CONFIG, config_name=config_name, overrides=search_path)
    return [name for name in found if not name.startswith("_")]


def addressed(config_name: str, words: list[Override]) -> list[str]:
    """The words as Hydra composes them: a choice of a group that exists as it is, and a key with `++`, which sets it whether the
    chosen file lists it or not.

    Raises:
        UserError: a choice that its group does not have.
    """
    search_path = search_path_of(words)
    composed = []
    for word in words:
        name, line = word.key_or_group, word.input_line
        options = [] if "." in name or name.startswith("hydra") or not name else options_of(name, config_name, search_path)
        if options:
            _refuse_choice(name, word, options)
        elif not name.startswith("hydra") and line[0] not in "+~" and word.package is None:
            line = f"++{line}"
        composed.append(line)
    return composed


def _refuse_choice(group: str, word: Override, options: list[str]) -> None:
    there = f"there are {', '.join(options)}"
    if word.is_delete():
        raise UserError(f"{word.input_line}: a recipe has one choice of every group; {there}")
    if word.is_sweep_override():
        return  # its points are looked at one by one
    value = word.value()
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, str) or one not in options:
            said = "null" if one is None else " ".join(str(one).split())
            key = f"; a key of it is set as {group}.KEY={said}" if isinstance(one, int | float) else ""
            raise UserError(f"{group}={said}: Could not find '{group}/{said}'; {there}{nearest(said, options)}{key}")


def quoted(text: str) -> str:
    """A value as Hydra's override grammar takes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def folder_name(text: str) -> str:
    """`text` as the name of one folder: no slashes, no `++` before keys, and within a file name's limit."""
    name = re.sub(r"(^|,)\+\+", r"\1", text).replace("/", "_")
    return name if len(name.encode()) <= 200 else f"{name[:150]}-{stable_hash(name):016x}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def sweep_words(key: str, folder: str, overrides: list[str], unnamed: Iterable[str]) -> list[str]:
    """What makes Hydra put every point of a sweep into a folder of `folder`, named after the keys that are swept.

    Raises:
        UserError: the folder itself is swept, `key`.
    """
    words = parsed(overrides, multirun=True)
    swept = {word.key_or_group for word in words if word.is_sweep_override()}
    if key in swept:
        raise UserError(f"{key} is the folder of the whole sweep; every point gets one in it, named after what is swept")
    hidden = {word.key_or_group for word in words} | set(unnamed)
    return [
        f"hydra.sweep.dir={quoted(folder)}",
        "hydra.sweep.subdir='${folder_name:${hydra.job.override_dirname}}'",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(hidden - swept))}]",
    ]


def search_word(folder: str) -> str:
    """`--config-dir FOLDER` as an override: Hydra's flag does not reach what composes before Hydra runs. Raises UserError where
    there is no such folder."""
    if not Path(folder).is_dir():
        raise UserError(f"--config-dir={folder}: there is no such folder")
    return f"hydra.searchpath=[{quoted('file://' + str(Path(folder).absolute()))}]"
