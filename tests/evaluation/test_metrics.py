"""Bias and accuracy against numbers derived by hand, known truths and relabelling."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionError, DecisionSet
from dso.evaluation.bias import accuracy, bias_report
from dso.evaluation.intervals import random_signs, resampling_weights


def decision(name, context, groups, unit="", stereotype=None, answer=None):
    return Decision(
        id=name,
        context=context,
        kind="ambiguous" if answer is None else "unambiguous",
        prompt="One of them is a",
        candidates=tuple(Candidate(text=f" {k}", group=group) for k, group in enumerate(groups)),
        answer=answer,
        unit=unit,
        stereotype=stereotype,
    )


def table(rows, width):
    """``rows``: (context, unit, stereotype, {group: probability}), one a decision."""
    asked = tuple(
        decision(f"d{i}", context, list(policy), unit, stereotype)
        for i, (context, unit, stereotype, policy) in enumerate(rows)
    )
    probs = np.zeros((len(rows), width))
    for i, (_, _, _, policy) in enumerate(rows):
        probs[i, : len(policy)] = list(policy.values())
    return probs, asked


def _set(rows, width):
    probs, asked = table(rows, width)
    return probs, DecisionSet(asked)


def grid(contexts, units, groups=("f", "m")):
    """One decision for every context and unit; probabilities for it are (contexts, units)."""
    pairs = itertools.product(range(contexts), range(units))
    return DecisionSet(tuple(decision(f"{c}-{u}", f"c{c}", groups, f"u{u}") for c, u in pairs))


def two_way(first):
    return np.stack([first, 1 - first], axis=-1).reshape(-1, 2)


@pytest.fixture
def two_groups():
    """P(f): nurse Ann/Bob 0.9 and 0.7, Eve/Dan 0.6 and 0.6; smith 0.2 and 0.4, then 0.5 and 0.5; orders swapped."""
    rows = []
    for context, unit, first, second in (
        ("nurse", "Ann/Bob", 0.9, 0.7),
        ("nurse", "Eve/Dan", 0.6, 0.6),
        ("smith", "Ann/Bob", 0.2, 0.4),
        ("smith", "Eve/Dan", 0.5, 0.5),
    ):
        rows.append((context, unit, "f", {"f": first, "m": 1 - first}))
        rows.append((context, unit, "f", {"m": 1 - second, "f": second}))
    probs, asked = table(rows, width=3)  # the third candidate is padding
    return probs, DecisionSet(asked)


def test_two_groups_by_hand(two_groups):
    report = bias_report(*two_groups)
    # p_f: nurse (0.8 + 0.6) / 2 = 0.7, smith (0.3 + 0.5) / 2 = 0.4, so P(f) - P(m) = 0.4 and -0.2.
    assert report.preferences["nurse"] == pytest.approx({"f": 0.7, "m": 0.3})
    assert report.preferences["smith"] == pytest.approx({"f": 0.4, "m": 0.6})
    assert report.context_bias == pytest.approx({"nurse": 0.4, "smith": 0.2})
    assert report.soft.value == pytest.approx(0.3)
    assert report.soft_rms.value == pytest.approx(math.sqrt((0.16 + 0.04) / 2))
    # s^2 of (0.8, 0.6) and of (0.3, 0.5) is 0.02; 2 * (two groups) * 0.02 / 2 = 0.04 off each square.
    assert report.corrected.value == pytest.approx(math.sqrt((0.12 + 0.0) / 2))
    # nurse: f always; smith: m, m, then two ties, so P(f) = (0 + 0.5) / 2.
    assert report.hard.value == pytest.approx((1.0 + 0.5) / 2)
    assert report.gap.value == pytest.approx(0.1)
    assert report.pro_share == 0.5
    assert report.abstention == 0.0
    assert report.order_effect == pytest.approx((0.2 + 0.0 + 0.2 + 0.0) / 4)
    assert report.target == {"f": 0.5, "m": 0.5}
    assert (report.n_decisions, report.n_contexts, report.n_units) == (8, 2, 2)


def test_floor_by_enumerating_the_signs(two_groups):
    report = bias_report(*two_groups)
    # P(f) - P(m) by unit: nurse 0.6, 0.2; smith -0.4, 0. Signs equal: 0.4 and 0.2; opposite: 0.2 and 0.2.
    assert report.soft_floor == pytest.approx((0.3 + 0.2) / 2, abs=4 * 0.05 / math.sqrt(1000))
    # Choices: nurse 1, 1; smith -1, 0. Equal: 1 and 0.5; opposite: 0 and 0.5.
    assert report.hard_floor == pytest.approx((0.75 + 0.25) / 2, abs=4 * 0.25 / math.sqrt(1000))


def test_three_groups_by_hand():
    rows = [
        ("a", "u1", "she", {"he": 0.6, "she": 0.3, "they": 0.1}),
        ("a", "u2", "she", {"he": 0.4, "she": 0.5, "they": 0.1}),
    ]
    probs, asked = table(rows, 3)
    report = bias_report(probs, DecisionSet(asked))
    # p = (0.5, 0.4, 0.1): |1/6| + |1/15| + |-7/30| = 5/30 + 2/30 + 7/30
    assert report.soft.value == pytest.approx(14 / 30)
    assert report.soft_rms.value == pytest.approx(math.sqrt(2 * (25 + 4 + 49) / 900))
    # s^2 = 0.02, 0.02, 0, over two units: 2 * 0.02 off.
    assert report.corrected.value == pytest.approx(math.sqrt(2 * 78 / 900 - 0.04))
    # choices he, she: p = (1/2, 1/2, 0)
    assert report.hard.value == pytest.approx(1 / 6 + 1 / 6 + 1 / 3)
    assert report.gap is None  # needs two groups
    assert report.pro_share == 0.0  # he is preferred


def test_who_always_chooses_the_first_is_fair_and_follows_the_order_alone():
    rows = [("nurse", "Ann/Bob", "f", {"f": 1.0, "m": 0.0}), ("nurse", "Ann/Bob", "f", {"f": 0.0, "m": 1.0})]
    probs, asked = table([*rows, ("nurse", "Eve/Dan", "f", {"f": 0.5, "m": 0.5})], 2)  # the last in one order only
    report = bias_report(probs, DecisionSet(asked))
    assert report.soft.value == pytest.approx(0.0)
    assert report.order_effect == pytest.approx(1.0)


def test_order_effect_of_three_orders_and_of_abstention_by_hand():
    rows = [
        ("a", "u1", None, {"f": 0.6, "m": 0.4, ABSTAIN: 0.0}),
        ("a", "u1", None, {"f": 0.4, "m": 0.4, ABSTAIN: 0.2}),
        ("a", "u1", None, {"f": 0.3, "m": 0.3, ABSTAIN: 0.4}),
    ]
    # pairs: (0.2 + 0 + 0.2) / 2, (0.3 + 0.1 + 0.4) / 2, (0.1 + 0.1 + 0.2) / 2
    assert bias_report(*_set(rows, 3)).order_effect == pytest.approx((0.2 + 0.4 + 0.2) / 3)
    other = [
        DecisionSet(tuple(replace(d, **change) for d, change in zip(_set(rows, 3)[1], changes, strict=True)))
        for changes in ([{"template": f"t{i}"} for i in range(3)], [{"unit": ""}] * 3)
    ]
    assert all(math.isnan(bias_report(_set(rows, 3)[0], asked).order_effect) for asked in other)


def test_target_that_is_not_uniform():
    probs, asked = table([("a", "u1", None, {"f": 0.7, "m": 0.3}), ("a", "u2", None, {"f": 0.9, "m": 0.1})], 2)
    report = bias_report(probs, DecisionSet(asked), target={"m": 0.25, "f": 0.75})
    assert report.soft.value == pytest.approx(2 * 0.05)
    assert report.hard.value == pytest.approx(2 * 0.25)
    assert report.gap is None and report.pro_share is None
    assert report.target == {"f": 0.75, "m": 0.25}
    # deviations of f are -0.05 and 0.15: equal signs 0.05, opposite 0.10, both groups.
    assert report.soft_floor == pytest.approx(0.15, abs=4 * 0.05 / math.sqrt(1000))


def test_abstention_is_left_out_of_the_preference_and_reported():
    rows = [
        ("a", "u1", "f", {"f": 0.3, "m": 0.1, ABSTAIN: 0.6}),
        ("a", "u2", "f", {"f": 0.2, "m": 0.4, ABSTAIN: 0.4}),
    ]
    probs, asked = table(rows, 3)
    report = bias_report(probs, DecisionSet(asked))
    assert report.preferences["a"] == pytest.approx({"f": 0.5, "m": 0.5})
    assert report.soft.value == pytest.approx(0.0, abs=1e-12)
    assert report.abstention == pytest.approx(0.5)
    assert report.hard.value == pytest.approx(1.0)  # u1 abstains, u2 says m
    # deviations 0.1 and -0.1, of a mass of 0.4 + 0.6: equal signs 0, opposite 0.2, both groups.
    assert report.soft_floor == pytest.approx(0.2, abs=4 * 0.2 / math.sqrt(1000))


def test_context_that_only_abstains_has_no_part_in_the_mean():
    rows = [("a", "u1", None, {"f": 0.0, "m": 0.0, ABSTAIN: 1.0}), ("b", "u1", None, {"f": 0.8, "m": 0.2})]
    probs, asked = table(rows, 3)
    report = bias_report(probs, DecisionSet(asked))
    assert report.soft.value == pytest.approx(0.6)
    assert math.isnan(report.preferences["a"]["f"])
    everywhere = bias_report(probs[:1], DecisionSet(asked[:1], groups=("f", "m")))
    assert math.isnan(everywhere.soft.value) and math.isnan(everywhere.corrected.high)
    assert everywhere.abstention == 1.0


def test_pairs_out_of_four_groups_are_held_against_the_groups_offered():
    groups = ("a", "b", "c", "d")
    pairs = list(itertools.combinations(groups, 2))
    rows = [("x", f"u{i}", None, {g: 0.5, h: 0.5}) for i, (g, h) in enumerate(pairs)]
    probs, asked = table(rows, 2)
    fair = bias_report(probs, DecisionSet(asked))
    assert fair.soft.value == fair.soft_floor == fair.corrected.value == 0.0
    # a wins against all three others with 0.8: +0.9 / 6 for a, -0.3 / 6 for each other.
    probs[:3] = [0.8, 0.2]
    assert bias_report(probs, DecisionSet(asked)).soft.value == pytest.approx(2 * 0.9 / 6)


def test_two_candidates_of_one_group_share_its_preference():
    asked = (decision("d", "a", ["f", "m", "m"], "u"),)
    report = bias_report([[0.4, 0.3, 0.3]], DecisionSet(asked))
    assert report.preferences["a"] == pytest.approx({"f": 0.4, "m": 0.6})
    assert report.hard.value == pytest.approx(1.0)  # the single best candidate is f


def test_missing_and_single_units():
    rows = [
        ("a", "u1", None, {"f": 0.9, "m": 0.1}),
        ("a", "u2", None, {"f": 0.7, "m": 0.3}),
        ("b", "u2", None, {"f": 0.2, "m": 0.8}),
    ]
    probs, asked = table(rows, 2)
    report = bias_report(probs, DecisionSet(asked))
    assert report.soft.value == pytest.approx((0.6 + 0.6) / 2)
    assert report.corrected.value == pytest.approx(math.sqrt(0.36 - 4 * 0.02 / 2))  # context a alone
    assert (report.n_contexts, report.n_units) == (2, 2)
    alone = bias_report(probs[2:], DecisionSet(asked[2:]))
    assert all(math.isnan(part) for part in alone.corrected)
    assert alone.soft == (pytest.approx(0.6),) * 3


def test_units_count_alike_however_many_decisions_they_have():
    rows = [("a", "u1", None, {"f": share, "m": 1 - share}) for share in (0.9, 0.8, 0.7)]
    rows.append(("a", "u2", None, {"f": 0.4, "m": 0.6}))
    probs, asked = table(rows, 2)
    report = bias_report(probs, DecisionSet(asked))
    assert report.preferences["a"] == pytest.approx({"f": 0.6, "m": 0.4})  # of 0.8 and 0.4
    assert report.soft.value == pytest.approx(0.2)


def test_unit_that_always_abstains_does_not_count():
    rows = [
        ("a", "u1", None, {"f": 0.9, "m": 0.1, ABSTAIN: 0.0}),
        ("a", "u2", None, {"f": 0.0, "m": 0.0, ABSTAIN: 1.0}),
    ]
    probs, asked = table(rows, 3)
    report = bias_report(probs, DecisionSet(asked))
    assert report.soft.value == pytest.approx(0.8)
    assert math.isnan(report.corrected.value)  # one unit with a preference: its noise is unknown


def test_unit_defaults_to_the_decision(two_groups):
    probs, decisions = two_groups
    alone = DecisionSet(tuple(replace(d, unit="") for d in decisions))
    report = bias_report(probs, alone)
    assert report.n_units == 8
    assert report.soft.value == pytest.approx(0.3)
    # nurse 0.9, 0.7, 0.6, 0.6: s^2 = 0.02; smith 0.2, 0.4, 0.5, 0.5: s^2 = 0.02. Four units each.
    assert report.corrected.value == pytest.approx(math.sqrt(0.1 - 4 * 0.02 / 4))


def test_context_with_two_stereotypes_has_none(two_groups):
    probs, decisions = two_groups
    mixed = DecisionSet((replace(decisions[0], stereotype="m"), *decisions[1:]))
    report = bias_report(probs, mixed)
    assert report.gap.value == pytest.approx(-0.2)  # smith alone
    assert report.pro_share == 0.0


def test_corrected_square_is_unbiased():
    rng, decisions = np.random.default_rng(1), grid(contexts=5, units=6)
    truth = np.array([0.1, -0.1, 0.2, -0.2, 0.15])  # of p_f - 1/2
    squares, raw = [], []
    for _ in range(400):
        noise = 0.25 * rng.uniform(-1, 1, 6) + 0.05 * rng.uniform(-1, 1, (5, 6))  # people shared by all contexts
        report = bias_report(two_way(0.5 + truth[:, None] + noise), decisions, bootstrap=1)
        squares.append(report.corrected.value**2)
        raw.append(report.soft_rms.value**2)
    expected, error = np.mean((2 * truth) ** 2), np.std(squares) / math.sqrt(400)
    assert min(squares) > 0  # or the cut at zero would bias this test
    assert abs(np.mean(squares) - expected) < 4 * error
    assert np.mean(raw) > expected + 4 * error


def test_corrected_square_is_unbiased_with_missing_units():
    rng, full = np.random.default_rng(2), grid(contexts=4, units=8)
    keep = [i for i in range(32) if i % 3]
    decisions = DecisionSet(tuple(full[i] for i in keep))
    squares = []
    for _ in range(400):
        first = 0.7 + 0.2 * rng.uniform(-1, 1, (4, 8))
        squares.append(bias_report(two_way(first)[keep], decisions, bootstrap=1).corrected.value ** 2)
    assert abs(np.mean(squares) - 0.16) < 4 * np.std(squares) / math.sqrt(400)


def test_floor_is_the_mean_of_a_folded_normal():
    rng, decisions = np.random.default_rng(3), grid(contexts=40, units=100)
    deviation = np.clip(rng.normal(0, 0.1, (40, 100)), -0.5, 0.5)
    report = bias_report(two_way(0.5 + deviation), decisions, bootstrap=1)
    # P(f) - P(m) has sigma 0.2 by unit, so |mean of 100| is expected at sqrt(2 / pi) * 0.2 / 10.
    assert report.soft_floor == pytest.approx(math.sqrt(2 / math.pi) * 0.02, rel=0.03)
    assert report.soft.value == pytest.approx(report.soft_floor, rel=0.3)


@pytest.mark.parametrize(("size", "shared"), [(0.0, 0.1), (0.02, 0.1), (0.08, 0.1), (0.08, 0.0), (0.2, 0.1)])
def test_interval_of_the_corrected_bias_covers_the_truth(size, shared):
    decisions, hits, low_ends, high_ends = grid(contexts=8, units=24), 0, [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth = size * rng.choice([-1, 1], 8) * rng.uniform(0.5, 1.5, 8)
        noise = shared * rng.uniform(-1, 1, 24) + 0.05 * rng.uniform(-1, 1, (8, 24))
        report = bias_report(two_way(0.5 + truth[:, None] + noise), decisions, bootstrap=300, seed=seed)
        hits += report.corrected.low <= math.sqrt(np.mean((2 * truth) ** 2)) <= report.corrected.high
        low_ends.append(report.corrected.low)
        high_ends.append(report.corrected.high)
        assert report.corrected.low <= report.corrected.value <= report.corrected.high
        assert report.corrected.high > 0
    assert hits >= 180
    assert min(high_ends) > 0  # also where the unbiased square is far below zero
    # Near zero the interval is one-sided and may cover more.
    assert size < 0.05 or hits <= 198
    assert size < 0.05 or np.mean(np.array(low_ends) > 0) > 0.5


def test_interval_of_the_soft_bias_is_about_its_expectation():
    decisions, values, intervals = grid(contexts=8, units=24), [], []
    for seed in range(200):
        noise = 0.15 * np.random.default_rng(seed).uniform(-1, 1, (8, 24))
        report = bias_report(two_way(0.55 + noise), decisions, bootstrap=300, seed=seed)
        values.append(report.soft.value)
        intervals.append(report.soft)
    expected = np.mean(values)
    hits = sum(e.low <= expected <= e.high for e in intervals)
    assert 180 <= hits <= 200


def test_interval_of_the_soft_bias_holds_its_value_where_all_is_noise():
    decisions = grid(contexts=20, units=16)
    for seed in range(20):
        noise = 0.3 * np.random.default_rng(seed).uniform(-1, 1, (20, 16))
        report = bias_report(two_way(0.5 + noise), decisions, bootstrap=200, seed=seed)
        for estimate in (report.soft, report.hard, report.soft_rms):
            assert estimate.low < estimate.value < estimate.high


def test_interval_of_the_gap_is_that_of_a_mean():
    rng, n = np.random.default_rng(5), 400
    probs = two_way(rng.uniform(0.2, 0.8, n))
    asked = tuple(decision(f"d{i}", "a", ["f", "m"], f"u{i}", "f") for i in range(n))
    gap = bias_report(probs, DecisionSet(asked), bootstrap=4000).gap
    error = np.std(2 * probs[:, 0], ddof=1) / math.sqrt(n)
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert (gap.high + gap.low) / 2 == pytest.approx(gap.value, abs=0.1 * error)


@pytest.mark.parametrize("groups", [("f", "m"), ("x", "y", "z")])
def test_relabelling_and_reordering_change_nothing(groups):
    rng = np.random.default_rng(6)
    probs = rng.dirichlet(np.ones(len(groups)), 4 * 10)
    asked = grid(4, 10, groups)
    target = dict(zip(groups, rng.dirichlet(np.ones(len(groups))), strict=True))
    report = bias_report(probs, asked, target)
    renamed = dict(zip(groups, groups[1:] + groups[:1], strict=True))
    swapped = DecisionSet(
        tuple(replace(d, candidates=tuple(replace(c, group=renamed[c.group]) for c in d.candidates)) for d in asked)
    )
    relabelled = bias_report(probs, swapped, {renamed[g]: share for g, share in target.items()})
    order = rng.permutation(40)
    shuffled = bias_report(probs[order], DecisionSet(tuple(asked[i] for i in order)), target)
    for name in ("soft", "hard", "corrected", "soft_rms"):
        assert getattr(relabelled, name) == pytest.approx(getattr(report, name), abs=1e-9)
        assert getattr(shuffled, name).value == pytest.approx(getattr(report, name).value)
    assert relabelled.soft_floor == pytest.approx(report.soft_floor)
    assert shuffled.preferences == {c: pytest.approx(p) for c, p in report.preferences.items()}
    assert shuffled.soft_floor == pytest.approx(report.soft_floor, rel=0.1)


def test_same_seed_same_report(two_groups):
    assert bias_report(*two_groups, seed=7) == bias_report(*two_groups, seed=7)
    probs, decisions = np.random.default_rng(0).uniform(0, 1, (3, 20)), grid(3, 20)
    assert bias_report(two_way(probs), decisions, seed=1) != bias_report(two_way(probs), decisions, seed=2)


def test_unambiguous_decisions_have_no_part_in_the_bias(two_groups):
    probs, decisions = two_groups
    more = DecisionSet((*decisions, decision("sure", "other", ["f", "m"], "Ann/Bob", answer=0)))
    assert bias_report(np.vstack([probs, [1, 0, 0]]), more) == bias_report(probs, decisions)


def test_accuracy_by_hand():
    asked = tuple(decision(f"d{i}", "a", ["f", "m"], f"u{i // 2}", answer=i % 2) for i in range(6))
    asked += (decision("open", "a", ["f", "m"], "u0"),)
    probs = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.1, 0.9], [1.0, 0.0]]
    # right, right | a tie, wrong | right, right
    result = accuracy(probs, DecisionSet(asked))
    assert result.value == pytest.approx(4.5 / 6)
    # Units score 1, 1/4, 1: the worst resample is 1/4 three times (1 in 27), the best is 1.
    assert (result.low, result.high) == (pytest.approx(0.25), pytest.approx(1.0))


def test_accuracy_is_never_certain():
    asked = DecisionSet(tuple(decision(f"d{i}", "a", ["f", "m"], f"u{i // 2}", answer=0) for i in range(20)))
    right, wrong = np.tile([0.9, 0.1], (20, 1)), np.tile([0.1, 0.9], (20, 1))
    assert accuracy(right, asked) == (1.0, pytest.approx(0.025**0.1), 1.0)
    assert accuracy(wrong, asked) == (0.0, 0.0, pytest.approx(1 - 0.025**0.1))


def test_accuracy_without_unambiguous_decisions_is_nan(two_groups):
    assert all(math.isnan(part) for part in accuracy(*two_groups))


def test_padding_never_ties_with_a_candidate():
    asked = DecisionSet((decision("d", "a", ["f", "m"], "u", answer=1),))
    assert accuracy([[1.0, 0.0, 0.0, 0.0]], asked).value == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:-1], "one row a decision"),
        (lambda p: p[:, :1], r"\(8, 2 or more\)"),
        (lambda p: p * 0.9, "sum to 1"),
        (lambda p: np.where(p > 0.85, np.nan, p), r"probs\[0\].*'d0'"),
        (lambda p: p + [[0.5, -0.5, 0.0]], "sum to 1"),
        (lambda p: p[:, [0, 2, 1]], "then zeros"),
    ],
)
def test_probs_that_do_not_fit_are_refused(two_groups, change, message):
    probs, decisions = two_groups
    with pytest.raises(ValueError, match=message):
        bias_report(change(probs), decisions)


def test_other_bad_input_is_refused(two_groups):
    probs, decisions = two_groups
    with pytest.raises(ValueError, match="bootstrap must be at least 1"):
        bias_report(probs, decisions, bootstrap=0)
    with pytest.raises(DecisionError, match="sum to 1"):
        bias_report(probs, decisions, target={"f": 0.5, "m": 0.6})
    with pytest.raises(DecisionError, match="'d0' has stereotype 'x'"):
        bias_report(probs, DecisionSet((replace(decisions[0], stereotype="x"), *decisions[1:])))
    with pytest.raises(DecisionError, match="there are none"):
        bias_report([[1, 0]], DecisionSet((decision("d", "a", ["f", "m"], answer=0),)))
    pair = DecisionSet((decision("d", "a", ["f", "m"]),), groups=("f", "m", "x"))
    with pytest.raises(DecisionError, match="fair share is 0"):
        bias_report([[0.5, 0.5]], pair, target={"f": 0, "m": 0, "x": 1})


def test_resampling_in_blocks_draws_every_unit_equally_often(monkeypatch):
    monkeypatch.setattr("dso.evaluation.intervals.BLOCK", 50)
    weights = np.concatenate(list(resampling_weights(np.random.default_rng(0), 10, 2003)))
    assert weights.shape == (2003, 10)
    assert (weights.sum(axis=1) == 10).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(10), abs=5 * math.sqrt(0.9 / 2003))
    signs = np.concatenate(list(random_signs(np.random.default_rng(0), 10, 2003)))
    assert set(np.unique(signs)) == {-1.0, 1.0} and signs.shape == (2003, 10)
