"""From measurements to evidence: a decision set at several scales as scale points.

What a run measures is of one of two kinds: the probabilities of candidates (:mod:`launch.run.candidates`), or sampled
answers (:mod:`launch.run.freeform`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dso.decisions.decision import Decision, DecisionSet
from dso.evaluation.bias import accuracy, bias_report
from dso.evaluation.comparison import cuts
from dso.evaluation.evaluator import Measurement
from dso.evaluation.report import ScalePoint

STRIDE = 3  # a thinned unit is asked about in one of so many contexts
MANY = 12  # contexts of a unit, from which on that leaves enough


class Evaluates(Protocol):
    """An evaluator of candidates' probabilities, in one process or several.

    Attributes:
        decisions: what it measures.
    """

    decisions: DecisionSet

    def curve(self, scales: Sequence[float]) -> list[Measurement]:
        """The set at each of several scales."""
        ...


class Measures(Protocol):
    """One decision set, which can be measured at any scale of a steering.

    Attributes:
        what: is measured, as a part of a sentence: "960 decisions".
        limits: of such figures, a sentence or more each.
    """

    what: str
    limits: tuple[str, ...]

    def points(self, scales: Sequence[float], bootstrap: int) -> list[ScalePoint]:
        """Each scale; where 0 is one of them, the others' bias is cut against it.

        Args:
            scales: to measure.
            bootstrap: resamples behind each interval; with 0 there are no intervals of bias, which is cheap.
        """
        ...

    def write(self, folder: Path, points: Sequence[ScalePoint]) -> list[str]:
        """Keep in a run's folder what only this kind has to show of the last points; what the report ends with."""
        ...


def thin(decisions: DecisionSet, stride: int) -> DecisionSet:
    """Every unit in one of ``stride`` neighbouring contexts only, so that all contexts keep people.

    For the same time that gives more people; what people differ in is most of a small measurement's noise. Units whose
    numbers differ by ``stride`` choose along the contexts in different rhythms, so that they connect all contexts and
    liking for them cancels from every difference. Unambiguous decisions stay as they are.
    """
    contexts = {context: divmod(number, stride) for number, context in enumerate(decisions.contexts)}
    units = {unit: number for number, unit in enumerate(dict.fromkeys(d.unit for d in decisions if d.ambiguous))}

    def kept(decision: Decision) -> bool:
        place, unit = contexts[decision.context], units[decision.unit]
        return (place[1] + unit + unit // stride * place[0]) % stride == 0

    return decisions.select(lambda d: not d.ambiguous or kept(d))


def thinned(decisions: DecisionSet) -> DecisionSet:
    """:func:`thin` by :data:`STRIDE` where each unit is asked about in :data:`MANY` contexts; else as they are."""
    met: dict[str, set[str]] = {}
    for decision in decisions:
        if decision.ambiguous:
            met.setdefault(decision.unit or decision.id, set()).add(decision.context)
    return thin(decisions, STRIDE) if met and min(map(len, met.values())) >= MANY else decisions


def scale_points(
    evaluator: Evaluates, scales: Sequence[float], target: dict[str, float] | None = None, bootstrap: int = 1000
) -> list[ScalePoint]:
    """Measure an evaluator's decisions at each scale; where 0 is one of them, the others' bias is cut against it."""
    return cut_points(scales, evaluator.curve(scales), evaluator.decisions, target, bootstrap)


def cut_points(
    scales: Sequence[float],
    measured: Sequence[Measurement],
    decisions: DecisionSet,
    target: dict[str, float] | None,
    bootstrap: int,
) -> list[ScalePoint]:
    """The point of each scale that was measured; where 0 is one of them, the others' bias is cut against it."""
    base = next((m for scale, m in zip(scales, measured, strict=True) if scale == 0), None)
    return [
        scale_point(scale, m, decisions, target, bootstrap, base if scale else None)
        for scale, m in zip(scales, measured, strict=True)
    ]


def scale_point(
    scale: float,
    measured: Measurement,
    decisions: DecisionSet,
    target: dict[str, float] | None,
    bootstrap: int,
    base: Measurement | None = None,
) -> ScalePoint:
    """Bias on the ambiguous decisions, accuracy on the others, KL and answer mass on each.

    Args:
        scale: of the point.
        measured: the decisions at that scale.
        decisions: that were measured.
        target: the fair share of each group; uniform when None.
        bootstrap: resamples behind each interval; with 0 there are no intervals of bias, which is cheap.
        base: the same decisions at scale 0, for the cut.
    """
    ambiguous = np.array([d.ambiguous for d in decisions])
    return ScalePoint(
        scale=scale,
        bias=bias_report(measured.policy, decisions, target, bootstrap),
        accuracy=accuracy(measured.policy, decisions),
        answer_mass=float(measured.answer_mass[ambiguous].mean()),
        kl=float(measured.kl[ambiguous].mean()),
        kl_unambiguous=float(measured.kl[~ambiguous].mean()) if not ambiguous.all() else math.nan,
        cut=None if base is None else cuts(base.policy, measured.policy, decisions, target, bootstrap),
    )
