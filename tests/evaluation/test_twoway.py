"""The two-way layout against numbers derived by hand and against plain least squares."""

from __future__ import annotations

import numpy as np
import pytest

from dso.evaluation.twoway import Cells, fit, fit_both


def cells(table: np.ndarray) -> Cells:
    """Of (units, contexts) differences of two groups; nan where a unit is not met."""
    unit, context = np.nonzero(~np.isnan(table))
    values = table[unit, context] / 2
    return Cells(context, unit, np.stack([values, -values], axis=1), table.shape[1])


def difference(found) -> np.ndarray:
    return found.theta[:, 0] - found.theta[:, 1]


def test_a_balanced_layout_by_hand() -> None:
    # Two couples in two contexts: means 0.4 and -0.2.
    found = fit(cells(np.array([[0.6, -0.4], [0.2, 0.0]])))
    assert difference(found) == pytest.approx([0.4, -0.2])
    assert found.freedom == 1
    context, common = found.context_part(), found.common_part()
    assert (context.square, common.square) == (pytest.approx(0.09), pytest.approx(0.01))
    # Half the contexts' difference is 0.5 and 0.1, a variance of 0.08 over two couples; the mean is 0.1 for both.
    assert (context.noise, common.noise) == (pytest.approx(0.04), pytest.approx(0.0))
    assert context.excess == pytest.approx(0.05)


def test_people_cancel_where_units_are_missing() -> None:
    """What couples are liked by is far more than the rest: differences of contexts are those within couples."""
    rng = np.random.default_rng(0)
    effect, liking = np.array([0.3, -0.1, 0.2, -0.4]), 5 * rng.standard_normal(12)
    table = effect + liking[:, None] + 1e-3 * rng.standard_normal((12, 4))
    table[rng.random((12, 4)) < 0.3] = np.nan
    found = difference(fit(cells(table)))
    assert found - found.mean() == pytest.approx(effect - effect.mean(), abs=0.01)
    plain = np.nanmean(table, axis=0)
    assert np.abs(plain - plain.mean() - effect + effect.mean()).max() > 0.5


def test_contexts_that_no_unit_connects_are_their_means() -> None:
    table = np.full((6, 4), np.nan)
    table[:3, :2], table[3:, 2:] = [[0.1, 0.5], [0.3, 0.3], [0.2, 0.7]], [[0.0, 0.2], [0.4, 0.4], [0.2, 0.3]]
    found = fit(cells(table))
    assert difference(found) == pytest.approx(np.nanmean(table, axis=0))
    assert found.freedom == 6 - 2


def test_units_of_one_context_each_are_means_with_a_noise_drawn_towards_the_common_one() -> None:
    table = np.full((5, 2), np.nan)
    table[:2, 0], table[2:, 1] = [0.2, 0.6], [0.1, 0.3, 0.8]
    found = fit(cells(table))
    assert difference(found) == pytest.approx([0.4, 0.4])
    squares = 0.08, 0.26  # about the means
    pooled = sum(squares) / 3
    own = [(s + 5 * pooled) / (n - 1 + 5) / n for s, n in zip(squares, (2, 3), strict=True)]
    variances = ((found.spread[:, :, 0] - found.spread[:, :, 1]) ** 2).sum(axis=0)
    assert variances == pytest.approx(own)


def test_a_context_with_one_unit_has_the_noise_of_the_others() -> None:
    rng = np.random.default_rng(1)
    table = 0.1 * rng.standard_normal((30, 4))
    table[1:, 3] = np.nan
    found = fit(cells(table))
    variances = ((found.spread[:, :, 0] - found.spread[:, :, 1]) ** 2).sum(axis=0)
    assert variances[3] == pytest.approx(0.01, rel=0.5)
    assert variances[:3] == pytest.approx([0.01 / 30] * 3, rel=0.6)


@pytest.mark.parametrize("design", ["full", "missing"])
def test_the_noise_is_what_other_samples_differ_by(design: str) -> None:
    rng = np.random.default_rng(2)
    gone = rng.random((15, 5)) < 0.3 if design == "missing" else np.zeros((15, 5), dtype=bool)
    gone[:2] = False
    context, common, noise = [], [], []
    for _ in range(1500):
        table = 0.4 * rng.standard_normal((15, 1)) + 0.1 * rng.standard_normal((15, 5))
        table[gone] = np.nan
        found = fit(cells(table))
        context.append(found.context_part().square)
        common.append(found.common_part().square)
        noise.append((found.context_part().noise, found.common_part().noise))
    assert np.mean(noise, axis=0) == pytest.approx([np.mean(context), np.mean(common)], rel=0.12)


def test_what_is_in_both_of_two_measurements_leaves_their_difference_without_noise() -> None:
    rng = np.random.default_rng(3)
    table = 0.3 * rng.standard_normal((10, 1)) + 0.1 * rng.standard_normal((10, 4))
    table[0, 0] = np.nan
    one, other = fit_both(cells(table), cells(table + 0.2))
    assert difference(other) - difference(one) == pytest.approx(np.full(4, 0.2))
    assert one.spread == pytest.approx(other.spread)
    alone = np.full((8, 2), np.nan)
    alone[:4, 0], alone[4:, 1] = rng.standard_normal(4), rng.standard_normal(4)
    one, other = fit_both(cells(alone), cells(3 * alone))
    assert 3 * one.spread == pytest.approx(other.spread, abs=1e-6)
