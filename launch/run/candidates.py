"""Measuring decisions by the probabilities of their candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dso.decisions.decision import DecisionSet
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.report import ScalePoint
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from launch.run.measure import scale_points
from trainers.learner import Learner
from trainers.measuring import SharedEvaluator


class Candidates:
    """See :class:`launch.run.measure.Measures`.

    Args:
        backbone, decisions, handle, progress, keep_reference: see :class:`dso.evaluation.evaluator.Evaluator`.
        learner: of the trainer, whose processes measure together where there are several.
        target: the fair share of each group; uniform when None.
    """

    limits: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        handle: Handle,
        learner: Learner,
        target: dict[str, float] | None = None,
        progress: Callable[[int], None] | None = None,
        keep_reference: bool = False,
    ):
        self.what = f"{len(decisions)} decisions"
        self._target = target
        self._evaluator: Evaluator | SharedEvaluator
        if learner.shared:
            self._evaluator = SharedEvaluator(
                learner, backbone, decisions, handle, progress=progress, keep_reference=keep_reference
            )
        else:
            self._evaluator = Evaluator(backbone, decisions, handle, progress=progress, keep_reference=keep_reference)

    def points(self, scales: Sequence[float], bootstrap: int) -> list[ScalePoint]:
        """See :meth:`launch.run.measure.Measures.points`."""
        return scale_points(self._evaluator, scales, self._target, bootstrap)

    def write(self, folder: Path, points: Sequence[ScalePoint]) -> list[str]:
        """See :meth:`launch.run.measure.Measures.write`: there is nothing else to show."""
        return []
