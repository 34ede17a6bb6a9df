"""The benchmarks run, on a tiny model; what they compute is checked by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import write_config

from dso.evaluation.bias import BiasParts, BiasReport
from dso.evaluation.comparison import Cuts
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.report import ScalePoint
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.run.measure import scale_point
from launch.run.train import last_step
from tools.bench import estimators, sweeps, timing
from tools.bench.cli import build_parser, main
from tools.bench.estimators import decisions_until
from tools.bench.sweeps import Variant


def test_decisions_until_a_figure_first_halves() -> None:
    history = [{"gap": b, "decisions": n} for b, n in ((0.4, 0), (0.3, 100), (0.1, 200), (0.25, 300), (0.05, 400))]
    assert decisions_until(history, "gap", 0.5) == 150
    assert decisions_until(history, "gap", 0.75) == 100
    assert decisions_until(history, "gap", 0.2) == 385  # 0.08 on the way from 0.25 to 0.05
    assert decisions_until(history, "gap", 0.1) is None


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
    assert list(rows) == ["regression", "expected", "reinforce", "ppo"]
    assert all(row["step_s"] > 0 and row["bare_s"] > 0 and row["ratio"] > 0 for row in rows.values())


def test_the_engine_is_timed_against_generate(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Steering.for_model(Backbone.load(str(model_folder)).model).save_pretrained(tmp_path / "steering")
    options = ["--requests", "3", "--tokens", "2", "--rounds", "1", "--results", str(tmp_path)]
    assert main(["serve", str(tmp_path / "steering"), "--model", str(model_folder), *options]) == 0
    assert "32 rows: 3 of 3 answers are those of generate" in capsys.readouterr().out
    speeds = json.loads((tmp_path / "serve.json").read_text())
    assert list(speeds) == ["generate, one by one", "engine, 1 rows", "engine, 8 rows", "engine, 32 rows"]
    assert all(speed > 0 for speed in speeds.values())


def test_a_sweep_trains_what_is_missing_and_measures_all(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model_folder)
    monkeypatch.setattr(sweeps, "RUNS", tmp_path / "bench")
    arguments = argparse.Namespace(only=None, seeds="0,1", overrides=[])
    variants = [Variant("plain", ()), Variant("reinforce", ("train.estimator=reinforce",))]
    folders = sweeps.train_all(str(config), variants, arguments)
    assert [(name, seed) for name, seed, _ in folders] == [
        (name, seed) for seed in (0, 1) for name in ("plain", "reinforce")
    ]
    made = [(folder / "steering" / "dso_model.safetensors").stat().st_mtime_ns for _, _, folder in folders]
    sweeps.train_all(str(config), variants, arguments)
    assert made == [(folder / "steering" / "dso_model.safetensors").stat().st_mtime_ns for _, _, folder in folders]
    data = sweeps.load_decisions(str(tmp_path / "letters.jsonl")).select(split="test")
    sweeps.measure_all(folders, data, "test", tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["variant"], row["seed"], row["scale"]) for row in rows][:2] == [("base", None, 0.0), ("plain", 0, 1.0)]
    assert len(rows) == 5 and rows[0]["kl"] == 0.0
    tensors = (Steering.from_pretrained(folder / "steering").tensors() for _, _, folder in folders)
    moved = [any(bool(value.any()) for value in own.values()) for own in tensors]  # else the base model was kept
    assert any(moved) and [row["kl"] > 0 for row in rows[1:]] == moved
    said = capsys.readouterr().out
    assert len(said.strip().splitlines()) == 8  # a title, the columns and their rule
    monkeypatch.setattr(sweeps.Backbone, "load", lambda *_, **__: pytest.fail("nothing is left to measure"))
    sweeps.measure_all(folders, data, "test", tmp_path / "results.json")
    assert capsys.readouterr().out == said
    with pytest.raises(pytest.fail.Exception, match="nothing is left"):  # other decisions are no old acquaintances
        sweeps.measure_all(folders, data.select(kind="ambiguous"), "test", tmp_path / "results.json")


def test_estimators_are_compared_by_what_the_last_step_left(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, model_folder)
    monkeypatch.setattr(sweeps, "RUNS", tmp_path / "bench")
    ((_, _, folder),) = sweeps.train_all(
        str(config),
        [Variant("plain", ("constraints.kl_budget=0.01",))],  # which the last step is beyond, so another is kept
        argparse.Namespace(only=None, seeds="0", overrides=[]),
    )
    history = json.loads((folder / "validation.json").read_text())
    last = [row for row in history if row["scale"] == 1][-1]  # as it was, before it was turned down
    assert last["kl"] > 0.01
    data = sweeps.load_decisions(str(tmp_path / "letters.jsonl")).select(split="validation")
    backbone = Backbone.load(str(model_folder))
    with last_step(folder).on(backbone.model) as handle:
        found = scale_point(1.0, Evaluator(backbone, data, handle).measure(), data, None, 1)
    assert (found.kl, found.bias.gap.value) == pytest.approx((last["kl"], last["gap"]), abs=1e-5)


def test_bias_is_compared_at_equal_kl() -> None:
    scales = []

    def measure(scale: float) -> SimpleNamespace:  # whose KL is 0.8 times the square of the scale
        scales.append(scale)
        return SimpleNamespace(scale=scale, kl=0.8 * scale**2)

    assert estimators._at_kl(measure, 0.2).scale == pytest.approx(0.5)
    assert scales == [1.0, pytest.approx(0.5)]
    assert estimators._at_kl(measure, 0.9).scale == 1.0  # a steering that spends less is not turned up
    assert estimators._at_kl(lambda scale: SimpleNamespace(scale=scale, kl=2 * scale), 0.5).kl == pytest.approx(
        0.5, 0.05
    )


def test_estimators_are_listed_by_seed_with_the_mean_of_their_decisions() -> None:
    def measured(gap: float, scale: float) -> dict:
        parts = BiasParts(
            bias=Estimate(gap, 0.0, 1.0), context_part=UNMEASURED, common_part=UNMEASURED,
            gap=Estimate(gap, 0.0, 2 * gap), square=gap**2,
        )  # fmt: skip
        report = BiasReport(
            probability=parts, log_odds=parts, order_effect=0.4, paper=0.1, paper_fair=0.1, abstention=0.0,
            target={}, preferences={}, context_bias={}, n_decisions=1, n_contexts=1, n_units=1,
        )  # fmt: skip
        cut = Estimate(1 - gap / 0.2, 0.5, 0.9)
        cuts = Cuts(bias=cut, context_part=cut, gap=cut, log_odds=cut, context_part_log_odds=cut) if scale else None
        return ScalePoint(
            scale=scale, bias=report, accuracy=Estimate(0.75, 0.6, 0.8), answer_mass=1.0, kl=0.05 * scale, cut=cuts
        ).to_json()

    def row(variant: str, seed: int, halved: int | None, gap: float) -> dict:
        return {
            "variant": variant,
            "seed": seed,
            "halved_at": {"bias": 50, "gap": halved},
            "at_kl": measured(gap, 1.0),
            "history": [{"decisions": 900, "gap": 0.01, "kl": 0.2, "accuracy": 0.5}],
        }

    rows = [row("expected", 0, 100, 0.04), row("expected", 1, 300, 0.02), row("published", 0, None, 0.1)]
    lines = estimators.table({"kl": 0.05, "base": measured(0.2, 0.0), "rows": rows}).splitlines()
    assert lines[0].startswith("base: gap 0.200 [0.000, 0.400], log-odds 0.200 [0.000, 1.000], order 0.40, accuracy")
    first = "expected 0 50 100 0.050 0.040 [0.000, 0.080] 80% [50, 90] 0.040 [0.000, 1.000] 80% [50, 90] 0.40 0.750"
    assert " ".join(lines[3].split()).startswith(first)
    assert lines[5].split() == ["expected", "mean", "50", "200"]
    assert lines[6].split()[:5] == ["published", "0", "50", ">", "900"]
