"""The embedded vision-language model: it ships, it sees, and it has the biases that were planted in it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dso.decisions.decision import DecisionSet
from dso.decisions.images import open_image
from dso.decisions.sets import load_decisions
from dso.decisions.sets.scenes import ASSOCIATIONS
from dso.evaluation.bias import accuracy, bias_report
from dso.evaluation.evaluator import Evaluator
from dso.models.backbone import Backbone
from dso.models.embedded import SHIPPED
from dso.steering.sites import resolve_sites
from launch.config.schema import load_config
from launch.run.constants import aimed_kl
from tools.bench import scenes, sweeps

FOLDER = SHIPPED["vlm-scenes"]
UNITS = {"units": {"test": 12}, "unambiguous": {"test": 24}, "splits": ["test"]}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("vlm-scenes", max_tokens=4096)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module", params=list(ASSOCIATIONS))
def measured(request, backbone: Backbone, pictures: Path) -> tuple[str, np.ndarray, DecisionSet]:
    decisions = load_decisions("scenes", association=request.param, pictures=pictures, **UNITS)
    return request.param, Evaluator(backbone, decisions).measure(0.0).policy, decisions


def test_weights_are_there_and_small(backbone: Backbone) -> None:
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in FOLDER.iterdir()
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000
    language = 2 * 61 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 160 + 2 * 64) + 64  # 61 words; layers; the last norm
    layer = 4 * (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64) + 4 * 64
    tower = 64 + 3 * 16 * 16 * 64 + 17 * 64 + 4 * 64 + 2 * layer  # class, patches, positions, two norms, layers
    projector = 2 * (64 * 64 + 64)
    assert sum(p.numel() for p in backbone.model.parameters()) == language + tower + projector == 275_392


def test_it_has_the_sites_of_a_llava_model(backbone: Backbone) -> None:
    layers = [
        f"model.language_model.layers.{n}.{norm}_layernorm" for n in range(3) for norm in ("input", "post_attention")
    ]
    assert sorted(resolve_sites(backbone.model)) == sorted([*layers, "model.language_model.norm"])


def assert_sees(policy: np.ndarray, decisions: DecisionSet) -> None:
    assert accuracy(policy, decisions).value >= 0.9
    sides = [int(d.answer) for d in decisions if not d.ambiguous]
    assert np.mean(sides) == 0.5


def assert_biased(name: str, policy: np.ndarray, decisions: DecisionSet) -> None:
    found = bias_report(policy, decisions, bootstrap=200)
    assert found.bias.low > 0.2
    assert found.context_part.value < 2 * ASSOCIATIONS[name].share - 1 + 0.1  # 0.85 against 0.15 is a bias of 0.7
    assert found.paper > 2 * found.paper_fair
    assert found.gap is not None and found.gap.value > 0.9 * found.paper  # contexts lean the way that was planted


def test_it_sees_what_the_picture_shows(measured) -> None:
    _, policy, decisions = measured
    assert_sees(policy, decisions)


def test_it_has_the_planted_bias(measured) -> None:
    assert_biased(*measured)


@pytest.mark.slow
def test_the_script_makes_such_a_model(tmp_path: Path, pictures: Path) -> None:
    command = [sys.executable, "-m", "tools.embedded_vlm", "--out", tmp_path / "model", "--work", tmp_path / "work"]
    subprocess.run(command, check=True, timeout=3600)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in FOLDER.iterdir()}
    made = Backbone.load(str(tmp_path / "model"), max_tokens=4096)
    for name in ASSOCIATIONS:
        decisions = load_decisions("scenes", association=name, pictures=pictures, **UNITS)
        policy = Evaluator(made, decisions).measure(0.0).policy
        assert_sees(policy, decisions)
        assert_biased(name, policy, decisions)


def test_it_describes_a_picture(backbone: Backbone, pictures: Path) -> None:
    decisions = load_decisions("scenes", pictures=pictures, **UNITS)
    question = [{"role": "user", "content": "<image>\nDescribe the picture."}]
    told = backbone.generate(question, images=decisions[0].images, max_new_tokens=24)
    assert told.count(" in ") >= 2 and {"woman", "man"} <= set(told.split())


def test_the_config_is_that_of_the_model_and_the_set() -> None:
    config = load_config("vlm-scenes")
    assert (config.model.name, config.data.set) == ("vlm-scenes", "scenes")
    assert aimed_kl(config) > 0.34  # less does not reach parity


def test_the_benchmark_trains_measures_and_draws(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(scenes, "load_decisions", lambda name, **options: load_decisions(
        name, pictures=pictures, units={"test": 12}, unambiguous={"test": 12}, **options
    ))  # fmt: skip
    small = "{association: gender, units: {train: 12, validation: 4}, unambiguous: {train: 4, validation: 4}}"
    overrides = [
        f"data.options={small}",
        "train.max_steps=12",
        "train.unambiguous=8",
        "train.optimizer.fisher_batches=2",
    ]
    overrides.append("evaluation.eval_steps=4")
    arguments = argparse.Namespace(
        only=None, seeds="0", overrides=overrides, results=str(tmp_path), sheet=str(tmp_path / "sheet.png")
    )
    scenes.scenes(arguments)
    base, steered = json.loads((tmp_path / "scenes-test.json").read_text())["rows"]
    assert steered["kl"] > 0
    assert {path.name for path in tmp_path.glob("scenes-*.json")} == {
        "scenes-test.json", "scenes-test-contexts.json", "scenes-skin.json",
    }  # fmt: skip
    assert Image.open(tmp_path / "sheet.png").size == (824, 755)
    assert "skin\nrun" in capsys.readouterr().out


def test_a_sheet_shows_each_picture_with_its_answers(pictures: Path) -> None:
    decisions = load_decisions("scenes", pictures=pictures, **UNITS)
    policy = np.array([[0.75, 0.25], [0.0, 1.0]]), np.array([[0.5, 0.5], [1.0, 0.0]])
    import io

    made = Image.open(io.BytesIO(scenes.sheet(decisions[:2], *policy))).convert("RGB")
    pixels = np.asarray(made).astype(int)
    top, side = scenes.LINE + scenes.EDGE, scenes.PICTURE
    for number, (x, shares) in enumerate(((scenes.EDGE, (0.75, 0.5)), (2 * scenes.EDGE + side, (0.0, 1.0)))):
        shown = np.asarray(open_image(decisions[number].images[0]).resize((side, side), Image.Resampling.NEAREST))
        assert np.abs(pixels[top : top + side, x : x + side] - shown).mean() < 4  # but for the sheet's 64 colours
        for line, (colour, share) in enumerate(zip((scenes.BEFORE, scenes.AFTER), shares, strict=True), 1):
            row = pixels[top + side + line * scenes.LINE + 3 + 5, x : x + scenes.BAR]  # through the bar's middle
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            filled = np.abs(row - wanted).sum(-1) < 12
            assert filled.mean() == pytest.approx(share, abs=0.02) and filled[: filled.sum()].all()
