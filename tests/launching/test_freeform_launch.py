"""``dso freeform`` under the real launchers, two processes each: the same run as that of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from answer_worker import keep_last, scripted
from answering import write_run

from dso.steering.model import Steering
from launch.cli import main
from trainers.grpo import SteeredAnswers

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).parents[1] / "helpers" / "answer_worker.py")
COMPARED = ("reward", "kl", "kl_coefficient", "running_bias", "abstention", "learning_rate")


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def accelerate(folder: Path, config: Path) -> list[str]:
    # accelerate's name for several processes on one machine; the config says that they are of CPUs.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    return [
        "-m",
        "accelerate.commands.launch",
        *options,
        "--dynamo_backend",
        "no",
        "--main_process_port",
        free_port(),
        WORKER,
        str(config),
    ]


def deepspeed(folder: Path, config: Path) -> list[str]:
    settings = folder / "zero0.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}), encoding="utf-8")
    options = ["--num_accelerators", "2", "--no_local_rank", "--master_port", free_port()]
    return ["-m", "deepspeed.launcher.runner", *options, WORKER, str(config), "--deepspeed", str(settings)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteeredAnswers, "_sample", scripted)
        patch.setattr(SteeredAnswers, "release", keep_last)
        assert main(["freeform", str(config), "--quiet"]) == 0
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs/letters/metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("launcher", [accelerate, deepspeed], ids=["accelerate", "deepspeed"])
def test_two_processes_of_a_launcher_make_the_run_of_one(launcher, alone: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher(tmp_path, config)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("name nobody") == 2  # the report's two scales, of one process only
    assert done.stdout.count("report    ") == 1
    found, expected = records(tmp_path), records(alone)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    # DeepSpeed's stage 0 does not tell the norm of the gradient.
    unsaid = {"train/grad_norm"} if launcher is deepspeed else set()
    assert all(set(one) | unsaid == set(other) | unsaid for one, other in zip(found, expected, strict=True))
    for one, other in zip(found, expected, strict=True):
        for key in {f"train/{name}" for name in COMPARED} & set(other) - unsaid:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
    learned, wanted = (Steering.from_pretrained(f / "runs/last").tensors() for f in (tmp_path, alone))
    assert any(bool(value.any()) for value in wanted.values())
    for key, value in wanted.items():
        torch.testing.assert_close(learned[key], value, atol=1e-5, rtol=1e-3)
    # Portions of decisions have seeds of their own, so what is measured does not depend on the processes either.
    rows = [json.loads((f / "runs/letters/validation.json").read_text("utf-8")) for f in (tmp_path, alone)]
    for one, other in zip(*rows, strict=True):
        measured = {key for key, value in other.items() if value is not None}
        assert {key for key, value in one.items() if value is not None} == measured
        one, other = ({key: row[key] for key in measured} for row in (one, other))
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4, nan_ok=True)
