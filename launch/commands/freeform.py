"""``dso freeform``: ``dso train`` on free-form answers, and measuring without training."""

from __future__ import annotations

import argparse

from dso.evaluation.report import scale_table
from launch.commands import train
from launch.commands.common import quieten
from launch.config.schema import ConfigError, load_config
from launch.run.freeform import explained
from launch.run.train import said


def run(arguments: argparse.Namespace) -> int:
    """``dso freeform``."""
    config = load_config(arguments.config, arguments.overrides)
    if not config.freeform:
        reason = f"is {config.train.estimator}, which scores candidates; free-form answers are trained by grpo or rloo"
        raise ConfigError(reason, "train.estimator")
    if not arguments.measure:
        return train.run(arguments)
    quieten()
    points = said(config, arguments.measure, arguments.quiet)
    print(scale_table(points) + "\n" + explained(points))
    return 0
