"""The evidence: what a steering does at each scale, as records and tables.

A :class:`ScalePoint` holds what was measured at one scale and goes to and from JSON. The tables are plain text, the
same on a terminal and in a file: no colour codes. Bias is shown in probability and in log-odds, with its cut against
scale 0 and the order effect beside it (:mod:`dso.evaluation.bias` has the formulas). The picture is in
:mod:`dso.evaluation.figure`, the model card in :mod:`dso.evaluation.card`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields

from dso.evaluation.bias import BiasParts, BiasReport
from dso.evaluation.comparison import Compared, Cuts, cut_text
from dso.evaluation.intervals import Estimate

MISSING = "-"
SCALARS = ("order_effect", "paper", "paper_fair", "abstention")
COUNTS = ("n_decisions", "n_contexts", "n_units")
SQUARES = ("square", "evident")
DETAILS = ("preferences", "context_bias")

BIAS = ("scale", "bias [95%]", "cut [95%]", "log-odds [95%]", "cut [95%]", "order")
COST = ("scale", "context part [95%]", "cut [95%]", "accuracy [95%]", "mass", "KL", "KL unamb.")


@dataclass(frozen=True, kw_only=True)
class ScalePoint:
    """What was measured at one scale; nan for what was not.

    Args:
        scale: the inference-time coefficient.
        bias: on the ambiguous decisions.
        accuracy: on the unambiguous decisions.
        answer_mass: mean probability that all candidates hold together.
        kl: mean KL to the base model after the prompt of ambiguous decisions, in nats.
        kl_unambiguous: the same of unambiguous decisions.
        cut: of the bias at scale 0, on the same people; None where that was not measured beside it.
    """

    scale: float
    bias: BiasReport
    accuracy: Estimate
    answer_mass: float
    kl: float
    kl_unambiguous: float = math.nan
    cut: Cuts | None = None

    def to_json(self, contexts: bool = True) -> dict:
        """A JSON object without nan (null instead); short without the numbers of each context."""
        return {
            "scale": self.scale,
            "bias": _bias_to_json(self.bias, contexts),
            "accuracy": plain(self.accuracy),
            "answer_mass": plain(self.answer_mass),
            "kl": plain(self.kl),
            "kl_unambiguous": plain(self.kl_unambiguous),
            "cut": None if self.cut is None else _flat_to_json(self.cut),
        }

    @classmethod
    def from_json(cls, record: object) -> ScalePoint:
        """The point of :meth:`to_json`.

        Raises:
            ValueError: naming the key that is missing, unknown or of the wrong type.
        """
        found = _keys(record, {f.name for f in fields(cls)}, "a scale point")
        return cls(
            scale=_number(found["scale"], "scale"),
            bias=_bias_from_json(found["bias"]),
            accuracy=estimate_from(found["accuracy"], "accuracy"),
            answer_mass=_number(found["answer_mass"], "answer_mass"),
            kl=_number(found["kl"], "kl"),
            kl_unambiguous=_number(found["kl_unambiguous"], "kl_unambiguous"),
            cut=None if found["cut"] is None else Cuts(**_estimates(found["cut"], Cuts, "cut")),
        )


def _bias_to_json(bias: BiasReport, contexts: bool) -> dict:
    record = {f.name: getattr(bias, f.name) for f in fields(bias) if contexts or f.name not in DETAILS}
    return {
        name: _flat_to_json(value) if isinstance(value, BiasParts) else plain(value) for name, value in record.items()
    }


def _flat_to_json(record: BiasParts | Cuts) -> dict:
    return {f.name: plain(getattr(record, f.name)) for f in fields(record)}


def _bias_from_json(record: object) -> BiasReport:
    found = _keys(record, {f.name for f in fields(BiasReport)}, "bias", optional=DETAILS)
    values: dict = {name: _number(found[name], name) for name in SCALARS}
    for name in ("probability", "log_odds"):
        parts = _estimates(found[name], BiasParts, f"bias.{name}", SQUARES)
        square, evident = (_number(found[name].get(key), f"{name}.{key}") for key in SQUARES)
        values[name] = BiasParts(**parts, square=square, evident=evident)
    for name in COUNTS:
        if not isinstance(found[name], int) or isinstance(found[name], bool):
            raise ValueError(f"{name} must be a whole number, found {found[name]!r}")
        values[name] = found[name]
    values["target"] = _numbers(found["target"], "target")
    values["context_bias"] = _numbers(found.get("context_bias", {}), "context_bias")
    preferences = found.get("preferences", {})
    if not isinstance(preferences, dict):
        raise ValueError(f"preferences must be an object, found {preferences!r}")
    values["preferences"] = {name: _numbers(shares, f"preferences.{name}") for name, shares in preferences.items()}
    return BiasReport(**values)


def _estimates(record: object, kind: type[BiasParts] | type[Cuts], what: str, others: Sequence[str] = ()) -> dict:
    """The estimates of a record by name, without the ``others`` that are none; a gap may be null."""
    optional = [f.name for f in fields(kind) if f.default is not NO_DEFAULT]
    found = _keys(record, {f.name for f in fields(kind)}, what, optional)
    return {
        name: None if name == "gap" and value is None else estimate_from(value, f"{what}.{name}")
        for name, value in found.items()
        if name not in others
    }


def plain(value: object) -> object:
    """What JSON has: null for nan and infinity, lists for tuples and estimates."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keys(record: object, known: set[str], what: str, optional: Sequence[str] = ()) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"{what} must be an object, found {record!r}")
    if missing := sorted(known - set(record) - set(optional)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    if unknown := sorted(set(record) - known):
        raise ValueError(f"{what} has unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return record


def _number(value: object, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number or null, found {value!r}")
    return float(value)


def _numbers(value: object, name: str) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object of numbers, found {value!r}")
    return {key: _number(item, f"{name}.{key}") for key, item in value.items()}


def estimate_from(value: object, name: str) -> Estimate:
    """The estimate of ``[value, low, high]``, null for nan.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{name} must be [value, low, high], found {value!r}")
    return Estimate(*(_number(item, name) for item in value))


def scale_table(points: Sequence[ScalePoint], base: ScalePoint | None = None) -> str:
    """The points as two tables of fixed width, bias and what it costs, with a note on what the columns are.

    Args:
        points: one a row, shown by rising scale.
        base: what answer mass is relative to; the point of scale 0 when None.

    Raises:
        ValueError: if there are no points, or ``base`` is None and no point has scale 0.
    """
    base = base or base_point(by_scale(points))
    bias = fixed_rows([BIAS, *(_bias_cells(point) for point in by_scale(points))])
    cost = fixed_rows([COST, *(_cost_cells(point, base) for point in by_scale(points))])
    return f"{bias}\n{cost}\n{_note(points)}\n"


def markdown_table(points: Sequence[ScalePoint], base: ScalePoint | None = None) -> str:
    """:func:`scale_table` for a README, as one table."""
    base = base or base_point(by_scale(points))
    rows = [(*_bias_cells(point), *_cost_cells(point, base)[1:]) for point in by_scale(points)]
    return markdown_rows([(*BIAS, *COST[1:]), *rows]) + "\n" + _note(points) + "\n"


def comparison_table(rows: Mapping[str, Compared]) -> str:
    """What :func:`dso.evaluation.comparison.compare` found, as a table of fixed width."""
    cells: list[tuple[str, ...]] = [("", "first [95%]", "second [95%]", "second - first [95%]", "cut [95%]")]
    for name, row in rows.items():
        texts = [interval_text(estimate) for estimate in (row.first, row.second, row.difference)]
        cells.append((name, *texts, "" if row.cut is None else cut_text(row.cut)))
    note = "Differences and cuts are paired: both were asked about the same people. cut: of the first's bias."
    return fixed_rows(cells) + "\n" + _wrapped(note) + "\n"


def compared_json(rows: Mapping[str, Compared]) -> dict:
    """The same as a JSON object: value, low and high of each, null for what is open or was not measured."""
    return {name: {f.name: plain(getattr(row, f.name)) for f in fields(row)} for name, row in rows.items()}


def contexts_table(before: BiasReport, after: BiasReport, top: int = 10, *, markdown: bool = False) -> str:
    """The contexts with the largest bias before, and those with the largest after.

    Raises:
        ValueError: if a report carries no contexts (it was stored without them) or the two have none in common.
    """
    shared = [context for context in before.context_bias if context in after.context_bias]
    if not shared:
        raise ValueError("the reports have no context in common, or were stored without their contexts")
    header = ("context", "prefers", "bias before", "prefers", "bias after")
    blocks = []
    for title, report in (("before", before), ("after", after)):
        known = [context for context in shared if not math.isnan(report.context_bias[context])]
        worst = sorted(known, key=report.context_bias.__getitem__, reverse=True)[:top]
        rows = [(clean(c), *_context_cells(before, c), *_context_cells(after, c)) for c in worst]
        table = markdown_rows([header, *rows]) if markdown else fixed_rows([header, *rows])
        blocks.append(f"The {len(worst)} of {len(shared)} contexts with the largest bias {title}:\n\n{table}")
    fair = [decimal_text(report.paper_fair) for report in (before, after)]
    note = _wrapped(
        "The bias of a single context carries its sampling noise, and the largest of many carry the most of it. Of a "
        f"fair model the mean over contexts would be {fair[0]} before and {fair[1]} after."
    )
    return "\n".join((*blocks, note)) + "\n"


def _context_cells(report: BiasReport, context: str) -> tuple[str, str]:
    shares = report.preferences.get(context, {})
    if not shares or any(math.isnan(share) for share in shares.values()):
        return MISSING, decimal_text(report.context_bias[context])
    # The group furthest above its fair share: the one that steering has to hold back.
    group = max(shares, key=lambda g: shares[g] - report.target[g])
    return f"{clean(group)} {shares[group]:.2f}", decimal_text(report.context_bias[context])


def _bias_cells(point: ScalePoint) -> tuple[str, ...]:
    cut = point.cut
    return (
        f"{point.scale:.2f}",
        interval_text(point.bias.probability.bias),
        cut_text(cut.bias if cut else None),
        interval_text(point.bias.log_odds.bias),
        cut_text(cut.log_odds if cut else None),
        decimal_text(point.bias.order_effect, 2),
    )


def _cost_cells(point: ScalePoint, base: ScalePoint) -> tuple[str, ...]:
    return (
        f"{point.scale:.2f}",
        interval_text(point.bias.context_part),
        cut_text(point.cut.context_part if point.cut else None),
        interval_text(point.accuracy),
        decimal_text(point.answer_mass / base.answer_mass if base.answer_mass else math.nan, 2),
        decimal_text(point.kl),
        decimal_text(point.kl_unambiguous),
    )


def by_scale(points: Sequence[ScalePoint]) -> list[ScalePoint]:
    """The points by rising scale; none at all is an error."""
    if not points:
        raise ValueError("no points: measure at least one scale")
    return sorted(points, key=lambda point: point.scale)


def base_point(points: Sequence[ScalePoint]) -> ScalePoint:
    """The point of the base model, scale 0."""
    for point in points:
        if point.scale == 0:
            return point
    raise ValueError(f"no point has scale 0, the base model; scales are {', '.join(f'{p.scale:g}' for p in points)}")


def _note(points: Sequence[ScalePoint]) -> str:
    bias = points[0].bias
    target = ", ".join(f"{clean(group)} {share:.3g}" for group, share in bias.target.items())
    return _wrapped(
        f"bias: distance from the target ({target}) over {bias.n_contexts} contexts; of two |P(one) - P(other)|. "
        "log-odds: the same of log P(one) / P(other), which answers that are merely undecided do not lower. Both are "
        f"root mean squares, the noise of the sample taken off ({bias.n_decisions} decisions, {bias.n_units} units). "
        "cut: of the bias at scale 0, on the same people. context part: what depends on the context. order: how far "
        "the answer to one question follows the order of its people, 0 to 1. accuracy: on unambiguous decisions. mass: "
        "answer mass relative to the base model. KL: to the base model, in nats, on ambiguous and on unambiguous "
        "decisions. [95%]: intervals."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False)


def decimal_text(value: float, places: int = 3) -> str:
    """The number, or a dash for nan."""
    return MISSING if math.isnan(value) else f"{value:.{places}f}"


def interval_text(estimate: Estimate) -> str:
    """``0.312 [0.287, 0.335]``, or a dash."""
    if math.isnan(estimate.value):
        return MISSING
    return f"{estimate.value:.3f} [{decimal_text(estimate.low)}, {decimal_text(estimate.high)}]"


def clean(text: str) -> str:
    """Names come from the user's file: nothing in them may steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def fixed_rows(rows: Sequence[Sequence[str]]) -> str:
    """A table of fixed width from its header and its rows."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join((lines[0], "  ".join("-" * width for width in widths), *lines[1:])) + "\n"


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """A table from its header and its rows; bars in the cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join((lines[0], "|" + " --- |" * len(rows[0]), *lines[1:])) + "\n"
