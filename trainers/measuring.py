"""Measuring a decision set with all processes: each passes its share, and learns of the others' results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dso.decisions.decision import DecisionSet
from dso.evaluation.evaluator import Evaluator, Measurement
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from trainers.learner import Learner


class SharedEvaluator:
    """What :class:`dso.evaluation.evaluator.Evaluator` is in one process, with the same results in each of several.

    Args:
        learner: of the model; its processes all measure together.
        backbone, decisions, handle, options: see :class:`dso.evaluation.evaluator.Evaluator`; ``progress`` is told of
            the shares of all processes as this one does its own.
    """

    def __init__(
        self,
        learner: Learner,
        backbone: Backbone,
        decisions: DecisionSet,
        handle: Handle | None = None,
        *,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ):
        self.decisions = decisions
        self._learner = learner
        self._columns = max(len(decision.candidates) for decision in decisions)
        # Neighbours in this order share beginnings, which a pass computes once.
        order = sorted(range(len(decisions)), key=lambda index: backbone.encode(decisions[index]).prompt)
        self._own = np.array_split(np.array(order), learner.world.size)[learner.world.rank]
        share = replace(decisions, decisions=tuple(decisions[index] for index in self._own))
        told = None if progress is None else lambda count: progress(count * learner.world.size)
        self._inner = Evaluator(backbone, share, handle, progress=told, **options) if len(self._own) else None

    def measure(self, scale: float = 1.0) -> Measurement:
        """The set at one scale."""
        return self.curve([scale])[0]

    def curve(self, scales: Sequence[float]) -> list[Measurement]:
        """The set at each of several scales."""
        found = self._learner.pass_through(lambda: self._inner.curve(scales) if self._inner else [None] * len(scales))
        return [self._gathered(measured) for measured in found]

    def _gathered(self, measured: Measurement | None) -> Measurement:
        table = torch.zeros(len(self.decisions), self._columns + 2)
        if measured is not None:
            table[self._own, : measured.policy.shape[1]] = torch.as_tensor(measured.policy).float()
            table[self._own, -2] = torch.as_tensor(measured.answer_mass).float()
            table[self._own, -1] = torch.as_tensor(measured.kl).float()
        whole = self._learner.world.all_sum(table).numpy()
        return Measurement(whole[:, :-2], whole[:, -2], whole[:, -1])
