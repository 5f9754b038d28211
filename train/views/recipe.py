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

FULL = 1 << 40  # a budget above every context
NEVER = 256  # refresh=never: how old a selection gets in training, in tokens (BudgetDraft's continuations)


class View(Section):
    """The keys of `view`: how memory positions are chosen. Sources: sink_recent, StreamingLLM; topk_chunk, TriForce, Quest,
    SpecPV and BudgetDraft; h2o, H2O with the attention of all queries so far summed in one look; snapkv, SnapKV averaged over a
    KV head's queries."""

    kind: Literal["auto", "full", "sink_recent", "topk_chunk", "h2o", "snapkv"]  # auto (eval): as the drafter was trained
    budget: int | None = Field(None, ge=0)  # memory positions; eval: null and 0 show everything
    sink: int = Field(0, ge=0)
    recent: int | None = Field(None, ge=0)  # of the tail, at least; null: all that sinks leave (sink_recent), half of it (h2o)
    chunk: int = Field(1, ge=1)
    scorer: Literal["mean", "lastkey", "minmax", "quest"] = "mean"
    pool: int = Field(1, ge=1)  # snapkv: neighbouring positions whose scores are averaged
    positions: Literal["absolute", "in_cache"] = "absolute"
    # Select anew: in every round, never after the prompt, or once this many tokens are verified.
    refresh: Literal["verify", "never"] | int = "verify"

    @model_validator(mode="before")
    @classmethod
    def _unsaid(cls, fields: dict) -> dict:
        return {k: v for k, v in fields.items() if v is not None} if fields.get("kind") == "auto" else fields

    @model_validator(mode="after")
    def _fits_together(self):
        if isinstance(self.refresh, int) and self.refresh < 1:
            raise ValueError(f"view.refresh={self.refresh}: a selection lasts 1 token or more; or verify, or never")
        if self.kind == "full" and self.budget:
            raise ValueError("view=full shows everything; view.budget is for the other views (0: everything)")
        if self.sink % self.chunk:
            raise ValueError(f"view.sink={self.sink} is not whole chunks of view.chunk={self.chunk}")
        if self.kind in ("topk_chunk", "snapkv") and self.recent is None:
            raise ValueError(f"view={self.kind} needs view.recent, the positions that are always visible")
        if self.kind == "sink_recent" and self.recent is not None:
            raise ValueError("view=sink_recent shows all that its sinks leave of the budget; it has no view.recent")
        if self.kind == "snapkv" and not (self.recent and self.pool % 2):
            raise ValueError("view=snapkv observes the last view.recent queries (1 or more), and view.pool is odd")
        if self.budget and self.kind not in ("auto", "full") and self.budget < self.least:
            raise ValueError(f"view.budget={self.budget}: {self.too_small}")
        return self

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
