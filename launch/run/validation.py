"""Measuring the validation split as training goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dso.evaluation.neutral import NeutralTexts, neutral_texts
from dso.evaluation.report import ScalePoint
from dso.steering.model import Steering
from launch.run.folder import RunError
from launch.run.freeform import FreeformAnswers
from launch.run.session import Session
from trainers.callbacks import Validation


class CutShort(Exception):
    """A validation that is not waited for, as the run is to stop; it is made anew when the run goes on."""


class Validator:
    """Measures the validation split.

    Args:
        session: of the run.

    Attributes:
        decisions: what is measured.
        base_mass: the base model's answer mass, which :meth:`begin` measures.
    """

    def __init__(self, session: Session):
        config = session.config
        self._session = session
        self.decisions = session.split("validation")
        self._measures = session.measures(self.decisions, self._look_up, keep_reference=True)
        limits = config.constraints
        self._neutral = None
        if limits.neutral_kl is not None:
            self._neutral = NeutralTexts(session.backbone, neutral_texts(limits.neutral_texts))
        self._base: ScalePoint | None = None
        self.base_mass = math.nan

    def begin(self) -> None:
        """Measure the base model.

        Raises:
            RunError: if nothing could be learned from what it says.
        """
        (self._base,) = self._measures.points([0.0], 0)
        self.base_mass = self._base.answer_mass
        if isinstance(self._measures, FreeformAnswers) and not self.base_mass:  # every answer would earn the same
            raise RunError(
                f"none of the base model's answers names a candidate ({self._measures.what}; one is "
                f"{self._measures.example()[:40]!r}); change the prompts, the matcher, "
                "train.freeform.max_completion_length or train.freeform.temperature"
            )

    def __call__(self, step: int, scale: float = 1.0) -> Validation:
        """See :class:`trainers.callbacks.Measure`."""
        # Step 0 is the base model, whose numbers are already there.
        turned = 1.0 if step else 0.0
        with _turned(self._session.steering, scale if step else 0.0):
            point = self._base if step == 0 and self._base is not None else self._measures.points([turned], 0)[0]
            neutral_kl = None if self._neutral is None else self._session.pass_through(self._neutral.kl)
        row = validation_row(step, point, self.base_mass)
        return replace(row, neutral_kl=neutral_kl, scale=scale)

    def _look_up(self, _: int) -> None:
        # Several processes would have to leave at the same place: they finish the measurement.
        trainer = self._session.trainer
        if trainer.stop_requested and trainer.world.size == 1:
            raise CutShort


@contextmanager
def _turned(steering: Steering, scale: float) -> Iterator[None]:
    """Within the block the operators are as many times larger, so that no scale is beyond the steering's range."""
    if scale == 1:
        yield
        return
    own = {key: value.detach().clone() for key, value in steering.tensors().items()}
    steering.load_tensors(steering.scaled_tensors(scale))
    try:
        yield
    finally:
        steering.load_tensors(own)


def validation_row(step: int, point: ScalePoint, base_mass: float) -> Validation:
    """What selection looks at in a measured point; ``base_mass`` is the base model's answer mass."""
    bias, log_odds, order = point.bias.probability, point.bias.log_odds.signed_root, point.bias.order_effect
    return Validation(
        step=step,
        bias=bias.signed_root,
        log_odds=None if math.isnan(log_odds) else log_odds,
        order_effect=None if math.isnan(order) else order,
        accuracy=point.accuracy.value,
        kl=point.kl,
        unambiguous_kl=None if math.isnan(point.kl_unambiguous) else point.kl_unambiguous,
        answer_mass=point.answer_mass / base_mass if base_mass else math.nan,
        gap=None if bias.gap is None else bias.gap.value,
    )


def validation_line(row: Validation, better: bool) -> str:
    """What is printed of a measurement; ``better`` where it is the best so far."""
    at = "" if row.scale == 1 else f", turned to {row.scale:.2f}"
    log_odds = "" if row.log_odds is None else f" (log-odds {row.log_odds:.3f})"
    order = "" if row.order_effect is None else f"  order {row.order_effect:.2f}"
    facts = "" if row.unambiguous_kl is None else f" (unambiguous {row.unambiguous_kl:.3f})"
    neutral = "" if row.neutral_kl is None else f"  neutral KL {row.neutral_kl:.3f}"
    return (
        f"validation at step {row.step}{at}: bias {row.bias:.3f}{log_odds}{order}  "
        f"accuracy {row.accuracy:.3f}  KL {row.kl:.3f}{facts}{neutral}  "
        f"answer mass x{row.answer_mass:.2f}{'  kept' if better else ''}"
    )
