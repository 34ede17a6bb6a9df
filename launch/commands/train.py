"""``dso train``: train a steering, by the trainer that the config names."""

from __future__ import annotations

import argparse
import sys

from launch.commands.common import quieten, run_name
from launch.config.schema import ConfigError, TrainConfig, load_config
from launch.exits import EXIT_PREEMPTED, EXIT_STOPPED, is_main
from launch.run import train
from launch.run.folder import Resume, Stopped


def run(arguments: argparse.Namespace) -> int:
    """``dso train``."""
    config, name = load_config(arguments.config, arguments.overrides), run_name(arguments.config)
    quieten()
    if arguments.dry_run:
        from launch.estimate.dryrun import dry_run  # it needs what no other command does, and that takes a second

        if config.freeform:
            raise ConfigError("there is no dry run of free-form answers yet", "train.estimator")
        print(dry_run(config, name=name, deepspeed=arguments.deepspeed, ranks=arguments.ranks))
        return 0
    try:
        said = _trained(config, name, arguments)
    except Stopped as stop:
        if is_main():
            print(f"dso: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED if stop.preempted else EXIT_STOPPED
    if is_main():
        print(said)
    return 0


def _trained(config: TrainConfig, name: str, arguments: argparse.Namespace) -> str:
    """Train; what a finished run prints."""
    common = {"name": name, "overwrite": arguments.overwrite, "quiet": arguments.quiet}
    if config.freeform:
        from launch.run import freeform  # TRL is not there where no one trains free-form answers

        if arguments.resume:
            raise ConfigError("free-form runs are not resumed; leave --resume away", "train.estimator")
        return freeform.report(freeform.train(config, deepspeed=arguments.deepspeed, **common))
    resume: Resume = "auto" if arguments.resume == "auto" else bool(arguments.resume)
    return train.report(train.train(config, resume=resume, deepspeed=arguments.deepspeed, **common))
