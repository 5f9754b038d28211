"""Keys of earlier releases: a command that names one is told the new name."""

from collections.abc import Iterable
from typing import Any

from common.errors import UserError

# By command: the old key, or `key=value` where one value is gone, and what says it now.
RENAMED = {
    "data_prep": {},
    "train": {
        "objective.budgets=fixed": "view.budget=N",
    },
    "eval": {
        "prompts.count": "suite.count",
        "prompts.tokens": "suite.prompt_tokens",
        "prompts.max_new_tokens": "suite.new_tokens (mode=decode and served) or score.new_tokens (mode=score and diagnose)",
        "context": "suite.prompt_tokens (mode=decode and served) or score.context (mode=score and diagnose)",
    },
}


def refuse_renamed(command: str, said: Iterable[tuple[str, Any]]) -> None:
    """`said`: the keys that a command line names, with their values. Raises UserError for one that has another name now."""
    renamed = RENAMED[command]
    for key, value in said:
        # A key may stay while one of its values is gone.
        old = f"{key}={value}" if f"{key}={value}" in renamed else key
        if old in renamed:
            raise UserError(f"{old} is now {renamed[old]}")
