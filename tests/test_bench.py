"""The benchmarks run, on a tiny model; what they compute is checked by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from launch.bench import build_parser, main
from launch.benchmarks import sweeps, timing
from launch.benchmarks.sweeps import Variant, decisions_until
from tests.training import write_config


def test_decisions_until_the_bias_first_halves() -> None:
    history = [{"bias": b, "decisions": n} for b, n in ((0.4, 0), (0.3, 100), (0.2, 200), (0.25, 300), (0.1, 400))]
    assert decisions_until(history, 0.5) == 200
    assert decisions_until(history, 0.25) == 400
    assert decisions_until(history, 0.1) is None


def test_every_benchmark_has_a_parser_and_a_wrong_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("step", "run", "budgets", "estimators", "groups"):
        assert build_parser().parse_args([name]).name == name
    assert build_parser().parse_args(["transfer", "folder"]).steerings == ["folder"]
    with pytest.raises(SystemExit):
        main(["steps"])
    assert "invalid choice" in capsys.readouterr().err


def test_a_step_is_timed_against_a_bare_pass(tmp_path: Path, model_folder: Path) -> None:
    config = write_config(tmp_path, model_folder)
    timing.step(argparse.Namespace(config=str(config), repeats=2, results=str(tmp_path / "results")))
    rows = json.loads((tmp_path / "results" / "step.json").read_text())
    assert list(rows) == ["expected", "reinforce", "ppo"]
    assert all(row["step_s"] > 0 and row["bare_s"] > 0 and row["ratio"] > 0 for row in rows.values())


def test_a_sweep_trains_what_is_missing_and_measures_all(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model_folder)
    monkeypatch.setattr(sweeps, "RUNS", tmp_path / "bench")
    arguments = argparse.Namespace(only=None, seeds="0,1", overrides=[])
    variants = [Variant("plain", ()), Variant("reinforce", ("train.estimator=reinforce",))]
    folders = sweeps._train_all(str(config), variants, arguments)
    assert [(name, seed) for name, seed, _ in folders] == [
        (name, seed) for seed in (0, 1) for name in ("plain", "reinforce")
    ]
    made = [(folder / "steering" / "dso_model.safetensors").stat().st_mtime_ns for _, _, folder in folders]
    sweeps._train_all(str(config), variants, arguments)
    assert made == [(folder / "steering" / "dso_model.safetensors").stat().st_mtime_ns for _, _, folder in folders]
    data = sweeps.load_decisions(str(tmp_path / "letters.jsonl")).select(split="test")
    sweeps._measure_all(folders, data, "test", tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["variant"], row["seed"], row["scale"]) for row in rows][:2] == [("base", None, 0.0), ("plain", 0, 1.0)]
    assert len(rows) == 5 and rows[0]["kl"] == 0.0 and all(row["kl"] > 0 for row in rows[1:])
    assert len(capsys.readouterr().out.strip().splitlines()) == 6
