"""A run that was saved and loaded goes on bit for bit as if it had never stopped; what does not fit is refused."""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_runs import contents, make_trainer, operators
from stable_baselines3.common.logger import Logger

import dso
from trainers.constraints import AnswerMassFloor, FixedKL, KLBudget, OrderLimit
from trainers.lesson import ESTIMATORS, ORDERED
from trainers.ppo import SteeringPPO
from trainers.state import saved as state
from trainers.state.saved import StateError, has_state, load_state, read_state, save_state, saved_states
from trainers.tracking.jsonlines import JsonLines

EVERYTHING: dict[str, Any] = {
    "ambiguous": 6,
    "unambiguous": 2,
    "batch_size": 4,
    "n_epochs": 2,
    "learning_rate": lambda left: 0.01 * left,
    "anchors": ("It rains.", "Two and two", "Once upon a time"),
    "anchors_a_step": 2,
    "sparsity": 0.001,
}


def build(estimator: str = "expected", **options: Any) -> SteeringPPO:
    limits: dict[str, Any] = {"kl": KLBudget(0.05, 0.1, 0.2), "mass_floor": AnswerMassFloor(1.0)}
    limits["anchor_limit"] = KLBudget(1e-4, 0.1)
    limits["unambiguous_limit"] = KLBudget(1e-4, 0.1)
    if estimator in ORDERED:
        limits["order"] = OrderLimit(0.0)
    return make_trainer(estimator=estimator, **{**limits, **EVERYTHING, **options})


def run(trainer: SteeringPPO, folder: Path, until: int, total: int = 6, size: int | None = None) -> int:
    """Train up to a step of a run of ``total``, whose schedule it follows; the size of its records."""
    lines = JsonLines(folder / "metrics.jsonl", size, lambda key: not key.startswith("time/"))
    trainer.set_logger(Logger(None, [lines]))
    batch = trainer.env.num_envs

    def stop(local: dict[str, Any], _: Any) -> bool:
        trainer.stop_requested = trainer.steps_done >= until
        return True

    trainer.learn(total * batch - trainer.num_timesteps, stop, reset_num_timesteps=False)
    trainer.stop_requested = False
    size = lines.sync()
    trainer.logger.close()
    return size


