"""Bias and accuracy against numbers derived by hand, known truths and relabelling."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionError, DecisionSet
from dso.evaluation.bias import accuracy, bias_report


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
    assert report.paper == pytest.approx(0.3)
    # Their mean is 0.1 for both couples: no noise. The contexts are 0.3 above and below it, (nurse - smith) / 2 is 0.5
    # and 0.1 for the couples: a variance of 0.08, over two units.
    assert report.common_part == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    assert report.context_part.value == pytest.approx(math.sqrt(0.3**2 - 0.08 / 2))
    assert report.bias.value == pytest.approx(math.sqrt(0.05 + 0.1**2))
    assert report.probability.square == pytest.approx(0.06)
    # P(f) - P(m) is 0.6 and 0.2 of nurses, -0.4 and 0 of smiths: a variance of 0.08 of each, over two units.
    assert report.paper_fair == pytest.approx(math.sqrt(2 / math.pi) * 0.2)
    assert report.gap.value == pytest.approx(0.1)
    assert report.abstention == 0.0
    assert report.order_effect == pytest.approx((0.2 + 0.0 + 0.2 + 0.0) / 4)
    assert report.target == {"f": 0.5, "m": 0.5}
    assert (report.n_decisions, report.n_contexts, report.n_units) == (8, 2, 2)


def test_log_odds_by_hand(two_groups):
    found = bias_report(*two_groups).log_odds
    # log P(f) / P(m), averaged over the orders.
    nurse = (math.log(9) + math.log(7 / 3)) / 2, math.log(1.5)
    smith = (math.log(0.25) + math.log(2 / 3)) / 2, 0.0
    ahead = [(n - s) / 2 for n, s in zip(nurse, smith, strict=True)]
    both = [(n + s) / 2 for n, s in zip(nurse, smith, strict=True)]
    assert found.common_part.value == pytest.approx(sum(both) / 2)
    assert found.gap.value == pytest.approx(sum(both) / 2)
    contexts = (sum(ahead) / 2) ** 2 - (ahead[0] - ahead[1]) ** 2 / 4
    assert found.context_part.value == pytest.approx(math.sqrt(contexts))
    assert found.square == pytest.approx(contexts + (sum(both) / 2) ** 2 - (both[0] - both[1]) ** 2 / 4)


def test_answers_that_are_only_undecided_or_decided_by_the_order_keep_their_log_odds():
    """Every answer's log-odds plus or minus 3 by the order: probabilities come together, the association does not."""
    rng = np.random.default_rng(0)
    log_odds = 0.8 * np.array([1, -1, 1, -1])[:, None] + 0.1 * rng.standard_normal((4, 12))

    def measured(order: float):
        rows = []
        for c, u in itertools.product(range(4), range(12)):
            for sign in (1, -1):
                p = 1 / (1 + math.exp(-log_odds[c, u] - sign * order))
                rows.append((f"c{c}", f"u{u}", None, {"f": p, "m": 1 - p}))
        return bias_report(*_set(rows, 2))

    plain, ordered = measured(0.0), measured(3.0)
    assert ordered.bias.value < 0.3 * plain.bias.value
    assert ordered.log_odds.square == pytest.approx(plain.log_odds.square, rel=1e-9)
    assert ordered.log_odds.bias.low == pytest.approx(plain.log_odds.bias.low, rel=0.05)  # of other resamples
    assert plain.order_effect == 0.0 and ordered.order_effect > 0.8


def test_frequencies_with_zeros_have_no_log_odds():
    probs, asked = _set([("a", "u1", None, {"f": 1.0, "m": 0.0}), ("a", "u2", None, {"f": 0.5, "m": 0.5})], 2)
    report = bias_report(probs, asked)
    assert report.bias.value > 0
    assert math.isnan(report.log_odds.bias.value) and report.log_odds.gap is None


