"""A slice of the coverage study: intervals hold the truth about as often as they say."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from dso.decisions.decision import Candidate, Decision, DecisionSet
from tools.coverage import Setting, Simulation, resample, settings, shares, simulate, summary, tables

ROOT = Path(__file__).parents[2]

SLICE = (
    Setting(8, 22, 0.3, 0.04),
    Setting(8, 8, 0.1, 0.0),
    Setting(8, 22, 0.1, 0.04, groups=4),
    Setting(8, 22, 0.3, 0.0, context=0.0),
    Setting(8, 22, 0.3, 0.04, design="missing"),
    Setting(8, 24, 0.3, 0.0, design="thin"),
    Setting(8, 22, 0.1, 0.04, design="alone"),
)


@pytest.mark.parametrize("setting", SLICE, ids=str)
def test_intervals_hold_the_truth(setting: Setting) -> None:
    rows = simulate(setting, 200, 200)
    assert {row["figure"] for row in rows} >= {"bias", "context_part", "common_part"}
    for row in rows:
        assert row["covered"] >= 0.91 - 0.03, row  # 200 samples are off by 1.5 points
        assert row["above"] <= 0.04 + 0.03, row
    assert sum(row["covered"] for row in rows) / len(rows) >= 0.92


def test_shares_are_held() -> None:
    assert all(row["covered"] >= 0.91 and row["above"] <= 0.05 for row in shares(300))


def test_the_truth_of_a_simulation_is_what_many_people_say() -> None:
    simulation = Simulation(Setting(8, 4000, 0.3, 0.04))
    probability, log_odds = simulation.draw(np.random.default_rng(0))
    for cells, truth in zip((probability, log_odds), simulation.truths, strict=True):
        theta = np.stack([cells.values[cells.context == c].mean(axis=0) for c in range(8)])
        common = 2 * theta[:, 0].mean()
        assert common == pytest.approx(truth["common_part"], abs=0.03)
        assert np.sqrt(((2 * theta[:, 0] - common) ** 2).mean()) == pytest.approx(truth["context_part"], abs=0.01)


def test_real_answers_are_drawn_again_and_the_truth_is_that_of_all() -> None:
    rng, pair = np.random.default_rng(1), (Candidate(text=" a", group="f"), Candidate(text=" b", group="m"))
    asked = [
        Decision(
            id=f"{c}/{u}", context=f"c{c}", kind="ambiguous", prompt="?", candidates=pair, unit=f"u{u}", stereotype="f"
        )
        for c, u in itertools.product(range(6), range(40))
    ]
    log_odds = (
        np.repeat([1, -1, 1, -1, 1, -1], 40) + np.tile(rng.standard_normal(40), 6) + 0.3 * rng.standard_normal(240)
    )
    base, steered = ((lambda p: np.stack([p, 1 - p], axis=1))(1 / (1 + np.exp(-s * log_odds))) for s in (1.0, 0.5))
    rows = resample(base, steered, DecisionSet(tuple(asked)), 20, 150, 200)
    assert {"bias", "gap", "cut of bias", "cut of context_part", "cut of gap"} <= {row["figure"] for row in rows}
    assert all(row["covered"] >= 0.87 for row in rows)
    assert "cut of context_part" in summary(rows, ("units", "scale", "figure"))


def test_the_page_has_the_figures_of_the_study_and_none_is_below_what_it_claims() -> None:
    record = json.loads((ROOT / "docs/results/coverage.json").read_text("utf-8"))
    assert tables(record).strip() in (ROOT / "docs/coverage.md").read_text("utf-8")
    assert {Setting(**{f.name: row[f.name] for f in fields(Setting)}) for row in record["simulated"]} == {*settings()}
    real = [row for row in record["real"] if row["units"] >= 22]
    assert all(row["covered"] >= 0.91 and row["above"] <= 0.05 for row in real)
    covered = [row["covered"] for row in record["simulated"]]
    assert sum(share >= 0.91 for share in covered) >= 0.99 * len(covered)


def test_the_study_is_of_everything_that_it_says() -> None:
    found = settings()
    assert {(s.contexts, s.units, s.liking, s.common, s.groups) for s in found if s.design == "full"} >= {
        *itertools.product((8, 30), (8, 22, 48, 106), (0.0, 0.1, 0.3), (0.0, 0.04), (2, 4))
    }
    assert {s.design for s in found} == {"full", "thin", "missing", "alone"}
    assert len(set(found)) == len(found)
