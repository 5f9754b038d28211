"""What `conf/eval.yaml` may say."""

from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from common.cli import validated
from common.recipe import Section
from common.rules import refuse
from data_prep.recipe import DataRecipe, FinishedCache, TargetRecipe
from eval import drafter_rules, rules
from eval.caches.partial import PartialRecipe
from eval.engine.tree import TreeShape
from eval.prompts.asking import ChatRecipe, DemoRecipe
from eval.prompts.load import load_prompts
from eval.prompts.suites import Prompt, SuiteRecipe
from eval.serving.servers import ServerRecipe
from train.drafter.config import DrafterConfig
from train.drafter.formats.export import FORMATS
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
    new_tokens: int = Field(64, ge=2)
    """Behind `context`, anchors lie in this many positions: as many as decoding makes tokens."""


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
    """Attention backend of drafters under view=h2o, and of mode=score."""
    seed: int
    """Seed of sampling."""
    # No part of the recipe: groups and keys that the command line names, as it names them.
    named: tuple[str, ...] = Field((), exclude=True)

    def tree(self, config: DrafterConfig) -> TreeShape | None:
        """Of drafts; None: they are chains."""
        return None if self.draft.breadth == 1 else TreeShape(self.draft.length or config.draft_length, self.draft.breadth)

    def longest(self, config: DrafterConfig) -> int:
        """Tokens of a draft, at most."""
        tree = self.tree(config)
        length = self.draft.length
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
        if self.decodes and self.suite.prompt_tokens:
            return self.suite.prompt_tokens, self.suite.prompt_tokens + self.suite.new_tokens
        if self.mode in ("score", "diagnose") and self.score.context:
            return self.score.context, self.score.context + self.score.new_tokens
        return None


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
    refuse(drafter_rules.VIEW, recipe, drafter_rules.Judged(config, view))
    return view


def prompts_of(recipe: EvalRecipe, config: DrafterConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict]:
    """The prompts of mode=decode, and what a report says of them. Raises UserError."""
    room = config.architecture.max_positions - config.slots  # the last round may draft beyond the last token
    found, said = prompts_within(recipe, room, tokenizer)
    refuse(rules.PROMPTS, recipe, rules.Found(len(found), said["source"]))
    return found, said


def prompts_within(recipe: EvalRecipe, room: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict]:
    """The same of any drafter: requests take at most `room` positions, their new tokens included."""
    return load_prompts(recipe.suite, recipe.data, tokenizer, room)


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
