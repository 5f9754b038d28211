"""Recipes that training refuses on this machine, for this cache or this target: (condition, words), tried in order.

`train/build.py` reads what they need to know and applies them. Combinations that need the recipe alone are in `train/rules.py`.

r: the recipe. c: the context, which each table names.
"""

from typing import NamedTuple

from common.rules import Rule
from data_prep.cache.manifest import Manifest
from data_prep.target.architecture import Architecture
from train.drafter.config import DrafterConfig
from train.drafter.own_sizes import plain_rope
from train.recipe import TrainRecipe

# c: the number of ranks.
RANKS = (
    Rule(
        "batch that ranks cannot share",
        lambda r, world: r.train.batch % world,
        "train.batch={r.train.batch} packs a step cannot be shared by {c} ranks; make it a multiple of the world size",
    ),
)


class Machine(NamedTuple):
    """Where a training is to run. `capability` and `name` are a GPU's; None on a CPU."""

    bf16: bool
    capability: tuple[int, int] | None
    name: str | None


# c: Machine.
MACHINE = (
    Rule(
        "recompute of a language model",
        lambda r, c: r.drafter.lm and r.train.recompute,
        "train.recompute=true is not for drafter.lm",
    ),
    Rule(
        "fp8 without what it needs",
        lambda r, c: r.train.fp8 and (r.drafter.lm or not c.bf16 or r.deepspeed.stage == 3),
        "train.fp8=true needs bf16 (train.precision=bf16), ZeRO 0 to 2, and no drafter.lm",
    ),
    Rule(
        "fp8 on an older GPU",
        lambda r, c: r.train.fp8 and c.capability and c.capability < (8, 9),
        "train.fp8=true: {c.name} has no fp8 products; use train.fp8=false",
    ),
)


# c: why draft layers cannot begin as layers of the target; None: they can.
START = (
    Rule(
        "start from layers of another kind",
        lambda r, c: c and r.drafter.start == "target" and not r.drafter.lm,
        "drafter.start=target: draft layers cannot begin as layers of {r.target.path}, because {c}; use drafter.start=random",
    ),
)


class Held(NamedTuple):
    """What a recipe needs of a cache, and what the cache holds, by kind of state (hidden, kv, query). `available`: layers that
    drafter.target_layers=auto chooses from."""

    needs: dict[str, bool]
    layers: dict[str, list[int]]
    available: list[int]


def _kind_not_held(r: TrainRecipe, c: Held) -> dict | None:
    lacking = next((name for name, needed in c.needs.items() if needed and not c.layers[name]), None)
    if lacking is None:
        return None
    wants = "loss.query_align" if lacking == "query" else f"reuse={r.reuse.kind}"
    kinds = ",".join(name for name in c.layers if c.needs[name] or c.layers[name])
    return {"wants": wants, "kind": lacking, "kinds": kinds}


def _too_few_layers(r: TrainRecipe, c: Held) -> dict | None:
    too_few = r.drafter.target_layers == "auto" and len(c.available) < r.drafter.layers
    return {"held": len(c.available)} if too_few else None


def _other_count_of_layers(r: TrainRecipe, c: Held) -> dict | None:
    named = r.drafter.target_layers
    return {"named": len(named)} if named != "auto" and len(named) != r.drafter.layers else None


# c: Held.
HELD = (
    Rule(
        "kind that the cache lacks",
        _kind_not_held,
        "{wants} needs {kind} states, which the cache {r.cache.dir} does not hold; capture it with cache.kinds=[{kinds}]",
    ),
    Rule(
        "more draft layers than captured ones",
        _too_few_layers,
        "drafter.layers={r.drafter.layers}, but the cache holds {held} layer(s); name drafter.target_layers, "
        "or capture more layers",
    ),
    Rule(
        "target_layers of another number",
        _other_count_of_layers,
        "drafter.target_layers names {named} layers for drafter.layers={r.drafter.layers}",
    ),
)


class Gemma(NamedTuple):
    """The target of an assistant: its `model_type`; by kind of layer the last one with K/V of its own; its hidden size; its last
    layer. `held`: by kind of state, the layers of the cache."""

    family: str
    last: dict[str, int]
    hidden_size: int
    deepest: int
    held: dict[str, list[int]]


def _kinds_read(r: TrainRecipe) -> list[str]:
    """Kinds of layers of which an assistant reads the last one. Layers that are named are looked at as any drafter's."""
    return ["full_attention", "sliding_attention"][: r.drafter.layers] if r.drafter.target_layers == "auto" else []


def _kind_of_layer_that_it_lacks(r: TrainRecipe, c: Gemma) -> dict | None:
    lacking = next((kind for kind in _kinds_read(r) if kind not in c.last), None)
    return {"kind": lacking} if lacking else None


def _last_layers_not_held(r: TrainRecipe, c: Gemma) -> dict | None:
    read = sorted(c.last[kind] for kind in _kinds_read(r))
    missing = c.deepest not in c.held["hidden"] or set(read) - set(c.held["kv"])
    return {"read": f" and K/V of {read}" if read else ""} if missing else None


