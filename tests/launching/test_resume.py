"""A run that was stopped and resumed ends as one that was not, to the last bit; what cannot be resumed is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import FILES, config_of, outcome, rows_of, steps_of
from small_runs import contents

import dso
import launch.run.opening
import launch.run.report
from dso.decisions.decision import DecisionError
from dso.errors import UserError
from dso.evaluation.evaluator import Evaluator
from launch.config.schema import TrainConfig, load_config, resolved_yaml
from launch.run.folder import RunError, Stopped
from launch.run.train import Result, report, train
from trainers.callbacks import Selection
from trainers.ppo import SteeringPPO
from trainers.state.saved import has_state, saved_states


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[TrainConfig, Result]:
    """One run of six steps, whole; not to be written to."""
    config = config_of(tmp_path_factory.mktemp("run"), model_folder)
    return config, train(config, name="unused", quiet=True)


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """A signal in the middle of a step."""
    real = SteeringPPO.train

    def interrupted(self: SteeringPPO) -> None:
        if self.steps_done == step:
            os.kill(os.getpid(), number)
        real(self)

    monkeypatch.setattr(SteeringPPO, "train", interrupted)


def disturb() -> None:
    """Another process has its generators elsewhere."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


# Stopped in good order


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [3, 4, 6])  # between two measurements, at one, and at the end
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: tuple[TrainConfig, Result],
    step: int,
    number: int,
) -> None:
    config = config_of(tmp_path, model_folder)
    with monkeypatch.context() as patch:
        signal_at(patch, step, number)
        with pytest.raises(Stopped) as caught:
            train(config, name="x", quiet=True)
    folder = tmp_path / "runs" / "letters"
    assert str(caught.value) == (
        f"stopped after step {step} of 6; {folder} has everything so far. Go on with the same command and --resume"
    )
    assert caught.value.preempted == (number == signal.SIGTERM)
    assert saved_states(folder / "state")[0].name == f"step-{step}.safetensors"
    assert not (folder / "steering").exists()
    disturb()
    result = train(config, name="x", resume=True, quiet=True)
    assert outcome(result.folder) == outcome(run[1].folder)
    assert {name.partition("-")[0] for name in contents(result.folder)} == {name.partition("-")[0] for name in FILES}


@pytest.mark.parametrize("at", [1, 2, 3])  # validations of a trained steering: after steps 2, 4 and 6
def test_a_validation_is_not_waited_for(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[TrainConfig, Result], at: int
) -> None:
    config = config_of(tmp_path, model_folder)
    real, seen = Evaluator.curve, []

    def preempted(self: Evaluator, scales: list[float]) -> Any:
        seen.extend(scales)
        if seen.count(1.0) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, scales)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "curve", preempted)
        with pytest.raises(Stopped, match=f"stopped after step {2 * at} of 6"):
            train(config, name="x", quiet=True)
    folder = tmp_path / "runs" / "letters"
    assert len([row for row in rows_of(folder) if "eval/kl" in row]) == at  # the base's and those before
    disturb()
    assert outcome(train(config, name="x", resume="auto", quiet=True).folder) == outcome(run[1].folder)


def test_how_often_is_saved_changes_nothing_but_what_is_done_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[TrainConfig, Result]
) -> None:
    real = SteeringPPO.train

    class Killed(BaseException):
        pass

    def killed(self: SteeringPPO) -> None:
        real(self)
        if self.steps_done == 4:
            raise Killed

    config = config_of(tmp_path, model_folder, run__save_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(SteeringPPO, "train", killed)
        with pytest.raises(Killed):
            train(config, name="x", quiet=True)
    states = tmp_path / "runs" / "letters" / "state"
    assert [path.name for path in saved_states(states)] == ["step-3.safetensors", "step-2.safetensors"]
    config = config_of(tmp_path, model_folder, run__save_steps=1)  # not what a run is made of: it may change
    result = train(config, name="x", resume=True, quiet=True)
    assert load_config(str(result.folder / "config.yaml")) == config
    assert outcome(result.folder) == outcome(run[1].folder)


def test_deterministic_mode_is_for_the_run_only(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"full_determinism": True})})
    first = train(config, name="x", quiet=True)
    assert not torch.are_deterministic_algorithms_enabled()
    before = outcome(first.folder)
    assert outcome(train(config, name="x", overwrite=True, quiet=True).folder) == before


