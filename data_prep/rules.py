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

# Of a target at a server.
SERVED = (
    Rule(
        "keys and values of a server",
        lambda r: r.target.server and set(r.cache.kinds) != {"hidden"},
        "target.server={r.target.server} hands out hidden states alone: cache.kinds=[hidden] (training: reuse=hidden); "
        "keys, values and queries are captured without target.server",
    ),
    Rule(
        "a forward of this process at a server",
        lambda r: r.target.server and (r.capture.spread != "none" or r.capture.attention != "auto"),
        "capture.spread and capture.attention are of a target in this process, and target.server={r.target.server} has its own "
        "(target.server_args=[--tensor-parallel-size,8] of a started one)",
    ),
    Rule(
        "flags for no server",
        lambda r: r.target.server_args and r.target.server != "vllm",
        "target.server_args are flags of the server that target.server=vllm starts, and this line starts none",
    ),
)

# Of training without a cache.
LIVE = (
    Rule(
        "live of a target for several processes",
        lambda r: r.cache.on_missing == "live" and r.capture.spread == "tp",
        "cache.on_missing=live with capture.spread=tp: every rank reads other documents; capture first",
    ),
    Rule(
        "live from a server",
        lambda r: r.cache.on_missing == "live" and r.target.server,
        "cache.on_missing=live runs the target in this process, and target.server={r.target.server} is for captures: "
        "cache.on_missing=capture",
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
    Rule(
        "documents that fill a server's positions",
        lambda r, c: r.target.server and r.data.max_length == c.max_positions,
        "data.max_length={r.data.max_length}: a server writes one token behind each document, and the target has "
        "{c.max_positions} positions; make it smaller by one",
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

# Methods whose checkpoints have scales in any case.
SCALED = ("awq", "bitsandbytes", "fbgemm_fp8", "fp8", "gptq", "mxfp8")
# Of a target before it is loaded. c: target.checkpoint.Checkpoint.
CHECKPOINT = (
    Rule(
        "adapter instead of a model",
        lambda r, c: c.adapter,
        "target.path={c.path} holds an adapter (adapter_config.json), which would be left out: merge it into its model first "
        "(merge_and_unload of peft) and name the merged one",
    ),
    Rule(
        "unknown quantisation",
        lambda r, c: c.method is not None and not c.known,
        "target.path={c.path} is quantised by '{c.method}', which transformers does not load: it would read the weights without "
        "their scales. A checkpoint in compressed-tensors, fp8, gptq or awq can be a target, or the model before quantisation",
    ),
    Rule(
        "ModelOpt without a word in config.json",
        lambda r, c: c.method is None and c.modelopt,
        "target.path={c.path} is quantised by ModelOpt (hf_quant_config.json), which transformers does not load: it would read "
        "the weights without their scales. A checkpoint in compressed-tensors or fp8 can be a target, or the model before it "
        "was quantised",
    ),
    Rule(
        "scales without a word in config.json",
        lambda r, c: c.method is None and c.scale,
        "target.path={c.path}: its files hold scales of quantised weights ({c.scale}), and config.json has no "
        "quantization_config that says how to read them: transformers would leave them out",
    ),
    Rule(
        "quantisation without its package",
        lambda r, c: c.missing,
        "target.path={c.path} is quantised by {c.method}: pip install {c.missing}",
    ),
    Rule(
        "quantised weights outside of safetensors",
        lambda r, c: c.method is not None and not c.safetensors,
        "target.path={c.path} is quantised and has no model.safetensors: quantised weights are read from safetensors alone",
    ),
    Rule(
        "a file of the index that is not there",
        lambda r, c: c.absent,
        "target.path={c.path}: its index names {c.absent}, which is not there; fetch it again",
    ),
    Rule(
        "quantisation of nothing",
        lambda r, c: c.method in SCALED and c.safetensors and not c.scale,
        "target.path={c.path}: config.json says that it is quantised by {c.method}, and its files hold no scales; take "
        "quantization_config out of config.json if the weights are as they were trained",
    ),
    Rule(
        "quantised weights under tp",
        lambda r, c: c.method is not None and c.spread == "tp",
        "capture.spread=tp divides weights that are not quantised; for {c.path} use capture.spread=device_map",
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
        "conversations of a server that captures",
        lambda r: r.mode in ("regenerate", "synthesize") and r.target.server,
        "target.server is for captures, and mode={r.mode} writes conversations: regenerate.base_url names a server that answers",
    ),
    Rule(
        "merge of one cache",
        lambda r: r.mode == "merge" and len(r.merge.sources) < 2,
        "mode=merge needs two caches or more: 'merge.sources=[CACHE_A,CACHE_B]'",
    ),
)

TABLES = (INSTALLED, SERVED, LIVE, LENGTHS, SPREAD, CHECKPOINT, MODES)