def test_three_groups_by_hand():
    rows = [
        ("a", "u1", "she", {"he": 0.6, "she": 0.3, "they": 0.1}),
        ("a", "u2", "she", {"he": 0.4, "she": 0.5, "they": 0.1}),
    ]
    report = bias_report(*_set(rows, 3))
    # p = (0.5, 0.4, 0.1): 1/6, 1/15 and -7/30 from the target
    assert report.paper == pytest.approx(14 / 30)
    # s^2 = 0.02, 0.02, 0, over two units, twice their sum taken off; one context differs from no other.
    assert report.bias.value == pytest.approx(math.sqrt(2 * (25 + 4 + 49) / 900 - 0.04))
    assert report.common_part.value == report.bias.value
    assert report.context_part.value == 0.0
    assert report.gap is None  # needs two groups


def test_who_always_chooses_the_first_is_fair_and_follows_the_order_alone():
    rows = [("nurse", "Ann/Bob", "f", {"f": 1.0, "m": 0.0}), ("nurse", "Ann/Bob", "f", {"f": 0.0, "m": 1.0})]
    probs, asked = table([*rows, ("nurse", "Eve/Dan", "f", {"f": 0.5, "m": 0.5})], 2)  # the last in one order only
    report = bias_report(probs, DecisionSet(asked))
    assert report.bias.value == pytest.approx(0.0)
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
    assert report.paper == pytest.approx(2 * 0.05)
    assert report.common_part.value == pytest.approx(2 * 0.05)  # of f over m, less 0.75 - 0.25
    assert report.gap is None
    assert report.target == {"f": 0.75, "m": 0.25}
    # P(f) - P(m) of 0.4 and 0.8: a variance of 0.08, over two units.
    assert report.paper_fair == pytest.approx(math.sqrt(2 / math.pi) * 0.2)
    log_odds = [math.log(p / (1 - p)) - math.log(3) for p in (0.7, 0.9)]
    assert report.log_odds.common_part.value == pytest.approx(sum(log_odds) / 2)


def test_abstention_is_left_out_of_the_preference_and_reported():
    rows = [
        ("a", "u1", "f", {"f": 0.3, "m": 0.1, ABSTAIN: 0.6}),
        ("a", "u2", "f", {"f": 0.2, "m": 0.4, ABSTAIN: 0.4}),
    ]
    report = bias_report(*_set(rows, 3))
    assert report.preferences["a"] == pytest.approx({"f": 0.5, "m": 0.5})
    assert report.paper == pytest.approx(0.0, abs=1e-12)
    assert report.bias.value == pytest.approx(0.0, abs=1e-12)
    assert report.abstention == pytest.approx(0.5)
    # f's deviations 0.1 and -0.1 are of a mean mass of 0.5, P(f) - P(m) is 0.4 and -0.4: a variance of 0.32, over 2.
    assert report.paper_fair == pytest.approx(math.sqrt(2 / math.pi) * 0.4)
    assert report.log_odds.common_part.value == pytest.approx((math.log(3) + math.log(0.5)) / 2)


def test_context_that_only_abstains_has_no_part_in_the_mean():
    rows = [("a", "u1", None, {"f": 0.0, "m": 0.0, ABSTAIN: 1.0}), ("b", "u1", None, {"f": 0.8, "m": 0.2})]
    probs, asked = table([*rows, ("a", "u2", None, rows[0][3]), ("b", "u2", None, {"f": 0.7, "m": 0.3})], 3)
    report = bias_report(probs, DecisionSet(asked))
    assert report.paper == pytest.approx(0.5)
    assert math.isnan(report.preferences["a"]["f"]) and math.isnan(report.context_bias["a"])
    everywhere = bias_report(probs[:1], DecisionSet(asked[:1], groups=("f", "m")))
    assert math.isnan(everywhere.paper) and all(math.isnan(part) for part in everywhere.bias)
    assert everywhere.abstention == 1.0


def test_pairs_out_of_four_groups_are_held_against_the_groups_offered():
    groups = ("a", "b", "c", "d")
    pairs = list(itertools.combinations(groups, 2))
    rows = [("x", f"u{i}", None, {g: 0.5, h: 0.5}) for i, (g, h) in enumerate(pairs)]
    probs, asked = table(rows, 2)
    fair = bias_report(probs, DecisionSet(asked))
    assert fair.paper == fair.bias.value == fair.paper_fair == fair.log_odds.bias.value == 0.0
    # a wins against all three others with 0.8: +0.9 / 6 for a, -0.3 / 6 for each other.
    probs[:3] = [0.8, 0.2]
    report = bias_report(probs, DecisionSet(asked))
    assert report.paper == pytest.approx(2 * 0.9 / 6)
    # Log-ratios of 1/2 log 4 for a and against the other, three times in six.
    assert report.log_odds.square + 0 == pytest.approx(
        2 * (0.5 * math.log(4)) ** 2 * (0.25 + 3 / 36) - 2 * _noise(0.5 * math.log(4))
    )


