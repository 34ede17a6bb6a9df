"""What several commands of ``dso`` share."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from dso.decisions.decision import DecisionSet
from dso.decisions.sets import load_decisions
from dso.editing.patch import Patch
from dso.editing.storing import CONFIG_FILE as PATCH_FILE
from dso.errors import UserError
from dso.files import as_path
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.config.reading import parse_yaml


def quieten() -> None:
    """Keep transformers' loading bars and advice out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_name(config: str) -> str:
    """What a run is called after its config; a model's "2.5" is no suffix."""
    return Path(config).name.removesuffix(".yaml").removesuffix(".yml")


def open_steering(source: str) -> Steering | Patch:
    """The steering of a folder, a Hub id or an artifact, or the patch of a folder: whichever is there.

    Raises:
        SteeringError: if it is neither, or damaged.
    """
    kind = Patch if (as_path(source) / PATCH_FILE).is_file() else Steering
    return kind.from_pretrained(source)


def load_backbone(arguments: argparse.Namespace, steering: Steering | Patch | None = None) -> Backbone:
    """The base model that ``--model`` names, or else the one that the steering states, scored as the steering was.

    Args:
        arguments: with those of :func:`launch.commands.arguments.add_model`.

    Raises:
        UserError: if neither names one, or it cannot be loaded.
    """
    name: str | None = arguments.model
    stated = steering.config.base_model if steering else ""
    if not (name or stated):
        raise UserError("name the base model with --model; no steering states one")
    revision = steering.config.revision if steering and name in (None, stated) else None
    scoring = steering.config.scoring if steering else None
    backbone = Backbone.load(
        name or stated, revision=revision, dtype=arguments.dtype, device=arguments.device, scoring=scoring
    )
    if line := backbone.layout_line():
        print(f"dso: {line}", file=sys.stderr)
    return backbone


def open_split(name: str, arguments: argparse.Namespace) -> DecisionSet:
    """The split ``--split`` of a decision set with its ``--option`` values.

    Raises:
        UserError: if there is no such set or split, or an option is none of the set's.
    """
    return load_decisions(name, **pairs(arguments.option, "--option")).select(split=arguments.split)


def scale_of(given: float | None, steering: Steering) -> float:
    """The scale that an option gives, or the steering's own."""
    return steering.config.default_scale if given is None else given


def pairs(items: list[str], option: str) -> dict:
    """``key=value`` arguments as a dictionary of YAML values.

    Raises:
        UserError: if one has no ``=``.
    """
    if bad := [item for item in items if "=" not in item]:
        raise UserError(f"{option} {bad[0]!r}: expected key=value")
    return {key: parse_yaml(value) for key, value in (item.split("=", 1) for item in items)}


def numbers(text: str, option: str = "--scales") -> list[float]:
    """Comma-separated finite numbers, the value of an option.

    Raises:
        UserError: if they are not.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} {text!r}: expected comma-separated numbers, as in 0,0.5,1")
    return found
