"""Audit fields against what is computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tiny import fact, role

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
from dso.evaluation.audit import audit, csv_rows

T1 = 12.706204736  # Student's 97.5% point with one degree of freedom


def asked(number: int, *groups: str) -> Decision:
    candidates = tuple(Candidate(text=f" {place}{group}", group=group) for place, group in enumerate(groups))
    return Decision(id=str(number), context="nurse", kind="ambiguous", prompt="Who?", candidates=candidates)


def two_people() -> tuple[np.ndarray, DecisionSet]:
    """Two units in two contexts: columns are female and male."""
    jobs = [(job, people) for people in (("Ann", "Bob"), ("Eve", "Dan")) for job in ("nurse", "pilot")]
    decisions = DecisionSet(tuple(role(job, *people) for job, people in jobs), ("female", "male"), "small")
    return np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]]), decisions


def test_rates_and_ratios_by_hand() -> None:
    found = audit(*two_people())
    female, male = found.rows
    assert (found.decisions, found.contexts, found.units, found.median) == (4, 2, 2, pytest.approx(0.5))
    assert (female.category, female.kind, female.number, female.share) == ("female", "group", 4, 0.5)
    assert female.selection_rate.value == pytest.approx(1.8 / 4)
    assert male.selection_rate.value == pytest.approx(2.2 / 4)
    assert female.impact_ratio.value == pytest.approx(0.45 / 0.55)
    assert female.flag is False  # 0.818
    assert male.impact_ratio.value == 1.0
    assert (female.scoring_rate, male.scoring_rate, female.scoring_ratio) == (0.5, 0.5, 1.0)  # 0.8, 0.6; 0.7, 0.9
    assert (female.worst_context, female.worst_context_ratio) == ("pilot", pytest.approx(0.2 / 0.8))
    assert (male.worst_context, male.worst_context_ratio) == ("nurse", pytest.approx(0.3 / 0.7))
    assert female.abstention == 0.0
    assert math.isnan(female.accuracy.value)


def test_intervals_and_what_can_be_detected_by_hand() -> None:
    female, _ = audit(*two_people()).rows
    without = math.log(0.35 / 0.65), math.log(0.55 / 0.45)  # log ratio with each unit left out
    error = abs(without[0] - without[1]) / 2  # jackknife of two
    middle = math.log(0.45 / 0.55)
    assert math.log(female.impact_ratio.low) == pytest.approx(middle - T1 * error)
    assert math.log(female.impact_ratio.high) == pytest.approx(middle + T1 * error)
    # Differences with a unit left out: -0.3 and 0.1, so a standard error of 0.2.
    assert female.detectable == pytest.approx((T1 + 0.8416212) * 0.2)


def test_a_low_ratio_is_flagged_and_nobody_selected_is_zero() -> None:
    policy, decisions = two_people()
    female, male = audit(np.array([[0.4, 0.6]] * 4), decisions).rows
    assert female.impact_ratio.value == pytest.approx(2 / 3)
    assert math.isnan(female.impact_ratio.low)  # units that are all alike do not tell
    assert math.isnan(female.detectable)
    assert (female.flag, male.flag) == (True, False)
    female, _ = audit(np.array([[0.0, 1.0]] * 4), decisions).rows
    assert female.impact_ratio.value == 0.0
    assert female.flag is True


def test_crossed_groups_are_counted_by_part_and_by_intersection() -> None:
    groups = ("female x black", "female x white", "male x black", "male x white")
    decisions = DecisionSet(tuple(asked(n, *groups) for n in range(3)), groups, "crossed")
    rows = {row.category: row for row in audit([[0.1, 0.2, 0.3, 0.4]] * 3, decisions).rows}
    assert {name: row.kind for name, row in rows.items()} == {
        "female": "part 1", "male": "part 1", "black": "part 2", "white": "part 2",
        **dict.fromkeys(groups, "intersection"),
    }  # fmt: skip
    assert rows["female"].selection_rate.value == pytest.approx(0.15)
    assert rows["female"].impact_ratio.value == pytest.approx(0.15 / 0.35)
    assert rows["black"].impact_ratio.value == pytest.approx(0.2 / 0.3)
    assert rows["female x black"].impact_ratio.value == pytest.approx(0.25)
    assert rows["black"].number == 6
    assert rows["male x white"].number == 3


def test_a_category_below_two_percent_is_named_and_no_reference() -> None:
    pairs = [asked(n, "female", "male") for n in range(60)]
    decisions = DecisionSet((*pairs, asked(60, "female", "nonbinary")), ("female", "male", "nonbinary"), "small")
    found = audit([[0.4, 0.6]] * 60 + [[0.0, 1.0]], decisions)
    assert found.left_out == {"nonbinary": "0.8% of the candidates, below 2%"}  # 1 of 122
    rows = {row.category: row for row in found.rows}
    assert rows["nonbinary"].selection_rate.value == 1.0
    assert rows["nonbinary"].flag is None
    assert rows["nonbinary"].worst_context is None
    assert rows["male"].impact_ratio.value == 1.0
    assert rows["female"].impact_ratio.value == pytest.approx((24 / 61) / 0.6)


def test_abstentions_and_accuracy_are_by_group() -> None:
    decisions = DecisionSet(
        (
            asked(0, "female", "male", "abstain"),
            asked(1, "female", "other"),
            fact("nurse", "pilot", "Ann", "Bob"),
            fact("nurse", "pilot", "Ann", "Bob", swap=True),
        ),
        ("female", "male", "other"),
        "small",
    )
    found = audit([[0.5, 0.3, 0.2], [0.5, 0.5, 0], [0.9, 0.1, 0], [0.8, 0.2, 0]], decisions)
    rows = {row.category: row for row in found.rows}
    assert rows["female"].abstention == pytest.approx(0.1)
    assert rows["male"].abstention == pytest.approx(0.2)
    assert rows["other"].abstention == 0.0
    assert rows["female"].accuracy.value == 1.0  # the right answer was Ann's
    assert rows["male"].accuracy.value == 0.0
    assert math.isnan(rows["other"].accuracy.value)


def test_an_audit_goes_to_json_and_csv() -> None:
    record = audit(*two_people()).to_json()
    assert json.loads(json.dumps(record)) == record
    assert record["rows"][1]["impact_ratio"] == [1.0, None, None]
    header, female, male = csv_rows({"base": record})
    assert len(header) == len(female) == 1 + 14 + 2 * 3
    assert female[:2] == ["base", "female"]
    assert male[header.index("impact_ratio")] == "1.0"
    assert male[header.index("impact_ratio_low")] == ""
    assert female[header.index("worst_context")] == "pilot"


def test_an_audit_needs_ambiguous_decisions() -> None:
    decisions = DecisionSet((fact("nurse", "pilot", "Ann", "Bob"),), ("female", "male"), "facts")
    with pytest.raises(DecisionError, match="audit is of ambiguous decisions"):
        audit([[1.0, 0.0]], decisions)
