"""The one base of all errors that are about what the user gave, not about this program."""

from __future__ import annotations


class UserError(ValueError):
    """Something given that cannot be used; the message is one line that says what, where and what to do.

    The command line prints these and exits; any other exception is a bug and shows its traceback.
    """
