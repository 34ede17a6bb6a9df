"""``dso train``: train a steering."""

from __future__ import annotations

import argparse
import sys

from launch.commands.common import quieten, run_name
from launch.config.schema import load_config
from launch.exits import EXIT_PREEMPTED, EXIT_STOPPED, is_main
from launch.run.folder import Stopped
from launch.run.train import report
from launch.run.train import train as train_run


def run(arguments: argparse.Namespace) -> int:
    """``dso train``."""
    config = load_config(arguments.config, arguments.overrides)
    quieten()
    if arguments.dry_run:
        from launch.estimate.dryrun import dry_run  # it needs what no other command does, and that takes a second

        print(dry_run(config, name=run_name(arguments.config), deepspeed=arguments.deepspeed, ranks=arguments.ranks))
        return 0
    try:
        result = train_run(
            config,
            name=run_name(arguments.config),
            resume="auto" if arguments.resume == "auto" else bool(arguments.resume),
            overwrite=arguments.overwrite,
            quiet=arguments.quiet,
            deepspeed=arguments.deepspeed,
        )
    except Stopped as stop:
        if is_main():
            print(f"dso: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED if stop.preempted else EXIT_STOPPED
    if is_main():
        print(report(result))
    return 0
