"""Refusals of combinations of keys, as tables: each command has its own in a module `rules.py`.

A key by itself is checked by its type and range, in the recipe. A rule is for keys that do not go together, or that do not go
with the machine, the cache or the drafter. The rules of a table are tried in order, and the first that is broken speaks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from common.errors import UserError

Section = TypeVar("Section")


class Rule(NamedTuple):
    """One combination that is refused.

    Attributes:
        name: what tests call it; every rule has a case.
        broken: takes the recipe (or a section of it), and in tables that need to know more, their context. Anything true means
            refused; a dict also fills in names of `words`.
        words: the message. `{r.train.batch}` is a key of the recipe, `{c.world}` a part of the context.
    """

    name: str
    broken: Callable[..., Any]
    words: str


def first_broken(rules: Sequence[Rule], recipe: Any, *context: Any) -> str | None:
    """What the first broken rule says; None where all hold."""
    for rule in rules:
        found = rule.broken(recipe, *context)
        if found:
            values = found if isinstance(found, dict) else {}
            return rule.words.format(r=recipe, c=context[0] if context else None, **values)
    return None


def refuse(rules: Sequence[Rule], recipe: Any, *context: Any) -> None:
    """Raises UserError with the words of the first broken rule."""
    if words := first_broken(rules, recipe, *context):
        raise UserError(words)


def obeying(rules: Sequence[Rule], section: Section) -> Section:
    """`section` itself, for validators of pydantic. Raises ValueError with the words of the first broken rule."""
    if words := first_broken(rules, section):
        raise ValueError(words)
    return section
