"""Audit fields in a study's page, and ``dso report --audit``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from serving import strong_steering
from studies import study
from tiny import small_set, tiny_llama

from dso.evaluation.audit import audit
from dso.evaluation.study import Study
from dso.reports.page import render
from launch.cli import main


def test_a_study_shows_its_audit() -> None:
    decisions = small_set(("test",))
    sides = {
        name: audit(np.array([[p, 1 - p]] * len(decisions)), decisions).to_json()
        for name, p in (("base", 0.4), ("steered", 0.5))
    }
    made = study()
    page, _ = render(Study(about={}, base=made.base, methods=made.methods[11:12], audit=sides))
    assert "Flags: female: impact ratio below 0.8." in page
    assert "Flags: no impact ratio is below 0.8." in page
    assert "<td>0.667</td><td>flag</td>" in page


def test_the_command_measures_base_and_steered(tmp_path: Path, model_folder: Path, capsys) -> None:
    strong_steering(tiny_llama()).save_pretrained(tmp_path / "steering")
    small_set().write_jsonl(tmp_path / "small.jsonl")
    common = ["--audit", tmp_path / "steering", "--set", tmp_path / "small.jsonl", "--model", model_folder, "--quiet"]
    words = [str(word) for word in ("report", *common, "--scale", 2, "--out", tmp_path / "out")]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "audit.html")
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    base, steered = record["audit"]["base"]["rows"], record["audit"]["steered"]["rows"]
    assert [row["category"] for row in base] == ["female", "male"]
    assert base[0]["number"] == 32  # 4 couples in 4 contexts and 2 orders
    assert base[0]["selection_rate"][0] + base[1]["selection_rate"][0] == pytest.approx(1)
    assert base[0]["selection_rate"] != steered[0]["selection_rate"]
    with open(tmp_path / "out" / "audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["side"], row["category"]) for row in rows] == [
        ("base", "female"), ("base", "male"), ("steered", "female"), ("steered", "male"),
    ]  # fmt: skip
    assert float(rows[2]["selection_rate"]) == steered[0]["selection_rate"][0]
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "scale 2" in page
    assert "<h3>Steered</h3>" in page


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "name a study, or a steering with --audit"),
        (["study", "--audit", "steering"], "name a study, or a steering with --audit"),
        (["--audit", "steering"], "--audit needs --out"),
    ],
)
def test_what_is_asked_for_must_be_clear(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    assert reason in capsys.readouterr().err
