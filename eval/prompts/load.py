"""Prompts are made: of held-out documents, or of the records of a suite (`suites.py`)."""

import random
import re
from collections import Counter
from dataclasses import replace
from itertools import zip_longest
from numbers import Number
from string import Formatter
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data_prep.recipe import DataRecipe
from data_prep.sources.messages import LeftOut, listed, messages_of
from data_prep.sources.records import records
from data_prep.sources.tokens import Part, encode, joined
from eval.prompts.records import numbered_rows
from eval.prompts.suites import Prompt, Style, SuiteRecipe


class Asked(NamedTuple):
    """A record of a suite: the user's turns, and the system message if it has one of its own."""

    id: str
    category: str | None
    turns: list[str]
    system: str | None


class _Filler(Formatter):
    """`str.format` for text and numbers: what Python writes for anything else is no prompt."""

    def get_field(self, name, args, kwargs):
        value, first = super().get_field(name, args, kwargs)
        if isinstance(value, bool) or not isinstance(value, str | Number) or value != value:
            raise TypeError(f"'{name}' is neither text nor a number")
        return value, first


def _turns(place: str, fields: dict, suite: SuiteRecipe) -> tuple[list[str], str | None]:
    """The user's turns and the record's own system message. A field that is all of the template may list turns or messages, as
    the field `suite.turns` does. Raises UserError for a record without the fields that they are made of."""
    if suite.turns is None:
        named = [name for _, name, _, _ in Formatter().parse(suite.template) if name is not None]
    else:
        named = [suite.turns]
    for name in named:
        root = re.split(r"[.\[]", name)[0]
        if fields.get(root) is None:
            raise UserError(f"{place}: no field '{root}', which suite={suite.kind} needs; it has {', '.join(fields) or 'none'}")
    alone = re.fullmatch(r"\{(\w+)\}", suite.template or "")
    listing = alone[1] if alone else suite.turns
    turns = listed(fields.get(listing))
    system = None
    if isinstance(turns, dict) or (isinstance(turns, list) and not all(isinstance(turn, str) for turn in turns)):
        turns, system = _of_messages(f"{place}: '{listing}'", turns)
    elif suite.template and not isinstance(turns, list):
        try:
            turns = [_Filler().vformat(suite.template, (), fields)]
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{place}: suite.template cannot be filled ({type(error).__name__}: {error})") from error
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{place}: '{suite.turns or suite.template}' is not a list of the user's turns, none of them empty")
    try:
        "".join([*turns, system or ""]).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: its text is not valid Unicode") from error
    return turns, system


def _of_messages(place: str, turns: list | dict) -> tuple[list[str], str | None]:
    """The user's turns and the system message of a conversation in any shape that data=chat reads. Its replies are left out:
    the target's own stand in their place."""
    try:
        messages = messages_of({"messages": turns})
    except LeftOut as reason:
        raise UserError(f"{place} is neither a list of the user's turns nor of messages ({reason})") from reason
    system = messages.pop(0)["content"] if messages[0]["role"] in ("system", "developer") else None
    roles = [message["role"] for message in messages]
    if roles != [("user", "assistant")[k % 2] for k in range(len(roles))]:
        raise UserError(f"{place} has messages of {', '.join(roles)}: a suite asks a user's turns, with a reply between two")
    return [message["content"] for message in messages[::2]], system


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
        return _of_documents(suite, data, tokenizer)
    return _of_suite(suite, tokenizer, room)


def _of_documents(suite: SuiteRecipe, data: DataRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict]:
    found = heldout_prompts(data, suite, tokenizer)
    said = {"source": data.source, "format": "plain text, the first tokens of documents", **_lengths(found)}
    told = ("chat", "thinking", "truncate", "warmup", "warmup_tokens")
    said |= {"suite": suite.kind, **suite.model_dump(include=set(told)), "positions": suite.prompt_tokens + suite.new_tokens}
    return found, said | {"count": suite.count, "tokens": suite.prompt_tokens, "max_new_tokens": suite.new_tokens}


