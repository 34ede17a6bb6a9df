"""The two-way layout behind every figure of bias: contexts that are asked about, people who are a sample.

In context c and unit u (the people of a decision), averaged over the orders of the people and the templates, the
deviation from the target is a vector over the G groups,

    y[c,u] = common + context[c] + people[u] + rest[c,u],      theta[c] = common + context[c]

Contexts are fixed, units are drawn. ``theta`` is estimated by generalised least squares with random people (Searle,
Casella and McCulloch, Variance Components, 1992, section 7.1): with the people's share
``rho_u = n_u v_people / (v_rest + n_u v_people)`` of a unit that is met in n_u contexts, and ``r = y - theta``,

    minimise over theta   sum_u [ sum_c |r[c,u]|^2 - rho_u / n_u |sum_c r[c,u]|^2 ]

Where every unit is met in every context this is the plain mean over units, and liking for people cancels from every
difference of contexts. Where units are missing, differences of contexts are taken within units as far as units connect
them. Where no unit is met twice (a file without units) it is the plain mean again.

**Noise.** The units' influences on ``theta`` are its noise: :attr:`Fit.spread` has one row a unit, whose outer products
add up to the sampling covariance of ``theta`` (a cluster-robust sandwich, Bell and McCaffrey, Survey Methodology 28,
2002, with the leverage of single cells; unbiased in a balanced layout). It allows for people who differ in how strongly
they follow the contexts. A context with one unit takes the pooled residual covariance of the others.

**Parts.** A :class:`Part` is a linear form of ``theta`` whose length is the figure. With two groups and the vector
``(d, -d)``, ``sqrt(2)`` times its length is ``|2 d| = |P(pro) - P(anti)|``, the paper's number, hence the factor 2:

    bias^2 = 2 mean_c |theta[c]|^2 = context_part^2 + common_part^2
    context_part^2 = 2 mean_c |theta[c] - mean theta|^2        common_part^2 = 2 |mean theta|^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

PRIOR = 5.0  # units' worth of the pooled variance in a context's own, where no unit is met twice
LEAST_LEFT = 1e-3  # least of what a cell's residual keeps
MOST = 0.999  # of a unit's share that is liking; at 1 what does not connect could not be estimated


@dataclass(frozen=True)
class Cells:
    """What was measured, one row a pair of context and unit that was met.

    Args:
        context: (N,) which context, below ``contexts``.
        unit: (N,) which unit.
        values: (N, G) the deviation.
        contexts: how many contexts there are.
    """

    context: Indices
    unit: Indices
    values: Array
    contexts: int


@dataclass(frozen=True)
class Part:
    """A vector with its noise.

    Args:
        value: (P,).
        spread: (R, P); the outer products of its rows add up to the covariance of ``value``. All nan if unknown.
        freedom: degrees of freedom that the spread was estimated with.
    """

    value: Array
    spread: Array
    freedom: float

    @property
    def square(self) -> float:
        """Squared length, noise included."""
        return float((self.value**2).sum())

    @property
    def noise(self) -> float:
        """What noise adds to :attr:`square` on average; nan if it is unknown."""
        return float((self.spread**2).sum())

    @property
    def excess(self) -> float:
        """Squared length without noise: unbiased, and therefore below 0 at times."""
        return self.square - self.noise


@dataclass(frozen=True)
class Fit:
    """``theta`` and its noise over the C contexts that were measured.

    Args:
        measured: (contexts,) which were.
        theta: (C, G).
        spread: (R, C, G), see :class:`Part`.
        freedom: units less the groups of contexts that no unit connects.
    """

    measured: Mask
    theta: Array
    spread: Array
    freedom: float

    def context_part(self) -> Part:
        """The contexts' differences from their mean."""
        scale = math.sqrt(2 / max(len(self.theta), 1))
        value, spread = self.theta - self.theta.mean(axis=0), self.spread - self.spread.mean(axis=1, keepdims=True)
        return Part(scale * value.ravel(), scale * spread.reshape(len(spread), -1), self.freedom)

    def common_part(self) -> Part:
        """What all contexts share."""
        scale = math.sqrt(2)
        return Part(scale * self.theta.mean(axis=0), scale * self.spread.mean(axis=1), self.freedom)

    def linear(self, weights: Array) -> Part:
        """The number ``sum_cg weights[c,g] theta[c,g]``; weights (contexts, G), unmeasured contexts have no part."""
        kept = weights[self.measured]
        return Part(np.array([(kept * self.theta).sum()]), (self.spread * kept).sum(axis=(1, 2))[:, None], self.freedom)


def fit(cells: Cells) -> Fit:
    """Estimate the layout; see the module's docstring."""
    met = np.bincount(cells.context, minlength=cells.contexts)
    measured = met > 0
    renumbered = np.cumsum(measured) - 1
    _, unit = np.unique(cells.unit, return_inverse=True)
    kept = Cells(renumbered[cells.context], unit.astype(np.intp), cells.values, int(measured.sum()))
    times = np.bincount(kept.unit)
    theta, spread, freedom = _nested(kept) if times.size == 0 or times.max() == 1 else _crossed(kept)
    return Fit(measured, theta, spread, freedom)


def fit_both(first: Cells, second: Cells) -> tuple[Fit, Fit]:
    """Two measurements of the same people, over the cells that both have: row r of both spreads is one unit's."""
    keys = [cells.context * (1 + max(first.unit.max(), second.unit.max())) + cells.unit for cells in (first, second)]
    _, rows, others = np.intersect1d(*keys, return_indices=True)
    values = np.concatenate([first.values[rows], second.values[others]], axis=1)
    both, groups = fit(Cells(first.context[rows], first.unit[rows], values, first.contexts)), first.values.shape[1]
    one, other = (
        Fit(both.measured, both.theta[:, part], both.spread[:, :, part], both.freedom)
        for part in (slice(groups), slice(groups, None))
    )
    return one, other


