"""From measurements to evidence: a decision set at several scales as scale points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dso.decisions import DecisionSet
from dso.evaluation import Evaluator, Measurement
from dso.metrics import Estimate, accuracy, bias_report
from dso.report import ScalePoint

NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


def scale_points(
    evaluator: Evaluator, scales: Sequence[float], target: dict[str, float] | None = None, bootstrap: int = 1000
) -> list[ScalePoint]:
    """Measure an evaluator's decisions at each scale."""
    measured = evaluator.curve(scales)
    return [
        scale_point(scale, m, evaluator.decisions, target, bootstrap) for scale, m in zip(scales, measured, strict=True)
    ]


def scale_point(
    scale: float, measured: Measurement, decisions: DecisionSet, target: dict[str, float] | None, bootstrap: int
) -> ScalePoint:
    """Bias on the ambiguous decisions, accuracy on the others, KL and answer mass on each."""
    ambiguous = np.array([d.ambiguous for d in decisions])
    return ScalePoint(
        scale=scale,
        bias=bias_report(measured.policy, decisions, target, bootstrap),
        accuracy=accuracy(measured.policy, decisions, bootstrap) if not ambiguous.all() else NOTHING,
        answer_mass=float(measured.answer_mass[ambiguous].mean()),
        kl=float(measured.kl[ambiguous].mean()),
        kl_unambiguous=float(measured.kl[~ambiguous].mean()) if not ambiguous.all() else float("nan"),
    )
