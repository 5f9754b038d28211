"""What `mode=decode` asks: held-out documents, or one of the suites that others report on. `load.py` reads them.

A suite is data (`conf/suite/*.yaml`): where its records are, what text they become, how long it may be, what is made of it.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.recipe import Section
from data_prep.sources.tokens import LeftOut, ids_of_text
from eval.prompts.asking import asked

Side = Literal["left", "right", "middle"]


class SuiteRecipe(Section):
    """Where prompts come from, what text they become, and how much is made of them."""

    kind: str
    """Name of the suite in the report; heldout: documents of `data` that no drafter was trained on."""
    path: str | None = None
    """File of records: .jsonl, .json, .parquet, or .txt (one prompt per line); replaces `name`."""
    name: str | None = None
    """Data set, as datasets.load_dataset takes it."""
    config: str | None = None
    """Configuration of the data set."""
    split: str = "test"
    """Split of the data set."""
    id: str | None = None
    """Field that names a prompt; null, or a record without the field: its number."""
    category: str | None = None
    """Field by which prompts are counted and judged apart."""
    kinds: dict[str, list[str]] | None = None
    """{kind: [categories]}: categories that are shown as one."""
    turns: str | None = None
    """Field that lists the user's turns, or messages (their replies are left out); or set `template`."""
    template: str | None = None
    """Text of the only turn, with {fields} of the record ({FIELD} alone may be such a list too); or set `turns`."""
    system: str | None = None
    """System message."""
    chat: bool = False
    """Use the target's chat template; false, or a target without one: turns joined by blank lines."""
    thinking: bool | None = None
    """`enable_thinking` of the chat template; null: the template's own default."""
    prompt_tokens: int | None = Field(None, ge=2)
    """Longest prompt of one turn, in tokens; heldout: the length of each. null: what the target's positions leave."""
    truncate: Side = "right"
    """Side on which a longer prompt is cut."""
    cut_after: str | None = None
    """truncate=right: end a cut prompt behind the last match of this pattern."""
    short: Literal["keep", "drop"] = "keep"
    """What becomes of prompts with fewer than prompt_tokens."""
    new_tokens: int = Field(2, ge=2)
    """Most new tokens per reply."""
    count: int | None = Field(None, ge=1, le=10**6)
    """Number of prompts; null: all."""
    shuffle: int | None = None
    """Seed by which `count` prompts are drawn; null: the first ones."""
    balanced: bool = False
    """Draw prompts from all kinds or categories in turn."""
    warmup: int = Field(1, ge=0)
    """Times that the first prompt is decoded before anything is timed."""
    warmup_tokens: int | None = Field(None, ge=1)
    """New tokens of a warm-up; null: new_tokens."""

    @property
    def heldout(self) -> bool:
        return self.kind == "heldout"

    def kind_of(self, category: str | None) -> str:
        """Under which name prompts of a category are shown."""
        named = (kind for kind, categories in (self.kinds or {}).items() if category in categories)
        return next(named, category or "no category")

    @model_validator(mode="after")
    def _fits_together(self):
        listed = Counter(category for categories in (self.kinds or {}).values() for category in categories)
        if twice := [category for category, count in listed.items() if count > 1]:
            raise ValueError(f"suite.kinds names the category '{twice[0]}' twice")
        if (self.kinds or self.balanced) and self.category is None:
            raise ValueError("suite.kinds and suite.balanced need suite.category, the field that says what a prompt is")
        needed = ("count", "prompt_tokens", "new_tokens")
        absent = [name for name in needed if name not in self.model_fields_set or getattr(self, name) is None]
        # The control that shows a drafter another request's memory takes two prompts.
        if self.heldout and (absent or self.count < 2):
            raise ValueError(
                "suite=heldout needs suite.count, 2 or more, suite.prompt_tokens and suite.new_tokens: how many documents, "
                "how much of each, and how many new tokens"
            )
        if not self.heldout and (self.turns is None) == (self.template is None):
            raise ValueError("give suite.turns, the field of a conversation's turns, or suite.template, the only turn, not both")
        if self.cut_after is not None:
            if self.truncate != "right":
                raise ValueError(f"suite.cut_after says where a prompt ends, and suite.truncate={self.truncate} keeps its end")
            try:
                re.compile(self.cut_after)
            except re.error as error:
                raise ValueError(f"suite.cut_after={self.cut_after} is no pattern ({error})") from error
        return self