def _noise(size):
    """Variance of the mean over six pairs of the four components: a's is ``size`` in three, each other's once."""
    first = 3 * size**2 - 6 * (size / 2) ** 2
    others = 3 * (size**2 - 6 * (size / 6) ** 2)
    return (first + others) / 5 / 6


def test_two_candidates_of_one_group_share_its_preference():
    asked = (decision("d", "a", ["f", "m", "m"], "u"),)
    report = bias_report([[0.4, 0.3, 0.3]], DecisionSet(asked))
    assert report.preferences["a"] == pytest.approx({"f": 0.4, "m": 0.6})
    assert report.log_odds.common_part.value == pytest.approx(math.log(4 / 6))


def test_one_unit_alone_is_reported_as_measured_without_an_interval():
    report = bias_report(*_set([("a", "u", None, {"f": 0.2, "m": 0.8}), ("b", "u", None, {"f": 0.7, "m": 0.3})], 2))
    assert report.bias.value == pytest.approx(math.sqrt((0.6**2 + 0.4**2) / 2))
    assert report.context_part.value == pytest.approx(0.5)
    assert report.common_part.value == pytest.approx(-0.1)
    for estimate in (report.bias, report.context_part, report.common_part):
        assert math.isnan(estimate.low) and math.isnan(estimate.high)


def test_units_count_alike_however_many_decisions_they_have():
    rows = [("a", "u1", None, {"f": share, "m": 1 - share}) for share in (0.9, 0.8, 0.7)]
    rows.append(("a", "u2", None, {"f": 0.4, "m": 0.6}))
    probs, asked = table(rows, 2)
    report = bias_report(probs, DecisionSet(asked))
    assert report.preferences["a"] == pytest.approx({"f": 0.6, "m": 0.4})  # of 0.8 and 0.4
    assert report.paper == pytest.approx(0.2)


def test_unit_that_always_abstains_does_not_count():
    rows = [
        ("a", "u1", None, {"f": 0.9, "m": 0.1, ABSTAIN: 0.0}),
        ("a", "u2", None, {"f": 0.0, "m": 0.0, ABSTAIN: 1.0}),
    ]
    probs, asked = table(rows, 3)
    report = bias_report(probs, DecisionSet(asked))
    assert report.paper == pytest.approx(0.8)
    assert report.bias.value == pytest.approx(0.8)
    assert math.isnan(report.bias.low)  # one unit with a preference: its noise is unknown


def test_unit_defaults_to_the_decision(two_groups):
    probs, decisions = two_groups
    alone = DecisionSet(tuple(replace(d, unit="") for d in decisions))
    report = bias_report(probs, alone)
    assert report.n_units == 8
    assert report.paper == pytest.approx(0.3)
    # nurse 0.9, 0.7, 0.6, 0.6: s^2 = 0.02; smith 0.2, 0.4, 0.5, 0.5: s^2 = 0.02. Four units each, so 4 * 0.02 / 4 of
    # the square of each context is noise; half of it is in their difference, half in their mean.
    assert report.context_part.value == pytest.approx(math.sqrt(0.09 - 0.01))
    assert report.probability.square == pytest.approx(0.1 - 0.02)


def test_context_with_two_stereotypes_has_none(two_groups):
    probs, decisions = two_groups
    mixed = DecisionSet((replace(decisions[0], stereotype="m"), *decisions[1:]))
    report = bias_report(probs, mixed)
    assert report.gap.value == pytest.approx(-0.2)  # smith alone


