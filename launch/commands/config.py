"""``dso config``: a config with every value, the JSON schema of configs, or the reference of their keys."""

from __future__ import annotations

import argparse
import json

from dso.errors import UserError
from launch.config.reference import reference
from launch.config.schema import TrainConfig, load_config, resolved_yaml


def run(arguments: argparse.Namespace) -> int:
    """``dso config``."""
    if arguments.schema:
        print(json.dumps(TrainConfig.model_json_schema(), indent=2))
    elif arguments.reference:
        print(reference(), end="")
    elif arguments.config is None:
        raise UserError("name a config, as in: dso config smollm2-roles (or give --schema or --reference)")
    else:
        print(resolved_yaml(load_config(arguments.config, arguments.overrides)), end="")
    return 0
