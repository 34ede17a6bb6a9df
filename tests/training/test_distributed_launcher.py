"""The real ``deepspeed`` launcher with two processes on the CPU, held against one process.

Two processes divide the decisions of a step that one process decides alone, so both have to come to the same update.
What differs is the order in which float32 numbers are added up. Tolerances are absolute: after 3 steps (12 of PPO's)
with a learning rate of 0.01, coefficients are of size 0.01 to 0.1 and agree to 1e-5; what was seen is below 1e-6.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from small_runs import write_config

from dso.steering.checkpoint import read_checkpoint
from dso.steering.model import Steering
from launch.cli import main
from launch.exits import EXIT_PREEMPTED

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]
TIMEOUT = 1500  # the machine may be busy
CLOSE = {"operators": 1e-5, "value head": 1e-5, "moments": 1e-5, "sizes": 1e-4, "preference": 1e-5, "policy": 1e-5,
         "kl": 1e-5, "random": 0.0}  # fmt: skip


def launch(*words: str) -> subprocess.CompletedProcess:
    """``deepspeed`` with two processes, one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_gpus", "2", "--master_port", port, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


# Every case in one launch, as most of its time goes into starting up


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Any]:
    """What two processes found, and how a run ended of which one could not go on."""
    out = tmp_path_factory.mktemp("together")
    config = write_config(out, model_folder, run__ddp_timeout=worker.TIMEOUT)
    (out / "zero2.json").write_bytes((ROOT / "configs" / "deepspeed" / "zero2.json").read_bytes())
    started = time.monotonic()
    done = launch("tests/helpers/distributed_worker.py", str(out), *worker.CASES, "--fail", str(config))
    assert (out / "rank1.pt").exists(), done.stdout[-3000:] + done.stderr[-6000:]
    ranks = [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]
    return {"ranks": ranks, "done": done, "seconds": time.monotonic() - started, "out": out}


def flat(found: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every number of nested dicts, by its path."""
    if isinstance(found, dict):
        return {k: v for key, value in found.items() for k, v in flat(value, f"{name}/{key}").items()}
    return {name: torch.as_tensor(found).double()}


@pytest.mark.parametrize("case", worker.CASES)
def test_all_processes_end_with_the_same_bits(case: str, together: dict[str, Any]) -> None:
    first, second = (flat(rank[case]) for rank in together["ranks"])
    assert first.keys() == second.keys() and len(first) > 20
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_take_the_steps_of_one(case: str, together: dict[str, Any]) -> None:
    torch.manual_seed(0)
    alone, found = worker.run(worker.trainer_of(worker.CASES[case])), together["ranks"][0][case]
    assert all(value.dtype == torch.float32 for value in found["operators"].values())
    assert all(value.any() for value in found["operators"].values())
    if "dtype" in worker.CASES[case]:  # bfloat16 rounds activations by 0.4%, by what they are packed with
        wanted, shared = (torch.cat(list(run["operators"].values())) for run in (alone, found))
        assert (shared - wanted).norm() < 0.15 * wanted.norm()
        return
    for part, tolerance in CLOSE.items():
        shared = flat(found[part])
        for key, wanted in flat(alone[part]).items():
            torch.testing.assert_close(shared[key], wanted, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    assert found["measured"] == pytest.approx(alone["measured"], rel=1e-4, abs=1e-5)
    assert alone["measured"]["mass_coefficient"] > 0 and alone["measured"]["anchor_coefficient"] > 0.1
    assert ("orders" in worker.CASES[case]) == (alone["measured"].get("order_coefficient", 0) > 0)
    assert found["price"] == pytest.approx(alone["price"], rel=1e-4)


def test_processes_take_unequal_numbers_of_passes_under_zero3(together: dict[str, Any]) -> None:
    """Else the cases would not show that those with fewer keep in step, with and without gradients."""
    first, second = (rank["passes zero3"] for rank in together["ranks"])
    assert all(other > one > 3 for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("case", worker.DIVIDED)
def test_weights_that_are_divided_as_they_are_loaded_make_the_same_run(case: str, together: dict[str, Any]) -> None:
    """Bit for bit; and no process ever holds more of the model than its half and one module's own weights."""
    model = worker.tiny_in(worker.CASES[case].get("dtype", torch.float32))
    elements, widest = model.num_parameters(), model.get_input_embeddings().weight.numel()
    assert elements > 2 * widest
    config = Steering.for_model(model).config
    for rank in together["ranks"]:
        found = rank[f"loaded {case}"]
        # The output layer is made apart from the embeddings, before it is tied to them.
        assert found["held"] == {"most": widest, "after": 0, "shares": (elements + widest) / 2}
        assert (found["sites"], found["weights"]) == (config.sites, config.fingerprint)
        assert found["layout"] == "packed"
        wanted, run = flat(rank[case]), flat(found["run"])
        assert run.keys() == wanted.keys()
        assert all(torch.equal(value, run[key]) for key, value in wanted.items())


@pytest.mark.parametrize("name", worker.ARCHITECTURES)
def test_a_divided_model_scores_as_a_whole_one(name: str, together: dict[str, Any]) -> None:
    assert [rank[f"scores {name}"] for rank in together["ranks"]] == [True, True]


def test_a_model_that_the_reading_process_cannot_load_is_refused_in_all(together: dict[str, Any]) -> None:
    first, second = (rank["misfit"] for rank in together["ranks"])
    folder = together["out"] / "misfit"
    assert first.startswith(f"model '{folder}' could not be loaded: ") and second == first


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
def test_a_saved_run_goes_on_bit_for_bit(stage: str, together: dict[str, Any]) -> None:
    assert [rank[f"resumed {stage}"] for rank in together["ranks"]] == [True, True]


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
def test_a_number_that_is_not_finite_in_one_process_skips_the_step_in_all(stage: str, together: dict[str, Any]) -> None:
    skipped, still, moved = 1, True, True
    assert [rank[f"skipped {stage}"] for rank in together["ranks"]] == [(skipped, still, moved)] * 2


def test_a_stop_that_one_process_hears_of_after_the_last_step_stops_all(together: dict[str, Any]) -> None:
    assert [rank["stopped"] for rank in together["ranks"]] == [EXIT_PREEMPTED] * 2
    folder = together["out"] / "runs" / "stopped"
    assert (folder / "state" / f"step-{worker.STEPS}.safetensors").exists()
    assert f"stopped after step {worker.STEPS} of {worker.STEPS}" in together["done"].stderr


def test_a_process_that_cannot_go_on_ends_the_job_with_its_message(together: dict[str, Any]) -> None:
    done = together["done"]
    assert done.returncode == 2, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("dso: ")]
    assert said[0].startswith("dso: stopped after step 3")  # the run before
    assert said[1] == "dso: process 1: the memory of this machine is gone", done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("processes", "code"), [("1", -signal.SIGABRT), ("2", 3)])