def untouched(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {name: (data, (folder / name).stat().st_mtime_ns) for name, data in contents(folder).items()}


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_finished_run_gives_its_result_without_a_model(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, resume: Any
) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=2)
    first = train(config, name="x", quiet=True)
    before = untouched(first.folder)
    monkeypatch.setattr(launch.run.opening, "open_session", lambda *_: pytest.fail("a model was opened"))
    again = train(config, name="x", resume=resume, quiet=True)
    assert report(again) == report(first)
    assert untouched(first.folder) == before


def test_a_finished_run_that_kept_nothing_measures_nothing_more(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Selection, "broken", lambda _, row: ["any limit"] if row.step else [])
    monkeypatch.setattr(Selection, "turned_down", lambda _, row: row.scale / 2)
    config = config_of(tmp_path, model_folder, train__max_steps=2)
    folder = train(config, name="x", quiet=True).folder
    before = outcome(folder)
    history = json.loads((folder / "validation.json").read_text())
    assert [(row["step"], row["scale"]) for row in history] == [(0, 1), (2, 1), (2, 0.5), (2, 0.25), (2, 0.125)]
    (folder / "report.md").unlink()
    assert outcome(train(config, name="x", resume=True, quiet=True).folder) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_other_decisions_of_any_split_cannot_be_gone_on_with(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, split: str, finished: bool
) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=2)
    folder = train(config, name="x", quiet=True).folder
    if not finished:
        (folder / "report.md").unlink()
    before = contents(folder)
    lines = Path(config.data.set).read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if json.loads(line)["split"] == split)
    record = json.loads(lines[place])
    lines[place] = json.dumps(record | {"prompt": "So " + record["prompt"]})
    Path(config.data.set).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(launch.run.opening, "open_session", lambda *_: pytest.fail("a model was opened"))
    called = {"train": "decision set", "validation": "validation decisions", "test": "test decisions"}[split]
    with pytest.raises(UserError, match=rf"^\S+safetensors: saved with {called} letters \(.*\), now it is letters \("):
        train(config, name="x", resume=True, quiet=True)
    assert contents(folder) == before


def test_a_finished_run_can_be_measured_again(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=2)
    first = train(config, name="x", quiet=True)
    before = outcome(first.folder)
    (first.folder / "curve.json").unlink()
    assert outcome(train(config, name="x", resume=True, quiet=True).folder) == before


def test_an_interrupt_before_anything_was_learned_leaves_nothing(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Evaluator, "curve", interrupted)
    with pytest.raises(Stopped, match="^interrupted; nothing was kept$") as caught:
        train(config_of(tmp_path, model_folder), name="x", quiet=True)
    assert caught.value.preempted
    assert not (tmp_path / "runs" / "letters").exists()


