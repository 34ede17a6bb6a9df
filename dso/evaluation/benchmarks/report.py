"""Figures of two models as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dso.evaluation.comparison import Compared
from dso.evaluation.intervals import Estimate
from dso.evaluation.report import clean, fixed_rows, plain


def figures_table(rows: Mapping[str, Compared]) -> str:
    """A table of fixed width; without a second model only the first one's column."""
    single = all(math.isnan(row.second.value) for row in rows.values())
    header = ("", "base [95%]", "steered [95%]", "steered - base [95%]")
    cells = []
    for name, row in rows.items():
        cells.append((clean(name), *number_texts(row.first, row.second, row.difference)))
    lines = [header, *cells]
    return fixed_rows([line[:2] for line in lines] if single else lines)


def figures_json(rows: Mapping[str, Compared]) -> dict[str, dict[str, object]]:
    """The same as a JSON object: value, low and high of each, null for what is not known."""
    return {
        name: {"base": plain(row.first), "steered": plain(row.second), "difference": plain(row.difference)}
        for name, row in rows.items()
    }


def number_texts(*row: Estimate) -> list[str]:
    """``62.3 [58.1, 66.2]`` in a row with large numbers, three decimals in others, a dash for what is not known."""
    places = 1 if any(abs(end) >= 10 for found in row for end in found) else 3
    texts = []
    for found in row:
        value, low, high = ("-" if math.isnan(end) else f"{round(end, places) + 0.0:.{places}f}" for end in found)
        texts.append(value if low == high == "-" else f"{value} [{low}, {high}]")
    return texts
