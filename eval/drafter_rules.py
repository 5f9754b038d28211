"""Combinations of keys and drafters that an evaluation refuses: (condition, words), tried in order. See eval/rules.py.

r: the recipe (EvalRecipe). c: the context, which each table names.
"""

from typing import NamedTuple

import psutil
import torch

from common.rules import Rule
from data_prep.target.loading import pick_device
from eval.caches.budgeted import KINDS
from train.drafter.config import DrafterConfig
from train.views.recipe import View


class Judged(NamedTuple):
    """A drafter's configuration, and the view that it is judged under (None: it sees everything)."""

    config: DrafterConfig
    view: View | None


# c: Judged.
VIEW = (
    Rule(
        "view of a window",
        lambda r, c: c.config.windowed,
        "view={c.view.kind} chooses from all of memory, and {r.drafter} reads layers of its target that have a window: leave out "
        "view.budget",
    ),
    Rule(
        "in_cache positions of mixed keys",
        lambda r, c: c.view.positions == "in_cache" and c.config.source == "projected" and c.config.uses_kv,
        "view.positions=in_cache turns keys to other positions; the drafter's projected keys mix turned ones",
    ),
)


def _beyond_the_target(r, c: Judged) -> dict | None:
    if not r.span or r.asks_suite or r.span[1] + c.config.slots <= c.config.architecture.max_positions:
        return None
    return {"section": "suite" if r.decodes else "score", "new": r.span[1] - r.span[0]}


# c: Judged.
MODES = (
    Rule(
        "view in a mode of the full view",
        lambda r, c: c.view and r.mode in ("diagnose", "export"),
        "mode={r.mode} knows the full view only: leave out view.budget",
    ),
    Rule(
        "diagnose of a language model",
        lambda r, c: c.config.lm and r.mode == "diagnose",
        "mode=diagnose looks at layers of our own, and a drafter.lm has none",
    ),
    Rule(
        "clusters of tokens elsewhere than in decoding",
        lambda r, c: c.config.centroids and r.mode in ("score", "diagnose"),
        "mode={r.mode} takes {r.drafter} to score all tokens, and it scores the likeliest clusters (use_ordered_embeddings): say "
        "mode=decode",
    ),
    Rule(
        "context beyond the target",
        _beyond_the_target,
        "{r.span[0]} tokens of context and {section}.new_tokens={new} exceed the "
        "target's {c.config.architecture.max_positions} positions",
    ),
)


class Reach(NamedTuple):
    """How far texts reach. The drafter knows positions below `known`; of `texts`, called `what` (prompts, documents), `beyond`
    need further ones, up to `most`."""

    config: DrafterConfig
    known: int
    what: str
    texts: int
    beyond: int
    most: int


# c: Reach.
POSITIONS = (
    Rule(
        "texts beyond a table of positions",
        lambda r, c: c.beyond and c.config.position_table,
        "{r.drafter}: drafter.lm={c.config.lm[path]} has a table of {c.known} positions, and {c.beyond} of "
        "{c.texts} {c.what} need up to {c.most}: keep them short",
    ),
)


class Tokens(NamedTuple):
    """A drafter's configuration, and the hash of the target's tokenizer."""

    config: DrafterConfig
    tokenizer_hash: str


# c: Tokens.
TOKENIZER = (
    Rule(
        "target of another tokenizer",
        lambda r, c: c.config.is_bound and c.tokenizer_hash != c.config.target["tokenizer_hash"],
        "{r.drafter} was trained for target {c.config.target[id]}, whose tokenizer is not that of {r.target.path}",
    ),
)


def _wrong_length(r, c: Judged) -> bool:
    return isinstance(r.draft.length, int) and not 1 <= r.draft.length <= c.config.draft_length


def _too_few_nodes(r, c: Judged) -> dict | None:
    tree = r.tree(c.config)
    return {"depth": tree.depth} if tree and r.longest(c.config) < tree.depth else None


def _too_broad(r, c: Judged) -> bool:
    tree = r.tree(c.config)
    return tree is not None and tree.breadth > (c.config.draft_vocab or c.config.architecture.vocab_size)


def _beyond_memory(r, c: Judged) -> dict | None:
    tree = r.tree(c.config)
    if not tree:
        return None
    vocabulary = c.config.architecture.vocab_size
    needed = r.batch * tree.nbytes(r.longest(c.config), c.config.draft_vocab or vocabulary, vocabulary)
    device = pick_device(r.target.device)
    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().available
    return {"needed": needed / 2**30, "there": there / 2**30, "device": device.type} if needed > there else None


def _no_partial_round(r, c: Judged) -> dict | None:
    tree = r.tree(c.config)
    deepest = tree.depth if tree else r.longest(c.config)
    return {"deepest": deepest} if r.verify.partial and r.verify.longest_interval <= deepest else None


