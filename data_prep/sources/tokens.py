"""Records -> token ids and a loss mask, which says which tokens' *predictions* are supervised.

A chat's mask comes from the chat template itself: from its generation marks where it has them, else from exact prefix
differences of token ids. A template that breaks its own prefixes is noticed, never masked wrongly or to zero in silence.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import date
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data_prep.recipe import DataRecipe
from data_prep.sources.messages import CALLS, LeftOut, is_mark, listed, marked_out, messages_of, tools_of, trained
from data_prep.sources.records import Record
from data_prep.sources.sides import VALIDATION, is_validation

# Masks beside stored tokens, 1 where a token is supervised: ours, and what TRL calls them.
MASKS = ("loss_mask", "assistant_masks", "assistant_mask", "completion_mask")
TOKEN_MARKS = (*MASKS, "labels", "attention_mask", "special_tokens_mask")
IGNORED = -100  # of labels
PASSED_OVER = "kept, but marks not to train are passed over by data.loss_mask=none"
REASONING = ("reasoning_content", "reasoning", "thinking")
DATE = re.compile(r"""strftime_now\(\s*["']([^"']*)["']\s*\)""")
TODAY = date(2026, 1, 1)  # for templates that write the date: a capture must go on tomorrow
HALF = re.compile("\ufffd{1,3}$")  # an end of a text that may still become a character
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TokenDocument(NamedTuple):
    """`input_ids` int32 [T]; `loss_mask` uint8 [T] marks tokens whose *prediction* is supervised ([0] is always 0)."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray


class Part(NamedTuple):
    """Tokens and mask of a record, or of several joined; `records`: which ones in `counts.Counts`."""

    id: str
    ids: list[int]
    mask: list[int]
    records: list[int] = []


