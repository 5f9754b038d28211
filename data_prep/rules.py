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
    max_positions: int


# c: Spread.
SPREAD = (
    Rule(
        "documents beyond the target",
        lambda r, c: r.data.max_length > c.max_positions,
        "data.max_length={r.data.max_length} exceeds the target's {c.max_positions} positions",
    ),
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
        "estimate of several processes",
        lambda r: r.mode == "estimate" and r.capture.spread == "tp",
        "mode=estimate measures one process; with a target for several, use capture.spread=device_map",
    ),
    Rule(
        "merge of one cache",
        lambda r: r.mode == "merge" and len(r.merge.sources) < 2,
        "mode=merge needs two caches or more: 'merge.sources=[CACHE_A,CACHE_B]'",
    ),
)

TABLES = (INSTALLED, SPREAD, MODES)
