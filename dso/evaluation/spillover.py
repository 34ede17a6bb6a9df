"""Spillover: does steering one attribute move the bias about others? ("No Free Lunch", arXiv 2511.18635, found that
31.5% of untargeted dimensions got worse.)

Every benchmark figure that is about an attribute and has a value without bias is one row. The size of a bias is its
distance from that value, ``|b|`` before and ``|s|`` after. With the paired numbers ``u = s - b`` and ``v = s + b``

    |s| - |b| = sign(u v) min(|u|, |v|)

so its interval has its ends at the corners of the intervals of u and v. It lies above 0 only where both lie on the
same side of 0, which is the intersection-union test of ``|s| > |b|`` (Berger, Technometrics 24, 1982): a bias *grew*
where it does. Intervals are simultaneous: each of the m rows has one of ``1 - 0.05 / m`` (Bonferroni), so that with 95%
none of the rows is said to have grown by chance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dso.errors import UserError
from dso.evaluation.benchmarks.figures import Figure, clipped, estimate_of
from dso.evaluation.benchmarks.registry import Measured
from dso.evaluation.benchmarks.report import number_texts
from dso.evaluation.benchmarks.task import FigureTask
from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.report import clean, fixed_rows, markdown_rows, plain
from dso.evaluation.twoway import Part

ERROR = 0.05
HEADER = ("attribute", "measured by", "base", "steered", "steered - base", "")
GENDERS = {"female", "male", "women", "men", "she", "he", "they", "nonbinary"}


@dataclass(frozen=True, kw_only=True)
class Spilled:
    """The size of one attribute's bias by one figure, before and after; ``grew`` where the difference's interval lies
    above 0."""

    attribute: str
    benchmark: str
    base: Estimate
    steered: Estimate
    difference: Estimate
    grew: bool

    def to_json(self) -> dict[str, object]:
        """A JSON object; null for what is not known."""
        record: dict[str, object] = {"attribute": self.attribute, "benchmark": self.benchmark}
        figures = {name: plain(getattr(self, name)) for name in ("base", "steered", "difference")}
        return record | figures | {"grew": self.grew}


@dataclass(frozen=True, kw_only=True)
class Spillover:
    """All rows, and how their intervals were corrected for their number."""

    rows: tuple[Spilled, ...]
    correction: str

    @property
    def grown(self) -> tuple[Spilled, ...]:
        """The rows that grew."""
        return tuple(row for row in self.rows if row.grew)

    def to_json(self) -> dict[str, object]:
        """A JSON object for a report."""
        return {"rows": [row.to_json() for row in self.rows], "correction": self.correction}

    def table(self, markdown: bool = False) -> str:
        """The rows as a table, with a note."""
        lines = [HEADER, *(_cells(row) for row in self.rows)]
        table = markdown_rows(lines) if markdown else fixed_rows(lines)
        return f"{table}\n{self.correction}\n"

    def section(self) -> str:
        """The text of a card's section: a warning where a bias grew, and the table."""
        grown = ", ".join(f"{row.attribute} ({row.benchmark})" for row in self.grown)
        lead = f"**Grew: {grown}.**" if grown else "No bias about another attribute is shown to have grown."
        return f"Bias about what this steering was not trained on. {lead}\n\n{self.table(markdown=True)}"


def steered_attributes(groups: Sequence[str]) -> frozenset[str]:
    """What a steering was trained on, by its groups: gender, where one of them is a gender."""
    words = {part.strip().lower() for group in groups for part in group.replace("/", " x ").split(" x ")}
    return frozenset({"gender"} if words & GENDERS else set())


def spillover(measured: Mapping[str, Measured], without: Collection[str] = ()) -> Spillover:
    """The bias about every attribute before and after.

    Args:
        measured: benchmarks by name, both models'.
        without: attributes that are left out: those the steering is meant to move.

    Raises:
        UserError: if nothing that was measured is about another attribute.
    """
    pairs = [
        (name, base, steered)
        for name, found in measured.items()
        if isinstance(found.task, FigureTask) and found.steered is not None
        for base, steered in zip(found.task.figures(found.base), found.task.figures(found.steered), strict=True)
        if base.attribute and base.attribute not in without and base.fair is not None
    ]
    if not pairs:
        raise UserError(
            "nothing measured tells a bias about another attribute; add crows_pairs, stereoset, bbq or holisticbias"
        )
    point = 1 - ERROR / (2 * len(pairs))
    correction = (
        f"Sizes: distance from the value without bias, in the benchmark's own unit (percentage points). Intervals are "
        f"simultaneous: {100 * (1 - ERROR):.0f}% for all {len(pairs)} rows together (Bonferroni)."
    )
    rows = tuple(_row(f"{name}: {base.name}", base, steered, point) for name, base, steered in pairs)
    return Spillover(rows=rows, correction=correction)


def _row(name: str, base: Figure, steered: Figure, point: float) -> Spilled:
    assert base.fair is not None  # it was asked for
    before, after = (Part(each.part.value - base.fair, each.part.spread, each.part.freedom) for each in (base, steered))
    most = max(abs(bound - base.fair) for bound in base.bounds)
    difference = clipped(grown_by(before, after, point), -most, most)
    return Spilled(
        attribute=base.attribute,
        benchmark=name,
        base=clipped(size_estimate(before, point), 0.0, most),
        steered=clipped(size_estimate(after, point), 0.0, most),
        difference=difference,
        grew=difference.low > 0,
    )


def size_estimate(part: Part, point: float) -> Estimate:
    """The size of a signed number."""
    value, low, high = estimate_of(part, point)
    if math.isnan(low + high):
        return Estimate(abs(value), low, high)
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return Estimate(abs(value), least, max(abs(low), abs(high)))


def grown_by(before: Part, after: Part, point: float) -> Estimate:
    """By how much the size of a signed number grew; the module's docstring has the rule."""
    apart = Part(after.value - before.value, after.spread - before.spread, before.freedom)
    total = Part(after.value + before.value, after.spread + before.spread, before.freedom)
    u, v = estimate_of(apart, point), estimate_of(total, point)
    if math.isnan(u.value + v.value):
        return UNMEASURED
    if math.isnan(u.low + v.low):
        return Estimate(_least(u.value, v.value), math.nan, math.nan)
    corners = [_least(one, other) for one in (u.low, u.high) for other in (v.low, v.high)]
    return Estimate(_least(u.value, v.value), min(corners), max(corners))


def _least(u: float, v: float) -> float:
    """``|s| - |b|`` of ``s - b`` and ``s + b``."""
    return math.copysign(min(abs(u), abs(v)), u * v) if u and v else 0.0


def _cells(row: Spilled) -> tuple[str, ...]:
    numbers = number_texts(row.base, row.steered, row.difference)
    return clean(row.attribute), clean(row.benchmark), *numbers, "grew" if row.grew else ""
