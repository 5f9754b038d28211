"""The one exception whose message is meant for the person who typed the command."""


class UserError(Exception):
    """Something the user can mend. Every entry point prints it as one line and exits with code 2."""
