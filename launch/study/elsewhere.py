"""What our steering does where it was not meant to act: bias about other attributes, and a capability task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.registry import BENCHMARKS, Measured, measure
from dso.evaluation.benchmarks.report import figures_json
from dso.evaluation.benchmarks.task import MissingData
from dso.evaluation.spillover import spillover, steered_attributes
from dso.steering.model import Steering
from launch.study.materials import Materials

SCALES = (0.5, 1.0)  # at which the capability task is asked
OTHERS = ("crows_pairs", "stereoset", "bbq", "holisticbias")  # what tells of attributes beside the one that is steered


def elsewhere(materials: Materials, steering: Steering, data: Path, limit: int | None) -> dict[str, Any]:
    """The bias about other attributes at scale 1, and ARC-Easy along the scale, as a study shows them.

    Args:
        data: the folder with a folder for each benchmark's files; those that are missing are left out.
        limit: items of each benchmark; all when None.

    Raises:
        UserError: if no file is there that tells of another attribute.
    """
    found: dict[str, Any] = {"capability": _capable(materials, steering, data, limit)}
    measured: dict[str, Measured] = {}
    with steering.on(materials.backbone.model, 0.0) as handle:
        for name in OTHERS:
            try:
                task = BENCHMARKS[name].open(data, limit)
            except MissingData:
                continue
            measured[name] = measure(task, materials.backbone, handle)
    return found | {"spillover": spillover(measured, steered_attributes(steering.config.groups)).to_json()}


def _capable(materials: Materials, steering: Steering, data: Path, limit: int | None) -> list[dict[str, Any]]:
    try:
        task = BENCHMARKS["arc"].open(data, limit)
    except MissingData:
        return []
    probe, rows = Probe(materials.backbone), []
    base = task.ask(probe)
    for scale in SCALES:
        with steering.on(materials.backbone.model, scale):
            figures = figures_json(task.compare(base, task.ask(probe)))
        rows += [{"benchmark": "arc", "figure": name, "scale": scale, **row} for name, row in figures.items()]
    return rows
