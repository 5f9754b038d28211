"""The one exception whose message is meant for the person who typed the command."""


class UserError(Exception):
    """Something the user can mend. Every entry point prints it as one line and exits with code 2."""


def first_line(error: Exception) -> str:
    """What another library's error says, as a part of one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
