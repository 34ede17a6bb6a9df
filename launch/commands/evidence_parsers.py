"""What the commands of evidence take: benchmarks, audits, calibration, patches. Light, as the parsers beside it."""

from __future__ import annotations

import argparse


def add_evidence(commands: argparse._SubParsersAction) -> None:
    """Add the commands; each is a file beside this one."""
