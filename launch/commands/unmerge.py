"""``dso unmerge``: write the model of a merged folder without the steering."""

from __future__ import annotations

import argparse

from dso.exports.unmerge import unmerge
from launch.commands.common import quieten


def run(arguments: argparse.Namespace) -> int:
    """``dso unmerge``."""
    quieten()
    print(unmerge(arguments.folder, arguments.out, arguments.steering, arguments.model, arguments.dtype))
    return 0
