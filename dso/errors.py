"""The one base of all errors about what the user gave, as opposed to bugs."""

from __future__ import annotations


class UserError(ValueError):
    """Something given that cannot be used. The message is one line: what is wrong, where, and what to do.

    The command line prints it and exits. Any other exception is a bug and shows its traceback.
    """
