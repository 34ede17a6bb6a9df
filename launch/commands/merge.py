"""``dso merge``: write a plain model folder with a steering merged into the weights."""

from __future__ import annotations

import argparse
import sys

from dso.decisions.decision import DecisionSet
from dso.errors import UserError
from dso.exports.merge import Merging
from dso.files import as_path
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.commands.common import open_split, quieten
from launch.commands.cost import cost_table

SHOWN = 8  # parts that are left out, by name


def run(arguments: argparse.Namespace) -> int:
    """``dso merge``."""
    quieten()
    steering = Steering.from_pretrained(arguments.steering)
    merging = Merging.of(steering, arguments.scale, arguments.model)
    if left := merging.plan.left_out:
        print(
            f"What has no place in {type(merging.model).__name__} ({len(left)} of {len(steering.config.sites)} sites):"
        )
        for entry in left[:SHOWN]:
            print(f"  {entry.part} at {entry.site}: {entry.reason}")
        if len(left) > SHOWN:
            print(f"  and {len(left) - SHOWN} more")
        print(_cost(arguments, merging), flush=True)
    report = merging.write(
        arguments.out,
        arguments.dtype,
        allow_partial=arguments.allow_partial,
        allow_rounding=arguments.allow_rounding,
        stated=str(arguments.steering),
    )
    print(report)
    print(f"{arguments.out}: ask a server that runs it with: dso verify {arguments.out} --url URL --model NAME")
    return 0


def _cost(arguments: argparse.Namespace, merging: Merging) -> str:
    """What leaving these parts out does to the measured figures."""
    try:
        decisions = _decisions(arguments)
    except UserError as error:
        return f"What leaving them out costs was not measured: {error}"
    if decisions is None:
        return "What leaving them out costs was not measured; --decisions SET measures it."
    steering = merging.steering
    backbone = Backbone(
        merging.model, merging.tokenizer, "model", processor=merging.processor, scoring=steering.config.scoring
    )
    return cost_table(backbone, decisions, steering, merging.part, [merging.scale], "merged")


def _decisions(arguments: argparse.Namespace) -> DecisionSet | None:
    """Those that are named, or else the test split of the run that the steering is the result of."""
    if arguments.decisions:
        return open_split(arguments.decisions, arguments)
    config = as_path(arguments.steering).parent / "config.yaml"
    if not config.is_file():
        return None
    from launch.config.schema import load_config
    from launch.run.session import open_decisions, split_of

    found = load_config(str(config))
    print(f"dso: measuring on the test split of {found.data.set}", file=sys.stderr)
    return split_of(found, open_decisions(found), "test")
