"""The conversation of a record, in the shapes that people have, and which of its turns are marked not to be trained."""

import json
import re
from collections.abc import Collection
from typing import Any

import numpy as np

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}  # ShareGPT's names
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
MARKS = ("weight", "loss_mask", "train", "training", "loss")  # of OpenAI, LlamaFactory, axolotl (two) and ms-swift: 0 or 1
MARK_LIKE = re.compile("(?<![a-z])(train|loss|weight|mask|label)")  # in names that may say what is not to be learned
CALLS = ("tool_calls", "function_call")


class LeftOut(Exception):
    """An example that cannot be used. Its text is the reason; examples are counted by reason and reported."""

    def __str__(self) -> str:
        # It may quote the example, half characters and all; a manifest and a terminal hold none.
        return super().__str__().encode("utf-8", "backslashreplace").decode()[:200]


def listed(value: Any) -> Any:
    """What an array or a number of numpy's stands for."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def messages_of(fields: dict, template: str = "") -> list[dict]:
    """The conversation as [{"role", "content", ...}]; ShareGPT's {"from", "value"} is translated. Of other keys what JSON can
    hold is kept, but for marks. Raises LeftOut, also for a value that it cannot hold under a key that `template` reads."""
    messages = []
    for turn in _turns(fields):
        role = turn.get("role") or turn.get("from")
        role = SPEAKERS.get(role, role) if isinstance(role, str) else None
        if role not in ROLES:
            raise LeftOut(f"an unknown role '{role}'" if role else "an unknown role, or none")
        if calls := _parsed(turn.get("tool_calls")):
            turn = turn | {"tool_calls": _calls(calls)}
        rest = {}
        for key, value in turn.items():
            if key in ("role", "from", "value", "content", *MARKS) or value is None or (key in CALLS and not value):
                continue
            if (reason := no_json(value)) is None:
                rest[key] = value
            elif key in template or key in CALLS:
                raise LeftOut(f"'{key}' of a message {reason}")
        messages.append({"role": role, "content": _content(turn), **rest})
    if no_json([message["content"] for message in messages]):
        raise LeftOut("its text is not valid Unicode")
    return messages


def tools_of(fields: dict) -> list[dict] | None:
    """The tools that a conversation may call; a list, or the JSON of one. Raises LeftOut."""
    tools = _parsed(listed(fields.get("tools")))
    if not tools:
        return None
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools) or no_json(tools):
        raise LeftOut("its 'tools' are not a list of JSON objects")
    return tools


def trained(fields: dict, remarks: set[str]) -> list[bool]:
    """Of each message, whether no mark says that it is not to be trained. Raises LeftOut for a mark that is neither 0 nor 1."""
    found = []
    for turn in _turns(fields):
        if any(turn.get(name) for name in ("train_detail", "training_detail")):
            raise LeftOut("'train_detail' of a message marks parts of it, which is not understood")
        marks = {name: turn[name] for name in MARKS if turn.get(name) is not None}
        for name, value in marks.items():
            if not is_mark(value):
                raise LeftOut(f"'{name}' of a message is neither 0 nor 1, which is not understood")
        found.append(all(marks.values()))
        unknown = [key for key in turn if MARK_LIKE.search(key) and key not in MARKS and turn[key] is not None]
        remarks.update(f"kept, but '{name}' of a message is not understood" for name in unknown)
    return found


def marked_out(fields: dict, remarks: set[str], known: Collection[str] = ()) -> bool:
    """Whether a mark beside the content of a record says that all of it is not to be trained. Fields that look like marks and say
    nothing of the kind (a column of losses, say) are no reason to lose a record: they are added to `remarks`, but for `known`
    ones, which are read elsewhere."""
    looks = [name for name, value in fields.items() if MARK_LIKE.search(name) and name not in known and value is not None]
    marks = {name: listed(fields[name]) for name in looks if name in MARKS}
    marks = {name: value for name, value in marks.items() if is_mark(value)}
    remarks.update(f"kept, but '{name}' of a record is not understood" for name in looks if name not in marks)
    return not all(marks.values())


def is_mark(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def no_json(value: Any) -> str | None:
    """Why JSON in Unicode cannot hold it; None: it can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    except (TypeError, ValueError, RecursionError):
        return "is nothing that JSON can hold"
    return None


def _turns(fields: dict) -> list[dict]:
    turns = _parsed(listed(fields.get("messages")) or listed(fields.get("conversations")))
    # As `datasets` gives a sequence of structs: by key, each a list of one length.
    if isinstance(turns, dict) and turns and all(isinstance(listed(v), list) for v in turns.values()):
        columns = {key: listed(values) for key, values in turns.items()}
        if len(set(map(len, columns.values()))) == 1:
            turns = [dict(zip(columns, row)) for row in zip(*columns.values())]
    if not isinstance(turns, list) or not turns:
        raise LeftOut("it has no 'messages' or 'conversations'")
    if not all(isinstance(turn, dict) for turn in turns):
        raise LeftOut("a message of it is not an object")
    return [{key: listed(value) for key, value in turn.items()} for turn in turns]


def _parsed(value: Any) -> Any:
    """What a text of JSON holds (tables keep lists of unlike objects so); anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _calls(calls: Any) -> list[dict]:
    """Calls of tools, their arguments as objects, as templates expect them and servers hand them to templates."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise LeftOut("'tool_calls' of a message are not a list of JSON objects")
    found = []
    for call in calls:
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        if isinstance(arguments := _parsed(inner.get("arguments")), dict):
            inner = inner | {"arguments": arguments}
        found.append(call | {"function": inner} if isinstance(call.get("function"), dict) else inner)
    return found


def _content(turn: dict) -> str | None:
    """The text of a message; OpenAI's parts are joined when they are text. None only beside a call of tools."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if isinstance(content, str) or (content is None and any(turn.get(name) for name in CALLS)):
        return content
    raise LeftOut("a message of it is not text")