def test_the_square_is_unbiased():
    rng, decisions = np.random.default_rng(1), grid(contexts=5, units=6)
    truth = np.array([0.1, -0.1, 0.2, -0.2, 0.15])  # of p_f - 1/2
    squares = []
    for _ in range(400):
        noise = 0.25 * rng.uniform(-1, 1, 6) + 0.05 * rng.uniform(-1, 1, (5, 6))  # people shared by all contexts
        report = bias_report(two_way(0.5 + truth[:, None] + noise), decisions, bootstrap=0)
        squares.append(report.probability.square)
    expected, error = np.mean((2 * truth) ** 2), np.std(squares) / math.sqrt(400)
    assert abs(np.mean(squares) - expected) < 4 * error
    assert min(squares) < expected - 0.02  # also below 0 at times, or a cut would bias it


def test_what_a_few_people_are_liked_for_does_not_rank():
    """A steering that halves the association is ranked first whoever was sampled; by the square, chance decides."""
    rng, decisions = np.random.default_rng(3), grid(contexts=10, units=12)
    effect = np.where(np.arange(10) % 2, 0.1, -0.1)[:, None]
    evident, square = [], []
    for _ in range(200):
        liking = 0.3 * rng.uniform(-1, 1, 12)
        noise = 0.02 * rng.uniform(-1, 1, (10, 12))
        before, after = (
            bias_report(two_way(0.5 + share * effect + shift + liking + noise), decisions, bootstrap=0).probability
            for share, shift in ((1.0, 0.0), (0.5, 0.05))
        )
        evident.append(after.signed_root < before.signed_root)
        square.append(after.square < before.square)
    assert np.mean(evident) > 0.97
    assert np.mean(square) < 0.9


def test_a_preference_that_all_contexts_share_beyond_doubt_does_rank():
    decisions, rng = grid(contexts=4, units=40), np.random.default_rng(4)
    liking = 0.1 * rng.uniform(-1, 1, 40)
    found = bias_report(two_way(0.75 + np.zeros((4, 1)) + liking), decisions, bootstrap=0).probability
    assert 0.4 < found.signed_root < math.sqrt(found.square)


def test_the_square_is_unbiased_with_missing_units():
    rng, full = np.random.default_rng(2), grid(contexts=4, units=8)
    keep = [i for i in range(32) if i % 3]
    decisions = DecisionSet(tuple(full[i] for i in keep))
    squares = []
    for _ in range(400):
        first = 0.7 + 0.2 * rng.uniform(-1, 1, 8) + 0.05 * rng.uniform(-1, 1, (4, 8))
        squares.append(bias_report(two_way(first)[keep], decisions, bootstrap=0).probability.square)
    assert abs(np.mean(squares) - 0.16) < 4 * np.std(squares) / math.sqrt(400)


def test_bias_that_is_beyond_doubt_is_not_reported_as_none():
    """0.045 in each of 30 contexts, 48 couples who are liked very differently: the sd of that is 0.34."""
    decisions, found = grid(contexts=30, units=48), []
    effect = 0.045 * np.where(np.arange(30) % 2, 1, -1)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        liking = np.clip(0.34 * rng.standard_normal(48), -0.9, 0.9)
        difference = effect[:, None] + liking + 0.02 * rng.standard_normal((30, 48))
        report = bias_report(two_way(0.5 + np.clip(difference, -1, 1) / 2), decisions, bootstrap=200, seed=seed)
        found.append(report.context_part)
        assert report.bias.value >= report.context_part.value > 0
        for estimate in (report.bias, report.context_part):
            assert 0 < estimate.low <= estimate.value <= estimate.high
    assert np.mean([e.value for e in found]) == pytest.approx(0.045, abs=0.0005)
    assert np.std([e.value for e in found]) < 0.001
    assert sum(e.low <= 0.045 <= e.high for e in found) >= 36


def test_what_a_fair_model_scores_is_the_mean_of_a_folded_normal():
    rng, decisions = np.random.default_rng(3), grid(contexts=40, units=100)
    deviation = np.clip(rng.normal(0, 0.1, (40, 100)), -0.5, 0.5)
    report = bias_report(two_way(0.5 + deviation), decisions, bootstrap=0)
    # P(f) - P(m) has sigma 0.2 by unit, so |mean of 100| is expected at sqrt(2 / pi) * 0.2 / 10.
    assert report.paper_fair == pytest.approx(math.sqrt(2 / math.pi) * 0.02, rel=0.03)
    assert report.paper == pytest.approx(report.paper_fair, rel=0.3)


