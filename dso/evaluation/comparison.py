"""Two policies on the same decisions: how much of the bias is cut, and what else differs, each with a paired interval.

    cut = 1 - bias(steered) / bias(base)

Both are measured on the same people, so what a sample happens to like is in both and their noise goes together: the
interval of the cut resamples the people once for both (:func:`dso.evaluation.intervals.cut_estimate`). A base whose own
bias is not told apart from 0 leaves a cut without a lower end (nan).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dso.decisions.decision import DecisionSet
from dso.evaluation.bias import accuracy, bias_parts, gap_weights, lay_out, most_bias, right_answers
from dso.evaluation.evaluator import Measurement
from dso.evaluation.intervals import (
    UNMEASURED,
    Estimate,
    cut_estimate,
    cut_of_estimates,
    difference_estimate,
    mean_estimate,
    number_estimate,
    ratio_estimate,
)
from dso.evaluation.layout import Layout, numbered
from dso.evaluation.twoway import Array, Fit, Part, fit_both


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Shares of the base's bias that are gone: 1 for all of it, below 0 where there is more of it than before.

    ``log_odds`` and ``context_part_log_odds`` are nan where an answer has probability 0; ``gap`` is None where no
    context has a stereotype, or the groups are not two. A gap that turned to the other side is cut by more than 1.
    """

    bias: Estimate
    context_part: Estimate
    gap: Estimate | None
    log_odds: Estimate
    context_part_log_odds: Estimate


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of two policies; ``cut`` is None for what is no bias."""

    first: Estimate
    second: Estimate
    difference: Estimate
    cut: Estimate | None = None


def cuts(
    base: ArrayLike,
    steered: ArrayLike,
    decisions: DecisionSet,
    target: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Cuts:
    """By how much ``steered`` has less bias than ``base``; the policies are those of :func:`bias_report`.

    Raises:
        DecisionError, ValueError: as :func:`dso.evaluation.bias.bias_report`.
    """
    layout, table, fair = lay_out(base, decisions, target)
    probability, log_odds = _fits(layout, table, lay_out(steered, decisions, target)[1])
    rows = scale_rows(*probability, layout.signs, bootstrap, seed, most_bias(fair))
    others = scale_rows(*log_odds, layout.signs, bootstrap, seed) if log_odds else {}
    gap, bias, context = rows.get("gap"), others.get("bias"), others.get("context part")
    return Cuts(
        bias=rows["bias"].cut or UNMEASURED,
        context_part=rows["context part"].cut or UNMEASURED,
        gap=gap.cut if gap else None,
        log_odds=bias.cut if bias and bias.cut else UNMEASURED,
        context_part_log_odds=context.cut if context and context.cut else UNMEASURED,
    )


def compare(
    first: Measurement,
    second: Measurement,
    decisions: DecisionSet,
    target: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Compared]:
    """Every figure of both, by name, with the paired difference ``second - first``.

    Raises:
        DecisionError, ValueError: as :func:`dso.evaluation.bias.bias_report`.
    """
    layout, table, fair = lay_out(first.policy, decisions, target)
    probability, log_odds = _fits(layout, table, other := lay_out(second.policy, decisions, target)[1])
    rows = scale_rows(*probability, layout.signs, bootstrap, seed, most_bias(fair))
    if log_odds:
        found = scale_rows(*log_odds, layout.signs, bootstrap, seed)
        rows |= {f"{name}, log-odds": row for name, row in found.items()}
    unit, effects = layout.order_effects(table)
    if len(effects):
        rows["order effect"] = _paired(unit, effects, layout.order_effects(other)[1])
    if any(not d.ambiguous for d in decisions):
        unit, right = right_answers(first.policy, decisions)
        moved = _paired(unit, right, right_answers(second.policy, decisions)[1]).difference
        shares = [accuracy(m.policy, decisions) for m in (first, second)]
        rows["accuracy"] = Compared(first=shares[0], second=shares[1], difference=moved)
    ambiguous = np.array([d.ambiguous for d in decisions])
    unit = numbered([d.unit or d.id for d in decisions])[1]
    for name, kept, field in (
        ("answer mass", ambiguous, "answer_mass"),
        ("KL", ambiguous, "kl"),
        ("KL unambiguous", ~ambiguous, "kl"),
    ):
        if kept.any():
            rows[name] = _paired(unit[kept], getattr(first, field)[kept], getattr(second, field)[kept])
    return rows


Pair = tuple[Fit, Fit]


def _fits(layout: Layout, base: Array, steered: Array) -> tuple[Pair, Pair | None]:
    """Both policies' layouts in probability, and in log-odds."""
    one, other = layout.log_odds(base), layout.log_odds(steered)
    probability = fit_both(layout.probability(base), layout.probability(steered))
    return probability, None if one is None or other is None else fit_both(one, other)


def scale_rows(
    base: Fit, steered: Fit, signs: Array, draws: int, seed: int, most: float = math.inf
) -> dict[str, Compared]:
    """The rows of one scale."""
    one, other = (bias_parts(found, signs, draws, seed, most) for found in (base, steered))
    whole, parts = (_joined(base), _joined(steered)), (base.context_part(), steered.context_part())
    rows = {
        "bias": Compared(
            first=one.bias,
            second=other.bias,
            difference=difference_estimate(one.bias, other.bias, *whole),
            cut=cut_of_estimates(one.bias, other.bias, *whole),
        ),
        "context part": Compared(
            first=one.context_part,
            second=other.context_part,
            difference=difference_estimate(one.context_part, other.context_part, *parts),
            cut=cut_estimate(*parts, draws, seed),
        ),
    }
    weights = gap_weights(base, signs)
    if weights is not None and one.gap is not None and other.gap is not None:
        gaps = base.linear(weights), steered.linear(weights)
        moved = Part(gaps[1].value - gaps[0].value, gaps[1].spread - gaps[0].spread, base.freedom)
        rows["gap"] = Compared(
            first=one.gap, second=other.gap, difference=number_estimate(moved), cut=ratio_estimate(*gaps)
        )
    return rows


def _joined(found: Fit) -> Part:
    """The vector whose length is the bias: context part and common part behind each other."""
    parts = found.context_part(), found.common_part()
    spread = np.concatenate([part.spread for part in parts], axis=1)
    return Part(np.concatenate([part.value for part in parts]), spread, found.freedom)


def _paired(unit: np.ndarray, first: Array, second: Array) -> Compared:
    return Compared(
        first=mean_estimate(unit, first),
        second=mean_estimate(unit, second),
        difference=mean_estimate(unit, second - first),
    )


def cut_text(cut: Estimate | None) -> str:
    """``83% [71, 90]``, or what is certain where all of it may be gone: ``over 71%``.

    A cut whose interval is open says so with a dash.
    """
    if cut is None or math.isnan(cut.value):
        return "-"
    low, high = (f"{100 * end:.0f}" if math.isfinite(end) else "-" for end in (cut.low, cut.high))
    if round(100 * cut.value) >= 100 and not cut.low >= 0.995 and cut.high >= 0.995:
        return f"over {low}%" if cut.low > 0 else f"- [{low}, {high}]"
    return f"{100 * cut.value:.0f}% [{low}, {high}]"
