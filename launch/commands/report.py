"""``dso report``: draw the report of a study again."""

from __future__ import annotations

import argparse
from pathlib import Path

from dso.evaluation.study import read_study
from dso.reports.page import RECORD, write_report


def run(arguments: argparse.Namespace) -> int:
    """``dso report``."""
    place = Path(arguments.study)
    file = place / RECORD if place.is_dir() else place
    print(write_report(read_study(file), arguments.out or file.parent))
    return 0