# For drafter.kind=gemma4_assistant. c: Gemma.
ASSISTANT = (
    Rule(
        "assistant of another family",
        lambda r, c: not c.family.startswith("gemma4"),
        "drafter.kind=gemma4_assistant is for targets of Gemma 4, and {r.target.path} is a '{c.family}'; for others it is "
        "reuse=hybrid reuse.fusion=cross_only reuse.own_kv=false",
    ),
    Rule(
        "assistant over layers of one kind",
        _kind_of_layer_that_it_lacks,
        "drafter.kind=gemma4_assistant: no layer of {r.target.path} that has K/V is a {kind}; name drafter.target_layers",
    ),
    Rule(
        "last layers that the cache lacks",
        _last_layers_not_held,
        "drafter.kind=gemma4_assistant reads hidden states of layer {c.deepest}{read}; the cache {r.cache.dir} holds "
        "{c.held[hidden]} and {c.held[kv]}: capture it with cache.layers=assistant cache.kinds=[hidden,kv]",
    ),
    Rule(
        "assistant wider than its target",
        lambda r, c: (r.drafter.hidden_size or 0) > c.hidden_size,
        "drafter.hidden_size={r.drafter.hidden_size} exceeds the target's {c.hidden_size}: an assistant begins with "
        "the target's LM head in fewer dimensions",
    ),
)


class ReadLayers(NamedTuple):
    """Layers of the target that a drafter reads or starts from. `reads`: by kind, those whose states it needs; `held`: by kind,
    those of the cache; `deepest`: the target's last layer."""

    named: list[int]
    reads: dict[str, list[int]]
    held: dict[str, list[int]]
    deepest: int


def _no_such_layer(r: TrainRecipe, c: ReadLayers) -> dict | None:
    wrong = [layer for layer in c.named if not 0 <= layer <= c.deepest]
    return {"layer": wrong[0]} if wrong else None


def _layer_not_held(r: TrainRecipe, c: ReadLayers) -> dict | None:
    for name, layers in c.reads.items():
        if missing := sorted(set(layers) - set(c.held[name])):
            return {"kind": name, "missing": missing, "held": c.held[name]}
    return None


# c: ReadLayers.
LAYERS = (
    Rule(
        "layer that the target lacks",
        _no_such_layer,
        "the target has layers 0 to {c.deepest}; there is no layer {layer}",
    ),
    Rule(
        "layer that the cache lacks",
        _layer_not_held,
        "reuse={r.reuse.kind} needs {kind} states of layer(s) {missing}; the cache {r.cache.dir} holds {held}",
    ),
)


class Shapes(NamedTuple):
    """The draft layers, the target's own, and how many rows and columns an fp8 product takes at a time."""

    architecture: Architecture
    target: Architecture
    tile: int


def _no_whole_tiles(r: TrainRecipe, c: Shapes) -> dict | None:
    sizes = [c.architecture.hidden_size, c.architecture.intermediate_size]
    if not r.drafter.own_head:
        sizes += [c.target.hidden_size, r.drafter.vocabulary or c.target.vocab_size]
    return {"sizes": sizes} if r.train.fp8 and any(size % c.tile for size in sizes) else None


def _in_place(r: TrainRecipe) -> bool:
    """Whether draft rows read the target's own keys, beside theirs if they have any."""
    return r.reuse.kind in ("kv", "hybrid") and r.reuse.source in ("native", "head_concat")


def _normed_differently(r: TrainRecipe, c: Shapes) -> dict | None:
    differs = r.drafter.qk_norm not in (None, c.target.qk_norm)
    return {"norm": str(r.drafter.qk_norm).lower()} if _in_place(r) and r.reuse.own_kv and differs else None


def _other_key_heads(r: TrainRecipe, c: Shapes) -> dict | None:
    names = ("kv_heads", "head_dim")
    other = [name for name in names if getattr(c.architecture, name) != getattr(c.target, name)]
    return {"key": other[0], "theirs": getattr(c.target, other[0])} if _in_place(r) and other else None


# c: Shapes.
SHAPES = (
    Rule(
        "fp8 of sizes that are no whole tiles",
        _no_whole_tiles,
        "train.fp8=true needs sizes that are whole {c.tile}s; the target's states, MLP and head have {sizes}",
    ),
    Rule(
        "keys that are normed differently",
        _normed_differently,
        "drafter.qk_norm={norm} with reuse.source={r.reuse.source}: draft keys and the target's would be normed differently; "
        "drafter.qk_norm=null follows the target",
    ),
    Rule(
        "heads in place that are not the target's",
        _other_key_heads,
        "reuse.source={r.reuse.source} reads the target's keys and values in place: leave out drafter.{key} (the target has "
        "{theirs}), or say reuse.source=projected_rope",
    ),
    Rule(
        "query heads that share no key head",
        lambda r, c: c.architecture.heads % c.architecture.kv_heads,
        "{c.architecture.heads} query heads cannot share {c.architecture.kv_heads} key/value heads: set drafter.heads and "
        "drafter.kv_heads",
    ),
    Rule(
        "heads without a rotary embedding",
        lambda r, c: c.architecture.head_dim != c.target.head_dim and plain_rope(c.target.inv_freq) is None,
        "drafter.head_dim={r.drafter.head_dim}: the target's rotary frequencies are of no theta that heads of another size could "
        "have; leave it out (the target has {c.target.head_dim})",
    ),
)


