"""Audit fields: selection by group, in the terms of bias audits of hiring tools. docs/audit.md says which rule asks
for which field.

An ambiguous decision assesses each of its candidates that stands for a group; its probability is the candidate's
*score*, and one candidate is selected. Over the candidates of a *category* (a group, or what crossed groups such as
``female x black`` have in common):

    selection rate   mean score: the share that is selected, in expectation
    impact ratio     selection rate over that of the category of the same kind that has the highest one
    flag             impact ratio below 0.8 (the four-fifths rule): a reason to look, not a finding
    scoring rate     share whose score is above the median of all scores
    worst context    the context in which the category's own impact ratio is the lowest
    detectable       the difference to everyone else's selection rate that 80 of 100 such samples would find at 5%:
                     (t + 0.84) times its standard error
    abstention       mean probability of an abstaining answer where the category is offered
    accuracy         share of the unambiguous decisions with a right answer of that category that are answered so

Intervals are about other people: decisions about the same people (the unit) go together. That of the impact ratio is
Student's on the scale of logarithms, by the jackknife over units. A category of less than 2% of the candidates has no
impact ratio and is no reference for one; it is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dso.decisions.decision import ABSTAIN, DecisionError, DecisionSet
from dso.evaluation.benchmarks.figures import estimate_of, jackknife
from dso.evaluation.bias import right_answers
from dso.evaluation.intervals import UNMEASURED, Estimate, share_estimate, student
from dso.evaluation.layout import checked, numbered
from dso.evaluation.report import plain
from dso.evaluation.twoway import Array

CROSS = " x "  # between the parts of a crossed group's name
FOUR_FIFTHS = 0.8
LEAST = 0.02  # share of the candidates
POWER = 0.8416212335729143  # the normal quantile of 80%
FIELDS = (
    "category", "kind", "number", "share", "selection_rate", "impact_ratio", "flag", "scoring_rate", "scoring_ratio",
    "worst_context", "worst_context_ratio", "detectable", "abstention", "accuracy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Category:
    """One row of an audit; the module's docstring has the fields. Nan, or None, is what could not be measured.

    ``kind`` is ``group`` where groups are not crossed, else ``intersection``, or ``part 1`` and so on for what stands
    first in the names of crossed groups.
    """

    category: str
    kind: str
    number: int
    share: float
    selection_rate: Estimate
    impact_ratio: Estimate
    flag: bool | None
    scoring_rate: float
    scoring_ratio: float
    worst_context: str | None
    worst_context_ratio: float
    detectable: float
    abstention: float
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The audit of one policy.

    Attributes:
        rows: a category each.
        left_out: category -> why it has no impact ratio.
        decisions, contexts, units: that were asked, ambiguous.
        median: of all scores.
    """

    rows: tuple[Category, ...]
    left_out: dict[str, str]
    decisions: int
    contexts: int
    units: int
    median: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object; null for what could not be measured."""
        rows = [{name: plain(value) for name, value in asdict(row).items()} for row in self.rows]
        counts = {"decisions": self.decisions, "contexts": self.contexts, "units": self.units}
        return {**counts, "median": plain(self.median), "rows": rows, "left_out": self.left_out}


@dataclass(frozen=True)
class Assessed:
    """Every candidate that stands for a group, (N,) each: its score, and numbers of its group, context and unit."""

    score: Array
    group: NDArray[np.intp]
    context: NDArray[np.intp]
    unit: NDArray[np.intp]
    abstained: Array
    contexts: tuple[str, ...]
    units: int


def audit(policy: ArrayLike, decisions: DecisionSet) -> Audit:
    """The audit fields of a policy, (N, K) probabilities over the candidates of each of N decisions.

    Raises:
        DecisionError: if no decision is ambiguous.
        ValueError: if ``policy`` does not fit the decisions.
    """
    table = checked(policy, decisions)
    found = _assessed(table, decisions)
    median = float(np.median(found.score))
    rows: list[Category] = []
    left_out: dict[str, str] = {}
    for kind, categories in _kinds(decisions.groups).items():
        members = {name: np.isin(found.group, numbers) for name, numbers in categories.items()}
        shares = {name: float(mask.mean()) for name, mask in members.items()}
        small = {name: f"{share:.1%} of the candidates, below {LEAST:.0%}" for name, share in shares.items()}
        small = {name: why for name, why in small.items() if shares[name] < LEAST}
        compared = {name: mask for name, mask in members.items() if name not in small}
        left_out |= small
        for name, numbers in categories.items():
            accuracy = _accuracy(table, decisions, {decisions.groups[number] for number in numbers})
            rows.append(_category(found, name, kind, members[name], compared, median, accuracy))
    asked = sum(decision.ambiguous for decision in decisions)
    return Audit(
        rows=tuple(rows),
        left_out=left_out,
        decisions=asked,
        contexts=len(found.contexts),
        units=found.units,
        median=median,
    )


def _category(
    found: Assessed,
    name: str,
    kind: str,
    mask: NDArray[np.bool_],
    compared: Mapping[str, NDArray[np.bool_]],
    median: float,
    accuracy: Estimate,
) -> Category:
    """The row of a category whose candidates are ``mask``, held against those of its kind that are large enough."""
    rates = {other: float(found.score[theirs].mean()) for other, theirs in compared.items()}
    scoring = {other: float((found.score[theirs] > median).mean()) for other, theirs in compared.items()}
    best, most = max(rates, key=lambda other: rates[other]), max(scoring.values())
    ratio = _impact(found, mask, compared[best], name == best) if name in compared else UNMEASURED
    context, lowest = _worst(found, name, compared)
    return Category(
        category=name,
        kind=kind,
        number=int(mask.sum()),
        share=float(mask.mean()),
        selection_rate=_rate(found, mask),
        impact_ratio=ratio,
        flag=None if math.isnan(ratio.value) else ratio.value < FOUR_FIFTHS,
        scoring_rate=_mean(found.score[mask] > median),
        scoring_ratio=scoring[name] / most if name in compared and most else math.nan,
        worst_context=context,
        worst_context_ratio=lowest,
        detectable=_detectable(found, mask),
        abstention=_mean(found.abstained[mask]),
        accuracy=accuracy,
    )


def _assessed(table: Array, decisions: DecisionSet) -> Assessed:
    asked = [(row, decision) for row, decision in enumerate(decisions) if decision.ambiguous]
    if not asked:
        raise DecisionError(f"{decisions.name}: an audit is of ambiguous decisions, there are none")
    contexts, context = numbered([decision.context for _, decision in asked])
    units, unit = numbered([decision.unit or decision.id for _, decision in asked])
    column = {group: number for number, group in enumerate(decisions.groups)}
    flat = []
    for place, (row, decision) in enumerate(asked):
        groups = [candidate.group for candidate in decision.candidates]
        away = sum(float(table[row, k]) for k, group in enumerate(groups) if group == ABSTAIN)
        flat += [
            (table[row, k], column[group], context[place], unit[place], away)
            for k, group in enumerate(groups)
            if group != ABSTAIN
        ]
    score, group, where, who, abstained = (np.array(values) for values in zip(*flat, strict=True))
    return Assessed(score, group, where, who, abstained, contexts, len(units))


def _kinds(groups: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Categories by kind, each with the numbers of its groups."""
    parts = [group.split(CROSS) for group in groups]
    whole = {group: [number] for number, group in enumerate(groups)}
    if len(parts[0]) < 2 or len({len(names) for names in parts}) > 1:
        return {"group": whole}
    kinds: dict[str, dict[str, list[int]]] = {}
    for place in range(len(parts[0])):
        found = kinds.setdefault(f"part {place + 1}", {})
        for number, names in enumerate(parts):
            found.setdefault(names[place].strip(), []).append(number)
    return {**kinds, "intersection": whole}


