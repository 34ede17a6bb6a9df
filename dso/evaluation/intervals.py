"""95% intervals of lengths, numbers, shares and ratios whose noise comes from people.

Noise is given as the rows of :attr:`dso.evaluation.twoway.Part.spread`, one a unit. A *resample* of the people is a
multiplier bootstrap: every unit's row with a standard normal factor (Mammen, Annals of Statistics 21, 1993). Two
measurements of the same people take the same factors, which is what makes their comparison paired.

**A length** r (:func:`length_estimate`). Its square with the noise taken off is ``|v|^2 - noise``, whose ends are found
by test inversion: with the true length r in the direction measured, a resample scores

    r^2 + 2 r along + (|e|^2 - noise)        e: a resample's noise, along: its part in that direction

and the interval holds the r for which the measured value lies within the central 95% of that. ``along`` is a Student
variable with the people's degrees of freedom; the spread of ``|e|^2`` is set to what an unbiased estimate of
``tr(S^2)`` says, as the rows of few people make noise look as though it had few directions (Bai and Saranadasa,
Statistica Sinica 6, 1996).

**A root of a sum of squares** (:func:`root_of_sum`) joins the intervals of both squares by MOVER (Zou and Donner,
Statistics in Medicine 27, 2008). **A ratio of lengths** (:func:`cut_estimate`) inverts the same test for
``|v|^2 - rho^2 |v0|^2``, as Fieller did for means. **A share** (:func:`share_estimate`) has Wilson's interval with the
effective sample size of Korn and Graubard (Survey Methodology 24, 1998), so it has no width 0.

docs/coverage.md has how often these intervals hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dso.evaluation.twoway import Array, Part

TAILS = (0.025, 0.975)
NORMAL = 1.959963984540054  # 97.5%
STEPS = 40  # of a bisection
FEW = 12.0  # units whose skewness is not looked at; chosen on resampled answers of a real model
MOST_RATIO = 20.0  # a larger one is not told apart from any


class Estimate(NamedTuple):
    """A value with its 95% interval; nan where nothing was measured, or where its noise is not known."""

    value: float
    low: float
    high: float


UNMEASURED = Estimate(math.nan, math.nan, math.nan)


def student(freedom: float, point: float = TAILS[1]) -> float:
    """A point of Student's t, above 1/2 (Abramowitz and Stegun, 26.7.5, exact for 1 and 2 degrees)."""
    if freedom < 1:
        return math.inf
    if freedom < 2:
        return math.tan(math.pi * (point - 0.5))
    if freedom < 3:
        return (2 * point - 1) / math.sqrt(2 * point * (1 - point))
    z = NormalDist().inv_cdf(point)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def number_estimate(part: Part, point: float = TAILS[1]) -> Estimate:
    """A signed number, a part of one component: Student's interval, moved by the skewness of the units.

    Args:
        point: up to which the interval goes; a later one for each of several numbers together.
    """
    value, shift = float(part.value[0]), skew_shift(part.spread[:, 0], part.freedom)
    reach = student(part.freedom, point) * math.sqrt(part.noise)
    return Estimate(value, min(value - reach + shift, value), max(value + reach + shift, value))


def skew_shift(influence: Array, freedom: float) -> float:
    """How far skewed units move the ends of a mean's interval, towards their longer tail.

    The second term of the Edgeworth expansion of Student's statistic, ``(2 z^2 + 1) / 6 * skewness * sd / n`` (Hall,
    Annals of Probability 15, 1987), from the units' influences. Of a few units the skewness is not known at all: less
    of it is taken, and none of :data:`FEW`.
    """
    noise, known = float((influence**2).sum()), max(0.0, 1 - FEW / max(freedom, 1.0))
    return known * (2 * NORMAL**2 + 1) / 6 * float((influence**3).sum()) / noise if noise > 0 else 0.0