def _heads_that_differ(r: TrainRecipe, c: DrafterConfig) -> dict | None:
    if not c.uses_kv or c.source != "head_concat":
        return None
    differs = [layer for layer in c.kv_layers if c.kv_shape(layer) != c.kv_shape(c.kv_layers[0])]
    other = "" if not c.own_kv else ", or use reuse.source=projected_rope"
    return {"one": c.kv_layers[0], "another": differs[0], "or_else": other} if differs else None


def _step_without_memory(r: TrainRecipe, c: DrafterConfig) -> dict | None:
    """The shortest window that is read, where a late step would stand beyond it."""
    if c.own_kv or c.constant_positions or not c.windowed:
        return None
    shortest = min(c.kv_shape(layer).window or c.slots + 1 for layer in c.kv_layers)
    return {"window": shortest} if c.slots >= shortest else None


def _heads_of_an_assistant(r: TrainRecipe, c: DrafterConfig) -> dict | None:
    """The number of key/value heads of a layer that is read, which the query heads cannot share."""
    heads = c.architecture.heads
    wrong = next((n for n in (c.kv_shape(i).kv_heads for i in c.kv_layers) if heads % n), None) if c.is_assistant else None
    return {"heads": heads, "wrong": wrong} if wrong else None


# c: DrafterConfig.
KV_SHAPES = (
    Rule(
        "assistant that does not fit",
        _heads_of_an_assistant,
        "drafter.kind=gemma4_assistant: {heads} query heads cannot share the {wrong} key/value heads of a layer that is read; "
        "set drafter.heads to a multiple of {wrong}",
    ),
    Rule(
        "step that sees no memory",
        _step_without_memory,
        "reuse.own_kv=false: step {r.objective.slots} would stand beyond the window of {window} positions of a layer that it "
        "reads; say objective.positions=constant, or objective.slots below {window}",
    ),
    Rule(
        "heads side by side that differ",
        _heads_that_differ,
        "reuse.source=head_concat: the K/V of layers {one} and {another} differ (heads, rotary embedding or window); name layers "
        "that are alike (reuse.kv_layers){or_else}",
    ),
    Rule(
        "view of a window",
        lambda r, c: r.view_sampler and c.windowed,
        "view={r.view.kind} chooses from all of memory, and the target's layers {c.kv_layers} read a window; use view=full, or "
        "reuse.source=projected_rope",
    ),
)


class Documents(NamedTuple):
    """The longest document of a cache, and the language model that is to read it (its path and positions)."""

    longest: int
    lm: dict | None


def _beyond_the_language_model(r: TrainRecipe, c: Documents) -> dict | None:
    positions = c.lm and c.lm["positions"]
    if not positions or c.longest <= r.drafter.rope_factor * positions:
        return None
    return {"positions": positions, "factor": -(-c.longest // positions)}


# c: Documents.
DOCUMENTS = (
    Rule(
        "documents beyond a language model",
        _beyond_the_language_model,
        "drafter.lm={c.lm[path]} knows {positions} positions, the cache's documents have up to {c.longest}; scale its "
        "positions with drafter.rope_factor={factor}, or cut the documents (data.max_length)",
    ),
)


class Tokens(NamedTuple):
    """The cache's manifest, and the hash of the target's tokenizer."""

    manifest: Manifest
    tokenizer_hash: str

    @property
    def vocabulary(self) -> int:
        return self.manifest.target["architecture"]["vocab_size"]


# c: Tokens.
TOKENIZER = (
    Rule(
        "cache of another tokenizer",
        lambda r, c: c.tokenizer_hash != c.manifest.tokenizer_hash,
        "the cache {r.cache.dir} was captured with another tokenizer than that of target {r.target.path}",
    ),
)
VOCABULARY = (
    Rule(
        "vocabulary that is not reduced",
        lambda r, c: r.drafter.vocabulary and r.drafter.vocabulary >= c.vocabulary,
        "drafter.vocabulary={r.drafter.vocabulary} is no less than the target's {c.vocabulary}; leave it out",
    ),
    Rule(
        "mask outside the vocabulary",
        lambda r, c: r.target.mask_token_id is not None and r.target.mask_token_id >= c.vocabulary,
        "target.mask_token_id={r.target.mask_token_id} is outside the vocabulary of {c.vocabulary}",
    ),
)

TABLES = (RANKS, MACHINE, START, HELD, ASSISTANT, LAYERS, SHAPES, KV_SHAPES, DOCUMENTS, TOKENIZER, VOCABULARY)
