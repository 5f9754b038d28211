"""Conversations, and files of them, as sources of data are given them."""

import json


def write_lines(path, rows):
    """A file of JSON lines; its path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(turns, system=None):
    """Messages of user and assistant in turn."""
    roles = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return ([{"role": "system", "content": system}] if system else []) + roles