class Resamples:
    """Noise of several parts that were measured on the same people, resampled together.

    Args:
        parts: of which each has the same units in the rows of its spread.
        draws: how many resamples.
        seed: of the resamples.
    """

    def __init__(self, parts: list[Part], draws: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        spread = np.concatenate([part.spread for part in parts], axis=1)
        if len(spread) > spread.shape[1]:
            spread = np.asarray(np.linalg.qr(spread, mode="r"))  # fewer rows with the same covariance
        noise = rng.standard_normal((draws, len(spread))) @ spread
        bounds = np.cumsum([0, *(len(part.value) for part in parts)])
        stretch = np.sqrt(rng.chisquare(parts[0].freedom, draws) / parts[0].freedom)
        self.along: list[Array] = []
        self.quadratic: list[Array] = []
        for part, start, end in zip(parts, bounds, bounds[1:], strict=False):
            e = noise[:, start:end]
            direction = part.value / (math.sqrt(part.square) or 1.0)
            self.along.append(e @ direction / stretch - skew_shift(part.spread @ direction, part.freedom))
            self.quadratic.append(_quadratic(part, (e**2).sum(axis=1), rng))


def _quadratic(part: Part, squares: Array, rng: np.random.Generator) -> Array:
    """``|e|^2 - noise`` of each resample, as spread as it is where the noise is estimated too."""
    noise, freedom = part.noise, part.freedom
    seen = float(((part.spread @ part.spread.T) ** 2).sum())  # tr(S^2), too large with few units
    unbiased = seen if freedom < 2 else freedom**2 / ((freedom - 1) * (freedom + 2)) * (seen - noise**2 / freedom)
    unbiased = max(unbiased, noise**2 / max(len(part.value), 1))
    directions = noise**2 / unbiased if unbiased > 0 else 1.0
    shrunk = noise + (squares - noise) * math.sqrt(min(unbiased / seen, 1.0) if seen else 1.0)
    estimated = rng.chisquare(freedom * directions, len(squares)) / (freedom * directions)
    return shrunk / estimated - noise


def length_estimate(part: Part, draws: int, seed: int = 0) -> Estimate:
    """The length of a part, its noise taken off, cut at 0; without draws no interval.

    Where its noise is not known the value is the length as measured, and the ends are nan.
    """
    if math.isnan(part.excess):
        return Estimate(math.sqrt(part.square), math.nan, math.nan) if not math.isnan(part.square) else UNMEASURED
    value = math.sqrt(max(0.0, part.excess))
    if not draws:
        return Estimate(value, math.nan, math.nan)
    resamples = Resamples([part], draws, seed)
    along, quadratic = resamples.along[0], resamples.quadratic[0]
    reach = float(np.abs(along).max())
    top = reach + math.sqrt(reach**2 + max(part.square, part.noise))

    def end(tail: float, measured: float) -> float:
        return bisect(lambda r: _quantile(r * r + 2 * r * along + quadratic, tail) - measured, 0.0, top)

    # A square below 0 counts as 0 for the upper end, which would vanish otherwise.
    low, high = end(TAILS[1], part.excess), end(TAILS[0], max(part.excess, 0.0))
    return Estimate(value, min(low, value), max(high, value))


def root_of_sum(one: Estimate, other: Estimate) -> Estimate:
    """The root of the sum of the squares of two lengths.

    The upper end is MOVER's. The lower end takes both lengths at their lower ends: MOVER's lies above that of the first
    where the second is not told apart from 0 but was measured large.
    """
    value = math.hypot(one.value, other.value)
    up = math.hypot(one.high**2 - one.value**2, other.high**2 - other.value**2)
    return Estimate(value, math.hypot(one.low, other.low), math.sqrt(value**2 + up))


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that starts below 0 crosses it; ``low`` where it starts above, ``high`` where it never does."""
    if function(low) >= 0:
        return low
    if function(high) < 0:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def _quantile(values: Array, tail: float) -> float:
    place = min(int(tail * len(values)), len(values) - 1)
    return float(np.partition(values, place)[place])


def share_estimate(right: NDArray[Any], asked: NDArray[Any]) -> Estimate:
    """A share ``sum right / sum asked`` over units, (U,) each; the interval has a width, short of everything.

    Units that answer alike are worth less than as many decisions, so the sample size is divided by the design effect,
    which is taken to be at least 1; where all are right, or all are wrong, every unit counts as one decision.
    """
    total, units = float(asked.sum()), len(asked)
    share = float(right.sum()) / total
    if 0 < share < 1 and units > 1:
        clustered = float(((right - share * asked) ** 2).sum()) * units / (units - 1) / total**2
        size = total / max(clustered * total / (share * (1 - share)), 1.0)
    else:
        size = float(units)
    quantile = student(units - 1) if 0 < share < 1 else NORMAL
    if not math.isfinite(quantile):
        return Estimate(share, 0.0, 1.0)
    weight = quantile**2 / size
    middle = (share + weight / 2) / (1 + weight)
    reach = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return Estimate(share, min(max(0.0, middle - reach), share), max(min(1.0, middle + reach), share))


def cut_estimate(base: Part, steered: Part, draws: int, seed: int = 0) -> Estimate:
    """``1 - r / r0`` of the lengths of two parts on the same units.

    With the true ratio rho, ``|v|^2 - rho^2 |v0|^2`` (noise taken off both) has the mean 0; the interval holds the
    ratios at which it lies within the central 95% of what resamples score. Where the base's length is not told apart
    from 0 every ratio is possible, and the cut has no lower end (nan).
    """
    if not base.excess > 0 or math.isnan(steered.excess):
        return UNMEASURED
    before, after = (math.sqrt(max(part.excess, 0.0)) for part in (base, steered))
    value = 1 - after / before
    if not draws:
        return Estimate(value, math.nan, math.nan)
    resamples = Resamples([base, steered], draws, seed)
    # Of each resample: what goes with rho (the steered length is that of a true ratio), with rho^2 and with neither.
    linear, constant = 2 * before * resamples.along[1], resamples.quadratic[1]
    squared = -2 * before * resamples.along[0] - resamples.quadratic[0]

    def end(tail: float, measured: float) -> float:
        def distance(rho: float) -> float:
            return _quantile(rho * linear + rho**2 * squared + constant, tail) - measured + rho**2 * base.excess

        return bisect(distance, 0.0, MOST_RATIO)

    return _cut(value, end(TAILS[1], steered.excess), end(TAILS[0], max(steered.excess, 0.0)))


def cut_of_estimates(base: Estimate, steered: Estimate, before: Part, after: Part) -> Estimate:
    """``1 - r / r0`` of two lengths with intervals, by MOVER with the correlation of their noise.

    Donner and Zou, Statistical Methods in Medical Research 21, 2012: the ratios whose difference ``r - rho r0`` has 0
    in its interval.
    """
    if not base.value > 0 or math.isnan(steered.value):
        return UNMEASURED
    value = 1 - steered.value / base.value
    if math.isnan(base.low + steered.low):
        return Estimate(value, math.nan, math.nan)
    correlation = _correlation(before, after)

    def low(rho: float) -> float:
        reach = _joint(steered.value - steered.low, rho * (base.high - base.value), correlation)
        return reach - (steered.value - rho * base.value)

    def high(rho: float) -> float:
        reach = _joint(steered.high - steered.value, rho * (base.value - base.low), correlation)
        return -reach - (steered.value - rho * base.value)

    return _cut(value, bisect(low, 0.0, MOST_RATIO), bisect(high, 0.0, MOST_RATIO))


def _cut(value: float, low: float, high: float) -> Estimate:
    """From the ends of a ratio, of which a large upper one is none."""
    return Estimate(value, math.nan if high >= MOST_RATIO else min(1 - high, value), max(1 - low, value))


def ratio_estimate(base: Part, steered: Part) -> Estimate:
    """``1 - x / x0`` of two numbers on the same units, by Fieller's theorem; without ends (nan) where x0 may be 0."""
    x0, x = float(base.value[0]), float(steered.value[0])
    if math.isnan(x0) or math.isnan(x) or x0 == 0:
        return UNMEASURED
    t = student(base.freedom) ** 2
    a, c = x0**2 - t * base.noise, x**2 - t * steered.noise
    b = x0 * x - t * float((base.spread * steered.spread).sum())
    if not a > 0:
        return Estimate(1 - x / x0, math.nan, math.nan)
    reach = math.sqrt(max(0.0, b**2 - a * c))
    return Estimate(1 - x / x0, 1 - (b + reach) / a, 1 - (b - reach) / a)


def difference_estimate(first: Estimate, second: Estimate, before: Part, after: Part) -> Estimate:
    """``second - first`` of the lengths of two parts on the same units, by MOVER with the correlation of their noise.

    Zou, Psychological Methods 12, 2007, equation 15.
    """
    correlation = _correlation(before, after)
    value = second.value - first.value
    low = value - _joint(second.value - second.low, first.high - first.value, correlation)
    return Estimate(value, low, value + _joint(second.high - second.value, first.value - first.low, correlation))


def _correlation(before: Part, after: Part) -> float:
    """Of the noise of both lengths, each in its measured direction."""
    one, other = (part.spread @ part.value for part in (before, after))
    sizes = math.sqrt(float((one**2).sum() * (other**2).sum()))
    return float(one @ other) / sizes if sizes else 0.0


def _joint(up: float, down: float, correlation: float) -> float:
    return math.sqrt(max(0.0, up**2 + down**2 - 2 * correlation * up * down))


def mean_estimate(unit: NDArray[Any], values: Array) -> Estimate:
    """The mean of values (N,) that belong to units (N,): Student's interval with units that answer alike."""
    if not len(values):
        return UNMEASURED
    mean = float(values.mean())
    sums = np.bincount(unit, values - mean)[np.bincount(unit) > 0]
    if len(sums) < 2:
        return Estimate(mean, math.nan, math.nan)
    reach = student(len(sums) - 1) * math.sqrt(float((sums**2).sum()) * len(sums) / (len(sums) - 1)) / len(values)
    return Estimate(mean, mean - reach, mean + reach)
