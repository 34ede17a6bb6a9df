"""Figures of benchmarks: values, influences and paired differences against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dso.evaluation.benchmarks.figures import (
    correlation_figure,
    difference_of,
    estimate_of,
    figure,
    mean_figure,
    paired,
    percent_figure,
    unit_sums,
)
from dso.evaluation.benchmarks.report import number_texts
from dso.evaluation.intervals import Estimate, student


def test_the_noise_of_a_mean_is_that_of_its_units() -> None:
    found = mean_figure("m", [1.0, 2.0, 6.0, 7.0], ["a", "b", "c", "d"])
    # Mean 4, variance (9 + 4 + 4 + 9) / 3, over 4.
    assert found.value == 4
    assert found.part.noise == pytest.approx(26 / 3 / 4)
    reach = student(3) * math.sqrt(26 / 12)
    assert found.estimate() == pytest.approx((4, 4 - reach, 4 + reach))  # of few units no skewness is taken
    # Answers of one unit move together: two units of sums 3 and 13, that is of means 1.5 and 6.5.
    assert mean_figure("m", [1.0, 2.0, 6.0, 7.0], ["a", "a", "c", "c"]).part.noise == pytest.approx(12.5 / 2)


def test_a_difference_is_paired() -> None:
    base = mean_figure("m", [1.0, 2.0, 6.0], range(3))
    steered = mean_figure("m", [2.0, 3.0, 7.5], range(3))
    apart = difference_of(base.part, steered.part)
    # Differences 1, 1, 1.5: mean 7/6, variance (2/36 + 4/36) / 2 = 1/12, over 3.
    assert apart.value == pytest.approx(7 / 6)
    assert apart.noise == pytest.approx(1 / 36)
    row = paired([base], [steered])["m"]
    reach = student(2) / 6
    assert row.difference == pytest.approx((7 / 6, 7 / 6 - reach, 7 / 6 + reach))
    assert math.isnan(paired([base], None)["m"].difference.value)


def test_what_is_alike_in_all_units_has_no_known_noise() -> None:
    same = paired([mean_figure("m", [1.0, 1.0], range(2))], [mean_figure("m", [2.0, 2.0], range(2))])["m"]
    assert same.difference.value == 1
    assert math.isnan(same.first.low) and math.isnan(same.difference.high)
    assert math.isnan(mean_figure("m", [1.0], range(1)).estimate().low)
    # A share has an interval of its own even then.
    share = percent_figure("s", [True, True, True], range(3)).estimate()
    assert share.value == share.high == 100 and 30 < share.low < 60


def test_a_figure_that_is_no_mean_is_left_out_one_by_one() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    y += 0.5 * x
    found = correlation_figure("r", x, y, 30)
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    left = [np.corrcoef(np.delete(x, place), np.delete(y, place))[0, 1] for place in range(30)]
    spread = math.sqrt(29 / 30) * (np.mean(left) - np.array(left))
    assert found.part.spread[:, 0] == pytest.approx(spread)
    assert math.isnan(correlation_figure("r", np.ones(5), np.arange(5), 5).estimate().value)


def test_ends_stay_within_bounds() -> None:
    sums = unit_sums(np.array([[0.9, 1.0], [0.1, 1.0], [1.0, 1.0]]), range(3))
    found = figure("f", sums, lambda s: s[..., 0] / s[..., 1], 3, bounds=(0.0, 1.0)).estimate()
    assert (found.low, found.high) == (0, 1)
    assert estimate_of(figure("f", sums, lambda s: s[..., 0] / s[..., 1], 3).part).high > 1


def test_numbers_of_a_row_have_the_same_places() -> None:
    texts = number_texts(Estimate(62.34, 58, 66), Estimate(9.5, math.nan, math.nan), Estimate(math.nan, math.nan, 0))
    assert texts == ["62.3 [58.0, 66.0]", "9.5", "- [-, 0.0]"]
    assert number_texts(Estimate(-0.12345, -1, -0.0)) == ["-0.123 [-1.000, 0.000]"]
