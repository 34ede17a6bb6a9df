"""``dso train``: train a steering, by the trainer that the config names."""

from __future__ import annotations

import argparse
import sys

from launch.commands.common import quieten, run_name
from launch.config.schema import load_config
from launch.exits import EXIT_PREEMPTED, EXIT_STOPPED, is_main
from launch.run import train
from launch.run.folder import Resume, Stopped


def run(arguments: argparse.Namespace) -> int:
    """``dso train``."""
    config, name = load_config(arguments.config, arguments.overrides), run_name(arguments.config)
    quieten()
    if arguments.dry_run:
        # They need what no other command does, and that takes a second.
        from launch.estimate import dryrun, freeform

        dry_run = freeform.dry_run if config.freeform else dryrun.dry_run
        print(dry_run(config, name=name, deepspeed=arguments.deepspeed, ranks=arguments.ranks))
        return 0
    try:
        resume: Resume = "auto" if arguments.resume == "auto" else bool(arguments.resume)
        result = train.train(
            config,
            name=name,
            resume=resume,
            overwrite=arguments.overwrite,
            quiet=arguments.quiet,
            deepspeed=arguments.deepspeed,
        )
    except Stopped as stop:
        if is_main():
            print(f"dso: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED if stop.preempted else EXIT_STOPPED
    if is_main():
        print(train.report(result))
    return 0
