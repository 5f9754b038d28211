"""What `conf/eval.yaml` may say."""

from pathlib import Path
from typing import Literal

import numpy as np
from omegaconf import OmegaConf
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from common.cli import in_sweep, refuse_file, validated
from common.errors import UserError
from common.recipe import Section
from data_prep.cache.reader import CacheReader
from data_prep.recipe import DataRecipe, FinishedCache, TargetRecipe
from data_prep.target.architecture import Architecture, target_sizes
from data_prep.target.loading import load_tokenizer, pick_device, tokenizer_hashes
from eval.caches.partial import PartialRecipe
from eval.engine.tree import TreeShape
from eval.prompts.asking import ChatRecipe, DemoRecipe, check_asking
from eval.prompts.load import load_prompts
from eval.prompts.suites import Prompt, SuiteRecipe
from eval.reports import compare
from eval.serving.find import find_server
from eval.serving.servers import ServerRecipe
from eval.serving.started import interpreter
from train.attention.choose import attention_backend
from train.drafter.build import load_config
from train.drafter.config import DrafterConfig, folder_of, is_foreign, read_fields
from train.drafter.formats.export import FORMATS, check_export
from train.recipe import TrackingRecipe
from train.views.recipe import View


class ScoreRecipe(Section):
    """`mode=score` and `mode=diagnose`: teacher-forced, from the cache alone."""

    documents: int = Field(ge=1)
    """Number of held-out documents."""
    anchors: int = Field(ge=1)
    """Anchors per document."""
    pack_tokens: int = Field(ge=2)
    """Tokens of a pack."""
    context: int | None = Field(None, ge=2)
    """Tokens before the first anchor; null: anchors may be anywhere."""


class VerifyRecipe(PartialRecipe):
    """How drafts are verified."""

    kind: Literal["full", "partial", "partial_audited"]
    """partial: SpecPV over a part of the cache, lossy; partial_audited: the same, exact if greedy."""
    offload: bool = False
    """Keep the whole cache in host memory; full verifications copy it to the device layer by layer."""

    @property
    def partial(self) -> PartialRecipe | None:
        return None if self.kind == "full" else self


class DraftRecipe(Section):
    """How many tokens are drafted in a round."""

    length: int | Literal["adaptive"] | None = None
    """Tokens per draft; null: as trained. adaptive: what measured acceptance and times make fastest."""
    breadth: int = Field(1, ge=1)
    """2 or more: draft trees (ttt), with this many continuations per node; `length` is their depth."""
    nodes: int | None = Field(None, ge=1)
    """Nodes of a tree; null: four times its depth."""