def _of_suite(suite: SuiteRecipe, tokenizer: PreTrainedTokenizerBase, room: int) -> tuple[list[Prompt], dict]:
    # 1. The form of a prompt, and what room it has.
    style = Style(suite, tokenizer, suite.prompt_tokens or room - suite.new_tokens, room)
    if style.limit < 2 or style.limit + suite.new_tokens > room:
        raise UserError(
            f"suite.prompt_tokens={suite.prompt_tokens} and suite.new_tokens={suite.new_tokens} exceed the {room} positions that "
            "the target has for a request"
        )

    # 2. Records become prompts, until there are enough.
    source = suite.path or suite.name
    found = []
    truncated = 0
    short = 0
    positions = 0
    for asked in _drawn(suite):
        prompt, was_cut = _prompt(asked, style)
        if prompt.takes > room:
            raise UserError(
                f"{source}: the conversation '{asked.id}' of {len(asked.turns)} turns may take {prompt.takes} positions with "
                f"suite.new_tokens={suite.new_tokens}, the target has {room} for a request"
            )
        if suite.short == "drop" and len(prompt.tokens) < style.limit and not was_cut:
            short += 1
            continue
        found.append(prompt)
        truncated += was_cut
        positions = max(positions, prompt.takes)
        if len(found) == suite.count:
            break
    if not found:
        raise UserError(f"{source}: no prompt has {style.limit} tokens (suite.short=keep takes shorter ones)")
    # Caches are made for the longest conversation, so that later turns may take no more than that.
    found = [replace(prompt, style=replace(style, room=positions)) for prompt in found]

    # 3. What a report says of them.
    said = {"suite": suite.kind, "source": source, "format": style.name}
    unused = {"config", "split"} if suite.path else set()
    said |= suite.model_dump(exclude={"kind", "path", "name", "count", "new_tokens"} | unused)
    said |= {"prompt_tokens": style.limit, "max_new_tokens": suite.new_tokens, "count": len(found), **_lengths(found)}
    said |= {"truncated": truncated, "left_out_as_short": short, "positions": positions}
    said["conversation_turns"] = sum(1 + len(p.waiting) for p in found)
    said["categories"] = dict(Counter(p.category for p in found if p.category is not None))
    return found, said


def _drawn(suite: SuiteRecipe) -> list[Asked]:
    """Every record, in the order in which they are taken. Raises UserError for any that is wrong."""
    if suite.path is None and suite.name is None:
        raise UserError(f"suite={suite.kind} needs suite.path=FILE; the head of conf/suite/{suite.kind}.yaml says of what")
    rows = numbered_rows(suite.path, suite.name, suite.config, suite.split)
    found = []
    seen = {}
    # All records are read before any is drawn, so that a wrong one is found whatever the seed.
    for number, (place, fields) in enumerate(rows):
        category = fields.get(suite.category)
        named = fields.get(suite.id)
        id = str(number if named is None else named)
        if id in seen:
            raise UserError(f"{place}: the id '{id}' stands twice ({seen[id]}); suite.id=null numbers the records")
        seen[id] = place
        found.append(Asked(id, None if category is None else str(category), *_turns(place, fields, suite)))
    if suite.count is not None and suite.count < len(found) and suite.shuffle is not None:
        random.Random(suite.shuffle).shuffle(found)  # as DFlash draws: the same seed, the same records
    return _in_turn(found, suite) if suite.balanced else found


def _in_turn(records: list[Asked], suite: SuiteRecipe) -> list[Asked]:
    """One of each kind, then another one of each, until all are there."""
    waiting: dict[str, list] = {}
    for one in records:
        waiting.setdefault(suite.kind_of(one.category), []).append(one)
    # Kinds end at different times; those that are left go on.
    rounds = zip_longest(*waiting.values())
    return [one for taken in rounds for one in taken if one is not None]


def _prompt(asked: Asked, style: Style) -> tuple[Prompt, bool]:
    """A conversation's first request, and whether it was cut. Only a single turn is cut: what a conversation's later turns speak
    of must stay."""
    id, category, turns, own = asked
    system = own or style.suite.system
    opening = ({"role": "system", "content": system},) if system else ()
    messages = (*opening, {"role": "user", "content": turns[0]})
    new = style.suite.new_tokens
    if len(turns) == 1:
        tokens, was_cut = style.fitted(messages)
        return Prompt(id, tokens, category, messages, (), style, len(tokens) + new), was_cut
    whole = list(messages)
    for turn in turns[1:]:
        # Replies are not known yet: what the template writes around them is counted here, and their most tokens behind it.
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
                yield Part(record.id, *encode(record, tokenizer, data))
            except LeftOut as reason:
                left_out[str(reason)] += 1

    left_out: Counter[str] = Counter()
    every = encoded()
    found = []
    if data.long == "join":
        every = joined(every, suite.prompt_tokens, tokenizer.eos_token_id)
    for part in every:
        if len(part.ids) >= suite.prompt_tokens:
            found.append(Prompt(part.id, part.ids[: suite.prompt_tokens]))
        if len(found) == suite.count:
            return found
    raise UserError(
        f"data={data.source} has {len(found)} held-out documents of {suite.prompt_tokens} tokens, fewer than "
        f"suite.count={suite.count}; data.long=join joins shorter ones"
        + "".join(f"; {n} x {reason}" for reason, n in left_out.most_common(3))
    )