def test_what_aborts_at_the_end_of_one_of_several_processes_does_not_fail_the_job(processes: str, code: int) -> None:
    """As a thread of gloo does now and then, here a handler that C's exit calls."""
    words = "import ctypes; from launch.cluster.processes import leave; libc = ctypes.CDLL(None); "
    words += "libc.__cxa_atexit(libc.abort, None, None); print('said', end=''); leave(3)"
    environment = os.environ | {"WORLD_SIZE": processes, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "said"), done.stderr


# The command, as users give it


def test_a_run_of_two_processes_is_that_of_one(tmp_path: Path, model_folder: Path) -> None:
    """ZeRO-3 divides the weights as they are loaded; layers are checkpointed and a step is learned in two parts."""
    options = {"train__gradient_checkpointing": True, "train__gradient_accumulation_steps": 2}
    config = write_config(tmp_path, model_folder, **options, run__ddp_timeout=worker.TIMEOUT)
    settings = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # weights of this size would stay whole
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    script = ["launch/train.py", "--config", str(config), "--deepspeed", str(file)]
    done = launch(*script, "run.run_name=two", "--quiet")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("dso generate") == 1  # the first process prints the result
    assert main(["train", str(config), "run.run_name=one", "--quiet"]) == 0
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    tensors = [read_checkpoint(folder / "steering")[1] for folder in (one, two)]
    for key, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][key], value, rtol=0, atol=1e-5)
    records = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(records[0]) == len(records[1]) > 6
    for alone, shared in zip(*records, strict=True):
        assert shared == pytest.approx(alone, rel=1e-3, abs=1e-5)
    curves = [json.loads((folder / "curve.json").read_text()) for folder in (one, two)]
    assert [point["kl"] for point in curves[1]] == pytest.approx([point["kl"] for point in curves[0]], abs=1e-5)
    states = sorted((two / "state").iterdir())
    backbone = (model_folder / "model.safetensors").stat().st_size
    assert states and all(path.stat().st_size < backbone for path in states)  # the operators' numbers alone
