"""Audit fields as tables of a page, and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

from dso.evaluation.audit import FOUR_FIFTHS, csv_rows
from dso.evaluation.report import MISSING, decimal_text, estimate_from, interval_text

TITLES = {"base": "Base model", "steered": "Steered"}
HEADER = (
    "category", "kind", "number", "selection rate [95%]", "impact ratio [95%]", "flag", "scoring rate",
    "its impact ratio", "worst context", "detectable difference", "abstention", "accuracy [95%]",
)  # fmt: skip
Block = dict[str, Any]


def audit_blocks(sides: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """A block a side for the page's template: title, sentences and tables."""
    return [
        {
            "title": TITLES.get(side, side),
            "lines": list(_lines(record)),
            "tables": [[HEADER, *(_cells(row) for row in record["rows"])]],
        }
        for side, record in sides.items()
    ]


def _lines(record: Mapping[str, Any]) -> list[str]:
    median = "" if record["median"] is None else f" The median of all scores is {record['median']:.3f}."
    lines = [
        f"{record['decisions']} ambiguous decisions in {record['contexts']} contexts about {record['units']} units of "
        f"people.{median}"
    ]
    flagged = [row["category"] for row in record["rows"] if row["flag"]]
    said = f"{', '.join(flagged)}: impact ratio below {FOUR_FIFTHS:g}" if flagged else "no impact ratio is below 0.8"
    lines.append(f"Flags: {said}.")
    lines += [f"Left out of impact ratios: {name}, {why}." for name, why in record["left_out"].items()]
    return lines


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    estimates = {name: estimate_from(row[name], name) for name in ("selection_rate", "impact_ratio", "accuracy")}
    numbers = {
        name: decimal_text(math.nan if row[name] is None else row[name])
        for name in ("scoring_rate", "scoring_ratio", "worst_context_ratio", "detectable", "abstention")
    }
    worst = MISSING if row["worst_context"] is None else f"{row['worst_context']} ({numbers['worst_context_ratio']})"
    impact = estimates["impact_ratio"]
    return (
        row["category"],
        row["kind"],
        f"{row['number']} ({row['share']:.1%})",
        interval_text(estimates["selection_rate"]),
        f"{impact.value:.3f}" if math.isnan(impact.low) and not math.isnan(impact.value) else interval_text(impact),
        {True: "flag", False: "", None: MISSING}[row["flag"]],
        numbers["scoring_rate"],
        numbers["scoring_ratio"],
        worst,
        numbers["detectable"],
        numbers["abstention"],
        interval_text(estimates["accuracy"]),
    )


def audit_csv(sides: Mapping[str, Mapping[str, Any]]) -> str:
    """The sides as one CSV text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(csv_rows(sides))
    return text.getvalue()
