"""Where in the source a private name of a library stands."""

from common.recipe import ROOT

ROOMS = ("common", "data_prep", "train", "eval", "launchers")


def uses(name: str) -> set[str]:
    """The files of the source, from the repository's root, whose text holds `name`."""
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    return {str(file.relative_to(ROOT)) for file in files if name in file.read_text()}