class EvalRecipe(Section):
    """`python eval/main.py`: a drafter -> acceptance, speed, memory, a report."""

    mode: Literal["decode", "score", "diagnose", "export", "compare", "chat", "demo", "served"]
    """What to do with the drafter; served: compare a server that drafts with our own engine."""
    drafter: str | None = None
    """RUN/checkpoints/best, or the name of a released drafter in eval/drafters."""
    any_target: bool = False
    """Accept a target of the same architecture whose weights are not those that the drafter was trained for."""
    format: Literal[tuple(FORMATS)]
    """mode=export: what is written, for vLLM and SGLang or (drafter) for this project."""
    runs: list[str] = []
    """mode=compare: folders of reports; differences are from the first."""
    out: str
    """Folder of the report; in a sweep (-m), of all reports."""
    view: View
    tracking: TrackingRecipe
    target: TargetRecipe
    data: DataRecipe
    suite: SuiteRecipe
    cache: FinishedCache
    score: ScoreRecipe
    chat: ChatRecipe
    demo: DemoRecipe
    verify: VerifyRecipe
    draft: DraftRecipe
    server: ServerRecipe
    batch: int = Field(ge=1)
    """Requests at a time."""
    temperatures: list[float] = Field(min_length=1)
    """Sampling temperatures to judge; 0: greedy."""
    top_p: float = Field(gt=0, le=1)
    """Nucleus sampling at temperatures above 0: the share of probability that is kept."""
    top_k: int = Field(ge=0)
    """Sampling from the k most likely tokens; 0: all."""
    stop: list[str]
    """Strings that end an output."""
    graphs: bool
    """Use CUDA graphs."""
    compile: bool
    """GPU: torch.compile the target's layers. CPU: lay out float32 weights for oneDNN."""
    transformers: bool
    """Time generate of transformers too (batch=1)."""
    controls: bool
    """Judge controls too: untrained drafter, prompt lookup, zero memory, another request's memory."""
    attention: Literal["auto", "reference", "flex"]
    """Attention backend of drafters under a view, and of mode=score."""
    seed: int
    """Seed of sampling."""

    def tree(self, config: DrafterConfig) -> TreeShape | None:
        """Of drafts; None: they are chains."""
        return None if self.draft.breadth == 1 else TreeShape(self.draft.length or config.draft_length, self.draft.breadth)

    def longest(self, config: DrafterConfig) -> int:
        """Tokens of a draft, at most."""
        tree, length = self.tree(config), self.draft.length
        if tree:
            return min(self.draft.nodes or 4 * tree.depth, tree.most)
        return length if isinstance(length, int) else config.draft_length

    @property
    def asks_suite(self) -> bool:
        """Whether prompts come from a suite, not from held-out documents."""
        return self.decodes and self.suite.kind != "heldout"

    @property
    def decodes(self) -> bool:
        """Whether it continues prompts, here or in a server."""
        return self.mode in ("decode", "served")

    @property
    def target_names(self) -> list[str]:
        """What a server may call the target."""
        path = self.target.location
        return [self.server.model] if self.server.model else [self.target.id, path, str(Path(path).resolve())]

    @property
    def span(self) -> tuple[int, int] | None:
        """Positions of the anchors behind a context, as many as decoding makes tokens; None: a context is not asked for."""
        context = {"score": self.score.context, "diagnose": self.score.context}.get(self.mode)
        if self.decodes:
            context = self.suite.prompt_tokens
        return context and (context, context + self.suite.new_tokens)


# view=auto of a drafter that was trained under the full view: what view=topk_chunk says.
OF_FULL_VIEWS = View(kind="topk_chunk", sink=8, recent=64, chunk=8)


def named_view(recipe: EvalRecipe, config: DrafterConfig) -> View:
    """The view that the command names, or the one that the drafter was trained under. Raises UserError for one that cannot be."""
    view = recipe.view
    if view.kind != "auto":
        return view
    trained = config.view or OF_FULL_VIEWS.model_dump()
    said = {name: getattr(view, name) for name in view.model_fields_set - {"kind"}}
    return validated(View, OmegaConf.create(trained | said))


def view_of(recipe: EvalRecipe, config: DrafterConfig) -> View | None:
    """The view that the drafter is judged under; None: it sees everything. Raises UserError for one that cannot be."""
    view = named_view(recipe, config)
    if view.kind == "full" or not view.budget:
        return None
    if view.positions == "in_cache" and config.source == "projected" and config.uses_kv:
        raise UserError("view.positions=in_cache turns keys to other positions; the drafter's projected keys mix turned ones")
    return view


def prompts_of(recipe: EvalRecipe, config: DrafterConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict]:
    """The prompts of mode=decode, and what a report says of them. Raises UserError."""
    room = config.architecture.max_positions - config.slots  # the last round may draft beyond the last token
    found, said = prompts_within(recipe, room, tokenizer)
    if len(found) < 2 and recipe.controls and recipe.mode == "decode":
        raise UserError(f"{said['source']} has one prompt, and one control shows a drafter another's memory: say controls=false")
    return found, said


def prompts_within(recipe: EvalRecipe, room: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict]:
    """The same of any drafter: requests take at most `room` positions, their new tokens included."""
    return load_prompts(recipe.suite, recipe.data, tokenizer, room)


