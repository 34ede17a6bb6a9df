"""What a tracker is told of a run, as plain values: scalars, the bias-scale curve, decisions before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dso.decisions.decision import Decision, DecisionSet
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.report import ScalePoint
from dso.models.backbone import Backbone
from dso.steering.handle import Handle

SAMPLES = 32
SAMPLE_COLUMNS = ("decision", "context", "kind", "prompt", "candidate", "group", "right", "before", "after")


def scalars(record: Mapping[str, Any], decisions: int) -> dict[str, float]:
    """The finite numbers of a record of the logger, with the optimiser steps and the decisions so far."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        value = value.item() if hasattr(value, "item") else value
        if "/" in key and isinstance(value, int | float) and math.isfinite(value):
            numbers[key] = value
    return {"train/global_step": record["step"] // decisions, "train/decisions": record["step"], **numbers}


def without_credentials(value: Any) -> Any:
    """Plain values with the user and password of each address replaced."""
    if isinstance(value, Mapping):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(item) for item in value]
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the scale; ``rows`` are (scale, value, the line's name)."""

    key: str
    title: str
    rows: list[list[Any]]


@dataclass(frozen=True, slots=True)
class Curve:
    """The bias-scale curve: a table of everything, a chart of bias, one of what it costs, and the ends as a summary."""

    columns: list[str]
    rows: list[list[float | None]]
    charts: list[Chart]
    summary: dict[str, float]


def curve_records(points: Sequence[ScalePoint]) -> Curve:
    """What is shown of the measured scales; a value that was not measured is None in the table and has no point."""
    rows = [
        {
            "scale": point.scale,
            **_ends("bias", point.bias.bias),
            **_ends("log-odds bias", point.bias.log_odds.bias),
            **_ends("cut", point.cut.bias if point.cut else UNMEASURED),
            **_ends("log-odds cut", point.cut.log_odds if point.cut else UNMEASURED),
            "context part": point.bias.context_part.value,
            "accuracy": point.accuracy.value,
            "order effect": point.bias.order_effect,
            "answer mass": point.answer_mass,
            "KL": point.kl,
            "KL unambiguous": point.kl_unambiguous,
        }
        for point in points
    ]
    summary = {f"test/{name}": value for name, value in rows[-1].items()}
    summary |= {f"test/base {name}": rows[0][name] for name in ("bias", "log-odds bias", "accuracy", "order effect")}
    return Curve(
        columns=list(rows[0]),
        rows=[_finite(list(row.values())) for row in rows],
        charts=[
            Chart("curve/bias", "Bias against the scale", _lines(rows, ("bias", "log-odds bias", "order effect"))),
            Chart("curve/cost", "What it costs", _lines(rows, ("accuracy", "answer mass", "KL"))),
        ],
        summary={name: value for name, value in summary.items() if math.isfinite(value)},
    )


def _lines(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[list[Any]]:
    return [[row["scale"], row[name], name] for name in names for row in rows if math.isfinite(row[name])]


def _ends(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high}


def decision_samples(
    backbone: Backbone, decisions: DecisionSet, handle: Handle, *, count: int = SAMPLES
) -> list[list[Any]]:
    """Some decisions of all contexts, as rows of :data:`SAMPLE_COLUMNS`, one a candidate.

    ``before`` and ``after`` are the candidate's probabilities at the scales 0 and 1. Every process of a job has to
    call this, as it runs the model.
    """
    chosen = _spread(decisions, count)
    evaluator = Evaluator(backbone, chosen, handle)
    before, after = (measured.policy for measured in evaluator.curve([0.0, 1.0]))
    return [
        [
            decision.id, decision.context, decision.kind, backbone.prompt_text(decision), candidate.text,
            candidate.group, None if decision.answer is None else decision.answer == column,
            float(before[row, column]), float(after[row, column]),
        ]
        for row, decision in enumerate(chosen)
        for column, candidate in enumerate(decision.candidates)
    ]  # fmt: skip


def _spread(decisions: DecisionSet, count: int) -> DecisionSet:
    """Up to ``count`` decisions: the first of each context and kind, then the second of each, and so on."""
    seen: dict[tuple[str, str], int] = {}
    ranked: list[tuple[int, int, Decision]] = []
    for place, decision in enumerate(decisions):
        key = (decision.context, decision.kind)
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], place, decision))
    wanted = {decision.id for _, _, decision in sorted(ranked, key=lambda entry: entry[:2])[:count]}
    return decisions.select(lambda decision: decision.id in wanted)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
