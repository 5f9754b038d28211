"""Sizes that are `auto` in conf/ and were not set: the usual ones on a GPU. A machine without one gets smaller ones, with which
a CPU takes minutes. A key that the command line or an experiment names is never touched."""

from common.ranks import world_size
from data_prep.capture.live import missing
from data_prep.recipe import STDLIB_TOKENS, CaptureSections
from data_prep.target.loading import pick_device

AUTO = "auto"
GPU = {
    "data.max_tokens": STDLIB_TOKENS,  # of data=stdlib; the other sources are taken whole
    "train.max_steps": 2000,
    "train.batch": 8,
    "train.pack_tokens": 4096,
    "train.save_every": 200,
    "train.lr": 6e-4,
}
# On two cores, embedded target, objective=blockwise reuse=hybrid: docs/research/speed.md.
CPU = {
    "data.max_tokens": 300_000,
    "train.max_steps": 600,
    "train.batch": 2,
    "train.pack_tokens": 1024,
    "train.save_every": 300,
    "train.lr": 2e-3,
}


def sized(config: dict) -> dict:
    """`config` (sections of keys) with a number for every key that says `auto`, and `chosen`: their dotted names.

    Raises:
        UserError: target.device=cuda on a machine without a GPU.
    """
    device = (config.get("target") or {}).get("device", AUTO)
    values = dict(GPU)
    if device in (AUTO, "cpu", "cuda") and pick_device(device).type == "cpu":
        world = world_size()
        packs = -(-CPU["train.batch"] // world) * world  # rounded up, so that every rank gets as many packs
        values = CPU | {"train.batch": packs}
    chosen = []
    config = {name: dict(part) if isinstance(part, dict) else part for name, part in config.items()}
    for key, value in values.items():
        section, name = key.split(".")
        if isinstance(config.get(section), dict) and config[section].get(name) == AUTO:
            config[section][name] = value
            chosen.append(key)
    return config | {"chosen": tuple(chosen)}


def spoken(recipe: CaptureSections) -> str:
    """The line that says which sizes were chosen, and how to choose others; empty where none was. Sizes of `data` count only
    while the cache has yet to be made."""
    keys = [key for key in recipe.chosen if missing(recipe) or not key.startswith("data.")]
    if not keys:
        return ""
    words = []
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        words.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return f"no GPU here: sizes for a CPU, {' '.join(words)}; name a key on the line to set it"
