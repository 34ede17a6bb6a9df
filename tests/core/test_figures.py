"""The figures of README.md and docs/scenes.md are those that docs/results keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8").splitlines()
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


def kept(path: str) -> list[Mapping]:
    """What a benchmark wrote, the base model first."""
    found = json.loads((ROOT / "docs/results" / path).read_text("utf-8"))
    base, *steered = found if isinstance(found, list) else found["rows"]
    assert base["kl"] == 0 and steered
    return [base, *steered]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def interval(found: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def as_measured(row: Mapping, *kinds: str) -> list[str]:
    """Biases without correction, each with its floor."""
    return [f"{row['bias'][kind][0]:.3f} ({row['bias'][f'{kind}_floor']:.3f})" for kind in kinds]


def cut(row: Mapping, base: Mapping) -> str:
    return f"{1 - row['bias']['corrected'][0] / base['bias']['corrected'][0]:.0%}"


def mass(row: Mapping, base: Mapping) -> str:
    return f"{row['answer_mass'] / base['answer_mass']:.2f}"


@pytest.mark.parametrize("folder", WITH_ORDER + WITHOUT)
def test_every_row_of_a_budget_is_in_the_readme(folder: str) -> None:
    base, *steered = kept(f"{folder}/budgets.json")
    for row in steered:
        cells = [interval(row["bias"]["corrected"]), cut(row, base), *as_measured(row, "soft")]
        cells += [f"{row['accuracy'][0]:.3f}", mass(row, base), f"{row['kl']:.3f}"]
        if folder in WITH_ORDER:
            cells.insert(4, f"{row['bias']['order_effect']:.2f}")
            cells.append(f"{row['kl_unambiguous']:.3f}")
        budget, seed = row["variant"].removeprefix("kl-"), str(row["seed"])
        names = [[f"seed {seed}"], [budget, seed], [f"{budget}, `min_answer_mass=0.9`", seed]]
        assert any(line(*name, *cells) in README for name in names)


@pytest.mark.parametrize("folder", [".", "pooled"])
@pytest.mark.parametrize(("name", "label"), SETS.items(), ids=SETS.values())
def test_every_set_that_was_not_trained_on_is_in_the_readme(folder: str, name: str, label: str) -> None:
    base, *steered = kept(f"{folder}/transfer-{label}.json")
    assert [row["seed"] for row in steered] == [0, 1, 2]
    biases = ", ".join(f"{row['bias']['corrected'][0]:.3f}" for row in steered)
    accuracies = ["", ""]
    if label.startswith("test-"):  # the others have no unambiguous decisions
        accuracies = [f"{base['accuracy'][0]:.3f}", ", ".join(f"{row['accuracy'][0]:.3f}" for row in steered)]
    cuts = ", ".join(cut(row, base) for row in steered)
    found = line(name, interval(base["bias"]["corrected"]), biases, cuts, *accuracies)
    assert found.replace("|  |  |", "| | |") in README


def test_the_first_table_is_that_of_the_default_run() -> None:
    points = kept("default-curve.json")
    assert [point["scale"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    for point in points:
        cells = ["0 (base)" if point["scale"] == 0 else f"{point['scale']:g}"]
        cells += [interval(point["bias"]["corrected"]), *as_measured(point, "soft", "hard")]
        cells += [interval(point["accuracy"]), f"{point['bias']['order_effect']:.2f}"]
        assert line(*cells, mass(point, points[0]), f"{point['kl']:.3f}") in README


@pytest.mark.parametrize("folder", [".", "groups-no-floor"])
def test_every_row_of_four_groups_is_in_the_readme(folder: str) -> None:
    rows = kept(f"{folder}/groups.json")
    for row in rows:
        cells = [interval(row["bias"]["corrected"]), *as_measured(row, "soft", "hard")]
        cells += [f"{row['accuracy'][0]:.3f}", mass(row, rows[0])]
        cells += [f"{row['kl']:.3f}", f"{row['kl_unambiguous']:.3f}"]
        names = ["base"] if row is rows[0] else [f"seed {row['seed']}", f"seed {row['seed']}, `min_answer_mass=null`"]
        assert any(line(name, *cells) in README for name in names)


@pytest.mark.parametrize("label", ["test", "test-contexts", "skin"])
def test_every_row_of_the_scenes_is_in_their_page(label: str) -> None:
    rows, page = kept(f"scenes-{label}.json"), (ROOT / "docs/scenes.md").read_text("utf-8").splitlines()
    assert [row["seed"] for row in rows] == [None, 0, 1, 2]
    for row in rows:
        name, share = ("base", "") if row is rows[0] else (f"seed {row['seed']}", cut(row, rows[0]))
        cells = [name, interval(row["bias"]["corrected"]), share, *as_measured(row, "soft", "hard")]
        assert line(*cells, interval(row["accuracy"]), f"{row['kl']:.3f}") in page
