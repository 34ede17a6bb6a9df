"""What a benchmark reports of a model: published figures, each with its noise, and two models' side by side.

Every figure here is a smooth function f of sums over *units*, the items that are alike (the questions of one template,
the sentences about one occupation), with a row of sums for each unit. Its noise is the delete-one jackknife's (Efron
and Stein, Annals of Statistics 9, 1981), here as influences, so that two models that answered the same units are
compared pairwise (:mod:`dso.evaluation.intervals` makes intervals of them):

    spread[u] = sqrt((U - 1) / U) * (mean over v of f(S - s_v)  -  f(S - s_u))        S = sum over u of s_u
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dso.evaluation.comparison import Compared
from dso.evaluation.intervals import TAILS, UNMEASURED, Estimate, number_estimate, share_estimate
from dso.evaluation.layout import numbered
from dso.evaluation.twoway import Array, Part

PERCENT = (0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published figure of one model.

    Attributes:
        name: of the figure.
        part: its value (1,) and the units' influences (U, 1); nan where it is not defined.
        items: how many answers it is made of.
        fair: its value where there is no bias; None for what is no bias.
        attribute: what the bias is about, such as ``religion``.
        bounds: what its interval cannot be beyond.
        share: its own interval, of shares, which have one even where all answers are alike.
    """

    name: str
    part: Part
    items: int
    fair: float | None = None
    attribute: str = ""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    share: Estimate | None = None

    @property
    def value(self) -> float:
        """Of the figure."""
        return float(self.part.value[0])

    def estimate(self) -> Estimate:
        """With its 95% interval."""
        return self.share or clipped(estimate_of(self.part), *self.bounds)


def figure(
    name: str,
    sums: Array,
    function: Callable[[Array], Array],
    items: int,
    fair: float | None = None,
    about: str = "",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Figure:
    """A figure from the sums (U, P) of its units; ``function`` takes sums (..., P) to values (...)."""
    return Figure(name=name, part=jackknife(sums, function), items=items, fair=fair, attribute=about, bounds=bounds)


def jackknife(sums: Array, function: Callable[[Array], Array]) -> Part:
    """``function`` of the sum over the rows of ``sums``, and the influence of each row."""
    total, units = sums.sum(axis=0), len(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.atleast_1d(function(total))
        left = function(total - sums) if units > 1 else np.full(units, np.nan)
    spread = math.sqrt((units - 1) / units) * (left.mean() - left) if units else left
    return Part(np.asarray(value, dtype=np.float64), np.asarray(spread, dtype=np.float64)[:, None], units - 1.0)


def estimate_of(part: Part, point: float = TAILS[1]) -> Estimate:
    """:func:`dso.evaluation.intervals.number_estimate`; nan for the ends that are not known."""
    value = float(part.value[0])
    if math.isnan(value):
        return UNMEASURED
    if part.freedom < 1 or not np.isfinite(part.spread).all() or not part.noise:
        return Estimate(value, math.nan, math.nan)  # units that are all alike do not tell how far they differ
    return number_estimate(part, point)


def clipped(found: Estimate, low: float, high: float) -> Estimate:
    """An estimate with its ends inside bounds; nan stays."""
    ends = (end if math.isnan(end) else min(max(end, low), high) for end in found[1:])
    return Estimate(found.value, *ends)


def difference_of(base: Part, steered: Part) -> Part:
    """``steered - base`` of two figures of the same units."""
    return Part(steered.value - base.value, steered.spread - base.spread, base.freedom)


def percent_figure(
    name: str, hit: ArrayLike, unit: Sequence[object], fair: float | None = None, about: str = ""
) -> Figure:
    """The percentage of N answers that hit, (N,) each; answers of one unit are resampled together."""
    sums = unit_sums(np.stack([np.asarray(hit, dtype=np.float64), np.ones(len(unit))], axis=1), unit)
    share = share_estimate(sums[:, 0], sums[:, 1])
    return Figure(
        name=name,
        part=jackknife(sums, lambda s: 100 * s[..., 0] / s[..., 1]),
        items=len(unit),
        fair=fair,
        attribute=about,
        bounds=PERCENT,
        share=Estimate(*(100 * end for end in share)),
    )


def mean_figure(
    name: str,
    values: ArrayLike,
    unit: Sequence[object],
    fair: float | None = None,
    about: str = "",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Figure:
    """The mean of N values."""
    sums = unit_sums(np.stack([np.asarray(values, dtype=np.float64), np.ones(len(unit))], axis=1), unit)
    return figure(name, sums, lambda s: s[..., 0] / s[..., 1], len(unit), fair, about, bounds)


def correlation_figure(name: str, x: ArrayLike, y: ArrayLike, items: int, about: str = "") -> Figure:
    """Pearson's correlation of U pairs, which are the units; nan where one of the two does not vary."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (x, y))
    one, other = one - one.mean(), other - other.mean()  # which changes nothing but the rounding
    sums = np.stack([one, other, one * one, other * other, one * other, np.ones(len(one))], axis=1)
    return figure(name, sums, _pearson, items, 0.0, about, (-1.0, 1.0))


def _pearson(sums: Array) -> Array:
    x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
    spreads = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
    return np.where(spreads > 1e-18, (xy / n - x * y / n**2) / np.sqrt(np.where(spreads > 0, spreads, 1.0)), np.nan)


def unit_sums(rows: Array, unit: Sequence[object]) -> Array:
    """(U, P): the rows (N, P) summed by their units, in order of first appearance."""
    names, number = numbered(unit)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, number, rows)
    return sums


def _difference(base: Figure, steered: Figure) -> Estimate:
    most = base.bounds[1] - base.bounds[0]
    return clipped(estimate_of(difference_of(base.part, steered.part)), -most, most)


def paired(base: Sequence[Figure], steered: Sequence[Figure] | None) -> dict[str, Compared]:
    """Both models' figures by name, with the paired difference; without a second model its columns are nan."""
    rows = {}
    for place, one in enumerate(base):
        other = steered[place] if steered else None
        rows[one.name] = Compared(
            first=one.estimate(),
            second=other.estimate() if other else UNMEASURED,
            difference=_difference(one, other) if other else UNMEASURED,
        )
    return rows
