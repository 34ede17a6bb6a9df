"""What launchers start: ``deepspeed launch/train.py --config C ...``, or ``--module launch.train C ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def script_arguments(argv: Sequence[str]) -> list[str]:
    """What a launcher starts this file with, as ``dso`` takes it: ``--config C`` first, ``--local_rank`` left out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--local_rank", "--local-rank")  # each process finds its own in the environment
    known, rest = parser.parse_known_args(argv)
    return ["train", *([] if known.config is None else [known.config]), *rest]


if __name__ == "__main__":
    from launch.cli import main
    from launch.cluster.processes import leave

    leave(main(script_arguments(sys.argv[1:])))