def _check_decoding(recipe: EvalRecipe, config: DrafterConfig, view: View | None) -> None:
    """Raises UserError for a way to draft or to verify that cannot be."""
    draft, verify, tree = recipe.draft, recipe.verify, recipe.tree(config)
    if isinstance(draft.length, int) and not 1 <= draft.length <= config.draft_length:
        raise UserError(f"draft.length={draft.length}: {recipe.drafter} drafts 1 to {config.draft_length} tokens")
    by_token = config.schedule.token_by_token
    if tree and (not by_token or view):
        why = "a view keeps chains only" if by_token else f"objective={config.objective} fills a block at once"
        raise UserError(f"draft.breadth={draft.breadth}: trees are for drafters that draft token by token under no view; {why}")
    if draft.length == "adaptive" and (tree or view):
        raise UserError("draft.length=adaptive is for chains (draft.breadth=1) under no view")
    if tree and recipe.longest(config) < tree.depth:
        raise UserError(f"draft.nodes={draft.nodes} is too few for trees {tree.depth} tokens deep (draft.length)")
    if tree and tree.breadth > (config.draft_vocab or config.architecture.vocab_size):
        raise UserError(f"draft.breadth={tree.breadth} exceeds what the drafter can say")
    if recipe.mode == "served" and (tree or view or draft.length == "adaptive"):
        raise UserError("mode=served compares chains of one length under the full view: leave out draft.* and view.*")
    if "" in recipe.stop:
        raise UserError('stop=[""]: an empty string ends nothing')
    if draft.nodes and not tree:
        raise UserError(f"draft.nodes={draft.nodes} is for trees (draft.breadth=2 or more)")
    if not verify.partial:
        if verify.offload:
            raise UserError(
                "verify.offload=true is for verify=partial and verify=partial_audited, which seldom read the whole cache"
            )
        return
    if recipe.mode != "decode":
        raise UserError(f"mode={recipe.mode} verifies over the whole cache: leave out verify={verify.kind}")
    if view:
        raise UserError(f"verify={verify.kind} goes back to tokens that a view's memory has seen: leave out view.budget")
    if verify.kind == "partial_audited" and max(recipe.temperatures) > 0:
        raise UserError("verify=partial_audited compares most likely tokens: say temperatures=[0]")
    deepest = tree.depth if tree else recipe.longest(config)
    if verify.partial_tokens <= deepest:
        raise UserError(f"verify.partial_tokens={verify.partial_tokens} leaves no partial step beside drafts of {deepest} tokens")
    if verify.offload and tree:
        raise UserError("verify.offload=true is for chains (draft.breadth=1)")


def known_positions(recipe: EvalRecipe, config: DrafterConfig) -> int | None:
    """Positions below this one are such that the drafter was trained at or began with; None: all that its target has, or all that
    it can be asked for."""
    known = config.positions or int(config.rope_factor * config.architecture.max_positions)
    view = view_of(recipe, config)
    if view and view.positions == "in_cache" and not config.memory_attends and view.budget + 1 + config.slots <= known:
        return None
    return known if known < config.architecture.max_positions else None


def room_of(recipe: EvalRecipe, config: DrafterConfig) -> int:
    """How many positions an answer and what is before it may take: those of the target, or of the drafter's table if it has one,
    without those of a last draft."""
    known = known_positions(recipe, config) if config.position_table else None
    return (known or config.architecture.max_positions) - config.slots


