"""Where `mode=decode` takes its prompts from: held-out documents, or one of the suites that others report on.

A suite is data (`conf/suite/*.yaml`): where its records are, what text they become, how long it may be, what is made of it.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from string import Formatter
from typing import Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.recipe import Section
from data_prep.recipe import DataRecipe
from data_prep.sources.records import records
from data_prep.sources.tokens import LeftOut, encode, joined
from eval.prompts.asking import asked
from eval.prompts.records import numbered_rows

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
    """Field that lists the user's turns; or set `template`."""
    template: str | None = None
    """Text of the only turn, with {fields} of the record; or set `turns`."""
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
    """Most new tokens per reply. mode=score: anchors lie in this many positions behind score.context."""
    count: int | None = Field(None, ge=1)
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
        if self.heldout and (self.count is None or self.count < 2 or self.prompt_tokens is None):
            # The control that shows a drafter another request's memory takes two prompts.
            raise ValueError(
                "suite=heldout needs suite.count, 2 or more, and suite.prompt_tokens: how many documents, and how much of each"
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
        """Token ids, uncut. Plain text gets what the tokenizer puts around any text (BOS). Raises UserError when the chat
        template refuses the messages."""
        if not (self.suite.chat and self.tokenizer.chat_template):
            return self.tokenizer("\n\n".join(m["content"] for m in messages), verbose=False)["input_ids"]
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
        blank = self.render((*messages[:-1], messages[-1] | {"content": ""}))
        before = _shared(whole, blank)
        behind = _shared(whole[before:][::-1], blank[before:][::-1])
        if (room := self.limit - before - behind) < 2:
            raise UserError(f"suite={self.suite.kind}: {self.limit} tokens leave no room for a prompt")
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


def _turns(place: str, fields: dict, suite: SuiteRecipe) -> list[str]:
    """The user's turns. Raises UserError for a record without the fields that they are made of."""
    if suite.turns is None:
        named = [name for _, name, _, _ in Formatter().parse(suite.template) if name is not None]
    else:
        named = [suite.turns]
    for name in named:
        root = re.split(r"[.\[]", name)[0]
        if fields.get(root) is None:
            raise UserError(f"{place}: no field '{root}', which suite={suite.kind} needs; it has {', '.join(fields) or 'none'}")
    try:
        turns = fields[suite.turns] if suite.turns else [suite.template.format_map(fields)]
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{place}: suite.template cannot be filled ({type(error).__name__}: {error})") from error
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{place}: '{suite.turns or suite.template}' is not a list of the user's turns, none of them empty")
    try:
        "".join(turns).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: its text is not valid Unicode") from error
    return turns


def load_prompts(
    suite: SuiteRecipe, data: DataRecipe, tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[list[Prompt], dict]:
    """The prompts, and what a report says of them: where they are from, how they were made, cut and counted.

    Args:
        data: where suite=heldout takes its documents from.
        room: positions that a request may take, its new tokens included.

    Raises:
        UserError: the source cannot be read, a record lacks a field, or a prompt with its new tokens takes more than `room`.
    """
    if suite.heldout:
        found = heldout_prompts(data, suite, tokenizer)
        said = {"source": data.source, "format": "plain text, the first tokens of documents", **_lengths(found)}
        told = ("chat", "thinking", "truncate", "warmup", "warmup_tokens")
        said |= {"suite": suite.kind, **suite.model_dump(include=set(told)), "positions": suite.prompt_tokens + suite.new_tokens}
        return found, said | {"count": suite.count, "tokens": suite.prompt_tokens, "max_new_tokens": suite.new_tokens}
    style = Style(suite, tokenizer, suite.prompt_tokens or room - suite.new_tokens, room)
    if style.limit < 2 or style.limit + suite.new_tokens > room:
        raise UserError(
            f"suite.prompt_tokens={suite.prompt_tokens} and suite.new_tokens={suite.new_tokens} exceed the {room} positions that "
            "the target has for a request"
        )
    source = suite.path or suite.name
    found, cut_, short, positions = [], 0, 0, 0
    for id, category, turns in _drawn(suite):
        prompt, was_cut = _prompt(id, category, turns, style)
        if prompt.takes > room:
            raise UserError(
                f"{source}: the conversation '{id}' of {len(turns)} turns may take {prompt.takes} positions with "
                f"suite.new_tokens={suite.new_tokens}, the target has {room} for a request"
            )
        if suite.short == "drop" and len(prompt.tokens) < style.limit and not was_cut:
            short += 1
            continue
        found.append(prompt)
        cut_, positions = cut_ + was_cut, max(positions, prompt.takes)
        if len(found) == suite.count:
            break
    if not found:
        raise UserError(f"{source}: no prompt has {style.limit} tokens (suite.short=keep takes shorter ones)")
    found = [replace(prompt, style=replace(style, room=positions)) for prompt in found]  # later turns take no more than was said
    said = {"suite": suite.kind, "source": source, "format": style.name}
    unused = {"config", "split"} if suite.path else set()
    said |= suite.model_dump(exclude={"kind", "path", "name", "count", "new_tokens"} | unused)
    said |= {"prompt_tokens": style.limit, "max_new_tokens": suite.new_tokens, "count": len(found), **_lengths(found)}
    said |= {"truncated": cut_, "left_out_as_short": short, "positions": positions}
    said["conversation_turns"] = sum(1 + len(p.waiting) for p in found)
    said["categories"] = dict(Counter(p.category for p in found if p.category is not None))
    return found, said


def _drawn(suite: SuiteRecipe) -> Iterator[tuple[str, str | None, list[str]]]:
    """Id, category and turns of every record, in the order in which they are taken. Raises UserError for any that is wrong."""
    if suite.path is None and suite.name is None:
        raise UserError(f"suite={suite.kind} needs suite.path=FILE; the head of conf/suite/{suite.kind}.yaml says of what")
    rows = numbered_rows(suite.path, suite.name, suite.config, suite.split)
    found, seen = [], {}
    for number, (place, fields) in enumerate(rows):
        id, category = fields.get(suite.id), fields.get(suite.category)
        id = str(number if id is None else id)
        if id in seen:
            raise UserError(f"{place}: the id '{id}' stands twice ({seen[id]}); suite.id=null numbers the records")
        seen[id] = place
        found.append((id, None if category is None else str(category), _turns(place, fields, suite)))
    if suite.count is not None and suite.count < len(found) and suite.shuffle is not None:
        random.Random(suite.shuffle).shuffle(found)  # as DFlash draws: the same seed, the same records
    return iter(_in_turn(found, suite) if suite.balanced else found)


def _in_turn(records: list[tuple[str, str | None, list[str]]], suite: SuiteRecipe) -> list[tuple[str, str | None, list[str]]]:
    """One of each kind, then another one of each, until all are there."""
    waiting: dict[str, list] = {}
    for one in records:
        waiting.setdefault(suite.kind_of(one[1]), []).append(one)
    rounds = zip_longest(*waiting.values())
    return [one for taken in rounds for one in taken if one is not None]


def _prompt(id: str, category: str | None, turns: list[str], style: Style) -> tuple[Prompt, bool]:
    """A conversation's first request, and whether it was cut. Only a single turn is cut: what a conversation's later turns speak
    of must stay."""
    opening = ({"role": "system", "content": style.suite.system},) if style.suite.system else ()
    messages = (*opening, {"role": "user", "content": turns[0]})
    new = style.suite.new_tokens
    if len(turns) == 1:
        tokens, was_cut = style.fitted(messages)
        return Prompt(id, tokens, category, messages, (), style, len(tokens) + new), was_cut
    whole = list(messages)
    for turn in turns[1:]:
        whole += [{"role": "assistant", "content": ""}, {"role": "user", "content": turn}]
    takes = len(style.render(whole)) + len(turns) * new
    return Prompt(id, style.render(messages), category, messages, tuple(turns[1:]), style, takes), False


def _lengths(prompts: list[Prompt]) -> dict:
    """Tokens of the first requests: the mean, the least, the most."""
    lengths = [len(p.tokens) for p in prompts]
    return {
        "tokens": round(sum(lengths) / len(lengths)),
        "least_tokens": min(lengths),
        "most_tokens": max(lengths),
        "ids": [p.id for p in prompts],
    }


def heldout_prompts(data: DataRecipe, suite: SuiteRecipe, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """One prompt a held-out document, in hashed order; with data.long=join the documents are joined first. Raises UserError when
    there are too few long enough."""

    def encoded():
        for record in records(data, heldout=True):
            try:
                yield record, encode(record, tokenizer, data)
            except LeftOut:
                continue

    every, found = encoded(), []
    if data.long == "join":
        every = joined(every, suite.prompt_tokens, tokenizer.eos_token_id)
    for record, (ids, _) in every:
        if len(ids) >= suite.prompt_tokens:
            found.append(Prompt(record.id, ids[: suite.prompt_tokens]))
        if len(found) == suite.count:
            return found
    raise UserError(
        f"data={data.source} has {len(found)} held-out documents of {suite.prompt_tokens} tokens, fewer than "
        f"suite.count={suite.count}; data.long=join joins shorter ones"
    )
