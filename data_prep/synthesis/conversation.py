"""A conversation that is to be answered anew, and what keeps its answer."""

import json
from collections.abc import Callable
from typing import NamedTuple

from common.hashing import stable_hash


class Conversation(NamedTuple):
    """What stands before each reply: system and user messages, once a reply. `number`: which record of the source it is."""

    id: str
    prompts: list[list[dict]]
    number: int = 0

    @property
    def hash(self) -> str:
        return f"{stable_hash(json.dumps(self.prompts, ensure_ascii=False)):016x}"


Write = Callable[[Conversation, list[dict], str], None]  # keep the messages of one conversation, and how it finished