def _check_positions(recipe: EvalRecipe, config: DrafterConfig, takes: list[int], what: str) -> None:
    """Warns of texts beyond the positions that the drafter knows, since outputs are the target's all the same. `takes`: how many
    positions each of the texts has, its new tokens and its last draft included; `what` they are. Raises UserError for positions
    that do not exist."""
    known = known_positions(recipe, config)
    beyond = [one for one in takes if known is not None and one > known]
    if not beyond:
        return
    if config.position_table:
        raise UserError(
            f"{recipe.drafter}: drafter.lm={config.lm['path']} has a table of {known} positions, and {len(beyond)} of "
            f"{len(takes)} {what} need up to {max(beyond)}: keep them short"
        )
    shown = {"decode": "outputs are the target's all the same, and tau is shown apart", "score": "tau is shown apart"}
    print(
        f"warning: {recipe.drafter} knows positions below {known}, and {len(beyond)} of {len(takes)} {what} reach up to "
        f"{max(beyond)}: {shown.get(recipe.mode, 'figures hold them too')} (it would know them if trained on longer documents, "
        "started from the target's layers or with drafter.rope_factor, and need none with view.positions=in_cache and a budget)",
        flush=True,
    )


def check_target(recipe: EvalRecipe, config: DrafterConfig, architecture: Architecture, weights_hash: str) -> None:
    """Raises UserError when the target that was loaded is not the drafter's, or with `any_target` not of its architecture; and
    when a cache that is read with it is of another one."""
    if recipe.mode in ("score", "diagnose") and CacheReader(recipe.cache.dir).manifest.target["weights_hash"] != weights_hash:
        raise UserError(f"{recipe.cache.dir} is a cache of another target than {recipe.target.path}")
    if not config.is_bound or weights_hash == config.target["weights_hash"]:
        return
    if not recipe.any_target:
        raise UserError(
            f"{recipe.drafter} was trained for other weights of {config.target['id']} than those of {recipe.target.path}: its "
            "drafts would seldom be accepted (any_target=true tries it all the same)"
        )
    for name, mine in vars(config.architecture).items():
        theirs = getattr(architecture, name)
        # Formats round a number otherwise: SmolLM2's norm_eps is 1e-5 in one file and 9.9999997e-6 in another.
        if np.size(mine) != np.size(theirs) or not np.allclose(mine, theirs, rtol=1e-5, atol=0):
            differs = f"{name} {mine}, and {recipe.target.path} has {theirs}" if np.size(mine) == 1 else f"another {name}"
            raise UserError(f"{recipe.drafter} is for targets with {differs}")


def _check_served(recipe: EvalRecipe) -> None:
    """Raises UserError for a server that cannot be asked or started, and for prompts that it cannot be sent."""
    server = recipe.server
    if (server.url is None) == (server.start is None):
        raise UserError("mode=served asks a server: say server.url=http://HOST:PORT, or server.start=vllm, which starts one")
    if server.start:
        if recipe.drafter is None:
            raise UserError(f"server.start={server.start} serves a drafter: say which, drafter=RUN/checkpoints/best")
        config = load_config(recipe.drafter, lambda: target_sizes(recipe.target))
        if not is_foreign(read_fields(recipe.drafter)):
            check_export(config, "speculators")
        if recipe.draft.length and not config.schedule.causal(config):
            raise UserError(
                f"draft.length={recipe.draft.length}: slots of {recipe.drafter}'s blocks see each other, so that a server that "
                "fills shorter ones would run another function; leave it out"
            )
        interpreter(server)
        return
    found = find_server(server.url, recipe.target_names)
    tokenizer = load_tokenizer(recipe.target.location, recipe.target.revision)
    _, said = prompts_within(recipe, target_sizes(recipe.target).max_positions - found.slots, tokenizer)
    if found.positions and said["positions"] > found.positions:
        raise UserError(
            f"server.url={server.url} has {found.positions} positions for a request, and these take up to {said['positions']} "
            "(start it with a greater --max-model-len, or ask for fewer tokens)"
        )


