"""``dso calibrate``, and who uses the scale that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from serving import strong_steering
from tiny import byte_tokenizer, small_set, tiny_llama

from dso.evaluation.evaluator import Evaluator
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.cli import main
from launch.exits import EXIT_UNMET


class Case(NamedTuple):
    """A steering and what it is measured on."""

    steering: Path
    data: Path
    model: Path

    def call(self, command: str, *arguments: object) -> int:
        common = ["--set", self.data, "--model", self.model, "--quiet"]
        return main([str(word) for word in (command, self.steering, *common, *arguments)])


@pytest.fixture
def case(tmp_path: Path, model_folder: Path) -> Case:
    strong_steering(tiny_llama()).save_pretrained(tmp_path / "steering", card="# Card\n")
    small_set().write_jsonl(tmp_path / "small.jsonl")
    return Case(tmp_path / "steering", tmp_path / "small.jsonl", model_folder)


def kl_at(scale: float, split: str = "validation") -> float:
    """KL on the ambiguous decisions, without the command."""
    backbone = Backbone(tiny_llama(), byte_tokenizer(), "tiny")
    handle = strong_steering(backbone.model).attach(backbone.model, 0.0)
    decisions = small_set().select(split=split, kind="ambiguous")
    return float(Evaluator(backbone, decisions, handle).measure(scale).kl.mean())


def test_the_scale_is_written_and_used(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = (kl_at(0.5) + kl_at(0.75)) / 2
    assert case.call("calibrate", "--max-kl", limit) == 0
    said = capsys.readouterr().out
    steering = Steering.from_pretrained(case.steering)
    scale = steering.config.default_scale
    assert 0.5 < scale < 0.75
    assert kl_at(scale) <= limit < kl_at(scale + 2 / 64)
    assert f"its own scale is {scale:g} from now on, the largest scale" in said
    assert steering.card == "# Card\n"
    wanted = strong_steering(tiny_llama()).tensors()
    assert all((value == wanted[key]).all() for key, value in steering.tensors().items())
    with steering.on(tiny_llama()) as handle:
        assert handle.scale == scale
    assert case.call("evaluate", "--json", tmp_path / "points.json", "--bootstrap", 5) == 0
    assert [point["scale"] for point in json.loads((tmp_path / "points.json").read_text())] == [0.0, scale]
    assert main(["inspect", str(case.steering)]) == 0
    assert f"scale        0 to 2, {scale:g} unless one is named" in capsys.readouterr().out


def test_where_no_scale_does_nothing_is_written(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in case.steering.iterdir()}
    assert case.call("calibrate", "--max-bias", "0.0001", "--max-accuracy-loss", "0.5", "--bootstrap", 20) == EXIT_UNMET
    said = capsys.readouterr().out
    assert "none does: no scale from 0 to 2 meets the limits; the nearest is" in said
    assert "bias, upper end of its interval," in said
    assert {path.name: path.read_bytes() for path in case.steering.iterdir()} == before


def test_it_may_be_written_elsewhere(case: Case, tmp_path: Path) -> None:
    assert case.call("calibrate", "--max-perplexity", "1000", "--out", tmp_path / "mild") == 0
    assert Steering.from_pretrained(tmp_path / "mild").config.default_scale == 2.0
    assert Steering.from_pretrained(case.steering).config.default_scale == 1.0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name a limit"),
        (["--max-bias", "nan"], "--max-bias nan: expected a number from 0"),
        (["--max-accuracy-loss=-0.1"], "--max-accuracy-loss -0.1: expected a number from 0"),
        (["--max-kl", "1", "--split", "holdout"], "holdout"),
    ],
)
def test_bad_limits_are_one_line(
    case: Case, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert case.call("calibrate", *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert reason in error


def test_a_scale_cannot_be_written_to_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "someone/steering", "--max-kl", "1"]) == 2
    assert "is no folder, so the scale cannot be written there; name one with --out" in capsys.readouterr().err
