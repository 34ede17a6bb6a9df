"""``dso decisions``: validate a decision set, count it, show examples."""

from __future__ import annotations

import argparse
import math

from dso.decisions.decision import Decision, DecisionSet
from dso.decisions.describe import describe, show
from dso.decisions.sets import load_decisions
from launch.commands.common import load_backbone, pairs, quieten


def run(arguments: argparse.Namespace) -> int:
    """``dso decisions``."""
    data = load_decisions(arguments.set, **pairs(arguments.option, "--option"))
    render = None
    if arguments.model:
        quieten()
        render = load_backbone(arguments).prompt_text
    print(describe(data))
    seen: dict[tuple[str, str], int] = {}
    for decision in _spread(data):
        key = (decision.split, decision.kind)
        if seen.get(key, 0) < arguments.examples:
            seen[key] = seen.get(key, 0) + 1
            print()
            print(show(decision, render))
    return 0


def _spread(data: DecisionSet) -> list[Decision]:
    """Decisions in an order in which the first few are not alike."""
    step = next(n for n in (7919, 104729, 1) if math.gcd(n, len(data)) == 1)
    return [data[(index * step) % len(data)] for index in range(len(data))]
