"""``dso evaluate``: measure a steering, or a base model, on a decision set."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm

from dso.decisions.decision import check_target
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.figure import scale_figure
from dso.evaluation.report import contexts_table, scale_table
from dso.files import check_writable, write_text
from launch.commands.common import load_backbone, numbers, open_split, open_steering, pairs, quieten
from launch.run.measure import scale_points


def run(arguments: argparse.Namespace) -> int:
    """``dso evaluate``."""
    bare = arguments.steering == "none"
    check_writable(arguments.json, arguments.figure)
    given = numbers(arguments.scales) if arguments.scales is not None and not bare else []
    data = open_split(arguments.set, arguments)
    data.select(kind="ambiguous")
    shares = pairs(arguments.target, "--target") or None
    check_target(shares, data.groups)
    quieten()
    steering = None if bare else open_steering(arguments.steering)
    if steering is not None and not given:
        given = [steering.config.default_scale]
    scales = sorted({0.0, *given})
    if shares is None and steering is not None:
        shares = steering.config.target_for(data.groups)
    target = dict(zip(data.groups, check_target(shares, data.groups), strict=True))
    backbone = load_backbone(arguments, steering)
    handle = steering.attach(backbone.model) if steering else None
    hidden = arguments.quiet or not sys.stderr.isatty()
    with tqdm(total=len(data) * len(scales), unit="decision", disable=hidden) as bar:
        evaluator = Evaluator(backbone, data, handle, progress=bar.update)
        points = scale_points(evaluator, scales, target, arguments.bootstrap)
    print(scale_table(points))
    if arguments.contexts:
        print(contexts_table(points[0].bias, points[-1].bias, arguments.contexts))
    if arguments.json:
        write_text(arguments.json, json.dumps([point.to_json() for point in points], indent=1))
    if arguments.figure:
        scale_figure(points, arguments.figure)
    return 0
