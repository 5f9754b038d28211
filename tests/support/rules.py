"""Tables of rules in tests: which of them a message is of."""

import re
from string import Formatter

from common.rules import Rule


def by_name(tables) -> dict[str, Rule]:
    """Every rule of some tables. Names are unique."""
    rules = [rule for table in tables for rule in table]
    found = {rule.name: rule for rule in rules}
    assert len(found) == len(rules)
    return found


def pattern(rule: Rule) -> str:
    """What the rule's message looks like, whatever it fills in."""
    parts = Formatter().parse(rule.words)
    return "".join(re.escape(text) + (".*" if name is not None else "") for text, name, _, _ in parts)
