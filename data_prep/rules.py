"""Every combination of keys that a capture refuses: (condition, words), tried in order. See common/rules.py.

r: CaptureSections, or what a table names. c: the context.
"""

from importlib.util import find_spec
from typing import NamedTuple

from common.rules import Rule

# Of what is installed here.
INSTALLED = (
    Rule(
        "flash_attention_2 without flash-attn",
        lambda r: r.capture.attention == "flash_attention_2" and find_spec("flash_attn") is None,
        "capture.attention=flash_attention_2, but flash-attn is not installed; capture.attention=auto does without",
    ),
    Rule(
        "device_map without accelerate",
        lambda r: r.capture.spread == "device_map" and find_spec("accelerate") is None,
        "capture.spread=device_map, but accelerate is not installed: pip install accelerate",
    ),
)


class Spread(NamedTuple):
    """How many processes there are, and what the target is."""

    world: int
    kv_heads: int


# c: architecture.Sizes.
LENGTHS = (
    Rule(
        "documents beyond the target",
        lambda r, c: r.data.max_length > c.max_positions,
        "data.max_length={r.data.max_length} exceeds the target's {c.max_positions} positions",
    ),
)

# c: Spread.
SPREAD = (
    Rule(
        "tp over processes that do not fit",
        lambda r, c: r.capture.spread == "tp" and (c.kv_heads % c.world or c.world == 1),
        "capture.spread=tp needs a launcher with several processes that share {c.kv_heads} K/V heads evenly, "
        "not {c.world}: deepspeed --num_gpus 2 data_prep/main.py ...",
    ),
    Rule(
        "device_map under a launcher",
        lambda r, c: r.capture.spread == "device_map" and c.world > 1,
        "capture.spread=device_map is one process that uses all GPUs: run it with python, not with a launcher",
    ),
)

# Over DataPrepRecipe.
MODES = (
    Rule(
        "decoding over several devices of one process",
        lambda r: r.mode in ("regenerate", "synthesize") and r.capture.spread == "device_map",
        "mode={r.mode} keeps the keys of all layers on one device, which capture.spread=device_map does not; use "
        "capture.spread=tp under a launcher with several processes",
    ),
    Rule(
        "spread beside a server",
        lambda r: r.mode == "regenerate" and r.regenerate.base_url and r.capture.spread != "none",
        "regenerate.base_url: the server has the target, so that capture.spread={r.capture.spread} spreads nothing; drop one",
    ),
    Rule(
        "merge of one cache",
        lambda r: r.mode == "merge" and len(r.merge.sources) < 2,
        "mode=merge needs two caches or more: 'merge.sources=[CACHE_A,CACHE_B]'",
    ),
)

TABLES = (INSTALLED, LENGTHS, SPREAD, MODES)
