"""Paired cuts and differences: against Fieller by hand, known truths, and what is the same in both."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.evaluation.bias import bias_report
from dso.evaluation.comparison import compare, cuts
from dso.evaluation.evaluator import Measurement
from dso.evaluation.intervals import ratio_estimate, student
from dso.evaluation.twoway import Part


def grid(contexts: int, units: int, answers: int = 0) -> DecisionSet:
    """One ambiguous decision for every context and unit, and ``answers`` unambiguous ones for every unit."""
    pair = (Candidate(text=" a", group="f"), Candidate(text=" b", group="m"))

    def one(context: str, unit: int, answer: int | None = None) -> Decision:
        kind, stereotype = ("ambiguous", "f") if answer is None else ("unambiguous", None)
        return Decision(
            id=f"{context}/{unit}", context=context, kind=kind, prompt="?", candidates=pair, unit=f"u{unit}",
            answer=answer, stereotype=stereotype,
        )  # fmt: skip

    open_ones = [one(f"c{c}", u) for c, u in itertools.product(range(contexts), range(units))]
    return DecisionSet(
        tuple(open_ones + [one(f"s{k}", u, 0) for k, u in itertools.product(range(answers), range(units))])
    )


def policy(log_odds: np.ndarray) -> np.ndarray:
    first = 1 / (1 + np.exp(-log_odds.ravel()))
    return np.stack([first, 1 - first], axis=1)


def measured(probs: np.ndarray, kl: float = 0.0) -> Measurement:
    return Measurement(probs, np.full(len(probs), 0.5), np.full(len(probs), kl))


def test_what_is_halved_in_log_odds_is_cut_by_half_with_certainty() -> None:
    """Everything is halved, whoever is asked: the sample says nothing about the cut, however little about the bias."""
    rng = np.random.default_rng(0)
    log_odds = np.array([1, -1, 0.5, -0.5])[:, None] + rng.standard_normal(12) + 0.3 * rng.standard_normal((4, 12))
    found = cuts(policy(log_odds), policy(log_odds / 2), grid(4, 12))
    for cut, reach in ((found.context_part_log_odds, 0.05), (found.log_odds, 0.15)):  # the second's ends are MOVER's
        assert cut.value == pytest.approx(0.5)
        assert 0.5 - cut.low < reach and cut.high - 0.5 < reach
    base = bias_report(policy(log_odds), grid(4, 12)).log_odds.context_part
    assert (base.high - base.low) / base.value > 0.2


def test_the_same_twice_has_no_difference_and_no_cut() -> None:
    rng = np.random.default_rng(1)
    log_odds = np.array([2, 0, 1.5, 0.5])[:, None] + 0.3 * rng.standard_normal((4, 12))
    probs = np.concatenate([policy(log_odds), policy(rng.standard_normal(24))])
    for name, row in compare(measured(probs), measured(probs), grid(4, 12, answers=2)).items():
        assert row.difference.value == 0.0, name
        assert row.difference.low == pytest.approx(0.0, abs=0.05) and row.difference.high == pytest.approx(
            0.0, abs=0.05
        )
        if row.cut is not None:
            assert row.cut == pytest.approx((0.0, 0.0, 0.0), abs=0.03), name
    assert {
        "bias",
        "gap",
        "bias, log-odds",
        "context part, log-odds",
        "accuracy",
        "KL unambiguous",
    } <= {*compare(measured(probs), measured(probs), grid(4, 12, answers=2))}


def test_a_cut_that_may_be_all_of_it_says_so() -> None:
    """The steered model is fair: its bias is 0 at times, and the interval reaches to 100% and well below it."""
    rng = np.random.default_rng(2)
    effect, reached = np.array([1, -1] * 4)[:, None], 0
    for _ in range(40):
        base, noise = effect + 0.5 * rng.standard_normal((8, 12)), 0.5 * rng.standard_normal((8, 12))
        cut = cuts(policy(base), policy(noise), grid(8, 12), bootstrap=300).context_part
        reached += cut.high >= 1
        assert cut.low < 1
    assert reached >= 36


def test_a_cut_covers_the_truth() -> None:
    rng, held = np.random.default_rng(3), 0
    effect = np.array([1, -1] * 4)[:, None]
    for seed in range(200):
        liking, rest = rng.standard_normal(16), rng.standard_normal((2, 8, 16))
        base = effect + liking + 0.5 * rest[0]
        steered = 0.4 * effect + liking + 0.5 * (0.8 * rest[0] + 0.6 * rest[1])
        cut = cuts(policy(base), policy(steered), grid(8, 16), bootstrap=200, seed=seed).context_part_log_odds
        held += cut.low <= 0.6 <= cut.high
    assert held >= 182


def test_a_base_without_bias_leaves_a_cut_open() -> None:
    rng = np.random.default_rng(4)
    base, steered = policy(rng.standard_normal((4, 12))), policy(rng.standard_normal((4, 12)))
    found = cuts(base, steered, grid(4, 12))
    assert math.isnan(found.context_part.low)
    assert found.gap is not None and math.isnan(found.gap.low) and math.isnan(found.gap.high)


def test_a_ratio_of_numbers_is_fiellers() -> None:
    base, steered = (
        Part(np.array([2.0]), np.array([[0.3], [0.1]]), 5),
        Part(np.array([1.0]), np.array([[0.2], [-0.1]]), 5),
    )
    found = ratio_estimate(base, steered)
    assert found.value == 0.5
    for end in (found.low, found.high):  # where x - rho x0 is just not told apart from 0
        rho = 1 - end
        noise = (0.2 - rho * 0.3) ** 2 + (-0.1 - rho * 0.1) ** 2
        assert (1 - 2 * rho) ** 2 == pytest.approx(student(5) ** 2 * noise)


def test_differences_are_paired() -> None:
    """Two units of two decisions each: 0.1 and 0.3 more, then 0.5 and 0.3 more."""
    decisions = grid(2, 2)
    base = np.array([[0.5, 0.5]] * 4)
    one, other = measured(base), Measurement(base, np.array([0.6, 1.0, 0.8, 0.8]), np.zeros(4))
    found = compare(one, other, decisions)["answer mass"].difference
    # Context by unit, units c0/u0, c0/u1, c1/u0, c1/u1: u0 has 0.1 and 0.3, u1 0.5 and 0.3; the means are 0.2 and 0.4.
    assert found.value == pytest.approx(0.3)
    assert found.high - found.value == pytest.approx(student(1) * 0.1)


def test_frequencies_have_cuts_in_probability_only() -> None:
    probs = np.array([[1.0, 0.0], [0.75, 0.25], [0.0, 1.0], [0.25, 0.75]])
    found = cuts(probs, np.full((4, 2), 0.5), grid(2, 2))
    assert found.bias.value == 1.0
    assert math.isnan(found.log_odds.value) and math.isnan(found.context_part_log_odds.value)