@dataclass(frozen=True)
class Prompt:
    """`tokens` is what a request begins with. A conversation's next request is known once this one is answered: `after`."""

    id: str
    tokens: list[int]
    category: str | None = None
    messages: tuple[dict, ...] = ()  # so far, this request's being the last
    waiting: tuple[str, ...] = ()  # the user's turns that are still to come
    style: "Style | None" = field(default=None, repr=False, compare=False)
    takes: int = 0  # positions, at most, of all of its turns with what is made of them

    def after(self, reply: list[int]) -> "Prompt | None":
        """The conversation's next request, behind the target's `reply` to this one (its token ids, an end token included).
        None: this was the last, or (which `load_prompts` makes unlikely) the next would not fit: a reply that is no text takes
        more tokens when it is read again."""
        if not self.waiting:
            return None
        said = {"role": "assistant", "content": self.style.tokenizer.decode(reply, skip_special_tokens=True)}
        messages = (*self.messages, said, {"role": "user", "content": self.waiting[0]})
        tokens = self.style.render(messages)
        fits = len(tokens) + self.style.suite.new_tokens <= self.style.room
        return replace(self, tokens=tokens, messages=messages, waiting=self.waiting[1:]) if fits else None


@dataclass(frozen=True)
class Style:
    """How messages become the tokens of a prompt: by the target's chat template, or as plain text. `limit`: tokens of a prompt,
    beyond which it is cut; `room`: positions of a request, its new tokens included."""

    suite: SuiteRecipe
    tokenizer: PreTrainedTokenizerBase
    limit: int
    room: int

    @property
    def name(self) -> str:
        if self.suite.chat and self.tokenizer.chat_template:
            return "chat template"
        return "plain text, turns joined by blank lines" + ": the target has no chat template" * self.suite.chat

    def render(self, messages: tuple[dict, ...] | list[dict]) -> list[int]:
        """Token ids, uncut. Plain text gets what the tokenizer puts before any text (BOS). Raises UserError when the chat
        template refuses the messages."""
        if not (self.suite.chat and self.tokenizer.chat_template):
            return ids_of_text(self.tokenizer, "\n\n".join(m["content"] for m in messages))
        try:
            return asked(self.tokenizer, messages, self.suite.thinking)
        except LeftOut as error:
            raise UserError(f"suite={self.suite.kind}: {error}") from error

    def fitted(self, messages: tuple[dict, ...]) -> tuple[list[int], bool]:
        """Token ids, and whether they were cut: tokens go from the last message, never from what the format writes around it.
        `cut_after` ends a cut text early. Raises UserError when the limit leaves no room for any text."""
        whole = self.render(messages)
        if len(whole) <= self.limit:
            return whole, False

        # What the format writes around the last message: what is there too when the message is empty.
        blank = self.render((*messages[:-1], messages[-1] | {"content": ""}))
        before = _shared(whole, blank)
        behind = _shared(whole[before:][::-1], blank[before:][::-1])
        room = self.limit - before - behind
        if room < 2:
            raise UserError(f"suite={self.suite.kind}: {self.limit} tokens leave no room for a prompt")

        # The last message, cut.
        kept = cut(whole[before : len(whole) - behind], room, self.suite.truncate)
        if self.suite.cut_after:
            text = self.tokenizer.decode(kept)
            if ends := [found.end() for found in re.finditer(self.suite.cut_after, text)]:
                ended = self.render((*messages[:-1], messages[-1] | {"content": text[: ends[-1]]}))
                if len(ended) <= self.limit:  # tokenised anew, which hardly ever takes more tokens
                    return ended, True
        return whole[:before] + kept + whole[len(whole) - behind :], True


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def cut(ids: list[int], limit: int, side: Side) -> list[int]:
    """At most `limit` tokens. `side` is what goes; middle: two halves of limit // 2 stay, as LongBench has it."""
    if len(ids) <= limit:
        return ids
    if side == "middle":
        return ids[: limit // 2] + ids[len(ids) - limit // 2 :]
    return ids[:limit] if side == "right" else ids[len(ids) - limit :]
