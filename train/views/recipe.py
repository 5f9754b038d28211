"""Views: which positions of its memory a drafter may read under a budget.

A view of budget b shows an anchor at most b memory positions of its own document: the first ones (sinks), a tail of the last
ones, and between them the chunks that score best, chosen by every layer, branch and KV head for itself. Scores are taken at a
*selection*, which may lie before the anchor (`refresh`); what came since belongs to the tail, and the worst of the chosen chunks
give way to it, so that the budget holds. A budget at or above the context hides nothing.

`layout.py` says how large each part is, `scores.py` which chunks are the best, `plan.py` puts both together for the anchors of a
pack, and `gather.py` takes the visible keys out.
"""

from typing import Literal

from pydantic import Field, model_validator

from common.recipe import Section
from common.rules import obeying
from train.rules import VIEW

FULL = 1 << 40  # a budget above every context
NEVER = 256  # refresh=never: how old a selection gets in training, in tokens (BudgetDraft's continuations)


class View(Section):
    """The keys of `view`: how memory positions are chosen. Sources: sink_recent, StreamingLLM; topk_chunk, TriForce, Quest,
    SpecPV and BudgetDraft; h2o, H2O with the attention of all queries so far summed in one look; snapkv, SnapKV averaged over a
    KV head's queries."""

    kind: Literal["auto", "full", "sink_recent", "topk_chunk", "h2o", "snapkv"]
    """How visible memory positions are chosen; auto (evaluation): as the drafter was trained."""
    budget: int | None = Field(None, ge=0)
    """Most memory positions that are visible. Training: null draws budgets. Evaluation: null and 0 show everything."""
    sink: int = Field(0, ge=0)
    """First positions, always visible."""
    recent: int | None = Field(None, ge=0)
    """Last positions, always visible; null: all that sinks leave (sink_recent), or half of that (h2o)."""
    chunk: int = Field(1, ge=1)
    """Positions per chunk; whole chunks are chosen."""
    scorer: Literal["mean", "lastkey", "minmax", "quest"] = "mean"
    """topk_chunk: score of a chunk, by its mean key (TriForce), last key (BudgetDraft) or bounds (SpecPV, Quest)."""
    pool: int = Field(1, ge=1)
    """snapkv: neighbouring positions whose scores are averaged."""
    positions: Literal["absolute", "in_cache"] = "absolute"
    """in_cache: number the visible keys one after the other, so that distances stay below the budget."""
    refresh: Literal["verify", "never"] | int = "verify"
    """When positions are chosen anew: every round (verify), every N verified tokens, or never after the prompt."""

    @model_validator(mode="before")
    @classmethod
    def _unsaid(cls, fields: dict) -> dict:
        return {k: v for k, v in fields.items() if v is not None} if fields.get("kind") == "auto" else fields

    @model_validator(mode="after")
    def _fits_together(self):
        return obeying(VIEW, self)

    @property
    def least(self) -> int:
        """The smallest budget that leaves something to choose."""
        return self.sink + (self.recent or 0) + self.chunk

    @property
    def too_small(self) -> str:
        others = f"{self.recent or 0} recent positions, and then chunks of {self.chunk}"
        others = "the last positions" if self.kind == "sink_recent" else others
        return f"view={self.kind} always shows {self.sink} sinks and {others}; the least budget is {self.least}"

    def tail_of(self, room):
        """How many of the positions that sinks leave of a budget are the tail's, at a selection."""
        if self.recent is not None:
            return self.recent
        return room if self.kind == "sink_recent" else room // 2

    @property
    def window(self) -> int | None:
        """How many of the last queries choose; None: all of them."""
        if self.kind == "topk_chunk":
            return int(self.scorer != "lastkey")
        return {"snapkv": self.recent, "h2o": None}.get(self.kind, 0)

    @property
    def lasts(self) -> int:
        """In training a selection serves anchors that lie fewer tokens than this behind it."""
        return {"verify": 1, "never": NEVER}.get(self.refresh, self.refresh)
