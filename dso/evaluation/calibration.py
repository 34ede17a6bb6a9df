"""Choosing the scale for somebody's limits, with few measurements.

With a limit of bias: the smallest scale that meets every limit. Without one: the largest scale up to which every limit
is met, as the smallest would be the base model. Bias is judged by the upper end of its 95% interval, everything else by
its value.

A ladder of :data:`RUNGS` steps from 0 to the largest scale finds where limits begin to be met, or to be broken, and
halving finds the place between two rungs. Where one rung has too much bias and the next one costs too much, the scale
at which the bias begins to be met lies between them, and is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from dso.evaluation.intervals import Estimate

RUNGS = 8
HALVINGS = 4  # so that a scale is found to 1/128 of the largest
PLACES = 3


class Reading(NamedTuple):
    """What was measured at one scale; nan for what was not.

    Attributes:
        scale: of the steering.
        bias: on the ambiguous decisions.
        kl: to the base model after the prompt of ambiguous decisions, in nats.
        accuracy_loss: of the base model's accuracy, on the same unambiguous decisions.
        perplexity: relative change on neutral texts (0.01 is 1% more).
    """

    scale: float
    bias: Estimate
    kl: float
    accuracy_loss: Estimate
    perplexity: Estimate


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that is allowed of each figure of a :class:`Reading`; None where there is no limit."""

    bias: float | None = None
    kl: float | None = None
    accuracy_loss: float | None = None
    perplexity: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The limits that there are, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: limit for name, limit in found.items() if limit is not None}

    def broken(self, reading: Reading) -> dict[str, float]:
        """What is judged, by the name of each limit that is not met; what was not measured (nan) meets none."""
        judged = {
            "bias": reading.bias.high,
            "kl": reading.kl,
            "accuracy_loss": reading.accuracy_loss.value,
            "perplexity": reading.perplexity.value,
        }
        return {name: judged[name] for name, limit in self.given.items() if not judged[name] <= limit}

    def distance(self, reading: Reading) -> float:
        """By how much the worst limit is broken, as a share of the limit; 0 where all are met."""
        shares = (
            (value - self.given[name]) / (abs(self.given[name]) or 1.0) for name, value in self.broken(reading).items()
        )
        return max((math.inf if math.isnan(share) else share for share in shares), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a search found.

    Attributes:
        chosen: None where no scale meets the limits; then ``nearest`` has the least of the largest excess.
        nearest: of those that were measured; the chosen one where there is one.
        readings: by rising scale.
    """

    chosen: Reading | None
    nearest: Reading
    readings: tuple[Reading, ...]


def calibrate(measure: Callable[[float], Reading], limits: Limits, largest: float) -> Calibration:
    """Search the scales from 0 to ``largest``; see the module's docstring.

    Raises:
        ValueError: if there is no limit, or no scale above 0.
    """
    if not limits.given:
        raise ValueError("calibration needs a limit")
    if not largest > 0:
        raise ValueError(f"the largest scale must be above 0, found {largest:g}")
    known: dict[float, Reading] = {}

    def read(scale: float) -> Reading:
        if scale not in known:
            known[scale] = measure(scale)
        return known[scale]

    rungs = [round(largest * step / RUNGS, PLACES) for step in range(RUNGS)] + [largest]
    found = _smallest(read, limits, rungs) if limits.bias is not None else _largest(read, limits, rungs)
    readings = tuple(known[scale] for scale in sorted(known))
    return Calibration(chosen=found, nearest=found or min(readings, key=limits.distance), readings=readings)


def _smallest(read: Callable[[float], Reading], limits: Limits, rungs: list[float]) -> Reading | None:
    def fits(reading: Reading) -> bool:
        return not limits.broken(reading)

    fair = _first(read, rungs, lambda reading: "bias" not in limits.broken(reading))
    if fair is None or fits(fair):
        return fair
    return _first(read, rungs, fits)


def _first(read: Callable[[float], Reading], rungs: list[float], fits: Callable[[Reading], bool]) -> Reading | None:
    """Where ``fits`` begins to hold."""
    for below, rung in zip([None, *rungs], rungs, strict=False):
        if fits(read(rung)):
            return read(rung) if below is None else read(_between(read, below, rung, fits))
    return None


def _largest(read: Callable[[float], Reading], limits: Limits, rungs: list[float]) -> Reading | None:
    def breaks(reading: Reading) -> bool:
        return bool(limits.broken(reading))

    last = 0.0
    for below, rung in zip(rungs, rungs[1:], strict=False):
        if breaks(read(rung)):
            last = _between(read, rung, below, lambda reading: not breaks(reading))
            break
        last = rung
    return read(last) if last else None


def _between(read: Callable[[float], Reading], without: float, within: float, fits: Callable[[Reading], bool]) -> float:
    """The scale that is nearest to ``without``, which does not fit, and fits as ``within`` does."""
    for _ in range(HALVINGS):
        middle = round((without + within) / 2, PLACES)
        if middle in (without, within):
            break
        without, within = (without, middle) if fits(read(middle)) else (middle, within)
    return within
