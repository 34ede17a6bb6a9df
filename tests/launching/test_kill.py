"""A run that is killed at any moment goes on to the very end that it would have had, whatever the kill left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from answering import write_run
from running import outcome
from small_runs import write_config

from launch.exits import EXIT_PREEMPTED

ROOT = Path(__file__).parents[2]
KILLING = ROOT / "tests" / "helpers" / "killing.py"
ZERO2 = str(ROOT / "configs" / "deepspeed" / "zero2.json")
SETTINGS = {
    "train__max_steps": 5,
    "train__estimator": "reinforce",  # which draws from torch's generator
    "train__preference__estimate": "controlled",  # which keeps what the base model prefers
    "run__save_steps": 1,
    "run__ddp_timeout": 60,  # which a process waits that meets no other
    "evaluation__scales": [1.0],
}
FREEFORM = {"train__max_steps": 5, "constraints__kl_budget": 5.0, "run__save_steps": 1, "evaluation__scales": [1.0]}
TIMEOUT = 3000  # the machine may be busy
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Killed(NamedTuple):
    """What tests/helpers/killing.py found: what each process of a run does, the kills, the runs that were refused."""

    known: list[dict[str, Any]]
    kills: list[dict[str, Any]]
    refused: dict[str, list[int]]
    config: Path


def killed(folder: Path, config: Path, number: int, *deepspeed: str) -> Killed:
    command = [
        sys.executable,
        str(KILLING),
        str(config),
        str(number),
        "0",
        *deepspeed,
    ]
    compiled = folder / "compiled"
    environment = ENVIRONMENT | {"TORCH_EXTENSIONS_DIR": str(compiled)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == 0  # pytest shows what it said
    assert not compiled.exists()  # DeepSpeed would, at its first exchange on CPUs
    found = [line.removeprefix("found ") for line in done.stdout.splitlines() if line.startswith("found ")]
    known, *kills, refused = map(json.loads, found)
    return Killed(known, kills, refused, config)


def assert_unharmed(kill: dict[str, Any], processes: int) -> None:
    """One process was killed, no other was left behind, and the run went on to the end that it would have had."""
    expected = {"half": -signal.SIGXFSZ, "term": EXIT_PREEMPTED}.get(kill["kind"], -signal.SIGKILL)
    assert kill["ended"][kill["victim"]] == expected, kill
    assert len(kill["ended"]) == processes and 0 not in kill["ended"], kill
    assert (kill["again"], kill["differs"]) == ([0] * processes, []), kill
    assert not [name for name in kill["files"] if name.endswith(".part")], kill


@pytest.mark.parametrize(("kind", "number"), [("candidates", 20), ("free-form", 10)])
def test_killed_at_random_moments(kind: str, number: int, tmp_path: Path, model_folder: Path) -> None:
    if kind == "candidates":
        config = write_config(tmp_path, model_folder, **SETTINGS)
    else:
        pytest.importorskip("trl")
        config = write_run(tmp_path, **FREEFORM)
    kills = killed(tmp_path, config, number).kills
    kinds = ("save", "evaluation", "step", "write", "time")
    assert Counter(kill["kind"] for kill in kills) == dict.fromkeys(kinds, number // 5) | {"half": 1, "term": 1}
    for kill in kills:
        assert_unharmed(kill, processes=1)
    assert len({kill["moment"] for kill in kills[:number]}) == number
    assert any(name.endswith(".part") for kill in kills for name in kill["left"] if kill["kind"] == "write")
    half = kills[number]["left"]
    assert [size for name, size in half.items() if name.startswith("state/.step-3.")] == [10_000]
    assert half["state/step-2.safetensors"] > 20_000


# Two processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Killed:
    """Runs of two processes under DeepSpeed of which one is killed at a time."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("pair")
    return killed(folder, write_config(folder, model_folder, **SETTINGS), 5, ZERO2)


def test_one_of_two_processes_killed(pair: Killed) -> None:
    assert [kill["kind"] for kill in pair.kills] == ["save", "evaluation", "step", "write", "time", "half", "term"]
    assert {kill["victim"] for kill in pair.kills} == {0, 1}
    for kill in pair.kills:
        assert_unharmed(kill, processes=2)
    assert pair.kills[-1]["ended"] == [EXIT_PREEMPTED, EXIT_PREEMPTED]  # one was told, both end at the same step
    assert pair.refused == {"unwritable": [2, 2], "another config": [2, 2]}
    runs = pair.config.parent / "runs"
    assert outcome(runs / "whole-0") == outcome(runs / "whole-1")


@pytest.mark.slow
def test_one_of_two_processes_killed_at_twenty_moments(tmp_path: Path, model_folder: Path) -> None:
    pytest.importorskip("deepspeed")
    kills = killed(tmp_path, write_config(tmp_path, model_folder, **SETTINGS), 20, ZERO2).kills
    assert len({(kill["victim"], kill["moment"]) for kill in kills[:20]}) == 20
    for kill in kills:
        assert_unharmed(kill, processes=2)


def test_a_process_of_the_real_launcher_killed(pair: Killed) -> None:
    """deepspeed ends the job, and the same command goes on to what the processes of :func:`pair` came to."""

    def launch(phase: str, call: int, rank: int) -> subprocess.CompletedProcess:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", port]
        script = [str(KILLING), "--launched", phase, str(call), str(rank)]
        run = [
            "--config",
            str(pair.config),
            "--deepspeed",
            ZERO2,
            "--resume",
            "auto",
            "run.run_name=launched",
            "--quiet",
        ]
        command = [*launcher, *script, *run]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)

    folder = pair.config.parent / "runs" / "launched"
    ended = launch("step", pair.known[1]["step"] * 2 // 3, rank=1)
    assert ended.returncode != 0, ended.stderr[-3000:]
    assert list((folder / "state").glob("step-*.safetensors"))
    assert not (folder / "steering").exists()
    again = launch("step", 0, rank=1)
    assert again.returncode == 0, again.stderr[-3000:]
    assert outcome(folder) == outcome(pair.config.parent / "runs" / "whole-0")
