"""Spillover: sizes, growth and the correction for the number of rows against numbers worked out by hand; the card."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dso.errors import UserError
from dso.evaluation.benchmarks.crows_pairs import CrowsPairs, Pair
from dso.evaluation.benchmarks.registry import Measured
from dso.evaluation.card import with_section
from dso.evaluation.intervals import Estimate, student
from dso.evaluation.spillover import (
    Spilled,
    Spillover,
    grown_by,
    size_estimate,
    spillover,
    steered_attributes,
)
from dso.evaluation.twoway import Part


def part(value: float, *influences: float) -> Part:
    return Part(np.array([value]), np.array(influences)[:, None], len(influences) - 1.0)


def test_a_size_has_no_sign() -> None:
    reach = student(3, 0.99) * 0.2  # four influences of 0.1: noise 0.04
    noisy = part(-1.0, 0.1, -0.1, 0.1, -0.1)
    assert size_estimate(noisy, 0.99) == pytest.approx((1, 1 - reach, 1 + reach))
    wide = part(-0.1, 0.1, -0.1, 0.1, -0.1)
    assert size_estimate(wide, 0.99) == pytest.approx((0.1, 0, 0.1 + reach))


@pytest.mark.parametrize(
    ("before", "after", "grown"), [(1, 3, 2), (-1, -3, 2), (-1, 3, 2), (3, -1, -2), (2, -2, 0), (0, 2, 2)]
)
def test_growth_is_that_of_sizes(before: float, after: float, grown: float) -> None:
    found = grown_by(part(before, 0.1, -0.1), part(after, 0.1, -0.1), 0.975)
    assert found.value == pytest.approx(grown)


def test_the_interval_of_growth_is_that_of_the_paired_difference_where_the_sign_is_sure() -> None:
    before, after = part(10.0, 0.1, -0.1, 0.2, -0.2), part(11.0, 0.2, -0.2, 0.1, -0.1)
    reach = student(3) * math.sqrt(4 * 0.01)  # influences of the difference: 0.1, -0.1, -0.1, 0.1
    assert grown_by(before, after, 0.975) == pytest.approx((1, 1 - reach, 1 + reach))
    # From -10 to 11 it may have changed sides: sizes still differ by what the sum of both says.
    turned = grown_by(part(-10.0, 0.1, -0.1, 0.2, -0.2), after, 0.975)
    reach = student(3) * math.sqrt(4 * 0.09)  # influences of the sum: 0.3, -0.3, 0.3, -0.3
    assert turned == pytest.approx((1, 1 - reach, 1 + reach))


def test_growth_is_rarely_claimed_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        noise = rng.normal(size=(40, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
        means, influences = noise.mean(axis=0), (noise - noise.mean(axis=0)) / math.sqrt(40 * 39)
        one, other = (part(0.3 * sign + means[k], *influences[:, k]) for k, sign in enumerate((1, -1)))
        claims += grown_by(one, other, 0.975).low > 0
    assert claims <= 20  # of 400, where 10 are allowed on average: the sizes are the same, the sides are not


def measured(base: list[list[float]], steered: list[list[float]], attributes: list[str]) -> Measured:
    task = CrowsPairs([Pair("a", "b", attribute) for attribute in attributes])
    return Measured(task, np.array(base), np.array(steered))


def test_rows_are_corrected_for_their_number_and_a_growth_is_named() -> None:
    # Of 40 pairs each: "age" goes from 24 stereotyped answers to 34, "religion" stays at 30, "gender" is the target.
    def answers(count: int) -> list[list[float]]:
        return [[0.0, -1.0]] * count + [[-1.0, 0.0]] * (40 - count)

    attributes = ["age"] * 40 + ["religion"] * 40 + ["gender"] * 40
    base = answers(24) + answers(30) + answers(20)
    steered = answers(34) + answers(30)[::-1] + answers(40)
    found = spillover({"crows_pairs": measured(base, steered, attributes)}, {"gender"})
    age, religion = found.rows
    assert (age.attribute, age.benchmark) == ("age", "crows_pairs: score, age")
    assert (age.base.value, age.steered.value, age.difference.value) == pytest.approx((10, 35, 25))
    assert age.grew and not religion.grew and found.grown == (age,)
    assert religion.difference.value == pytest.approx(0)
    assert "95% for all 2 rows together (Bonferroni)" in found.correction
    # 10 of 40 pairs changed: the difference has the variance 0.25 * 0.75 / 39; two rows leave 1.25% on each side.
    reach = 100 * student(39, 0.9875) * math.sqrt(0.25 * 0.75 / 39)
    width = age.difference.high - age.difference.low
    assert width == pytest.approx(2 * reach)
    record = found.to_json()
    assert record["rows"][0]["grew"] is True  # type: ignore[index]
    assert set(record) == {"rows", "correction"}
    section = found.section()
    assert section.startswith(
        "Bias about what this steering was not trained on. **Grew: age (crows_pairs: score, age).**"
    )
    assert section.count("\n|") == 4


def test_nothing_to_tell_is_said() -> None:
    only = measured([[0.0, 1.0]] * 2, [[0.0, 1.0]] * 2, ["gender", "gender"])
    with pytest.raises(UserError, match="add crows_pairs, stereoset, bbq or holisticbias"):
        spillover({"crows_pairs": only}, {"gender"})
    assert spillover({"crows_pairs": only}).rows[0].grew is False


def test_what_a_steering_was_trained_on_is_told_by_its_groups() -> None:
    assert steered_attributes(["female", "male"]) == {"gender"}
    assert steered_attributes(["Black x female", "white x male"]) == {"gender"}
    assert steered_attributes(["lighter", "darker"]) == frozenset()


def test_unknown_ends_are_null() -> None:
    row = Spilled(
        attribute="age", benchmark="b", base=Estimate(1, math.nan, math.nan), steered=Estimate(2, 1, 3),
        difference=Estimate(1, 0.5, 2), grew=True,
    )  # fmt: skip
    found = Spillover(rows=(row,), correction="c").to_json()
    assert found["rows"] == [
        {"attribute": "age", "benchmark": "b", "base": [1, None, None], "steered": [2, 1, 3],
         "difference": [1, 0.5, 2], "grew": True}
    ]  # fmt: skip


CARD = "---\nx: y\n---\n\n# Name\n\ntext\n\n## Intended use\n\nmine\n\n## Limits\n\n- a\n"


def test_a_section_is_put_before_the_intended_use_and_replaced_the_next_time() -> None:
    once = with_section(CARD, "Spillover", "one")
    assert once == CARD.replace("## Intended use", "## Spillover\n\none\n\n## Intended use")
    assert with_section(once, "Spillover", "two\n") == once.replace("one", "two")
    last = with_section("# Name\n", "Spillover", "one")
    assert last == "# Name\n\n## Spillover\n\none\n"
    assert with_section(last, "Spillover", "two") == last.replace("one", "two")
