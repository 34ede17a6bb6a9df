"""How a command of ``dso`` ends, and which of several processes says so."""

from __future__ import annotations

import os

EXIT_INPUT = 2
EXIT_PARTLY = 3  # of what was asked for by name, something could not be had; the rest was done
EXIT_UNMET = 4  # no scale meets the limits; nothing was changed
EXIT_STOPPED = 130  # by Ctrl-C; what was done is saved
EXIT_PREEMPTED = 75  # by SIGTERM, likewise (EX_TEMPFAIL: the same command with --resume auto goes on)


def is_main() -> bool:
    """Whether this process speaks for the run: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
