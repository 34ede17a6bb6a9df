"""``dso freeform`` from a config to a run's folder, what it refuses before it loads a model, and measuring alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_worker import keep_last
from answering import TOKENS, write_run

import launch.run.opening
import launch.run.train
from dso.decisions.matching import Matcher
from dso.evaluation.report import ScalePoint
from dso.steering.model import Steering
from launch.cli import main
from launch.config.schema import TrainConfig, load_config
from launch.run.trainer import open_matcher
from tools.bench.cli import main as bench
from trainers.grpo import GRPOTrainer, SteeredAnswers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    config = write_run(folder, train__max_steps=4, constraints__kl_budget=5.0)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        assert main(["freeform", str(config), "--quiet"]) == 0
    return folder / "runs/letters", "\n".join(lines)


def test_a_run_leaves_its_evidence(run: tuple[Path, str]) -> None:
    folder, said = run
    files = {"answers.jsonl", "config.yaml", "curve.json", "curve.png", "metrics.jsonl", "report.md", "validation.json"}
    assert {path.name for path in folder.iterdir()} == {*files, "state", "steering", "times.jsonl"}
    assert load_config(str(folder / "config.yaml")).train.max_steps == 4
    assert "name nobody" in said
    assert str(folder / "steering") in said
    assert "of the answers name nobody" in (folder / "report.md").read_text("utf-8")


def test_a_run_that_keeps_nothing_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path, train__max_steps=2, constraints__kl_budget=1e-9)
    assert main(["freeform", str(config)]) == 0
    assert "none of 1 measured steps was kept (KL above 1e-09: 1" in capsys.readouterr().err
    steering = Steering.from_pretrained(tmp_path / "runs/letters/steering")
    assert not any(bool(value.any()) for value in steering.tensors().values())


def test_the_steering_is_one_like_any_other_with_the_measured_curve(run: tuple[Path, str]) -> None:
    folder, _ = run
    steering = Steering.from_pretrained(folder / "steering")
    assert any(bool(value.any()) for value in steering.tensors().values())
    points = [ScalePoint.from_json(record) for record in steering.config.scale_curve]
    assert [point.scale for point in points] == [0.0, 1.0]
    assert points[0].kl == 0.0
    assert points[1].kl > 0.0
    assert "sampled at temperature 1" in (folder / "steering/README.md").read_text("utf-8")


def test_the_curve_is_counted_from_the_answers(run: tuple[Path, str]) -> None:
    folder, _ = run
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    curve = {record["scale"]: record for record in json.loads((folder / "curve.json").read_text("utf-8"))}
    for scale, point in curve.items():
        said = [r for r in records if r["scale"] == scale and "/fact" not in r["id"]]
        assert len(said) == 16
        assert all(len(r["answers"]) == len(r["groups"]) == 4 for r in said)
        nobody = [group == "abstain" for r in said for group in r["groups"]]
        assert point["bias"]["abstention"] == pytest.approx(sum(nobody) / len(nobody))
        for context, shares in point["bias"]["preferences"].items():
            named = [g for r in said if f"/{context}/" in r["id"] for g in r["groups"] if g != "abstain"]
            if named:
                assert shares["female"] == pytest.approx(named.count("female") / len(named))


def test_steps_and_validations_are_recorded(run: tuple[Path, str]) -> None:
    folder, _ = run
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [r["step"] // 20 for r in records if "train/reward" in r] == [1, 2, 3, 4]
    assert [r["step"] // 20 for r in records if "eval/bias" in r] == [0, 2, 4]
    assert all(r["train/kl_coefficient"] > 0 for r in records if "train/reward" in r)
    history = json.loads((folder / "validation.json").read_text("utf-8"))
    assert [row["step"] for row in history if row["scale"] == 1] == [0, 2, 4]
    assert history[0]["kl"] == 0.0
    assert history[0]["answer_mass"] == 1.0


def test_a_steering_is_measured_without_training(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, said = run
    config = folder.parents[1] / "own.yaml"
    assert main(["freeform", str(config), "--measure", str(folder / "steering"), "--quiet"]) == 0
    table = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith(("0.00", "1.00"))]
    assert len(rows) == 4  # bias, and what it costs
    assert all(row in table for row in rows)  # the same decisions and seed: the same answers
    assert main(["freeform", str(config), "--measure", "none", "--quiet"]) == 0
    bare = capsys.readouterr().out
    assert [row.split() in [line.split() for line in bare.splitlines()] for row in rows] == [True, False, True, False]


def test_an_existing_run_is_not_replaced_unasked(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    assert main(["freeform", str(folder.parents[1] / "own.yaml"), "train.max_steps=1"]) == 2
    assert "was trained with another config: train.max_steps was 4 and is 1; " in capsys.readouterr().err
    assert main(["freeform", str(folder.parents[1] / "own.yaml")]) == 2
    assert (
        "exists; resume it with --resume, replace it with --overwrite, or set run.run_name" in capsys.readouterr().err
    )


def test_what_leaves_the_budget_is_not_kept(tmp_path: Path) -> None:
    config = write_run(tmp_path, constraints__kl_budget=1e-6, train__optimizer__learning_rate=0.05)
    assert main(["freeform", str(config), "--quiet"]) == 0
    steering = Steering.from_pretrained(tmp_path / "runs/letters/steering")
    assert not any(bool(value.any()) for value in steering.tensors().values())  # the base model is what is inside


def test_rloo_is_another_estimator_of_the_same_run(tmp_path: Path) -> None:
    config = write_run(
        tmp_path, train__estimator="rloo", train__gradient_accumulation_steps=2, constraints__sparsity=0.01
    )
    assert main(["freeform", str(config), "--quiet", "evaluation.scales=[0.5,1]"]) == 0
    points = json.loads((tmp_path / "runs/letters/curve.json").read_text("utf-8"))
    assert [point["scale"] for point in points] == [0.0, 0.5, 1.0]


def test_the_benchmark_measures_a_run_of_its_own_and_other_steerings(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    config, other = folder.parents[1] / "own.yaml", str(folder / "steering")
    monkeypatch.chdir(tmp_path)
    asked = ["freeform", "--config", str(config), "--also", other, "--results", str(tmp_path)]
    assert bench([*asked, "train.max_steps=1"]) == 0
    rows = json.loads((tmp_path / "freeform.json").read_text("utf-8"))
    assert [(row["steering"], row["scale"]) for row in rows] == [("base", 0.0), ("grpo s0", 1.0), (other, 1.0)]
    curve = json.loads((folder / "curve.json").read_text("utf-8"))  # of the other one, measured alike
    assert rows[0]["bias"]["paper"] == pytest.approx(curve[0]["bias"]["paper"])
    assert rows[2]["bias"]["paper"] == pytest.approx(curve[1]["bias"]["paper"])
    table = capsys.readouterr().out
    metrics = tmp_path / "runs/bench/freeform-own-s0/metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    assert bench([*asked, "train.max_steps=1"]) == 0
    assert metrics.stat().st_mtime_ns == written  # what is there is not done again
    assert capsys.readouterr().out == table


# Ending early, and going on


def interrupted_at(call: int, do: Callable[..., Any]) -> Callable[..., Any]:
    """``do``, but SIGTERM comes as it is called for the so manieth time."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return do(*args, **kwargs)

    return wrapped


