"""Records -> token ids and a loss mask, which says which tokens' *predictions* are supervised.

A chat's mask comes from the chat template itself: from its generation marks where it has them, else from exact prefix
differences of token ids. A template that breaks its own prefixes is noticed, never masked wrongly or to zero in silence.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data_prep.recipe import DataRecipe
from data_prep.sources.records import Record
from data_prep.sources.sides import VALIDATION, is_validation

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}  # ShareGPT's names
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
DATE = re.compile(r"""strftime_now\(\s*["']([^"']*)["']\s*\)""")
TODAY = date(2026, 1, 1)  # for templates that write the date: a capture must go on tomorrow
HALF = re.compile("\ufffd{1,3}$")  # an end of a text that may still become a character
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class LeftOut(Exception):
    """An example that cannot be used. Its text is the reason; examples are counted by reason and reported."""


class TokenDocument(NamedTuple):
    """`input_ids` int32 [T]; `loss_mask` uint8 [T] marks tokens whose *prediction* is supervised ([0] is always 0)."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, data: DataRecipe) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of one record, uncut.

    Raises:
        LeftOut: the record is malformed, has tokens that the model has not, or the chat template cannot say what the assistant
            wrote.
        UserError: the tokenizer has no chat template.
    """
    ids, mask = _encoded(record, tokenizer, data)
    # A model may have more tokens than its tokenizer knows, or lack some (of pictures).
    if ids and max(ids) >= getattr(tokenizer, "model_vocab_size", len(tokenizer)):
        raise LeftOut("a token id outside the vocabulary")
    return ids, mask


def _encoded(record: Record, tokenizer: PreTrainedTokenizerBase, data: DataRecipe) -> tuple[list[int], list[int]]:
    match _format(record.fields, data):
        case "tokens":
            return _stored_tokens(record.fields)
        case "chat":
            ids, mask = _chat(messages_of(record.fields), record.fields.get("tools"), tokenizer, data)
            if record.fields.get("finish") == "length" and any(mask):  # mode=regenerate: the target did not end its last reply
                last = len(mask) - 1 - mask[::-1].index(1)
                mask[last] = int(ids[last] not in tokenizer.all_special_ids)
            return ids, mask
    if not isinstance(record.fields.get("text"), str):
        raise LeftOut("it has no 'text'")
    try:
        record.fields["text"].encode()
    except UnicodeEncodeError:
        raise LeftOut("its text is not valid Unicode") from None
    ids = ids_of_text(tokenizer, record.fields["text"])
    # What the tokenizer puts before a text is given, wherever the text stands when texts are joined.
    given = min(len(put_before(tokenizer)), len(ids))
    return ids, [0] * given + [1] * (len(ids) - given)


def ids_of_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text that is no chat, as the model's own tokenizer has it: with the tokens that it puts before any text (BOS). Those that
    some put behind it (EOS) are left out, because the target is to go on."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[: len(ids) - len(_put_around(tokenizer)[1])]


def put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before any text."""
    return _put_around(tokenizer)[0]


def _put_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def pieces(record: Record, ids: list[int], mask: list[int], data: DataRecipe, left_out: Counter) -> Iterator[TokenDocument]:
    """The documents `id#k` that a record becomes; what cannot be used is counted in `left_out`."""
    length = data.max_length
    if len(ids) > length and data.long == "drop":
        left_out[f"longer than data.max_length={length} tokens"] += 1
        return
    if len(ids) > length and data.long == "cut":
        left_out[f"kept, but cut to data.max_length={length} tokens"] += 1
        ids = ids[:length]
        mask = mask[:length]
    for k, start in enumerate(range(0, max(len(ids), 1), length)):
        piece = np.asarray(ids[start : start + length], dtype=np.int32)
        supervised = np.asarray(mask[start : start + length], dtype=np.uint8)
        # Also where a long text was cut: what came before is not in the document.
        supervised[:1] = 0  # the first token is predicted from nothing
        if not supervised.any():
            left_out["no supervised token" if len(piece) > 1 else "fewer than two tokens"] += 1
        else:
            yield TokenDocument(f"{record.id}#{k}", piece, supervised)


def joined(
    encoded: Iterable[tuple[Record, tuple[list[int], list[int]] | str]], length: int, end: int | None
) -> Iterator[tuple[Record, tuple[list[int], list[int]] | str]]:
    """data.long=join: records end to end, the tokenizer's end token between them, cut every `length` tokens. A piece is named
    after the record in which it begins, and the place there. Records that training is to be judged on are joined by themselves,
    so that no text stands on both sides (`VALIDATION`)."""
    begun: dict[bool, tuple[str, list[int], list[int]]] = {}
    for record, one in encoded:
        if isinstance(one, str):
            yield record, one
            continue
        # Decided for each record, before joining: a piece that held both sides could be on neither.
        judged = is_validation(record.id)
        prefix = VALIDATION * judged
        name, ids, mask = begun.pop(judged, (prefix + record.id, [], []))
        started = len(ids)
        # The end token between two texts is the only sign that the next one does not follow from the last.
        ids = ids + one[0] + [end] * (end is not None)
        mask = mask + one[1] + [1] * (end is not None)
        while len(ids) >= length:
            yield Record(name, {}), (ids[:length], mask[:length])
            ids = ids[length:]
            mask = mask[length:]
            started = started - length
            name = f"{prefix}{record.id}@{-started}"
        if ids:
            begun[judged] = name, ids, mask
    for name, ids, mask in begun.values():
        yield Record(name, {}), (ids, mask)


