"""Intervals against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dso.evaluation.intervals import (
    Estimate,
    bisect,
    length_estimate,
    mean_estimate,
    number_estimate,
    root_of_sum,
    share_estimate,
    student,
)
from dso.evaluation.twoway import Part


@pytest.mark.parametrize(
    ("freedom", "point"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980), (10**6, 1.960)],
)
def test_student_is_that_of_the_tables(freedom: int, point: float) -> None:
    assert student(freedom) == pytest.approx(point, rel=4e-3)


def test_a_length_of_many_directions_is_that_of_a_chi_square() -> None:
    """Noise of variance 1 in each of 40 directions, known well: |v|^2 - 40 between the points of a chi-square."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((4000, 40)) / math.sqrt(4000)
    none = Part(np.full(40, 1.0), spread, 3999)  # |v|^2 is what noise alone gives
    found = length_estimate(none, 20_000)
    assert found.value < 1.5 and found.low == 0.0
    # The largest length of which so little is measured in 2.5% of samples.
    assert np.mean(rng.noncentral_chisquare(40, found.high**2, 200_000) <= 40) == pytest.approx(0.025, abs=0.006)


def test_a_long_length_is_that_of_its_direction() -> None:
    rng = np.random.default_rng(1)
    spread = 0.01 * rng.standard_normal((200, 3)) / math.sqrt(200)
    spread = np.concatenate([spread, -spread])
    found = length_estimate(Part(np.array([3.0, 0.0, 4.0]), spread, 10_000), 20_000)
    along = math.sqrt(((spread @ [0.6, 0.0, 0.8]) ** 2).sum())
    assert found.value == pytest.approx(5.0, abs=1e-4)
    assert found.high - found.low == pytest.approx(2 * 1.96 * along, rel=0.05)


def test_without_draws_or_noise_there_is_no_interval() -> None:
    part = Part(np.array([3.0, 4.0]), np.full((1, 2), math.nan), 0.0)
    assert length_estimate(part, 100)[0] == 5.0 and math.isnan(length_estimate(part, 100).low)
    known = Part(np.array([3.0, 4.0]), np.array([[0.0, 3.0]]), 5.0)
    assert length_estimate(known, 0)[0] == 4.0 and math.isnan(length_estimate(known, 0).high)


def test_skewed_units_move_a_number_towards_their_longer_tail() -> None:
    units = np.random.default_rng(2).exponential(size=400)
    centred = (units - units.mean()) / 400
    found = number_estimate(Part(np.array([units.mean()]), centred[:, None], 399))
    assert found.high - found.value > found.value - found.low
    even = number_estimate(Part(np.array([0.0]), np.concatenate([centred, -centred])[:, None], 799))
    assert even.high == pytest.approx(-even.low)


def test_a_root_of_a_sum_of_squares_joins_both_ends() -> None:
    found = root_of_sum(Estimate(3.0, 2.0, 3.5), Estimate(4.0, 3.0, 5.0))
    assert found.value == 5.0
    assert found.low == pytest.approx(math.hypot(2, 3))
    assert found.high == pytest.approx(math.sqrt(25 + math.hypot(3.5**2 - 9, 25 - 16)))


def test_a_mean_over_units_is_that_of_their_sums() -> None:
    found = mean_estimate(np.array([0, 0, 1, 1]), np.array([0.1, 0.3, 0.5, 0.3]))
    assert found.value == pytest.approx(0.3)
    assert found.high == pytest.approx(0.3 + student(1) * 0.1)
    assert math.isnan(mean_estimate(np.array([0, 0]), np.array([1.0, 2.0])).low)


def test_a_share_of_units_that_answer_alike_is_worth_as_many_units() -> None:
    """Ten units of four decisions, all right or all wrong: as ten decisions, save for Student's point."""
    right = np.array([4.0] * 7 + [0.0] * 3)
    found, wanted = share_estimate(right, np.full(10, 4)), share_estimate(right / 4, np.ones(10))
    assert found == pytest.approx(wanted, rel=0.03)


def test_a_crossing_is_found_or_its_end_is_given() -> None:
    assert bisect(lambda x: x * x - 2, 0.0, 4.0) == pytest.approx(math.sqrt(2))
    assert bisect(lambda x: x + 1, 0.0, 4.0) == 0.0
    assert bisect(lambda x: x - 5, 0.0, 4.0) == 4.0