def check_evaluation(recipe: EvalRecipe) -> None:
    """Raises UserError for everything that can be known before the target is loaded."""
    if min(recipe.temperatures) < 0:
        raise UserError(f"temperatures={recipe.temperatures}: a temperature is 0 (greedy) or more")
    refuse_file("out", recipe.out)
    if recipe.mode == "compare":
        compare.load(recipe.runs)
        return
    if recipe.runs:
        raise UserError(f"runs= is for mode=compare; mode={recipe.mode} judges one drafter")
    if recipe.mode == "served":
        _check_served(recipe)
        if recipe.drafter is None:
            return
    if recipe.drafter is None:
        raise UserError(f"mode={recipe.mode} judges a drafter: say which, drafter=RUN/checkpoints/best")
    config = load_config(recipe.drafter, lambda: target_sizes(recipe.target))
    if not any(folder_of(recipe.drafter).glob("*.safetensors")):
        raise UserError(f"{recipe.drafter} holds no weights (model.safetensors)")
    view = view_of(recipe, config)
    if view and recipe.mode in ("diagnose", "export"):
        raise UserError(f"mode={recipe.mode} knows the full view only: leave out view.budget")
    if config.lm and recipe.mode == "diagnose":
        raise UserError("mode=diagnose looks at layers of our own, and a drafter.lm has none")
    if recipe.span and not recipe.asks_suite:
        room, end = config.architecture.max_positions, recipe.span[1]
        if end + config.slots > room:
            raise UserError(
                f"{recipe.span[0]} tokens of context and suite.new_tokens={recipe.suite.new_tokens} exceed the "
                f"target's {room} positions"
            )
        if recipe.decodes:
            _check_positions(recipe, config, [end + config.slots] * recipe.suite.count, "prompts")
    tokenizer = load_tokenizer(recipe.target.location, recipe.target.revision)
    if config.is_bound and tokenizer_hashes(tokenizer)[0] != config.target["tokenizer_hash"]:
        raise UserError(
            f"{recipe.drafter} was trained for target {config.target['id']}, whose tokenizer is not that of {recipe.target.path}"
        )
    if recipe.mode in ("decode", "chat", "demo", "served"):
        _check_decoding(recipe, config, view)
    if recipe.mode in ("chat", "demo"):
        if in_sweep():
            raise UserError(f"mode={recipe.mode} is for a person; it has no sweep (-m)")
        demo = recipe.demo if recipe.mode == "demo" else None
        check_asking(recipe.target.path, recipe.chat, demo, room_of(recipe, config), tokenizer)
    if recipe.asks_suite:
        takes = [prompt.takes + config.slots for prompt in prompts_of(recipe, config, tokenizer)[0]]
        _check_positions(recipe, config, takes, "prompts")
    attention_backend(recipe.attention, pick_device(recipe.target.device), training=recipe.mode == "diagnose")
    if recipe.mode == "export":
        if Path(recipe.out).resolve() == folder_of(recipe.drafter).resolve():
            raise UserError(f"out={recipe.out} is the drafter's own folder; an export needs another")
        if recipe.any_target and recipe.format != "drafter":
            raise UserError(f"format={recipe.format} writes parts of the drafter's own target: leave out any_target=true")
        check_export(config, recipe.format)
    if recipe.mode in ("score", "diagnose"):
        reader = CacheReader(recipe.cache.dir)
        manifest = reader.manifest
        other = manifest.target["weights_hash"] != config.target["weights_hash"]
        if config.is_bound and other and not recipe.any_target:
            raise UserError(f"{recipe.cache.dir} is a cache of another target than the drafter's")
        for kind, needed, held in (
            ("hidden", config.hidden_layers, manifest.hidden_layers),
            ("kv", config.kv_layers, manifest.kv_layers),
        ):
            if missing := sorted(set(needed) - set(held)):
                raise UserError(f"the drafter reads {kind} states of layer(s) {missing}, which {recipe.cache.dir} lacks")
        longest = int(reader.lengths.max())
        read = recipe.span[1] + config.slots if recipe.span else recipe.score.pack_tokens  # nothing counts beyond
        _check_positions(recipe, config, np.minimum(reader.lengths, read).tolist(), "documents")
        if recipe.mode == "diagnose" and not set(config.query_layers) <= set(manifest.query_layers):
            if recipe.score.pack_tokens < longest:  # the target reads them again, from the start
                raise UserError(f"mode=diagnose needs whole documents: score.pack_tokens={longest} for {recipe.cache.dir}")