def encode(
    record: Record, tokenizer: PreTrainedTokenizerBase, data: DataRecipe, remarks: set[str] | None = None
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of one record, uncut. What of it is not understood or not written is added to `remarks`.

    Raises:
        LeftOut: the record is malformed, has tokens that the model has not, or the chat template cannot say what the assistant
            wrote.
        UserError: the tokenizer has no chat template.
    """
    ids, mask = _encoded(record, tokenizer, data, set() if remarks is None else remarks)
    # A model may have more tokens than its tokenizer knows, or lack some (of pictures).
    if ids and max(ids) >= getattr(tokenizer, "model_vocab_size", len(tokenizer)):
        raise LeftOut("a token id outside the vocabulary")
    return ids, mask


def _encoded(
    record: Record, tokenizer: PreTrainedTokenizerBase, data: DataRecipe, remarks: set[str]
) -> tuple[list[int], list[int]]:
    format = _format(record.fields, data)
    if marked_out(record.fields, remarks, known=TOKEN_MARKS if format == "tokens" else ()):
        if data.loss_mask != "none":
            raise LeftOut("marked not to be trained")
        remarks.add(PASSED_OVER)
    if format == "tokens":
        return _stored_tokens(record.fields)
    if format == "chat":
        ids, mask = _chat(record.fields, tokenizer, data, remarks)
        if record.fields.get("finish") == "length" and any(mask):  # mode=regenerate: the target did not end its last reply
            last = len(mask) - 1 - mask[::-1].index(1)
            mask[last] = int(ids[last] not in tokenizer.all_special_ids)
        return ids, mask
    if not isinstance(record.fields.get("text"), str):
        raise LeftOut("it has no 'text'" if record.fields.get("text") is None else "its 'text' is not text")
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


@lru_cache(maxsize=4)  # asked for every text
def _put_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def pieces(part: Part, data: DataRecipe) -> Iterator[TokenDocument | str]:
    """The documents `id#k` that a part becomes, and what is wrong with those that cannot be used."""
    length = data.max_length
    _, ids, mask, _ = part
    if len(ids) > length and data.long == "drop":
        yield f"longer than data.max_length={length} tokens"
        return
    if len(ids) > length and data.long == "cut":
        yield f"cut to data.max_length={length} tokens"
        ids = ids[:length]
        mask = mask[:length]
    for k, start in enumerate(range(0, max(len(ids), 1), length)):
        piece = np.asarray(ids[start : start + length], dtype=np.int32)
        supervised = np.asarray(mask[start : start + length], dtype=np.uint8)
        # Also where a long text was cut: what came before is not in the document.
        supervised[:1] = 0  # the first token is predicted from nothing
        document = TokenDocument(f"{part.id}#{k}", piece, supervised)
        yield unusable(document) or document


def unusable(document: TokenDocument) -> str | None:
    """Why no slot of a document could count; None: one can. The first anchor is token 1, so that the first slot is token 2."""
    if len(document.input_ids) < 3:
        return "fewer than three tokens"
    if not document.loss_mask.any():
        return "no supervised token"
    return None if document.loss_mask[2:].any() else "no supervised token behind the second, where the first draft begins"


def joined(parts: Iterable[Part], length: int, end: int | None) -> Iterator[Part]:
    """data.long=join: records end to end, the tokenizer's end token between them, cut every `length` tokens. A piece is named
    after the record in which it begins, and the place there. Records that training is to be judged on are joined by themselves,
    so that no text stands on both sides (`VALIDATION`)."""
    begun: dict[bool, Part] = {}
    for part in parts:
        if not part.ids and end is None:  # nothing of it can be joined
            yield part
            continue
        # Decided for each record, before joining: a piece that held both sides could be on neither.
        judged = is_validation(part.id)
        prefix = VALIDATION * judged
        name, ids, mask, records = begun.pop(judged, Part(prefix + part.id, [], []))
        started = len(ids)
        # The end token between two texts is the only sign that the next one does not follow from the last.
        ids = ids + part.ids + [end] * (end is not None)
        mask = mask + part.mask + [1] * (end is not None)
        records = records + part.records
        while len(ids) >= length:
            yield Part(name, ids[:length], mask[:length], records)
            ids = ids[length:]
            mask = mask[length:]
            records = part.records  # what is left is of the last one alone
            started = started - length
            name = f"{prefix}{part.id}@{-started}"
        if ids:
            begun[judged] = Part(name, ids, mask, records)
    yield from begun.values()


def dateless(template: str) -> str:
    """A chat template that writes the same tokens every day."""
    return DATE.sub(lambda call: repr(TODAY.strftime(call[1])), template)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options) -> dict:
    """`apply_chat_template`, ids and all. Raises LeftOut when the template refuses the conversation."""
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise LeftOut(f"the chat template refuses it ({' '.join(str(error).split())[:80]})") from error


def _format(fields: dict, data: DataRecipe) -> str:
    if data.format != "auto":
        return data.format
    if fields.get("input_ids") is not None:
        return "tokens"
    return "chat" if any(listed(fields.get(name)) for name in ("messages", "conversations")) else "text"


def _stored_tokens(fields: dict) -> tuple[list[int], list[int]]:
    """A token is supervised when each mask beside it says so: `MASKS` by 1, `labels` by the token itself instead of -100."""
    ids = listed(fields.get("input_ids"))
    if not isinstance(ids, list):
        raise LeftOut("'input_ids' is not a list")
    beside = {name: listed(fields.get(name)) for name in (*MASKS, "labels", "attention_mask")}
    beside = {name: values for name, values in beside.items() if values is not None}
    for name, values in beside.items():
        if not isinstance(values, list) or len(values) != len(ids):
            raise LeftOut(f"'input_ids' and '{name}' are not lists of one length")
        if name != "labels" and not all(map(is_mark, values)):
            raise LeftOut(f"'{name}' is not of 0 and 1")
    if not all(type(i) is int and i >= 0 for i in ids):
        raise LeftOut("a token id that is no number of a token")
    labels = beside.pop("labels", ids)
    if not all(type(label) is int and label in (IGNORED, id) for label, id in zip(labels, ids)):
        raise LeftOut(f"'labels' are neither the input_ids beside them nor {IGNORED}")
    there = beside.pop("attention_mask", [1] * len(ids))
    kept = slice(there.index(1), len(there) - there[::-1].index(1)) if 1 in there else slice(0)
    if not all(there[kept]):
        raise LeftOut("'attention_mask' hides tokens between others")
    mask = [int(label != IGNORED and all(column)) for label, *column in zip(labels, *beside.values())]
    return ids[kept], mask[kept]


def _chat(fields: dict, tokenizer: PreTrainedTokenizerBase, data: DataRecipe, remarks: set[str]) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise UserError("the target's tokenizer has no chat template, which data=chat needs")
    tools = tools_of(fields)

    # A template that writes today's date would make another cache tomorrow.
    template = dateless(tokenizer.get_chat_template(tools=tools))
    messages = messages_of(fields, template)

    def render(some: list[dict], prompt: bool = False, mask: bool = False):
        options = {"tools": tools, "chat_template": template, "add_generation_prompt": prompt}
        out = rendered(tokenizer, some, return_assistant_tokens_mask=mask, **options, **data.template)
        return (out["input_ids"], out["assistant_masks"]) if mask else out["input_ids"]

    _refuse_unwritten(messages, template, render)
    if tools and "tools" not in template:
        remarks.add("kept, but the chat template does not write its 'tools'")
    remarks.update(
        f"kept, but the chat template does not write '{name}'"
        for name in REASONING
        if not re.search(rf"\b{name}\b", template) and any(name in message for message in messages)
    )
    wanted = trained(fields, remarks)
    if data.loss_mask == "none":
        if not all(wanted):
            remarks.add(PASSED_OVER)
        ids = render(messages)
        return ids, [1] * len(ids)
    turns = [k for k, message in enumerate(messages) if k and message["role"] == "assistant"]  # the first answers nobody
    if not turns:
        raise LeftOut("no reply of the assistant")
    turns = turns[-1:] if data.loss_mask == "last_turn" else turns
    unwanted = [k for k in turns if not wanted[k]]
    if len(unwanted) == len(turns):
        raise LeftOut("every reply is marked not to be trained")
    if GENERATION_MARK.search(template):
        ids, mask = render(messages, mask=True)
        if data.loss_mask == "last_turn":
            before = len(_prefix(render(messages[: turns[0]], prompt=True), ids, data))
            mask = [0] * before + mask[before:]
        for k in unwanted:
            after = len(_prefix(render(messages[: k + 1]), ids, data))
            before = len(_prefix(render(messages[:k], prompt=True), ids, data))
            mask[before:after] = [0] * (after - before)
        return ids, mask
    ids = render(messages)
    mask = [0] * len(ids)
    special = set(tokenizer.all_special_ids)
    for k in turns:
        if k in unwanted:
            continue
        after = _prefix(render(messages[: k + 1]), ids, data)
        start = len(_prefix(render(messages[:k], prompt=True), after, data))
        end = len(after)
        ends = [i for i in range(start, end) if after[i] in special]
        if ends and not tokenizer.decode(after[ends[-1] + 1 :]).strip():
            end = ends[-1] + 1  # white space behind the end-of-turn token is the template's, not the model's
        mask[start:end] = [1] * (end - start)
    return ids, mask


def _refuse_unwritten(messages: list[dict], template: str, render) -> None:
    """Raises LeftOut for calls of tools, and what came of them, that the template passes over: it would leave an empty reply."""
    for name in CALLS:
        if any(name in message for message in messages):
            if name not in template or _same(render, messages, [{**m, name: None} if name in m else m for m in messages]):
                raise LeftOut(f"the chat template does not write '{name}'")
    results = ("tool", "function")
    if any(m["role"] in results and m["content"] for m in messages):
        if _same(render, messages, [m | {"content": ""} if m["role"] in results else m for m in messages]):
            raise LeftOut("the chat template does not write what tools return")


def _same(render, messages: list[dict], changed: list[dict]) -> bool:
    whole = render(messages)
    try:
        return render([{k: v for k, v in m.items() if k == "content" or v is not None} for m in changed]) == whole
    except LeftOut:  # it looks at what is missing now
        return False


def _prefix(part: list[int], whole: list[int], data: DataRecipe) -> list[int]:
    """`part`, once it is seen to begin `whole`."""
    # Compared as tokens and not as text: two texts of which one begins the other need not be cut into tokens alike.
    if whole[: len(part)] != part:
        raise LeftOut(
            "the chat template writes a turn differently once others follow it (Qwen3 drops earlier thinking), so that "
            f"its tokens cannot be told by data.loss_mask={data.loss_mask}"
        )
    return part
