"""Running a decision set through the base and the steered model: policies, answer mass and KL.

Base and steered passes alternate over chunks of decisions, so that the base's next-token distributions need not be
kept; where a set is measured again and again (validation during training) they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dso.decisions.decision import Decision, DecisionSet
from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.scores import Scores
from dso.steering.handle import Handle, Turnable, unsteered

CHUNK = 240


@dataclass(frozen=True, slots=True)
class Measurement:
    """A decision set at one scale.

    Attributes:
        policy: (N, K) probabilities over the candidates, 0 where there is none.
        answer_mass: (N,) probability that the candidates hold together.
        kl: (N,) KL(pi_s || pi_0) in nats of the next-token distribution, mean over the answer positions
            (:mod:`dso.models.scores`).
    """

    policy: np.ndarray
    answer_mass: np.ndarray
    kl: np.ndarray


@runtime_checkable
class Rewrites(Protocol):
    """A handle that asks another question, with the same candidates, instead of changing the model."""

    def prepare(self, decisions: Sequence[Decision]) -> None:
        """Work out together what :meth:`rewrite` needs of decisions that are about to be asked."""
        ...

    def rewrite(self, decision: Decision) -> Decision:
        """The decision as it is asked at this scale."""
        ...


def check_scoring(backbone: Backbone, handle: Turnable | None) -> None:
    """Make sure that a steering is measured by the rule of scoring that it was trained with.

    Raises:
        UserError: if the backbone has another one.
    """
    if not isinstance(handle, Handle):
        return
    if reason := handle.steering.config.scoring.difference(backbone.scoring):
        raise UserError(
            f"the steering was trained with another scoring: {reason} at the model; "
            "load the model with Backbone.load(..., scoring=steering.config.scoring)"
        )


class Evaluator:
    """Measures one decision set under a steering at any scale.

    While it measures, every other steering on the model is at scale 0, so that the base is the base.

    Args:
        backbone: the model that ``handle`` is attached to.
        decisions: what to decide.
        handle: the steering, or what acts like one; None measures the base model only.
        keep_reference: keep the base's distributions in memory (4 bytes x vocabulary a decision).
        progress: called with the number of forward-passed decisions after each chunk.

    Raises:
        UserError: if the steering was trained with another rule of scoring than the backbone's.
    """

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        handle: Turnable | None = None,
        *,
        keep_reference: bool = False,
        progress: Callable[[int], None] | None = None,
    ):
        check_scoring(backbone, handle)
        self.backbone = backbone
        self.decisions = decisions
        self.handle = handle
        self.progress = progress
        order = sorted(range(len(decisions)), key=lambda i: backbone.encode(decisions[i]).prompt)
        self._chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        self._columns = max(len(decision.candidates) for decision in decisions)
        self._kept: dict[int, Scores] | None = {} if keep_reference else None

    def measure(self, scale: float = 1.0) -> Measurement:
        """The set at one scale."""
        return self.curve([scale])[0]

    def curve(self, scales: Sequence[float]) -> list[Measurement]:
        """The set at each of several scales."""
        if self.handle is None and any(scales):
            raise ValueError(f"scales {list(scales)} need a steering; without one there is only scale 0")
        return self.settings([(self.handle, scale) for scale in scales])

    @torch.no_grad()
    def settings(self, settings: Sequence[tuple[Turnable | None, float]]) -> list[Measurement]:
        """The set under each of several handles and scales, one at a time, over one pass of the base model.

        All steerings on the model have the scale afterwards that they had before.
        """
        for handle, _ in settings:
            check_scoring(self.backbone, handle)
        collected: list[list[tuple[Tensor, ...]]] = [[] for _ in settings]
        turned = dict.fromkeys(handle for handle, scale in settings if handle is not None and scale)
        with unsteered(self.backbone.model, *turned):
            for handle in turned:
                if isinstance(handle, Rewrites):
                    handle.prepare(self.decisions)
            for number, chunk in enumerate(self._chunks):
                base = self._base(number, chunk)
                reference = base.asked()[0]
                for place, (handle, scale) in enumerate(settings):
                    scores = base if handle is None or scale == 0 else self._scores(chunk, handle, scale)
                    collected[place].append((scores.policy().exp(), scores.answer_mass(), scores.kl(reference)))
        back = np.argsort([index for chunk in self._chunks for index in chunk])
        return [
            Measurement(*(torch.cat(parts).cpu().numpy()[back] for parts in zip(*rows, strict=True)))
            for rows in collected
        ]

    def _base(self, number: int, chunk: Sequence[int]) -> Scores:
        if self._kept is None:
            return self._scores(chunk)
        if number not in self._kept:
            self._kept[number] = self._scores(chunk)
        return self._kept[number]

    def _scores(self, chunk: Sequence[int], handle: Turnable | None = None, scale: float = 0.0) -> Scores:
        if handle is not None:
            handle.scale = scale
        asked = [self.decisions[i] for i in chunk]
        if isinstance(handle, Rewrites):
            asked = [handle.rewrite(decision) for decision in asked]
        scores = self.backbone.score(asked, next_token=True)
        if handle is not None:
            handle.scale = 0.0
        # Every chunk has to have the set's K columns for the parts to be joined.
        if missing := self._columns - scores.log_probs.shape[1]:
            log_probs = torch.nn.functional.pad(scores.log_probs, (0, missing), value=-torch.inf)
            lengths = torch.nn.functional.pad(scores.lengths, (0, missing), value=1)
            scores = replace(scores, log_probs=log_probs, lengths=lengths)
        if self.progress is not None:
            self.progress(len(chunk))
        return scores