_TREES = "draft.breadth={r.draft.breadth}: trees are for drafters that draft token by token; "


def _beside_each_other(c: Judged) -> bool:
    """Whether a batch has a drafter for each request (eval/engine/one_by_one.py)."""
    return c.view is not None and c.view.kind not in KINDS


# How drafts are made and verified, where something is decoded. c: Judged.
DECODING = (
    Rule(
        "length that is not drafted",
        _wrong_length,
        "draft.length={r.draft.length}: {r.drafter} drafts 1 to {c.config.draft_length} tokens",
    ),
    Rule(
        "trees of blocks",
        lambda r, c: r.tree(c.config) and not c.config.schedule.token_by_token,
        _TREES + "objective={c.config.objective} fills a block at once",
    ),
    Rule(
        "trees under a view that goes one by one",
        lambda r, c: r.tree(c.config) and _beside_each_other(c),
        "draft.breadth={r.draft.breadth}: under view={c.view.kind} drafts are chains: say draft.breadth=1",
    ),
    Rule(
        "adaptive length of trees",
        lambda r, c: r.draft.length == "adaptive" and r.tree(c.config),
        "draft.length=adaptive is for chains: say draft.breadth=1",
    ),
    Rule(
        "adaptive length under a view that goes one by one",
        lambda r, c: r.draft.length == "adaptive" and _beside_each_other(c),
        "draft.length=adaptive: under view={c.view.kind} drafts are of one length",
    ),
    Rule(
        "fewer nodes than depths",
        _too_few_nodes,
        "draft.nodes={r.draft.nodes} is too few for trees {depth} tokens deep (draft.length)",
    ),
    Rule(
        "breadth beyond the vocabulary",
        _too_broad,
        "draft.breadth={r.draft.breadth} exceeds what the drafter can say",
    ),
    Rule(
        "breadth beyond the nodes",
        lambda r, c: r.tree(c.config) and r.draft.breadth > r.longest(c.config),
        "draft.breadth={r.draft.breadth}: a tree keeps its draft.nodes likeliest nodes (null: four times its depth), and a "
        "breadth beyond their number makes the same trees, later: say a smaller one, or draft.nodes={r.draft.breadth}",
    ),
    Rule(
        "trees beyond memory",
        _beyond_memory,
        "draft.breadth={r.draft.breadth}, draft.nodes={r.draft.nodes}, batch={r.batch}: trees take {needed:,.0f} GiB or more, "
        "and the {device} has {there:,.0f} GiB",
    ),
    Rule(
        "drafts that no server makes",
        lambda r, c: r.mode == "served" and (r.tree(c.config) or c.view or r.draft.length == "adaptive"),
        "mode=served compares chains of one length under the full view: leave out draft.* and view.*",
    ),
    Rule(
        "empty stop",
        lambda r, c: "" in r.stop,
        'stop=[""]: an empty string ends nothing',
    ),
    Rule(
        "nodes without trees",
        lambda r, c: r.draft.nodes and not r.tree(c.config),
        "draft.nodes={r.draft.nodes} is for trees (draft.breadth=2 or more)",
    ),
    Rule(
        "offload of full verification",
        lambda r, c: r.verify.offload and not r.verify.partial,
        "verify.offload=true is for verify=partial and verify=partial_audited, which seldom read the whole cache",
    ),
    Rule(
        "partial verification elsewhere",
        lambda r, c: r.verify.partial and r.mode != "decode",
        "mode={r.mode} verifies over the whole cache: leave out verify={r.verify.kind}",
    ),
    Rule(
        "partial verification under a view",
        lambda r, c: r.verify.partial and c.view,
        "verify={r.verify.kind} goes back to tokens that a view's memory has seen: leave out view.budget",
    ),
    Rule(
        "audit of samples",
        lambda r, c: r.verify.kind == "partial_audited" and max(r.temperatures) > 0,
        "verify=partial_audited compares most likely tokens: say temperatures=[0]",
    ),
    Rule(
        "adaptive intervals without an audit",
        lambda r, c: r.verify.kind == "partial" and r.verify.partial_tokens == "adaptive",
        "verify=partial never learns when it errs: verify.partial_tokens=adaptive is for verify=partial_audited",
    ),
    Rule(
        "no partial round",
        _no_partial_round,
        "verify.partial_tokens={r.verify.partial_tokens} leaves no partial step beside drafts of {deepest} tokens",
    ),
    Rule(
        "offload under trees",
        lambda r, c: r.verify.offload and r.tree(c.config),
        "verify.offload=true is for chains (draft.breadth=1)",
    ),
)

TABLES = (VIEW, MODES, POSITIONS, TOKENIZER, DECODING)