def test_sigterm_while_the_model_is_loaded_changes_nothing(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.run.opening, "open_session", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="nothing was changed") as caught:
        train(config_of(tmp_path, model_folder), name="x", quiet=True)
    assert caught.value.preempted
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_measuring_keeps_what_was_learned(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(launch.run.report, "scale_figure", lambda *_, **__: os.kill(os.getpid(), number))
        with pytest.raises(Stopped, match="interrupted; .*letters has what was done; go on .* --resume") as caught:
            train(config, name="x", quiet=True)
    assert caught.value.preempted == (number == signal.SIGTERM)
    assert (train(config, name="x", resume=True, quiet=True).folder / "report.md").is_file()


# Nothing to go on from


def test_there_has_to_be_something_to_resume(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder)
    with pytest.raises(RunError, match="nothing to resume, .* leave --resume away to start"):
        train(config, name="x", resume=True)
    (tmp_path / "runs" / "letters").mkdir(parents=True)
    with pytest.raises(RunError, match="nothing to resume, .* replace it with --overwrite"):
        train(config, name="x", resume=True)


@pytest.mark.parametrize(
    "left",
    [
        None,  # killed before the folder was made
        {},  # as it was made
        {".config.yaml.x1y2.part": "half a conf"},
        {"config.yaml": None},  # before the first state was written
        {"config.yaml": None, "metrics.jsonl": '{"step": 0}\n', "state/.step-0.safetensors.x1.part": "half"},
    ],
)
def test_auto_starts_a_run_that_was_killed_before_it_had_anything(
    tmp_path: Path, model_folder: Path, run: tuple[TrainConfig, Result], left: dict[str, str | None] | None
) -> None:
    config = config_of(tmp_path, model_folder)
    folder = tmp_path / "runs" / "letters"
    if left is not None:
        (folder / "state").mkdir(parents=True)
        for name, text in left.items():
            (folder / name).write_text(resolved_yaml(config) if text is None else text)
        if not list((folder / "state").iterdir()):
            (folder / "state").rmdir()
    result = train(config, name="x", resume="auto", quiet=True)
    assert outcome(result.folder) == outcome(run[1].folder)
    assert contents(result.folder).keys() == FILES


def test_auto_drops_no_results(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=1)
    folder = train(config, name="x", quiet=True).folder
    shutil.rmtree(folder / "state")
    before = contents(folder)
    with pytest.raises(RunError, match="has results .validation.json, .* but no state to go on from; replace"):
        train(config, name="x", resume="auto")
    assert contents(folder) == before


# What does not fit


def test_another_config_cannot_resume(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=1)
    folder = train(config, name="x", quiet=True).folder
    before = contents(folder)
    other = config_of(tmp_path, model_folder, train__max_steps=2, train__seed=3)
    for resume in (True, "auto"):
        with pytest.raises(RunError, match="with another config: train.max_steps was 1 and is 2 .and 1 more."):
            train(other, name="x", resume=resume)
    shutil.rmtree(folder / "state")
    for name in ("validation.json", "curve.json", "curve.png", "report.md"):
        (folder / name).unlink()
    shutil.rmtree(folder / "steering")
    with pytest.raises(RunError, match="with another config"):
        train(other, name="x", resume="auto")
    assert (folder / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


def test_other_decisions_or_a_damaged_state_cannot_resume(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=1)
    folder = train(config, name="x", quiet=True).folder
    before = contents(folder)
    data = Path(config.data.set).read_text()
    Path(config.data.set).write_text(data.replace("The nurse is", "A nurse is"))
    with pytest.raises(UserError, match="saved with decision set letters"):
        train(config, name="x", resume=True)
    assert contents(folder) == before
    Path(config.data.set).write_text(data)
    for name in ("state/step-0.safetensors", "state/step-1.safetensors"):
        (folder / name).write_bytes(before[name][:-9])
    for resume in (True, "auto"):
        with pytest.raises(UserError, match="no saved state is usable: .*step-1.*; .*step-0"):
            train(config, name="x", resume=resume)
    for name in ("state/step-0.safetensors", "state/step-1.safetensors"):
        (folder / name).write_bytes(before[name])
    (folder / "config.yaml").unlink()
    with pytest.raises(RunError, match="cannot be resumed, as its config is of no use here: .*cannot be read"):
        train(config, name="x", resume=True)


def test_a_run_of_another_version_is_refused(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=1)
    before = contents(train(config, name="x", quiet=True).folder)
    was = dso.__version__
    monkeypatch.setattr(dso, "__version__", "7.0")
    with pytest.raises(UserError, match=f"saved by dso {was} .*, this is dso 7.0 .*; go on with that version, or "):
        train(config, name="x", resume="auto")
    assert contents(tmp_path / "runs" / "letters") == before


def test_what_is_passed_over_or_differs_is_told(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, model_folder)
    folder = train(config, name="x", quiet=True).folder
    (folder / "state/step-6.safetensors").write_bytes(b"half")
    (folder / "metrics.jsonl").write_text("")
    monkeypatch.setattr("transformers.__version__", "0.1")
    train(config, name="x", resume=True)
    said = capsys.readouterr().err.splitlines()
    for pattern in (
        r".*/state/step-6\.safetensors: .*; going on from step 4 instead",
        r"not bit for bit the run that was stopped: transformers \S+ then and 0\.1 now",
        r".*/metrics\.jsonl: \d+ bytes of earlier records are missing",
    ):
        assert any(re.fullmatch(pattern, line) for line in said), pattern
    assert steps_of(folder) == [100, 120]


def test_a_bad_decision_in_mid_run_is_told_with_what_was_kept(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SteeringPPO.train

    def fails(self: SteeringPPO) -> None:
        if self.steps_done == 3:
            raise DecisionError("decision 'x': two candidates have the same tokens")
        real(self)

    monkeypatch.setattr(SteeringPPO, "train", fails)
    with pytest.raises(DecisionError):
        train(config_of(tmp_path, model_folder), name="x", quiet=True)
    assert has_state(tmp_path / "runs" / "letters" / "state")
