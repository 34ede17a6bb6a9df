"""``dso freeform``: train and measure on free-form answers."""

from __future__ import annotations

import argparse
import sys

from launch.commands.common import quieten, run_name
from launch.config.freeform import load_freeform
from launch.exits import EXIT_PREEMPTED, EXIT_STOPPED, is_main
from launch.run import freeform
from launch.run.folder import Stopped


def run(arguments: argparse.Namespace) -> int:
    """``dso freeform``."""
    config, name = load_freeform(arguments.config, arguments.overrides), run_name(arguments.config)
    quieten()
    if arguments.measure:
        print(freeform.measured(config, arguments.measure, arguments.quiet))
        return 0
    try:
        result = freeform.train(
            config, name=name, overwrite=arguments.overwrite, quiet=arguments.quiet, deepspeed=arguments.deepspeed
        )
    except Stopped as stop:
        if is_main():
            print(f"dso: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED if stop.preempted else EXIT_STOPPED
    if is_main():
        print(freeform.report(result))
    return 0