def everything(trainer: SteeringPPO) -> dict[str, Any]:
    """All that decides how a run goes on."""
    optimizer = trainer.policy.optimizer.state_dict()["state"]
    return {
        "operators": operators(trainer),
        "policy": {key: value.clone() for key, value in trainer.policy.state_dict().items()},
        "moments": {f"{i}/{k}": value.clone() for i, entry in optimizer.items() for k, value in entry.items()},
        "task": trainer.task.state_dict(),
        "sampler": trainer.env.inner.sampler.state_dict(),
        "indices": trainer.env.inner.indices.tolist(),
        "kl": trainer.kl.state_dict(),
        "constraints": str(trainer.constraints.state_dict()),
        "counters": (trainer.num_timesteps, trainer._n_updates),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Bit for bit."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, tuple):
        assert str(found) == str(wanted), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("baseline", ["context", "value"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, estimator: str, baseline: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    trainer = build(estimator, baseline=baseline)
    run(trainer, whole, until=6)
    wanted = everything(trainer)

    first = build(estimator, baseline=baseline)
    size = run(first, parts, until=4)
    save_state(parts / "state", first, {"best": torch.arange(3.0)}, {"note": [1, None, math.nan]})
    run(first, parts, until=5)  # killed after the state was saved: this step comes again
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    second = build(estimator, baseline=baseline, seed=0)
    tensors, facts = load_state(read_state(parts / "state"), second)
    assert torch.equal(tensors["best"], torch.arange(3.0))
    assert facts["note"][:2] == [1, None]
    assert math.isnan(facts["note"][2])
    run(second, parts, until=6, size=size)

    assert_same(everything(second), wanted)
    records = (whole / "metrics.jsonl").read_bytes()
    assert (parts / "metrics.jsonl").read_bytes() == records
    assert records.count(b"\n") == records.count(b'"train/kl"') == 6


def test_a_state_can_be_taken_before_the_first_step(tmp_path: Path) -> None:
    trainer = build()
    trainer._last_obs = trainer.env.reset()
    save_state(tmp_path, trainer, {}, {})
    run(trainer, tmp_path, until=2)
    other = build(seed=0)
    load_state(read_state(tmp_path), other)
    run(other, tmp_path, until=2)
    assert_same(everything(other), everything(trainer))


def test_a_state_is_one_file_without_pickle_and_without_the_backbone(tmp_path: Path) -> None:
    trainer = build(width=64)
    run(trainer, tmp_path, until=1)
    assert not has_state(tmp_path / "state")
    save_state(tmp_path / "state", trainer, {}, {})
    assert has_state(tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-1.safetensors"]
    with safe_open(tmp_path / "state" / "step-1.safetensors", framework="pt") as file:
        sizes = {key: file.get_tensor(key).numel() for key in file.keys() if not key.startswith("random/")}  # noqa: SIM118
    learned = 5 * 2 * 64
    assert sum(sizes.values()) == 4 * learned + 10 + 8 + sum(n for key, n in sizes.items() if key.startswith("task/"))


def test_the_two_latest_states_are_kept_and_later_ones_of_an_abandoned_time_dropped(tmp_path: Path) -> None:
    trainer = build()
    trainer._last_obs = trainer.env.reset()
    names = []
    for step in (0, 1, 2, 3):
        if step:
            run(trainer, tmp_path, until=step)
        save_state(tmp_path / "state", trainer, {}, {})
        names.append([path.name for path in saved_states(tmp_path / "state")])
    assert names == [
        ["step-0.safetensors"],
        ["step-1.safetensors", "step-0.safetensors"],
        ["step-2.safetensors", "step-1.safetensors"],
        ["step-3.safetensors", "step-2.safetensors"],
    ]
    (tmp_path / "state" / "step-9.safetensors").write_bytes(b"damaged, so the run went back")
    (tmp_path / "state" / "notes.txt").write_text("the user's own")
    save_state(tmp_path / "state", trainer, {}, {})  # the same step again
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "notes.txt",
        "step-2.safetensors",
        "step-3.safetensors",
    ]


def test_ten_comes_after_nine(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"step-{step}.safetensors").touch()
    (tmp_path / ".step-200.safetensors.x1.part").touch()
    assert [path.name for path in saved_states(tmp_path)] == [f"step-{step}.safetensors" for step in (100, 10, 9)]


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_where_the_newest_is_damaged_the_one_before_is_taken(tmp_path: Path, spoil: Any) -> None:
    trainer = build()
    run(trainer, tmp_path, until=1)
    save_state(tmp_path, trainer, {}, {})
    before = everything(trainer)
    run(trainer, tmp_path, until=2)
    save_state(tmp_path, trainer, {}, {})
    newest = tmp_path / "step-2.safetensors"
    newest.write_bytes(spoil(newest.read_bytes()))
    saved = read_state(tmp_path)
    assert (saved.step, saved.path.name, len(saved.passed_over)) == (1, "step-1.safetensors", 1)
    assert saved.passed_over[0].startswith(f"{newest}: ")
    load_state(saved, trainer)
    assert_same(everything(trainer), before)
    (tmp_path / "step-1.safetensors").write_bytes(b"too")
    with pytest.raises(StateError, match="^no saved state is usable: .*step-2.safetensors: .*; .*step-1.safetensors: "):
        read_state(tmp_path)


def test_what_a_state_was_made_with_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    run(trainer, tmp_path, until=1)
    save_state(tmp_path, trainer, {}, {})
    assert read_state(tmp_path).differences(trainer) == ""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    assert read_state(tmp_path).differences(trainer) == f"threads {threads} then and {threads + 3} now"


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_while_writing_keeps_the_old_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    trainer = build()
    run(trainer, tmp_path, until=1)
    save_state(tmp_path, trainer, {}, {})
    run(trainer, tmp_path, until=2)
    save_state(tmp_path, trainer, {}, {})
    before = contents(tmp_path)
    run(trainer, tmp_path, until=3)
    with monkeypatch.context() as patch:
        patch.setattr(f"dso.files.os.{step}", full)
        with pytest.raises(OSError, match="No space left on device: .*step-3.safetensors"):
            save_state(tmp_path, trainer, {}, {})
    assert {key: value for key, value in contents(tmp_path).items() if key != "metrics.jsonl"} == {
        key: value for key, value in before.items() if key != "metrics.jsonl"
    }


def test_a_save_that_has_no_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    run(trainer, tmp_path, until=1)
    save_state(tmp_path, trainer, {}, {})
    size = (tmp_path / "step-1.safetensors").stat().st_size
    run(trainer, tmp_path, until=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size // 2))
    monkeypatch.setattr(state, "write_bytes", lambda *_: pytest.fail("a write was begun"))
    with pytest.raises(OSError, match="no space: 0.0 MB are needed, 0.0 MB are free: .*step-2.safetensors") as caught:
        save_state(tmp_path, trainer, {}, {})
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in saved_states(tmp_path)] == ["step-1.safetensors"]


# What is refused


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer = build()
    run(trainer, tmp_path, until=2)
    save_state(tmp_path, trainer, {}, {})
    return tmp_path


def refusal(folder: Path, trainer: SteeringPPO) -> str:
    """The message; the trainer must be as it was."""
    before = everything(trainer)
    with pytest.raises(StateError) as caught:
        load_state(read_state(folder), trainer)
    assert_same(everything(trainer), before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_state_is_refused(tmp_path: Path) -> None:
    assert not has_state(tmp_path / "none")
    assert refusal(tmp_path / "none", build()) == f"{tmp_path}/none: no saved state there"


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_state_is_refused(saved: Path, size: int) -> None:
    path = saved / "step-2.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"no saved state is usable: {path}: " in refusal(saved, build())


def test_any_flipped_bit_is_found(saved: Path) -> None:
    path = saved / "step-2.safetensors"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [8, 9, *rng.integers(0, len(data), 40), len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(StateError, match="no saved state is usable: |saved by dso "):
            read_state(saved)


def test_a_state_of_another_version_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    was = dso.__version__
    monkeypatch.setattr(dso, "__version__", "9.1")
    assert f"saved by dso {was} (state format {state.FORMAT}), this is dso 9.1 " in refusal(saved, build())
    assert "go on with that version, or start anew with --overwrite" in refusal(saved, build())
    monkeypatch.setattr(dso, "__version__", was)
    monkeypatch.setattr(state, "FORMAT", state.FORMAT + 1)
    assert f"(state format {state.FORMAT - 1}), this is dso {was} (format {state.FORMAT})" in refusal(saved, build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "reinforce"}, "saved with estimator expected, now it is reinforce"),
        ({"kl": FixedKL(0.1)}, "saved with KL constraint KLBudget, now it is FixedKL"),
        ({"ambiguous": 10}, "saved with decisions a step 8, now it is 12"),
        ({"operator": "bias"}, "of another steering or baseline: steering._operators.0.a was (16,), now it is absent"),
        ({"width": 32}, "saved with base weights "),
        ({"baseline": "value"}, "of another steering or baseline: context_values was (4, 2), now it is (0, 2)"),
    ],
)
def test_a_state_of_another_set_up_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(saved, build(**change))
