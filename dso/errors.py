"""The one base of all errors about what the user gave, as opposed to bugs, and what is quoted of a library's."""

from __future__ import annotations


class UserError(ValueError):
    """Something given that cannot be used. The message is one line: what is wrong, where, and what to do.

    The command line prints it and exits. Any other exception is a bug and shows its traceback.
    """


def first_line(error: Exception) -> str:
    """What is quoted of a library's error: its first line, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