def _sums(found: Assessed, mask: NDArray[np.bool_]) -> Array:
    """(U, 2): the scores of a category, and its candidates, by unit."""
    unit = found.unit[mask]
    columns = np.bincount(unit, found.score[mask], found.units), np.bincount(unit, minlength=found.units)
    return np.stack(columns, axis=1)


def _rate(found: Assessed, mask: NDArray[np.bool_]) -> Estimate:
    sums = _sums(found, mask)
    return share_estimate(sums[:, 0], sums[:, 1]) if mask.any() else UNMEASURED


def _impact(found: Assessed, mask: NDArray[np.bool_], best: NDArray[np.bool_], itself: bool) -> Estimate:
    if itself:
        return Estimate(1.0, math.nan, math.nan)
    sums = np.concatenate([_sums(found, mask), _sums(found, best)], axis=1)
    if not sums[:, 2].sum():  # nobody is selected
        return UNMEASURED
    if not sums[:, 0].sum():
        return Estimate(0.0, math.nan, math.nan)
    logs = estimate_of(jackknife(sums, lambda s: np.log(s[..., 0] * s[..., 3] / (s[..., 1] * s[..., 2]))))
    return Estimate(*(math.exp(value) for value in logs))


def _worst(found: Assessed, name: str, compared: Mapping[str, NDArray[np.bool_]]) -> tuple[str | None, float]:
    """The context with the category's lowest impact ratio, and that ratio."""
    if name not in compared:
        return None, math.nan
    ratios = dict(_ratios(found, name, compared))
    worst = min(ratios, key=lambda context: ratios[context], default=None)
    return worst, math.nan if worst is None else ratios[worst]


def _ratios(found: Assessed, name: str, compared: Mapping[str, NDArray[np.bool_]]) -> Iterator[tuple[str, float]]:
    for number, context in enumerate(found.contexts):
        here = found.context == number
        rates = {other: _mean(found.score[mask & here]) for other, mask in compared.items() if (mask & here).any()}
        if name in rates and (most := max(rates.values())) > 0:
            yield context, rates[name] / most


def _detectable(found: Assessed, mask: NDArray[np.bool_]) -> float:
    if not mask.any() or mask.all():
        return math.nan
    sums = np.concatenate([_sums(found, mask), _sums(found, ~mask)], axis=1)
    apart = jackknife(sums, lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3])
    if not np.isfinite(apart.spread).all() or not apart.noise:  # units that are all alike do not tell
        return math.nan
    return (student(apart.freedom) + POWER) * math.sqrt(apart.noise)


def _accuracy(table: Array, decisions: DecisionSet, groups: set[str]) -> Estimate:
    asked = [decision for decision in decisions if not decision.ambiguous]
    if not asked:
        return UNMEASURED
    unit, right = right_answers(table, decisions)
    theirs = np.array([decision.candidates[decision.answer or 0].group in groups for decision in asked])
    if not theirs.any():
        return UNMEASURED
    unit = numbered(unit[theirs].tolist())[1]
    return share_estimate(np.bincount(unit, right[theirs]), np.bincount(unit))


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def csv_rows(sides: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The rows of several audits' JSON objects, by the side's name, for a CSV file; the header first.

    An estimate has three columns. What could not be measured is empty.
    """
    estimates = ("selection_rate", "impact_ratio", "accuracy")
    names = [n for name in FIELDS for n in ((name, f"{name}_low", f"{name}_high") if name in estimates else (name,))]
    rows = [["side", *names]]
    for side, record in sides.items():
        for row in record["rows"]:
            values = [v for name in FIELDS for v in (row[name] if name in estimates else (row[name],))]
            rows.append([side, *("" if value is None else str(value) for value in values)])
    return rows
