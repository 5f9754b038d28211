"""Every combination of keys that an evaluation refuses: (condition, words), tried in order. See common/rules.py.

The first tables need nothing but the recipe. The others also need the drafter, its target, the cache or a server; what they need
is read by `eval/check.py`. What a drafter can be asked for is in `eval/drafter_rules.py`. Neither module imports another part of
`eval`, so that all of them may use it.

r: the recipe (EvalRecipe). c: the context, which each table names.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.rules import Rule
from data_prep.cache.manifest import Manifest
from data_prep.target import quantised
from data_prep.target.architecture import Architecture
from data_prep.target.loading import pick_device
from train.drafter.config import DrafterConfig

TEMPERATURES = (
    Rule(
        "negative temperature",
        lambda r: min(r.temperatures) < 0,
        "temperatures={r.temperatures}: a temperature is 0 (greedy) or more",
    ),
)

TARGET = (
    Rule(
        "a server for captures",
        lambda r: r.target.server,
        "target.server is for captures: mode=served with server.url or server.start judges a drafter in a server",
    ),
)

# Of every mode but compare.
RUNS = (
    Rule(
        "runs without compare",
        lambda r: r.runs,
        "runs= is for mode=compare; mode={r.mode} judges one drafter",
    ),
)

# Of mode=served.
SERVER = (
    Rule(
        "not one server",
        lambda r: (r.server.url is None) == (r.server.start is None),
        "mode=served asks a server: say server.url=http://HOST:PORT, or server.start=vllm, which starts one",
    ),
    Rule(
        "started server without a drafter",
        lambda r: r.server.start and r.drafter is None,
        "server.start={r.server.start} serves a drafter: say which, drafter=RUN/checkpoints/best",
    ),
)

# Of a server that is to be started. c: the configuration of its drafter.
STARTED = (
    Rule(
        "shorter blocks that look ahead",
        lambda r, c: r.draft.length and not c.schedule.causal(c),
        "draft.length={r.draft.length}: slots of {r.drafter}'s blocks see each other, so that a server that "
        "fills shorter ones would run another function; leave it out",
    ),
    Rule(
        "clusters of tokens on a CPU",
        lambda r, c: c.centroids and r.server.start == "vllm" and pick_device(r.target.device).type == "cpu",
        "server.start=vllm: vLLM 0.32 scores clusters of tokens, as {r.drafter} does (use_ordered_embeddings), on GPUs only",
    ),
)


class ServerRoom(NamedTuple):
    """How many positions a running server has for a request (None: it does not say), and how many the longest takes."""

    positions: int | None
    takes: int


# Of a server that runs. c: ServerRoom.
RUNNING = (
    Rule(
        "requests beyond the server",
        lambda r, c: c.positions and c.takes > c.positions,
        "server.url={r.server.url} has {c.positions} positions for a request, and these take up to {c.takes} "
        "(start it with a greater --max-model-len, or ask for fewer tokens)",
    ),
)


class Held(NamedTuple):
    """A report that stands in `out` already, and the drafter that it judges."""

    name: str
    drafter: str | None


def _of_another(r, c: Held) -> bool:
    return c.drafter != r.drafter and (None in (c.drafter, r.drafter) or Path(c.drafter).resolve() != Path(r.drafter).resolve())


# Of modes that write reports. c: Held.
HELD = (
    Rule(
        "report of another drafter",
        _of_another,
        "out={r.out} holds the {c.name} of another drafter, {c.drafter}: say another out, or remove that folder",
    ),
)

DRAFTER = (
    Rule(
        "no drafter",
        lambda r: r.drafter is None,
        "mode={r.mode} judges a drafter: say which, drafter=RUN/checkpoints/best",
    ),
)

# c: the files of weights in the drafter's folder.
WEIGHTS = (Rule("no weights", lambda r, files: not files, "{r.drafter} holds no weights (model.safetensors)"),)


class Decoded(NamedTuple):
    """A target that our engine is to decode: its family, and how many positions its layers with a window read (None: it has no
    such layers)."""

    family: str
    window: int | None


# c: Decoded.
DECODED = (
    Rule(
        "partial verification of windows",
        lambda r, c: r.verify.partial and c.window is not None,
        "verify={r.verify.kind}: layers of target {r.target.path}, a '{c.family}', read the last {c.window} positions alone, and "
        "a part of its cache does not say which these are. verify=full reads them",
    ),
)

# Of mode=chat and mode=demo. c: whether the command is a sweep.
PERSON = (Rule("sweep of a person", lambda r, swept: swept, "mode={r.mode} is for a person; it has no sweep (-m)"),)


class Found(NamedTuple):
    """How many prompts there are, and where they are from."""

    count: int
    source: str


# c: Found.
PROMPTS = (
    Rule(
        "controls over one prompt",
        lambda r, c: c.count < 2 and r.controls and r.mode == "decode",
        "{c.source} has one prompt, and one control shows a drafter another's memory: say controls=false",
    ),
)


def _is_out(r, folder: Path) -> bool:
    return Path(r.out).resolve() == folder.resolve()


# Of mode=export. c: the drafter's own folder.
EXPORT = (
    Rule("export onto the drafter", _is_out, "out={r.out} is the drafter's own folder; an export needs another"),
    Rule(
        "export for any target",
        lambda r, folder: r.any_target and r.format != "drafter",
        "format={r.format} writes parts of the drafter's own target: leave out any_target=true",
    ),
)


class Cached(NamedTuple):
    """A drafter's configuration, the manifest of the cache that it is judged on, and the cache's longest document in tokens."""

    config: DrafterConfig
    manifest: Manifest
    longest: int


def _of_another_target(r, c: Cached) -> bool:
    other = c.manifest.target["weights_hash"] != c.config.target["weights_hash"]
    return c.config.is_bound and other and not r.any_target


def _state_not_held(r, c: Cached) -> dict | None:
    for kind, needed, held in (
        ("hidden", c.config.hidden_layers, c.manifest.hidden_layers),
        ("kv", c.config.kv_layers, c.manifest.kv_layers),
    ):
        if missing := sorted(set(needed) - set(held)):
            return {"kind": kind, "missing": missing}
    return None


def _parts_of_documents(r, c: Cached) -> bool:
    # Without stored queries the target reads the documents again, and it can do so from the start only.
    reads_again = r.mode == "diagnose" and not set(c.config.query_layers) <= set(c.manifest.query_layers)
    return reads_again and r.score.pack_tokens < c.longest


# Of mode=score and mode=diagnose. c: Cached.
CACHE = (
    Rule(
        "cache of another target",
        _of_another_target,
        "{r.cache.dir} is a cache of another target than the drafter's",
    ),
    Rule(
        "state that the cache lacks",
        _state_not_held,
        "the drafter reads {kind} states of layer(s) {missing}, which {r.cache.dir} lacks",
    ),
)
DOCUMENTS = (
    Rule(
        "diagnose of parts of documents",
        _parts_of_documents,
        "mode=diagnose needs whole documents: score.pack_tokens={c.longest} for {r.cache.dir}",
    ),
)


class Loaded(NamedTuple):
    """A drafter's configuration, the target that was loaded, what the manifest of a cache that is read with it says of its target
    (None: no cache is), and how the loaded one is quantised."""

    config: DrafterConfig
    architecture: Architecture
    weights_hash: str
    cached: dict | None
    quantisation: dict | None = None

    @property
    def is_another(self) -> bool:
        """Whether the drafter is bound to another target."""
        return self.config.is_bound and self.weights_hash != self.config.target["weights_hash"]


def _cached_of_another(r, c: Loaded) -> dict | None:
    if c.cached is None or c.cached["weights_hash"] == c.weights_hash:
        return None
    return {"quantised": quantised.apart(c.cached.get("quantisation"), c.quantisation)}


def _other_weights(r, c: Loaded) -> dict | None:
    if not c.is_another or r.any_target:
        return None
    return {"quantised": quantised.apart(c.config.target.get("quantisation"), c.quantisation)}


def _differing(r, c: Loaded) -> dict | None:
    if not c.is_another:
        return None
    # What the draft layers have of their own is not the target's; its states are what they were made for.
    states = {"hidden_size": c.config.state_size}
    for name, mine in (vars(c.config.architecture) | states).items():
        if name in set(c.config.own_sizes) - states.keys():
            continue
        theirs = getattr(c.architecture, name)
        # Formats round a number otherwise: SmolLM2's norm_eps is 1e-5 in one file and 9.9999997e-6 in another.
        if np.size(mine) != np.size(theirs) or not np.allclose(mine, theirs, rtol=1e-5, atol=0):
            both = f"{name} {mine}, and {r.target.path} has {theirs}"
            return {"differs": both if np.size(mine) == 1 else f"another {name}"}
    return None


# Once the target is loaded. c: Loaded.
LOADED = (
    Rule(
        "cache of another target than the loaded one",
        _cached_of_another,
        "{r.cache.dir} is a cache of another target than {r.target.path}{quantised}",
    ),
    Rule(
        "other weights",
        _other_weights,
        "{r.drafter} was trained for other weights of {c.config.target[id]} than those of {r.target.path}{quantised}: its "
        "drafts would seldom be accepted (any_target=true tries it all the same)",
    ),
    Rule("another architecture", _differing, "{r.drafter} is for targets with {differs}"),
)

TABLES = (
    *(TEMPERATURES, TARGET, RUNS, HELD, SERVER, STARTED, RUNNING, DRAFTER, WEIGHTS, DECODED, PERSON, PROMPTS, EXPORT),
    *(CACHE, DOCUMENTS, LOADED),
)
