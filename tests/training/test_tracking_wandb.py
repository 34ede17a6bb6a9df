"""Training tracked by W&B itself: what its files hold, and servers that refuse, hang, and answer 500."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_config
from wandb_tools import (
    KEY,
    Logged,
    after_a_sample,
    clean_environment,
    closed_port,
    gone,
    offline_runs,
    read,
    services,
    serving,
    table,
)  # fmt: skip

import launch.run.session
import launch.run.train
from launch.config.schema import TrainConfig, load_config
from launch.run.train import Result, train
from trainers.tracking.tracker import open_tracker
from trainers.tracking.weights_and_biases import SLACK

Offline = tuple[TrainConfig, Result, Path, list[str]]
SECRETS = {"HF_TOKEN": "hf_never-to-be-seen-anywhere", "AWS_SECRET_ACCESS_KEY": "never-to-be-seen-either"}


def config_of(folder: Path, model: Path, **wandb: Any) -> TrainConfig:
    path = write_config(folder, model, run__report_to="wandb", run__wandb={"tags": ["test"]} | wandb)
    return load_config(str(path))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What the run's own records say, against the optimiser steps of 20 decisions."""
    return [(row["step"] // 20, row[name]) for row in rows_of(folder) if row.get(name) is not None]


def check_scalars(logged: Logged, folder: Path) -> None:
    for name in ("train/kl", "train/objective", "eval/bias", "eval/kl", "eval/accuracy"):
        assert expected_scalars(folder, name)
        assert logged.scalars(name) == expected_scalars(folder, name)


def check_results(path: Path, logged: Logged, folder: Path) -> None:
    """The curve, the samples and the artifact of a finished run."""
    curve = json.loads((folder / "curve.json").read_text())
    points = table(path, logged, "curve/points")
    bias = points["columns"].index("log-odds bias")
    assert [(row[0], row[bias]) for row in points["data"]] == [
        (point["scale"], pytest.approx(point["bias"]["log_odds"]["bias"][0])) for point in curve
    ]
    assert logged.config["_wandb"]["visualize"]["curve/bias"]["panel_config"]["panelDefId"] == "wandb/line/v0"
    chart = table(path, logged, "curve/bias_table")
    assert [row[1] for row in chart["data"] if row[2] == "log-odds bias"] == pytest.approx(
        [point["bias"]["log_odds"]["bias"][0] for point in curve]
    )
    samples = table(path, logged, "samples")
    assert {"prompt", "candidate", "group", "before", "after"} <= set(samples["columns"])
    assert len(samples["data"]) == 40  # the test split has 20 decisions of two candidates
    steering = logged.artifacts["steering-letters"]
    assert {*steering.aliases} == {"best", "latest"}
    assert steering.type == "steering"
    kept = {entry.path: Path(entry.local_path) for entry in steering.manifest.contents}
    assert set(kept) == {"dso_config.json", "dso_model.safetensors", "README.md"}
    assert all(local == folder.resolve() / "steering" / name for name, local in kept.items())
    selected = json.loads(steering.metadata)
    history = json.loads((folder / "validation.json").read_text())
    validation = {(row["step"], row["scale"]): row for row in history}
    assert selected["bias"] == validation[selected["step"], selected["scale"]]["bias"]
    assert logged.summary["selected/bias"] == selected["bias"]
    assert logged.summary["test/KL"] == pytest.approx(curve[-1]["kl"])


# Without a key


@pytest.fixture(scope="module")
def offline(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> tuple[TrainConfig, Result, Path, list[str]]:
    """A whole run without key and network, its home, and what it wrote to stderr."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("offline")
        home, scratch = folder / "home", folder / "t"
        scratch.mkdir()
        clean_environment(patch, home, TMPDIR=str(scratch), **SECRETS)
        said: list[str] = []
        patch.setattr(launch.run.train.tqdm, "write", lambda line, **_: said.append(line))
        config = config_of(folder, model_folder)
        patch.setattr(launch.run.train, "measure", after_a_sample(launch.run.train.measure, folder))
        return config, train(config, name="unused"), home, said


def test_an_offline_run_holds_what_was_logged(offline: Offline) -> None:
    config, result, _, _ = offline
    (path,) = offline_runs(result.folder)
    assert path.parent.name.startswith("offline-run-")
    logged = read(path)
    assert logged.exit_code == 0
    assert logged.config["train"]["max_steps"] == 6
    assert logged.config["constraints"]["kl_budget"] == 0.2
    assert logged.config["run"]["report_to"] == "wandb"
    assert logged.run.project == "dso"
    assert logged.run.display_name == "letters"
    assert list(logged.run.tags) == ["test"]
    assert logged.run.run_id == json.loads((result.folder / "wandb.json").read_text())["id"]
    for pattern in ("train/*", "eval/*"):
        assert logged.metrics[pattern] == "train/global_step"
    check_scalars(logged, result.folder)
    check_results(path, logged, result.folder)
    assert logged.stats["memory_percent"] > 0
    own = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    assert own / 2 < logged.stats["proc.memory.rssMB"] < 2 * own  # of the process that trains


def test_nothing_is_asked_warned_or_left_behind(offline: Offline) -> None:
    _, result, home, said = offline
    (path,) = offline_runs(result.folder)
    about = [line for line in said if "W&B" in line and not line.startswith("waiting")]
    assert about == [f"W&B: offline run, to be sent with: wandb sync {path.parent.resolve()}"]
    assert gone(home)
    assert list((home.parent / "t").rglob("*wandb*")) == []


def test_no_secret_is_in_any_file_of_the_run(offline: Offline) -> None:
    files = [path for path in offline[1].folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_the_command_that_is_named_sends_an_offline_run(offline: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    _, result, home, said = offline
    (line,) = [line for line in said if "wandb sync" in line]
    program, *arguments = line.split(": ")[-1].split()
    with serving("well") as server:
        clean_environment(monkeypatch, home, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name = json.loads((result.folder / "wandb.json").read_text())["id"]
    assert {run["name"] for run in server.runs} == {name}
    sent = [(row["train/global_step"], row["train/kl"]) for row in server.history if "train/kl" in row]
    assert sent == expected_scalars(result.folder, "train/kl")
    assert "steering" in {artifact["input"]["artifactTypeName"] for artifact in server.artifacts}


def test_a_resumed_run_has_the_same_id_and_its_whole_history(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_environment(monkeypatch, tmp_path / "home")
    config = config_of(tmp_path, model_folder, timeout=120.0)  # how long an early end waits for a busy machine
    folder = Path(config.run.output_dir) / "letters"
    before = launch.run.train.learn

    def interrupted(session: Any, *arguments: Any, **options: Any) -> float:
        train_once = session.trainer.train

        def trained() -> None:
            train_once()
            if session.trainer.steps_done == 3:
                os.kill(os.getpid(), signal.SIGINT)

        session.trainer.train = trained
        return before(session, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(launch.run.train.Stopped):
        patch.setattr(launch.run.train, "learn", interrupted)
        train(config, name="unused", quiet=True)
    name = json.loads((folder / "wandb.json").read_text())["id"]
    result = train(config, name="unused", resume=True, quiet=True)
    first, second = (read(path) for path in offline_runs(folder))
    assert first.run.run_id == second.run.run_id == name
    assert first.exit_code == 1
    assert [step for step, _ in first.scalars("train/kl")] == [1, 2, 3]
    check_scalars(second, result.folder)
    check_results(offline_runs(folder)[1], second, result.folder)
    assert second.exit_code == 0


# Servers


def run_online(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, url: str, timeout: float = 1.0
) -> tuple[Path, list[str], float]:
    """A run in mode online: its folder, what was said to the user, and the seconds that the tracker took at its end."""
    clean_environment(monkeypatch, tmp_path / "home", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    said: list[str] = []
    monkeypatch.setattr(launch.run.train.tqdm, "write", lambda line, **_: said.append(line))
    took: list[float] = []
    opened = launch.run.session.open_tracker

    def open_timed(*arguments: Any, **options: Any) -> Any:
        tracker = opened(*arguments, **options)
        close = tracker.close

        def timed(code: int = 0) -> None:
            started = time.monotonic()
            close(code)
            took.append(time.monotonic() - started)

        tracker.close = timed
        return tracker

    monkeypatch.setattr(launch.run.session, "open_tracker", open_timed)
    result = train(config_of(tmp_path, model, timeout=timeout), name="unused", quiet=True)
    assert (result.folder / "report.md").exists()
    assert gone(tmp_path / "home")
    return result.folder, said, took[0]


def no_key_anywhere(folder: Path) -> bool:
    return not any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("behaviour", ["refuse", "hang", "fail"])
def test_a_server_that_does_not_serve_stops_nothing(
    behaviour: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(behaviour) as server:
        url = closed_port() if behaviour == "refuse" else server.url
        folder, said, took = run_online(tmp_path, model_folder, monkeypatch, url)
    assert took < 2 * 1.0 + SLACK
    warnings = [line for line in said if line.startswith("dso:")]
    assert len(warnings) == 1
    (path,) = (run for run in offline_runs(folder) if run.parent.name.startswith("offline-run-"))
    assert f"send it later with: wandb sync {path.parent.resolve()}" in warnings[0]
    logged = read(path)
    assert logged.exit_code == 0
    check_scalars(logged, folder)
    check_results(path, logged, folder)
    assert no_key_anywhere(folder)


def test_a_server_that_serves_gets_everything_and_the_same_run_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("well") as server:
        folder, said, _ = run_online(tmp_path, model_folder, monkeypatch, server.url, timeout=60.0)
        name = json.loads((folder / "wandb.json").read_text())["id"]
        assert {run["name"] for run in server.runs} == {name}
        streamed = [(row["train/global_step"], row["train/kl"]) for row in server.history if "train/kl" in row]
        assert streamed == expected_scalars(folder, "train/kl")
        (steering,) = [a["input"] for a in server.artifacts if a["input"]["artifactTypeName"] == "steering"]
        assert {alias["alias"] for alias in steering["aliases"]} == {"best", "latest"}
        assert [line for line in said if line.startswith("dso:")] == []
        config = load_config(str(folder / "config.yaml"))
        (folder / "report.md").unlink()  # else nothing is done again, and nobody told
        train(config, name="unused", resume=True, quiet=True)
        assert {run["name"] for run in server.runs} == {name}
        assert server.calls["RunResumeStatus"] == 2
    assert no_key_anywhere(folder)


def test_a_server_that_hangs_in_mid_run_costs_a_bounded_time_and_no_data(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = launch.run.train.measure

    def measure(*arguments: Any) -> Any:
        until = time.monotonic() + SLACK
        while not server.calls["UpsertBucket"] and time.monotonic() < until:  # until the run is open
            time.sleep(0.1)
        server.behaviour = "hang"
        return results(*arguments)

    with serving("well") as server:
        monkeypatch.setattr(launch.run.train, "measure", measure)
        folder, said, took = run_online(tmp_path, model_folder, monkeypatch, server.url, timeout=5.0)
    assert took < 2 * 5.0 + SLACK
    assert len([line for line in said if line.startswith("dso:")]) == 1
    complete = offline_runs(folder)[0]
    assert complete.parent.name.startswith("offline-run-")
    logged = read(complete)
    check_scalars(logged, folder)
    check_results(complete, logged, folder)


def test_a_server_that_hangs_at_the_end_costs_its_time_and_no_data(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("well") as server:
        answered = server.answer

        def answer(operation: str, variables: dict[str, Any]) -> dict[str, Any]:
            found = answered(operation, variables)
            if operation == "CreateArtifact" and variables["input"]["artifactTypeName"] == "steering":
                server.behaviour = "hang"  # from then on
            return found

        monkeypatch.setattr(server, "answer", answer)
        folder, said, took = run_online(tmp_path, model_folder, monkeypatch, server.url, timeout=3.0)
    assert took < 2 * 3.0 + SLACK
    assert len([line for line in said if "wandb sync" in line]) == 1
    path = offline_runs(folder)[0]
    assert path.parent.name.startswith("offline-run-")
    logged = read(path)
    check_scalars(logged, folder)
    check_results(path, logged, folder)


# Ends


SCRIPT = """
import sys, time
from pathlib import Path
from trainers.tracking.tracker import open_tracker
folder = Path(sys.argv[1])
say = lambda line: print(line, flush=True)
(output,) = open_tracker("wandb", folder, config={}, say=say, warn=say, project="dso").outputs(4)
for step in range(1, 6):
    output.write({"train/kl": step / 8}, {}, 4 * step)
time.sleep(600)
"""


def test_no_process_outlives_one_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    clean_environment(monkeypatch, home)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("W&B: offline run")
        assert services(home)
        time.sleep(4.0)  # until they are on the disk
    finally:
        process.kill()
        process.wait()
    assert gone(home)
    (path,) = offline_runs(tmp_path)
    assert read(path).scalars("train/kl") == [(step, step / 8) for step in range(1, 6)]


def test_a_password_on_the_command_line_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(sys, "argv", ["dso", "train", "x", "data.options.path=https://user:never-seen@host/x"])
    config = {"data": {"options": {"path": "https://user:never-seen@host/x"}}}
    with open_tracker("wandb", tmp_path, config=config, say=print, warn=print, project="dso") as tracker:
        tracker.outputs(4)
    (path,) = offline_runs(tmp_path)
    assert read(path).config["data"]["options"]["path"] == "https://***@host/x"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"never-seen" in path.read_bytes()]


def test_an_error_ends_the_run_as_failed_also_that_of_a_sweep(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text("wandb_version: 1\ntrain.seed: {desc: null, value: 0}\n")
    agent = {"RUN_ID": "1e234567", "SWEEP_ID": "swept", "SWEEP_PARAM_PATH": str(parameters), "PROJECT": "of-the-sweep"}
    clean_environment(monkeypatch, tmp_path / "home", **{f"WANDB_{name}": value for name, value in agent.items()})
    config = config_of(tmp_path, model_folder, mode="offline", timeout=120.0)

    def broken(*_: Any) -> None:
        raise RuntimeError("the measurement broke")

    monkeypatch.setattr(launch.run.train, "measure", broken)
    with pytest.raises(RuntimeError, match="the measurement broke"):
        train(config, name="unused", quiet=True)
    folder = Path(config.run.output_dir) / "letters"
    logged = read(offline_runs(folder)[0])
    assert logged.exit_code == 1
    assert (logged.run.run_id, logged.run.sweep_id, logged.run.project) == ("1e234567", "swept", "of-the-sweep")
    assert logged.config["train.seed"] == logged.config["train"]["seed"] == 0
    check_scalars(logged, folder)
