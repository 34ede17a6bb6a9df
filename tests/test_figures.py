"""The figures of README.md are those that docs/results keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
WITH_ORDER = (".", "budget-0.3", "pooled")  # their tables have two columns more
WITHOUT = ("budget-0.1-answer-mass", "held-budgets", "small-budgets", "turned-down")
SETS = {
    "unseen templates, names of the training": "test-templates",
    "unseen names, templates of the training": "test-names",
    "ten unseen occupations, unseen names and templates": "test-contexts",
    "WinoBias, type 1": "type1-test",
    "WinoBias, type 2": "type2-test",
    "pronouns: he, she or they": "pronouns",
}


def rows_of(path: str) -> tuple[Mapping, list[Mapping]]:
    base, *steered = json.loads((ROOT / "docs/results" / path).read_text("utf-8"))["rows"]
    assert base["variant"] == "base" and steered
    return base, steered


def interval(found: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def cut(row: Mapping, base: Mapping) -> str:
    return f"{1 - row['bias']['corrected'][0] / base['bias']['corrected'][0]:.0%}"


def figures(row: Mapping, base: Mapping, *, order: bool) -> str:
    """The cells of a table of budgets, from the bias to the KL."""
    bias = row["bias"]
    cells = [interval(bias["corrected"]), cut(row, base), f"{bias['soft'][0]:.3f} ({bias['soft_floor']:.3f})"]
    cells += [f"{row['accuracy'][0]:.3f}", *([f"{bias['order_effect']:.2f}"] if order else ())]
    return " | ".join([*cells, f"{row['answer_mass'] / base['answer_mass']:.2f}", f"{row['kl']:.3f}"])


@pytest.mark.parametrize("folder", WITH_ORDER + WITHOUT)
def test_every_row_of_a_budget_is_in_the_readme(folder: str) -> None:
    base, steered = rows_of(f"{folder}/budgets.json")
    for row in steered:
        cells = figures(row, base, order=folder in WITH_ORDER)
        if folder in WITH_ORDER:
            cells += f" | {row['kl_unambiguous']:.3f}"
        assert f"| {row['seed']} | {cells} |" in README or f"| seed {row['seed']} | {cells} |" in README


@pytest.mark.parametrize("folder", [".", "pooled"])
@pytest.mark.parametrize(("name", "label"), SETS.items(), ids=SETS.values())
def test_every_set_that_was_not_trained_on_is_in_the_readme(folder: str, name: str, label: str) -> None:
    base, steered = rows_of(f"{folder}/transfer-{label}.json")
    assert [row["seed"] for row in steered] == [0, 1, 2]
    biases = ", ".join(f"{row['bias']['corrected'][0]:.3f}" for row in steered)
    cells = [name, interval(base["bias"]["corrected"]), biases, ", ".join(cut(row, base) for row in steered)]
    if label.startswith("test-"):
        cells += [f"{base['accuracy'][0]:.3f}", ", ".join(f"{row['accuracy'][0]:.3f}" for row in steered)]
    assert f"| {' | '.join(cells)} |" in README


def test_the_first_table_is_that_of_the_default_run() -> None:
    points = json.loads((ROOT / "docs/results/default-curve.json").read_text("utf-8"))
    assert [point["scale"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    for point in points:
        bias, name = point["bias"], "0 (base)" if point["scale"] == 0 else f"{point['scale']:g}"
        cells = [name, interval(bias["corrected"])]
        cells += [f"{bias[kind][0]:.3f} ({bias[f'{kind}_floor']:.3f})" for kind in ("soft", "hard")]
        cells += [interval(point["accuracy"]), f"{bias['order_effect']:.2f}"]
        mass = point["answer_mass"] / points[0]["answer_mass"]
        assert f"| {' | '.join([*cells, f'{mass:.2f}', format(point['kl'], '.3f')])} |" in README


@pytest.mark.parametrize("folder", [".", "groups-no-floor"])
def test_every_row_of_four_groups_is_in_the_readme(folder: str) -> None:
    base, steered = rows_of(f"{folder}/groups.json")
    for row in (base, *steered):
        bias = row["bias"]
        cells = [interval(bias["corrected"])]
        cells += [f"{bias[kind][0]:.3f} ({bias[f'{kind}_floor']:.3f})" for kind in ("soft", "hard")]
        cells += [f"{row['accuracy'][0]:.3f}", f"{row['answer_mass'] / base['answer_mass']:.2f}"]
        cells += [f"{row['kl']:.3f}", f"{row['kl_unambiguous']:.3f}"]
        assert f" | {' | '.join(cells)} |" in README