def test_interval_of_the_gap_is_that_of_a_mean():
    rng, n = np.random.default_rng(5), 400
    probs = two_way(rng.uniform(0.2, 0.8, n))
    asked = tuple(decision(f"d{i}", "a", ["f", "m"], f"u{i}", "f") for i in range(n))
    gap = bias_report(probs, DecisionSet(asked)).gap
    error = np.std(2 * probs[:, 0], ddof=1) / math.sqrt(n)
    assert gap.high - gap.low == pytest.approx(2 * 1.966 * error, rel=1e-3)  # Student's t of 399 degrees
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
    for scale in ("probability", "log_odds"):
        one, other, again = (getattr(r, scale) for r in (report, relabelled, shuffled))
        assert other.bias.high == pytest.approx(one.bias.high, rel=0.1)  # of other resamples
        for name in ("bias", "context_part"):
            assert getattr(other, name).value == pytest.approx(getattr(one, name).value, abs=1e-9)
            assert getattr(again, name).value == pytest.approx(getattr(one, name).value, abs=1e-9)
        assert abs(other.common_part.value) == pytest.approx(abs(one.common_part.value))
    assert relabelled.paper_fair == pytest.approx(report.paper_fair)
    assert shuffled.preferences == {c: pytest.approx(p) for c, p in report.preferences.items()}
    assert shuffled.paper_fair == pytest.approx(report.paper_fair)


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
    # Units have 0.5, -1 and 0.5 more than their share: a variance of 1.5 * 3 / 2 / 36 = 1/16, where six decisions of
    # their own would have 3/16 / 6 = 1/32. So they are worth three, and Wilson has t = 4.303 for 2 degrees.
    weight = 4.302652730**2 / 3
    middle, reach = (0.75 + weight / 2) / (1 + weight), math.sqrt(weight * 3 / 16 + weight**2 / 4) / (1 + weight)
    assert (result.low, result.high) == (pytest.approx(middle - reach), pytest.approx(middle + reach))


def test_accuracy_is_never_certain():
    asked = DecisionSet(tuple(decision(f"d{i}", "a", ["f", "m"], f"u{i // 2}", answer=0) for i in range(20)))
    right, wrong = np.tile([0.9, 0.1], (20, 1)), np.tile([0.1, 0.9], (20, 1))
    weight = 1.959964**2 / 10  # ten units
    assert accuracy(right, asked) == (1.0, pytest.approx(1 / (1 + weight)), 1.0)
    assert accuracy(wrong, asked) == (0.0, 0.0, pytest.approx(weight / (1 + weight)))


def test_accuracy_of_couples_that_are_half_right_each_has_a_width():
    asked = DecisionSet(tuple(decision(f"d{i}", "a", ["f", "m"], f"u{i // 2}", answer=i % 2) for i in range(4)))
    found = accuracy(np.tile([0.9, 0.1], (4, 1)), asked)
    assert found.value == 0.5
    assert found.low < 0.05 and found.high > 0.95  # two couples say next to nothing


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
    with pytest.raises(ValueError, match="bootstrap must be at least 0"):
        bias_report(probs, decisions, bootstrap=-1)
    with pytest.raises(DecisionError, match="sum to 1"):
        bias_report(probs, decisions, target={"f": 0.5, "m": 0.6})
    with pytest.raises(DecisionError, match="'d0' has stereotype 'x'"):
        bias_report(probs, DecisionSet((replace(decisions[0], stereotype="x"), *decisions[1:])))
    with pytest.raises(DecisionError, match="there are none"):
        bias_report([[1, 0]], DecisionSet((decision("d", "a", ["f", "m"], answer=0),)))
    pair = DecisionSet((decision("d", "a", ["f", "m"]),), groups=("f", "m", "x"))
    with pytest.raises(DecisionError, match="fair share is 0"):
        bias_report([[0.5, 0.5]], pair, target={"f": 0, "m": 0, "x": 1})
