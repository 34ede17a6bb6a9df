"""``dso compare``: a config's steering against every rival, or two steerings on the same decisions.

The first writes a study with its report (:mod:`launch.study`); the second prints paired differences.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from dso.decisions.decision import check_target
from dso.errors import UserError
from dso.evaluation.comparison import compare
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.report import compared_json, comparison_table
from dso.files import as_path, check_writable, write_text
from dso.steering.model import Steering
from launch.commands.common import load_backbone, open_split, pairs, quieten, run_name, scale_of

OF_PAIRS: dict[str, object] = {
    "model": None,
    "set": "roles",
    "split": "test",
    "target": [],
    "json": None,
}  # with their defaults


def run(arguments: argparse.Namespace) -> int:
    """``dso compare``."""
    named = [text for text in arguments.what if "=" not in text]
    if len(named) == 1:
        return _study(named[0], [text for text in arguments.what if "=" in text], arguments)
    if len(named) != 2 or len(named) < len(arguments.what):
        raise UserError(
            f"{' '.join(arguments.what)!r}: expected a config, with key=value settings if you like, or two steerings"
        )
    first, second = named
    return _pair(first, second, arguments)


def _study(source: str, overrides: list[str], arguments: argparse.Namespace) -> int:
    """A config's steering and its rivals."""
    from launch.study.arms import chosen_arms
    from launch.study.folder import StudyFolder
    from launch.study.running import Running, measured_config

    for option, default in OF_PAIRS.items():
        if getattr(arguments, option) != default:
            raise UserError(f"--{option} is of two steerings; a study has its model and decisions from the config")
    arms = chosen_arms(arguments.methods.split(","))
    seeds = _seeds(arguments.seeds)
    options, seconds = pairs(arguments.option, "--option"), arguments.seconds
    config = measured_config(source, overrides, options)
    place = arguments.out or Path(config.run.output_dir) / f"{config.run.run_name or run_name(source)}-compare"
    quieten()
    folder = StudyFolder.claim(place, config)
    running = Running(source, overrides, config, folder, seconds, arguments.quiet)
    running.run(arms, seeds)
    if arguments.data:
        running.look_elsewhere(as_path(arguments.data), arguments.limit)
    asked = [word for option in arguments.option for word in ("--option", option)]
    words = ["dso", "compare", source, *overrides, *asked, "--methods", arguments.methods, "--seeds", arguments.seeds]
    print(running.write(shlex.join([*words, "--seconds", f"{seconds:g}"])))
    return 0


def _seeds(text: str) -> list[int]:
    """Comma-separated seeds, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--seeds {text!r}: expected comma-separated whole numbers, as in 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def _pair(one: str, two: str, arguments: argparse.Namespace) -> int:
    """Two steerings, or two scales of one."""
    check_writable(arguments.json)
    (first, scale), (second, other) = _place(one), _place(two)
    data = open_split(arguments.set, arguments)
    data.select(kind="ambiguous")
    shares = pairs(arguments.target, "--target") or None
    check_target(shares, data.groups)
    quieten()
    loaded = {name: Steering.from_pretrained(name) for name in dict.fromkeys((first, second)) if name != "none"}
    stated = {name: steering.config.base_model for name, steering in loaded.items()}
    if arguments.model is None and len({*stated.values()}) > 1:
        raise UserError(f"{first} states the base model {stated[first]}, {second} {stated[second]}; name one: --model")
    steering = next(iter(loaded.values()), None)
    if shares is None and steering is not None:
        shares = steering.config.target_for(data.groups)
    if len({str(each.config.scoring) for each in loaded.values()}) > 1:
        raise UserError(f"{first} and {second} score answers by different rules, so their figures do not compare")
    backbone = load_backbone(arguments, steering)
    handles = {name: each.to(backbone.device).attach(backbone.model, 0.0) for name, each in loaded.items()}
    hidden = arguments.quiet or not sys.stderr.isatty()
    settings = [
        (handles.get(name), scale_of(scale, loaded[name]) if name in loaded else 0.0)
        for name, scale in ((first, scale), (second, other))
    ]
    # The base model runs once for both, unless they are at 0.
    passes = 1 + sum(handle is not None and bool(scale) for handle, scale in settings)
    with tqdm(total=len(data) * passes, unit="decision", disable=hidden) as bar:
        measured = Evaluator(backbone, data, progress=bar.update).settings(settings)
    rows = compare(measured[0], measured[1], data, shares, arguments.bootstrap)
    print(f"first   {one}\nsecond  {two}\n")
    print(comparison_table(rows), end="")
    if arguments.json:
        write_text(arguments.json, json.dumps(compared_json(rows), indent=1) + "\n")
    return 0


def _place(text: str) -> tuple[str, float | None]:
    """A steering and its scale, None where it is not named, from ``FOLDER``, ``FOLDER@0.5`` or ``none``."""
    name, _, number = text.rpartition("@")
    try:
        scale = float(number)
    except ValueError:  # no scale, or a folder with an @ in its name
        name, scale = text, None
    if not name or not math.isfinite(scale or 0.0):
        raise UserError(f"{text!r}: expected a steering and a finite scale, as in FOLDER@0.5")
    return name, 0.0 if name == "none" else scale
