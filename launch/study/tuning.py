"""Which candidate of a method, and at which scale: chosen on validation, inside the limits that training keeps too.

Every method has the same decisions, the same limits and the same wall clock. A candidate's scales are tried from the
lowest on; then those beside the best one, as finely as training turns its operators up. Where validation can be
thinned, all are tried on a part of it first and the best of them on the whole, which is successive halving in two
rounds (Jamieson and Talwalkar 2016, arXiv 1502.07943): the same time is enough for twice the candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

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
BEST = 4  # of a part of validation, which are tried on the whole of it
TRIES, CLOSE = 4, 0.05  # scales that are tried for a KL, and how close to it is close enough

Measure = Callable[[Attachable, float], Validation]


def study_limits(config: TrainConfig) -> Limits:
    """What every method is held to on validation: the limits of the config, with a wider one of accuracy."""
    return replace(kept_limits(config), max_accuracy_loss=ACCURACY_LOSS)


@dataclass(frozen=True, slots=True)
class Judge:
    """What candidates are judged on.

    Attributes:
        measure: (steering, scale) -> what these decisions say.
        base: what they say of the base model.
    """

    measure: Measure
    base: Validation


@dataclass(frozen=True, slots=True)
class Choice:
    """What validation chose.

    Attributes:
        candidate: the one; where nothing was inside the limits, the one that came nearest.
        scale: its scale. inside: whether it keeps every limit, and is less biased than the base model.
        why: what keeps it from that; empty if nothing does.
        tried: candidates x scales that were measured, on a part of validation or the whole.
    """

    candidate: Candidate
    scale: float
    inside: bool
    why: str
    tried: int


@dataclass(frozen=True, slots=True)
class _Tried:
    """A candidate at a scale; the lower the rank, the better: how many limits it breaks, bias, KL."""

    rank: tuple[float, float, float]
    candidate: Candidate
    scale: float
    broken: list[str]


@dataclass(slots=True)
class _Search:
    judge: Judge
    limits: Limits
    tried: list[_Tried] = field(default_factory=list)

    def look(self, candidate: Candidate, scale: float) -> bool:
        """Measure one; whether more of it can only be worse."""
        row = self.judge.measure(candidate.steering, scale)
        broken = self.limits.broken(row, self.judge.base)
        if not broken and not row.bias < self.judge.base.bias:
            broken = ["no less biased than the base model"]
        bias = math.inf if math.isnan(row.bias) else row.bias
        self.tried.append(_Tried((float(len(broken)), bias, row.kl), candidate, scale, broken))
        return any(not kl < HOPELESS * limit for kl, limit in self.limits.divergences(row).values())

    def ranked(self) -> list[_Tried]:
        """The best first; of equals the one that was tried first."""
        return sorted(self.tried, key=lambda tried: tried.rank)


def tune(
    candidates: Iterable[Candidate],
    scales: tuple[float, ...],
    judge: Judge,
    limits: Limits,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    part: Judge | None = None,
) -> Choice:
    """The least biased candidate and scale inside the limits, of as many as there is time for; at least one is tried.

    Args:
        candidates: the most promising first.
        scales: of each, rising; one alone is a method without a strength.
        judge: what chooses.
        limits: see :meth:`trainers.callbacks.Limits.broken`.
        seconds: of wall clock, the making of the candidates among it.
        part: what chooses those that ``judge`` is shown, in half of the time that is left when the first candidate is
            there; None shows it all of them.

    Raises:
        UserError: if there are no candidates.
    """
    end = clock() + seconds
    coming = iter(candidates)
    first = next(coming, None)
    if first is None:
        raise UserError("the method proposed no candidate")
    search = _Search(judge, limits)
    sieve, until = (search, end) if part is None else (_Search(part, limits), (clock() + end) / 2)
    _try_all(sieve, chain((first,), coming), scales, lambda: clock() >= until)
    if sieve is not search:
        for tried in sieve.ranked()[:BEST]:
            search.look(tried.candidate, tried.scale)
            if clock() >= end:
                break
    if len(scales) > 1:
        _refine(search, lambda: clock() >= end)
    best = search.ranked()[0]
    measured = {(id(tried.candidate), round(tried.scale, 6)) for tried in (*sieve.tried, *search.tried)}
    return Choice(best.candidate, best.scale, not best.broken, "; ".join(best.broken), len(measured))


def _try_all(
    search: _Search, candidates: Iterable[Candidate], scales: tuple[float, ...], over: Callable[[], bool]
) -> None:
    """Each candidate's scales, up to one beyond which more can only be worse, as long as there is time."""
    for candidate in candidates:
        for scale in within(candidate.steering, scales):
            if search.look(candidate, scale) or over():
                break
        if over():
            return


def _refine(search: _Search, over: Callable[[], bool]) -> None:
    """Try the scales on either side of the best, as long as that makes it better."""
    tried = set()
    while not over():
        best = search.ranked()[0]
        beside = [near for near in (best.scale * STEP, best.scale / STEP) if round(near, 4) not in tried]
        for near in within(best.candidate.steering, tuple(beside)):
            tried.add(round(near, 4))
            search.look(best.candidate, near)
            if over():
                return
        if search.ranked()[0].scale == best.scale:
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
