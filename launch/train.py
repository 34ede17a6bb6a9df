"""What launchers start: ``deepspeed launch/train.py --config C ...``, or ``--module launch.train C ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def script_arguments(argv: Sequence[str]) -> list[str]:
    """What a launcher starts this file with, as ``dso`` takes it: ``--config C`` first, ``--local_rank`` left out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--local_rank", "--local-rank")  # each process finds its own in the environment
    known, rest = parser.parse_known_args(argv)
    return ["train", *([] if known.config is None else [known.config]), *rest]


def leave_working_folder() -> None:
    """Import from where Python is installed, not from the working directory, unless this package is there.

    ``python -m`` and DeepSpeed put it first, where a user's own ``envs`` or ``trainers`` would stand for ours.
    """
    here, own = Path.cwd(), Path(__file__).resolve().parents[1]
    if here != own:
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]


if __name__ == "__main__":
    leave_working_folder()
    from launch.cli import main
    from launch.cluster.processes import leave

    leave(main(script_arguments(sys.argv[1:])))
