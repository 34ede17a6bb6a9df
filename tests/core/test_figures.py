"""The figures of README.md and docs are those that docs/results keeps: tools/figures.py makes the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tools import figures
from tools.figures import TABLES, Table, filled, result

ROOT = Path(__file__).parents[2]


def words(page: str) -> str:
    return " ".join((ROOT / page).read_text("utf-8").split())


@pytest.mark.parametrize("page", dict.fromkeys(table.page for table in TABLES))
def test_tables_are_those_of_the_results(page: str) -> None:
    shown = (ROOT / page).read_text("utf-8")
    assert shown == figures.page(page), "make them again with: python -m tools.figures"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.page}-{table.heading}-{table.place}")
def test_every_row_has_a_cell_for_each_column(table: Table) -> None:
    lines = (ROOT / table.page).read_text("utf-8").splitlines()
    below = next(place for place, line in enumerate(lines) if line.startswith(table.heading))
    rules = [line for line in lines[below:] if line.startswith("| ---")]
    rows = list(table.rows())
    assert len(rows) >= 3 and {len(row) for row in rows} == {rules[table.place].count("---")}


def test_a_table_is_found_below_its_heading_and_nothing_else_is_touched() -> None:
    lines = ["# A", "| h |", "| --- |", "| old |", "", "## B", "| h |", "| --- |", "| old |", "| old |", "end"]
    table = Table("p.md", "## B", lambda: iter([["new"], ["1", "2"]]))
    assert filled(lines, table) == [*lines[:8], "| new |", "| 1 | 2 |", "end"]
    first = Table("p.md", "# A", lambda: iter([["new"]]), 1)
    assert filled(lines, first) == [*lines[:8], "| new |", "end"]
    with pytest.raises(ValueError, match=r"p.md: 0 lines begin with '## C', expected one"):
        filled(lines, Table("p.md", "## C", lambda: iter([])))
    with pytest.raises(ValueError, match=r"p.md: no table 1 below '## B'"):
        filled(lines, Table("p.md", "## B", lambda: iter([]), 1))


def test_cells_are_as_they_read() -> None:
    assert figures.three([0.1234, -0.05, 1.0]) == "0.123 [-0.050, 1.000]"
    assert figures.percent([0.876, None, 0.911]) == "88% [-, 91%]" and figures.percent(None) == ""
    row: Mapping[str, Any] = {
        "steering": "s",
        "bias": {
            "probability": {"gap": [0.1, 0.0, 0.2], "context_part": [0.02, 0.0, 0.05]},
            "order_effect": 0.456,
            "abstention": 0.2,
        },
        "accuracy": [0.35, 0.3, 0.4],
        "kl": 0.1234,
        "cut": {"context_part": [0.997, 0.76, 1.0]},
    }
    rows = [{**row, "cut": None}, row, {**row, "cut": {"context_part": [0.91, 0.69, 1.0]}}, row]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "result", lambda _: rows)
        shown = list(figures.sampled())
    gap, part = "0.100 [0.000, 0.200]", "0.020 [0.000, 0.050]"
    assert shown[0] == ["base", gap, part, "", "0.46", "0.20", "0.350", "0.123"]
    assert [each[3] for each in shown[1:]] == ["at least 76%", "91% [69%, 100%]", "at least 76%"]


# What has to hold of the figures themselves


def three_seeds(name: str, variants: int = 1) -> Sequence[Mapping[str, Any]]:
    """What a benchmark wrote of the steerings; the base model stands before them."""
    base, *steered = result(name)["rows"]
    assert base["kl"] == 0 and [row["seed"] for row in steered] == [0, 1, 2] * variants
    return steered


@pytest.mark.parametrize(("name", "variants"), [("budgets.json", 1), ("expected.json", 1), ("blocks.json", 2)])
def test_three_seeds_and_never_all_of_a_bias(name: str, variants: int) -> None:
    for row in three_seeds(name, variants):
        for cut in ("bias", "log_odds", "context_part"):
            _, low, high = row["cut"][cut]
            assert low is not None and high < 0.995


@pytest.mark.parametrize("name", figures.TRANSFER)
def test_what_was_not_trained_on_has_three_seeds(name: str) -> None:
    assert len(three_seeds(f"transfer-{name}.json")) == 3


def test_studies_have_ours_and_the_rivals_that_matter() -> None:
    for name in ("compare.json", "compare-winobias.json"):
        found = {method["name"]: {trial["seed"] for trial in method["trials"]} for method in result(name)["methods"]}
        assert {"affine-editing", "caa", "published", "random"} <= set(found)
        assert found["ours"] == found["lora"] == {0, 1, 2}


def test_nothing_spilled_over() -> None:
    assert not any(row["grew"] for row in result("benchmarks.json")["spillover"]["rows"])


def test_edits_of_weights_have_their_controls() -> None:
    assert {row["places"] for row in result("editing.json")["rows"]} >= {"", "value", "mask", "random", "shuffled"}


def test_what_bbq_says_of_the_base_model_is_shown() -> None:
    found = result("bbq.json")["benchmarks"]["bbq"]["figures"]
    base = "{:.1f} [{:.1f}, {:.1f}]".format(*found["bias, ambiguous"]["base"])
    assert f"its published bias score on ambiguous questions is {base} of 100" in words("docs/results.md")


def test_what_gemma_loses_is_shown() -> None:
    base, *seeds = result("gemma/harm.json")["rows"]
    assert base["neutral_kl"] == 0
    points = [f"{row['points'][0]:+.2f}" for row in seeds]
    changes = [f"{row['perplexity_change'][0]:+.1%}" for row in seeds]
    assert f"by {points[0]}, {points[1]} and {points[2]} points" in words("docs/results.md")
    assert f"texts changes by {changes[0]}, {changes[1]} and {changes[2]}" in words("docs/results.md")


def test_what_steering_costs_is_within_its_aims() -> None:
    found = result("overhead.json")
    for name in figures.OVERHEAD:
        most = {"hooks": 1.03, "per row": 1.05, "merged": 1.015}.get(name, 1.15)
        assert all(found[mode][phase][name]["ratio"] <= most for mode in ("eager", "compiled") for phase in found[mode])
    ratio = found["import"]["ratio"]
    assert ratio <= 1.05
    assert f"takes {ratio:.2f} of the time of `import torch, transformers`." in words("docs/steering.md")