def _nested(cells: Cells) -> tuple[Array, Array, float]:
    """Every unit in one context only: means, and the covariance of each."""
    contexts, groups = cells.contexts, cells.values.shape[1]
    met = np.bincount(cells.context, minlength=contexts)
    theta = sums_by(cells.context, cells.values, contexts) / np.maximum(met, 1)[:, None]
    residual = cells.values - theta[cells.context]
    products = residual[:, :, None] * residual[:, None, :]
    sums = sums_by(cells.context, products.reshape(-1, groups * groups), contexts)
    freedom = int(met.sum()) - contexts
    pooled = sums.sum(axis=0) / freedom if freedom else np.full(groups * groups, np.nan)
    # A variance from few units is unsure of itself: it is drawn towards that of all contexts.
    own = (sums + PRIOR * pooled) / (np.maximum(met - 1, 0) + PRIOR)[:, None]
    spread = np.zeros((contexts, 2 * groups, contexts, groups))
    for c, covariance in enumerate(own.reshape(contexts, groups, groups) / np.maximum(met, 1)[:, None, None]):
        spread[c, :, c, :] = _root(covariance)
    return theta, spread.reshape(2 * groups * contexts, contexts, groups), float(freedom)


def _crossed(cells: Cells) -> tuple[Array, Array, float]:
    """Units that are met in several contexts: generalised least squares with random people."""
    units, groups = int(cells.unit.max()) + 1, cells.values.shape[1]
    seen = np.zeros((units, cells.contexts))
    values = np.zeros((units, cells.contexts, groups))
    seen[cells.unit, cells.context] = 1.0
    values[cells.unit, cells.context] = cells.values
    times, met = seen.sum(axis=1), seen.sum(axis=0)
    residual = (values - values.sum(axis=0) / met[:, None]) * seen[:, :, None]
    share = _people(residual, seen, times)
    # Normal equations of the form in the module's docstring.
    inverse = np.linalg.inv(np.diag(met) - (seen * (share / times)[:, None]).T @ seen)

    def weighted(r: Array) -> Array:
        return seen[:, :, None] * (r - (share / times)[:, None, None] * r.sum(axis=1, keepdims=True))

    theta = inverse @ weighted(values).sum(axis=0)
    residual = (values - theta) * seen[:, :, None]
    freedom = units - _components(seen)
    if (met == 1).all() or freedom < 1:
        return theta, np.full((1, cells.contexts, groups), np.nan), 0.0
    # A cell pulls theta towards itself, so that its residual is too small: by the root of one less its leverage.
    leverage = np.diag(inverse) - (seen * (share / times)[:, None]) @ inverse
    scaled = residual / np.sqrt(np.where(met > 1, np.maximum(1 - leverage, LEAST_LEFT), 1.0))[:, :, None]
    rows = inverse @ weighted(scaled)
    return theta, np.concatenate([rows, _alone(residual, seen, met)]), float(freedom)


def _people(residual: Array, seen: Array, times: Array) -> Array:
    """(U,): ``rho_u``, from the moments of the residuals within and between units."""
    mean = residual.sum(axis=1) / times[:, None]
    within = ((residual - mean[:, None, :] * seen[:, :, None]) ** 2).sum()
    rest = within / max(float((times - 1).sum()), 1.0)
    liking = max(0.0, float((mean**2).sum(axis=1).mean() - rest * (1 / times).mean()))
    total = rest + times * liking
    return np.minimum(np.where(total > 0, times * liking / np.where(total > 0, total, 1.0), 0.0), MOST)


def _alone(residual: Array, seen: Array, met: Array) -> Array:
    """Rows of spread for the contexts with one unit: what a residual of the other contexts varies by."""
    lone = np.flatnonzero(met == 1)
    contexts, groups = residual.shape[1:]
    rows = np.zeros((len(lone), 2 * groups, contexts, groups))
    if len(lone):
        others = residual[:, met > 1].reshape(-1, groups)
        pooled = others.T @ others / max(float((met[met > 1] - 1).sum()), 1.0)
        for row, c in enumerate(lone):
            rows[row, :, c, :] = _root(pooled)
    return rows.reshape(2 * groups * len(lone), contexts, groups)


def sums_by(number: Indices, values: Array, count: int) -> Array:
    """(count, G): sums of values (N, G) by number (N,)."""
    columns = [np.bincount(number, column, count) for column in values.T]
    return np.stack(columns, axis=1).astype(np.float64)


def _components(seen: Array) -> int:
    """How many groups of contexts there are that no unit connects."""
    label = np.arange(seen.shape[1])
    while True:
        # The smallest label that each unit sees, then the smallest of the units that meet each context.
        low = np.where(seen > 0, label, seen.shape[1]).min(axis=1)
        new = np.where(seen > 0, low[:, None], seen.shape[1]).min(axis=0)
        if (new == label).all():
            return len(np.unique(label))
        label = new


def _root(covariance: Array) -> Array:
    """Rows (2 G, G) whose outer products add up to a covariance, with either sign: no unit's, so not skewed."""
    if np.isnan(covariance).any():
        return np.full((2 * len(covariance), len(covariance)), np.nan)
    sizes, directions = np.linalg.eigh(covariance)
    rows = np.sqrt(np.maximum(sizes, 0.0) / 2)[:, None] * directions.T
    return np.concatenate([rows, -rows])