def dateless(template: str) -> str:
    """A chat template that writes the same tokens every day."""
    return DATE.sub(lambda call: repr(TODAY.strftime(call[1])), template)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options) -> dict:
    """`apply_chat_template`, ids and all. Raises LeftOut when the template refuses the conversation."""
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise LeftOut(f"the chat template refuses it ({' '.join(str(error).split())[:80]})") from error


def messages_of(fields: dict) -> list[dict]:
    """The conversation as [{"role", "content", ...}]; ShareGPT's {"from", "value"} is translated. Raises LeftOut."""
    turns = fields.get("messages") or fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise LeftOut("it has no 'messages' or 'conversations'")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise LeftOut("a message of it is not an object")
        role = turn.get("role") or turn.get("from")
        role = SPEAKERS.get(role, role) if isinstance(role, str) else None
        if role not in ROLES:
            raise LeftOut(f"an unknown role '{role}'")
        rest = {k: v for k, v in turn.items() if k not in ("role", "from", "value", "content") and v is not None}
        messages.append({"role": role, "content": _content(turn), **rest})
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LeftOut("its text is not valid Unicode") from None
    return messages


def _content(turn: dict) -> str | None:
    """The text of a message; OpenAI's parts are joined when they are text. None only beside a call of tools."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if isinstance(content, str) or (content is None and turn.get("tool_calls")):
        return content
    raise LeftOut("a message of it is not text")


def _format(fields: dict, data: DataRecipe) -> str:
    if data.format != "auto":
        return data.format
    if "input_ids" in fields:
        return "tokens"
    return "chat" if fields.get("messages") or fields.get("conversations") else "text"


def _stored_tokens(fields: dict) -> tuple[list[int], list[int]]:
    ids = fields.get("input_ids")
    mask = fields.get("loss_mask")
    mask = [1] * len(ids) if mask is None and isinstance(ids, list) else mask
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise LeftOut("'input_ids' and 'loss_mask' are not lists of one length")
    if not all(type(i) is int and i >= 0 for i in ids) or not all(m in (0, 1) for m in mask):
        raise LeftOut("a token id that is no number of a token, or a loss mask that is not of 0 and 1")
    return ids, [int(m) for m in mask]


def _chat(messages: list[dict], tools, tokenizer: PreTrainedTokenizerBase, data: DataRecipe) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise UserError("the target's tokenizer has no chat template, which data=chat needs")

    # A template that writes today's date would make another cache tomorrow.
    template = dateless(tokenizer.get_chat_template(tools=tools or None))

    def render(some: list[dict], prompt: bool = False, mask: bool = False):
        options = {"tools": tools or None, "chat_template": template, "add_generation_prompt": prompt}
        out = rendered(tokenizer, some, return_assistant_tokens_mask=mask, **options, **data.template)
        return (out["input_ids"], out["assistant_masks"]) if mask else out["input_ids"]

    if data.loss_mask == "none":
        ids = render(messages)
        return ids, [1] * len(ids)
    turns = [k for k, message in enumerate(messages) if k and message["role"] == "assistant"]  # the first answers nobody
    if not turns:
        raise LeftOut("no reply of the assistant")
    turns = turns[-1:] if data.loss_mask == "last_turn" else turns
    if GENERATION_MARK.search(template):
        ids, mask = render(messages, mask=True)
        if data.loss_mask == "last_turn":
            before = len(_prefix(render(messages[: turns[0]], prompt=True), ids, data))
            mask = [0] * before + mask[before:]
        return ids, mask
    ids = render(messages)
    mask = [0] * len(ids)
    special = set(tokenizer.all_special_ids)
    for k in turns:
        after = _prefix(render(messages[: k + 1]), ids, data)
        start = len(_prefix(render(messages[:k], prompt=True), after, data))
        end = len(after)
        ends = [i for i in range(start, end) if after[i] in special]
        if ends and not tokenizer.decode(after[ends[-1] + 1 :]).strip():
            end = ends[-1] + 1  # white space behind the end-of-turn token is the template's, not the model's
        mask[start:end] = [1] * (end - start)
    return ids, mask


def _prefix(part: list[int], whole: list[int], data: DataRecipe) -> list[int]:
    """`part`, once it is seen to begin `whole`."""
    # Compared as tokens and not as text: two texts of which one begins the other need not be cut into tokens alike.
    if whole[: len(part)] != part:
        raise LeftOut(
            "the chat template writes a turn differently once others follow it (Qwen3 drops earlier thinking), so that "
            f"its tokens cannot be told by data.loss_mask={data.loss_mask}"
        )
    return part
