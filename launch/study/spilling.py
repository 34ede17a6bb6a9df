"""What our steering does to attributes that it was not trained on: published benchmarks before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dso.evaluation.benchmarks.registry import BENCHMARKS, Measured, measure
from dso.evaluation.benchmarks.task import MissingData
from dso.evaluation.spillover import spillover, steered_attributes
from dso.steering.model import Steering
from launch.study.materials import Materials

OTHERS = ("crows_pairs", "stereoset", "bbq", "holisticbias")  # what tells of attributes beside the one that is steered


def spilled(materials: Materials, steering: Steering, data: Path, limit: int | None) -> dict[str, Any]:
    """The bias about other attributes at scale 1, as a study shows it.

    Args:
        data: the folder with a folder for each benchmark's files; those that are missing are left out.
        limit: items of each benchmark; all when None.

    Raises:
        UserError: if none of the files is there.
    """
    measured: dict[str, Measured] = {}
    with steering.on(materials.backbone.model, 0.0) as handle:
        for name in OTHERS:
            try:
                task = BENCHMARKS[name].open(data, limit)
            except MissingData:
                continue
            measured[name] = measure(task, materials.backbone, handle)
    return spillover(measured, steered_attributes(steering.config.groups)).to_json()
