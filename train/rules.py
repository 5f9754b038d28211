"""Every combination of keys that training refuses: (condition, words), tried in order. See common/rules.py.

These tables need nothing but the recipe, and are applied when it is composed. What also needs the machine, the cache or the
target is in `train/machine_rules.py`. This module imports no other part of `train`, so that all of them may use it.

r: the recipe, or the section that the table is of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.rules import Rule

if TYPE_CHECKING:
    from train.recipe import TrainRecipe


# Over ObjectiveRecipe.
OBJECTIVE = (
    Rule(
        "keys of blocks under ttt",
        lambda r: r.kind == "ttt" and (r.shifted or r.causal or r.prefix),
        "objective.shifted, .causal and .prefix are for block-wise drafting; ttt is causal and shifted by nature",
    ),
    Rule(
        "smallest above largest",
        lambda r: r.smallest > r.largest,
        "objective.smallest={r.smallest} exceeds objective.largest={r.largest}",
    ),
    Rule(
        "block of one slot",
        lambda r: r.kind == "blockwise" and r.slots < 2,
        "objective.slots={r.slots}: slot 0 of a block is the anchor itself, so a block needs at least 2 slots",
    ),
)

# Over ReuseRecipe.
REUSE = (
    Rule(
        "K/V keys without K/V",
        lambda r: r.kind in ("none", "hidden") and (r.source != "native" or r.kv_layers != "auto"),
        "reuse={r.kind} reads no K/V: reuse.source and reuse.kv_layers are for kv and hybrid",
    ),
    Rule(
        "kv_layers of native K/V",
        lambda r: r.source == "native" and r.kv_layers != "auto",
        "reuse.source=native reads the layers of drafter.target_layers; reuse.kv_layers is for the other sources",
    ),
    Rule(
        "hidden_layers without hidden states",
        lambda r: r.kind in ("none", "kv") and r.hidden_layers != "auto",
        "reuse={r.kind} reads no hidden states: reuse.hidden_layers is for hidden and hybrid",
    ),
    Rule(
        "pairs without hidden states",
        lambda r: r.kind != "hidden" and r.pairs,
        "reuse.pairs is for reuse=hidden: a pair is a token and the feature that hidden states give",
    ),
    Rule(
        "fusion of one memory",
        lambda r: r.kind != "hybrid" and r.fusion != "gated_delta",
        "reuse.fusion is for reuse=hybrid",
    ),
    Rule(
        "queries alone without a stream",
        lambda r: not r.own_kv and (r.kind != "hybrid" or r.fusion != "cross_only"),
        "reuse.own_kv=false leaves a step its token, the feature of the step before and queries over the target's K/V: say "
        "reuse=hybrid reuse.fusion=cross_only",
    ),
    Rule(
        "queries alone over projected keys",
        lambda r: not r.own_kv and r.source.startswith("projected"),
        "reuse.own_kv=false reads the target's cache in place, and reuse.source={r.source} makes keys of its own; use native or "
        "head_concat",
    ),
    Rule(
        "gate that does not exist",
        lambda r: (r.kind != "hybrid" or r.fusion == "cross_only") and r.gate != type(r.gate)(),
        "reuse.gate is for reuse=hybrid reuse.fusion=gated_delta",
    ),
)


def _beside_a_language_model(r) -> dict | None:
    """The first key of a layered drafter that is set beside drafter.lm."""
    if r.lm is None:
        return None
    keys = [name for name in ("warm_start", "qk_norm", "vocabulary", "sequential") if getattr(r, name) is not None]
    if r.own_head:
        keys.append("own_head")
    keys += r.named_sizes
    return {"key": keys[0]} if keys else None


# Over DrafterRecipe.
DRAFTER = (
    Rule(
        "keys of layers beside lm",
        _beside_a_language_model,
        "drafter.lm brings layers, norms, vocabulary and head; leave out drafter.{key}",
    ),
    Rule(
        "own sizes of layers that start as the target's",
        lambda r: {"key": next(iter(r.named_sizes))} if r.named_sizes and r.start == "target" else None,
        "drafter.start=target copies the target's layers, and drafter.{key} is for layers of other sizes: say "
        "drafter.start=random",
    ),
    Rule(
        "heads of an odd size",
        lambda r: (r.head_dim or 0) % 2,
        "drafter.head_dim={r.head_dim}: a rotary embedding turns the two halves of a head, so that its size is even",
    ),
)


def _not_as_the_format(r: TrainRecipe) -> dict | None:
    """What has to be said of an assistant, and is said otherwise."""
    if r.drafter.kind != "gemma4_assistant":
        return None
    format_ = {
        "objective": (r.objective.kind, "ttt"),
        "objective.positions": (r.objective.positions, "constant"),
        "reuse": (r.reuse.kind, "hybrid"),
        "reuse.fusion": (r.reuse.fusion, "cross_only"),
        "reuse.own_kv": (r.reuse.own_kv, False),
        "reuse.source": (r.reuse.source, "native"),
        "reuse.hidden_layers": (r.reuse.hidden_layers, "auto"),
        "drafter.start": (r.drafter.start, "random"),
        "drafter.own_head": (r.drafter.own_head, True),
    }
    wrong = next((key for key, (said, needed) in format_.items() if said != needed), None)
    return {"key": wrong, "needed": str(format_[wrong][1]).lower()} if wrong else None


def _beside_an_assistant(r: TrainRecipe) -> dict | None:
    """The first key that the format of assistants has no place for."""
    if r.drafter.kind != "gemma4_assistant":
        return None
    ordinary = {
        **dict.fromkeys(("lm", "vocabulary", "sequential", "qk_norm", "kv_heads", "head_dim"), None),
        **dict.fromkeys(("fc_norm", "norm_output", "norm_before_residual"), False),
        "rope_factor": 1,
    }
    wrong = next((name for name, value in ordinary.items() if getattr(r.drafter, name) != value), None)
    return {"key": wrong} if wrong else None


# Over LossRecipe.
LOSS = (
    Rule(
        "loss without a term",
        lambda r: not r.per_slot and not r.expected_length,
        "no term has a weight; say loss=kl, or loss.tv=1",
    ),
)

# Over View, in training and in evaluation.
VIEW = (
    Rule(
        "refresh below one token",
        lambda r: isinstance(r.refresh, int) and r.refresh < 1,
        "view.refresh={r.refresh}: a selection lasts 1 token or more; or verify, or never",
    ),
    Rule(
        "budget of the full view",
        lambda r: r.kind == "full" and r.budget,
        "view=full shows everything; view.budget is for the other views (0: everything)",
    ),
    Rule(
        "sinks in parts of chunks",
        lambda r: r.sink % r.chunk,
        "view.sink={r.sink} is not whole chunks of view.chunk={r.chunk}",
    ),
    Rule(
        "no recent positions",
        lambda r: r.kind in ("topk_chunk", "snapkv") and r.recent is None,
        "view={r.kind} needs view.recent, the positions that are always visible",
    ),
    Rule(
        "recent of sink_recent",
        lambda r: r.kind == "sink_recent" and r.recent is not None,
        "view=sink_recent shows all that its sinks leave of the budget; it has no view.recent",
    ),
    Rule(
        "snapkv without a window",
        lambda r: r.kind == "snapkv" and not (r.recent and r.pool % 2),
        "view=snapkv observes the last view.recent queries (1 or more), and view.pool is odd",
    ),
    Rule(
        "chunks of single positions",
        lambda r: r.kind in ("h2o", "snapkv") and r.chunk > 1,
        "view={r.kind} chooses single positions: leave out view.chunk",
    ),
    Rule(
        "budget below the least",
        lambda r: r.budget and r.kind not in ("auto", "full") and r.budget < r.least,
        "view.budget={r.budget}: {r.too_small}",
    ),
)


def _over_pairs(r: TrainRecipe) -> bool:
    """Whether ttt reads pairs of token and feature."""
    return r.objective.kind == "ttt" and r.reuse.kind in ("hidden", "hybrid")


def _judged_too_small(r: TrainRecipe) -> dict | None:
    if r.view_sampler is None:
        return None
    least = min(r.view_sampler.judged)
    return {"least": least} if least < r.view.least else None


# Over TrainRecipe.
RECIPE = (
    Rule(
        "assistant of another form",
        _not_as_the_format,
        "drafter.kind=gemma4_assistant is a format with {key}={needed}: start from experiment=gemma4_assistant",
    ),
    Rule(
        "keys beside an assistant",
        _beside_an_assistant,
        "drafter.kind=gemma4_assistant has no place for drafter.{key}; leave it out",
    ),
    Rule(
        "queries alone in blocks",
        lambda r: not r.reuse.own_kv and r.objective.kind == "blockwise",
        "reuse.own_kv=false with objective=blockwise: slots of a block know each other by their keys alone; say objective=ttt",
    ),
    Rule(
        "constant positions of rows with keys",
        lambda r: r.objective.positions == "constant" and r.reuse.own_kv,
        "objective.positions=constant places all steps where one stands, so that none may have keys: it is for "
        "reuse.own_kv=false",
    ),
    Rule(
        "cross_only in blocks",
        lambda r: r.reuse.fusion == "cross_only" and r.objective.kind == "blockwise",
        "reuse.fusion=cross_only with objective=blockwise has no hidden memory left: that is reuse=kv",
    ),
    Rule(
        "sequential head under ttt",
        lambda r: r.drafter.sequential and r.objective.kind != "blockwise",
        "drafter.sequential is for objective=blockwise; every step of ttt reads the token before it",
    ),
    Rule(
        "norm_before_residual without a feature",
        lambda r: r.drafter.norm_before_residual and not _over_pairs(r),
        "drafter.norm_before_residual is for ttt over hidden states, where a row reads a feature",
    ),
    Rule(
        "align losses without K/V",
        lambda r: (r.loss.kv_align or r.loss.query_align) and r.reuse.kind not in ("kv", "hybrid"),
        "loss.kv_align and loss.query_align compare K/V and queries with the target's; reuse={r.reuse.kind} reads no K/V",
    ),
    Rule(
        "kv_align of queries alone",
        lambda r: r.loss.kv_align and not r.reuse.own_kv,
        "loss.kv_align is of the draft rows' own keys and values, which reuse.own_kv=false takes away",
    ),
    Rule(
        "query_align of projected keys",
        lambda r: r.loss.query_align and r.reuse.source.startswith("projected"),
        "loss.query_align with reuse.source={r.reuse.source}: projected keys have their own space; use native or head_concat",
    ),
    Rule(
        "query_align of another number of heads",
        lambda r: r.loss.query_align and r.drafter.heads,
        "loss.query_align compares the drafter's queries with the target's, head by head: leave out drafter.heads",
    ),
    Rule(
        "pairs under ttt",
        lambda r: r.reuse.pairs and r.objective.kind == "ttt",
        "reuse.pairs is for objective=blockwise; ttt over hidden states reads pairs by nature",
    ),
    Rule(
        "pairs in a block that looks ahead",
        lambda r: r.reuse.pairs and not (r.objective.shifted and r.objective.causal),
        "reuse.pairs=true: the anchor's own pair drafts and is memory later, which sees nothing behind it: say "
        "objective.shifted=true objective.causal=true",
    ),
    Rule(
        "prefix of pairs",
        lambda r: r.reuse.pairs and r.objective.prefix,
        "objective.prefix shows tokens whose features no block has when it is drafted; it is not for reuse.pairs=true",
    ),
    Rule(
        "fc_norm without pairs",
        lambda r: r.drafter.fc_norm and not (_over_pairs(r) or r.reuse.pairs),
        "drafter.fc_norm norms what fc joins for pairs of token and feature: objective=ttt with reuse=hidden or hybrid, "
        "or reuse.pairs=true",
    ),
    Rule(
        "norm_output without a stream",
        lambda r: r.drafter.norm_output and not _over_pairs(r),
        "drafter.norm_output is of the stream that one step leaves to the next: objective=ttt with reuse=hidden or hybrid",
    ),
    Rule(
        "language model that reads the target",
        lambda r: r.drafter.lm and (r.reuse.kind != "none" or r.objective.kind == "blockwise"),
        "drafter.lm drafts token by token with K/V of its own: reuse=none objective=ttt, or budgetdraft",
    ),
    Rule(
        "view=auto",
        lambda r: r.view.kind == "auto",
        "view=auto is for evaluation; training needs to know the view: full, sink_recent, topk_chunk, ...",
    ),
    Rule(
        "budgetdraft under the full view",
        lambda r: r.view.kind == "full" and r.objective.sparse,
        "objective=budgetdraft with view=full has nothing to hide; choose another view, or objective=ttt",
    ),
    Rule(
        "view without budgetdraft",
        lambda r: r.view.kind != "full" and not r.objective.sparse,
        "view={r.view.kind} is practised by objective=budgetdraft; the other objectives train under the full view",
    ),
    Rule(
        "budget of everything",
        lambda r: r.view.budget == 0,
        "view.budget=0 (everything) trains no sparse branch; name a budget, or null to draw them",
    ),
    Rule("judged budget below the least", _judged_too_small, "a budget of {least}: {r.view.too_small}"),
    Rule(
        "align losses under views",
        lambda r: r.view_sampler and (r.loss.kv_align or r.loss.query_align),
        "loss.kv_align and loss.query_align are for objective=ttt and blockwise, where each anchor has one view",
    ),
    Rule(
        "in_cache positions of mixed keys",
        lambda r: r.view_sampler and r.view.positions == "in_cache" and r.reuse.source == "projected",
        "view.positions=in_cache turns keys to other positions; reuse.source=projected mixes turned keys",
    ),
)

TABLES = (OBJECTIVE, REUSE, DRAFTER, LOSS, VIEW, RECIPE)
