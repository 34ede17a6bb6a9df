"""SIGTERM through the real command line, as whoever manages machines sends it; what launchers start a script with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import outcome, rows_of
from small_runs import write_config

from launch.cli import _parse
from launch.config.schema import load_config
from launch.exits import EXIT_PREEMPTED
from launch.run.train import train
from launch.train import script_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the processes that the test starts: sums are rounded alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sigterm_exits_with_75_and_the_same_command_goes_on(
    tmp_path: Path, model_folder: Path, one_thread: None
) -> None:
    config = write_config(tmp_path, model_folder, train__max_steps=60, evaluation__eval_steps=20, run__save_steps=7)
    whole = train(load_config(str(config), ["run.run_name=whole"]), name="x", quiet=True).folder
    # As a launcher starts it: the file itself, with --config, in a process with hash seeds of its own.
    options = ["--local_rank=0", "--config", str(config), "--resume", "auto", "--quiet"]
    command = [sys.executable, "launch/train.py", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    folder = tmp_path / "runs" / "letters"
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train/kl"') > 2):
        time.sleep(0.02)
    for _ in range(3):  # launchers send it more than once
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (EXIT_PREEMPTED, ""), err
    done = len([row for row in rows_of(folder) if "train/kl" in row])
    assert 2 < done < 60
    said = f"dso: stopped after step {done} of 60; {folder} has everything so far."
    assert err.splitlines()[-1] == f"{said} Go on with the same command and --resume"
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert outcome(folder) == outcome(whole)


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        (["mine"], None),
        (["mine", "--resume"], "always"),
        (["--resume", "mine", "a=1"], "always"),  # which does not take the config for its value
        (["mine", "--resume", "a=1"], "always"),
        (["mine", "--resume", "auto"], "auto"),
        (["--resume=auto", "mine"], "auto"),
    ],
)
def test_resume_is_bare_or_auto(words: list[str], resume: str | None) -> None:
    arguments = _parse(["train", *words])
    assert (arguments.config, arguments.resume, arguments.overrides) == ("mine", resume, ["a=1"] * ("a=1" in words))


def test_resume_takes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parse(["train", "mine", "--resume=always-or-never"])
    assert ended.value.code == 2
    assert "invalid choice: 'always-or-never'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["mine", "--resume"], ["mine", "--resume"]),
        (["--local_rank=1", "--config", "c.yaml", "--resume", "auto", "a=1"], ["c.yaml", "--resume", "auto", "a=1"]),
        (["--config=c", "a=1", "--local-rank", "0", "--quiet", "b=2"], ["c", "a=1", "--quiet", "b=2"]),
        (["--help"], ["--help"]),
    ],
)
def test_what_launchers_give_is_what_dso_train_takes(given: list[str], wanted: list[str]) -> None:
    assert script_arguments(given) == ["train", *wanted]