def ends_alike_untrained(config: Path, folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed without a step, a run ends with what the finished one has."""
    with monkeypatch.context() as patch:
        patch.setattr(SteeredAnswers, "_sample", None)
        assert main(["freeform", str(config), "--quiet", "--resume"]) == 0
    for name in ("curve.json", "answers.jsonl", "metrics.jsonl", "validation.json"):
        assert (folder / name).read_text("utf-8") == (finished / name).read_text("utf-8"), name


def test_a_signal_while_it_measures_loses_nothing_and_resume_finishes(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, train__max_steps=4, constraints__kl_budget=5.0)
    folder, finished = tmp_path / "runs/letters", run[0]
    with monkeypatch.context() as patch:
        patch.setattr(launch.run.train, "measure", interrupted_at(1, launch.run.train.measure))
        assert main(["freeform", str(config), "--quiet"]) == 75
    said = capsys.readouterr().err
    assert f"interrupted; {folder} has what was done; go on with the same command and --resume" in said
    kept, wanted = (Steering.from_pretrained(f / "steering").tensors() for f in (folder, finished))
    assert all(torch.equal(kept[key], value) for key, value in wanted.items())
    ends_alike_untrained(config, folder, finished, monkeypatch)


def test_an_error_while_it_measures_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "report.md")

    monkeypatch.setattr(launch.run.train, "write_results", full)
    assert main(["freeform", str(write_run(tmp_path)), "--quiet"]) == 2
    folder = tmp_path / "runs/letters"
    assert f"report.md: No space left on device; {folder} has what was done" in capsys.readouterr().err
    assert Steering.from_pretrained(folder / "steering").tensors()


def test_a_stop_in_the_last_step_is_heeded_and_nothing_is_done_again(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, train__max_steps=4, constraints__kl_budget=5.0)
    folder, finished = tmp_path / "runs/letters", run[0]
    with monkeypatch.context() as patch:
        patch.setattr(SteeredAnswers, "_sample", interrupted_at(4, SteeredAnswers._sample))
        assert main(["freeform", str(config), "--quiet"]) == 75
    assert f"stopped after step 4 of 4; {folder} has everything so far" in capsys.readouterr().err
    ends_alike_untrained(config, folder, finished, monkeypatch)


def test_a_finished_run_gives_its_result_without_a_model(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(launch.run.opening, "open_session", lambda *_: pytest.fail("a model was opened"))
    assert main(["train", str(folder.parents[1] / "own.yaml"), "--resume", "auto"]) == 0
    captured = capsys.readouterr()
    assert said.endswith(captured.out.rstrip())  # libraries print before it
    assert captured.err == f"{folder} is finished; this is its result\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SteeredAnswers, "release", keep_last)
    configs = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        changes = {"train__estimator": estimator, "train__max_steps": 6, "constraints__kl_budget": 0.5}
        configs.append(
            write_run(tmp_path / name, train__preference={"estimate": "blocked"}, evaluation__scales=[1.0], **changes)
        )
    whole, parts = (path.parent / "runs/letters" for path in configs)
    assert main(["train", str(configs[0]), "--quiet"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(SteeredAnswers, "_sample", interrupted_at(3, SteeredAnswers._sample))
        assert main(["train", str(configs[1]), "--quiet"]) == 75
    assert f"stopped after step 3 of 6; {parts} has everything so far" in capsys.readouterr().err
    assert not (parts / "steering").exists()
    assert main(["train", str(configs[1]), "--quiet", "--resume"]) == 0
    learned, wanted = (Steering.from_pretrained(folder.parent / "last").tensors() for folder in (parts, whole))
    assert any(bool(value.any()) for value in wanted.values())
    assert all(torch.equal(learned[key], value) for key, value in wanted.items())
    for name in ("metrics.jsonl", "validation.json", "curve.json", "answers.jsonl"):
        assert (parts / name).read_text("utf-8") == (whole / name).read_text("utf-8"), name


def test_a_state_of_other_decisions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    assert main(["freeform", str(config), "--quiet"]) == 0
    text = (tmp_path / "letters.jsonl").read_text("utf-8")
    (tmp_path / "letters.jsonl").write_text(text.replace('"prompt": "', '"prompt": "So ', 1), "utf-8")
    assert main(["freeform", str(config), "--quiet", "--resume"]) == 2
    assert "saved with decision set letters (" in capsys.readouterr().err


def test_checkpointing_leaves_dropout_off(tmp_path: Path) -> None:
    config = write_run(tmp_path, train__gradient_checkpointing=True, train__max_steps=1, evaluation__scales=[1.0])
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "attention_dropout": 0.3}), "utf-8")
    assert main(["freeform", str(config), "--quiet"]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs/letters/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [r["train/kl"] for r in records if "train/kl" in r] == [pytest.approx(0.0, abs=1e-6)]


# What a run will be


def test_a_dry_run_says_what_is_sampled_without_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    assert main(["train", str(config), NO_MODEL, "--dry-run", "--ranks", "2"]) == 0
    said = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert said["run"].endswith(str(tmp_path / "runs/letters"))
    steps = "2 steps x 20 decisions (16 ambiguous, 4 unambiguous) x 4 answers = 160 answers of up to 3 tokens"
    assert steps in said["training"]
    assert said["each process"].endswith("40 answers a step")  # 20 x 4 of 2 processes
    assert said["validation"].endswith("2 times 24 decisions x 4 answers")
    assert said["test"].endswith("2 scales x 24 decisions x 4 answers")
    assert not (tmp_path / "runs").exists()


# Bad input


def test_a_trl_without_what_is_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(GRPOTrainer, "_generate_single_turn")
    assert main(["train", str(write_run(tmp_path)), NO_MODEL]) == 2
    assert "has no GRPOTrainer._generate_single_turn" in capsys.readouterr().err


NO_MODEL = "model.name=no/where"  # a mistake that is found before the model is looked for does not speak of it


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.freeform.max_completion_length=0", "train.freeform.max_completion_length: must be at least 1, found 0"),
        ("train.freeform.num_generations=1", "train.freeform.num_generations: must be at least 2"),
        ("train.gradient_accumulation_steps=7", "steps: must divide the 80 answers of a step"),
        ("train.ppo.n_epochs=2", "train.ppo.n_epochs: has no effect, as train.estimator is grpo"),
        ("train.estimator=ppo", "train.estimator: is ppo, which scores candidates"),
        ("train.freeform.temperature=0", "train.freeform.temperature: must be above 0"),
        ("matcher.rule=last", "matcher.rule: expected one of first, only, start"),
        ("matcher.after=''", "the matcher's after is empty"),
        ("matcher.abstentions=[a, '']", "an empty phrase"),
        ("matcher.ignore_case=yes", "matcher.ignore_case: expected true or false"),
        ("constraints.beta=1", "constraints.beta: has no effect, as constraints.kl_budget is 0.05"),
        ("evaluation.samples=0", "evaluation.samples: must be at least 1"),
        ("run.run_name=a/b", "must be a name, not a path"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path)
    assert main(["freeform", str(config), NO_MODEL, override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dso: ")
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_a_matcher_that_can_name_nobody_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path)
    text = (tmp_path / "letters.jsonl").read_text("utf-8")
    letters = {c["text"] for c in json.loads(text.splitlines()[0])["candidates"]}
    first, second = sorted(letters)
    (tmp_path / "letters.jsonl").write_text(text.replace(f'"text": "{second}"', f'"text": "{first.lower()}"'), "utf-8")
    assert main(["freeform", str(config), NO_MODEL, "matcher.ignore_case=true"]) == 2
    assert "can never name the candidate" in capsys.readouterr().err


def test_answers_that_processes_cannot_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["freeform", str(write_run(tmp_path)), NO_MODEL]) == 2
    assert "which 3 processes cannot share evenly" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"zero_optimization": {"stage": 3}}', "zero_optimization.stage is 3, expected 0"),
        ('{"zero_optimization": 0}', "zero_optimization: expected an object, found int"),
        ('{"bf16": true}', "bf16: expected an object, found bool"),
        ('{"bf16": {"enabled": true}}', "bf16 is switched on, but model.dtype is float32"),
        ('{"train_batch_size": 64}', "train_batch_size is 64, but the config says 80"),
        ('{"optimizer": {"type": "Adam"}}', "optimizer: the optimiser is set by train.optimizer"),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_is_refused(
    settings: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text(settings, encoding="utf-8")
    assert main(["freeform", str(write_run(tmp_path)), NO_MODEL, "--deepspeed", str(tmp_path / "ds.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_names_nobody_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    assert main(["freeform", str(config), "matcher.after=Zq!", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert f"answers names a candidate (4 answers of up to {TOKENS} tokens, " in error
    assert not (tmp_path / "runs/letters").exists()


# The config


def test_the_defaults_ask_the_questions_that_are_shipped() -> None:
    config = TrainConfig(train={"estimator": "grpo"})
    assert config.data.options == {"texts": "questions"}
    assert open_matcher(config) == Matcher()
