"""Which candidate of a method, and at which scale: chosen on validation, inside the limits that training keeps too.

Every method has the same decisions, the same limits and the same wall clock. A candidate's scales are tried from the
lowest on; then those beside the best one, as finely as training turns its operators up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from dso.baselines.baseline import Attachable, Candidate
from dso.errors import UserError
from launch.config.schema import TrainConfig
from launch.run.constants import kept_limits
from trainers.callbacks import Limits, Validation

# Of accuracy, below the base's. Training's own limit of a point is one answer of 64 or 128: of two methods that are as
# accurate as the base model it would let one pass by luck.
ACCURACY_LOSS = 0.05
HOPELESS = 8.0  # times a KL limit at which higher scales are not tried
STEP = 1.4  # between the scales beside the best
TRIES, CLOSE = 4, 0.05  # scales that are tried for a KL, and how close to it is close enough

Measure = Callable[[Attachable, float], Validation]


def study_limits(config: TrainConfig) -> Limits:
    """What every method is held to on validation: the limits of the config, with a wider one of accuracy."""
    return replace(kept_limits(config), max_accuracy_loss=ACCURACY_LOSS)


@dataclass(frozen=True, slots=True)
class Choice:
    """What validation chose.

    Attributes:
        candidate: the one; where nothing was inside the limits, the one that came nearest.
        scale: its scale. inside: whether it keeps every limit, and is less biased than the base model.
        why: what keeps it from that; empty if nothing does.
        tried: candidates x scales that were measured.
    """

    candidate: Candidate
    scale: float
    inside: bool
    why: str
    tried: int


@dataclass(slots=True)
class _Search:
    measure: Measure
    limits: Limits
    base: Validation
    best: tuple[tuple[float, ...], Candidate, float, list[str]] | None = None
    tried: int = 0

    def look(self, candidate: Candidate, scale: float) -> Validation:
        """Measure one, and keep it if it is the best."""
        row = self.measure(candidate.steering, scale)
        self.tried += 1
        broken = self.limits.broken(row, self.base)
        if not broken and not row.bias < self.base.bias:
            broken = ["no less biased than the base model"]
        bias = math.inf if math.isnan(row.bias) else row.bias
        rank = (float(len(broken)), bias, row.kl)
        if self.best is None or rank < self.best[0]:
            self.best = (rank, candidate, scale, broken)
        return row

    def hopeless(self, row: Validation) -> bool:
        """Whether more of it can only be worse."""
        return any(not kl < HOPELESS * limit for kl, limit in self.limits.divergences(row).values())


def tune(
    candidates: Iterable[Candidate],
    scales: tuple[float, ...],
    measure: Measure,
    limits: Limits,
    base: Validation,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Choice:
    """The least biased candidate and scale inside the limits, of as many as there is time for; at least one is tried.

    Args:
        candidates: the most promising first.
        scales: of each, rising; one alone is a method without a strength.
        measure: (steering, scale) -> what validation says.
        limits, base: see :meth:`trainers.callbacks.Limits.broken`.
        seconds: of wall clock, the making of the candidates among it.

    Raises:
        UserError: if there are no candidates.
    """
    search, end = _Search(measure, limits, base), clock() + seconds
    for candidate in candidates:
        for scale in within(candidate.steering, scales):
            row = search.look(candidate, scale)
            if search.hopeless(row) or clock() >= end:
                break
        if clock() >= end:
            break
    if search.best is None:
        raise UserError("the method proposed no candidate")
    if len(scales) > 1:
        _refine(search, lambda: clock() >= end)
    _, candidate, scale, broken = search.best
    return Choice(candidate, scale, not broken, "; ".join(broken), search.tried)


def _refine(search: _Search, over: Callable[[], bool]) -> None:
    """Try the scales on either side of the best, as long as that makes it better."""
    tried = set()
    while search.best is not None and not over():
        _, candidate, scale, _ = search.best
        beside = [near for near in (scale * STEP, scale / STEP) if round(near, 4) not in tried]
        for near in within(candidate.steering, tuple(beside)):
            tried.add(round(near, 4))
            search.look(candidate, near)
            if over():
                return
        if search.best[2] == scale:
            return


def within(steering: Attachable, scales: Iterable[float]) -> Iterator[float]:
    """The scales that a steering allows."""
    stated = getattr(getattr(steering, "config", None), "scale_range", None)
    return (scale for scale in scales if stated is None or stated[0] <= scale <= stated[1])


def at_kl(measure: Callable[[float], float], wanted: float, scale: float = 1.0, highest: float = math.inf) -> float:
    """The scale at which the KL is ``wanted``, within 5%, or ``highest`` if it is less there.

    KL grows about as the square of the scale; after the first step the power is what the last two scales tell.

    Args:
        measure: scale -> KL.
        wanted: above 0.
        scale: to start from.
    """
    power, kl = 2.0, measure(scale)
    for _ in range(TRIES):
        if abs(kl / wanted - 1) <= CLOSE or (scale == highest and kl <= wanted):
            break
        before, old = scale, max(kl, 1e-12)
        scale = min(highest, scale * min((wanted / old) ** (1 / power), 10.0))
        kl = measure(scale)
        if scale != before and kl > 0 and kl != old:
            power = max(0.5, math.log(kl / old) / math.log(scale / before))
    return scale
