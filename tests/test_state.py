"""A run that was saved and loaded goes on bit for bit as if it had never stopped; what does not fit is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from stable_baselines3.common.logger import Logger
from training import letters_set, make_trainer, operators

from trainers.callbacks import JsonLines
from trainers.constraints import FixedKL, KLBudget
from trainers.ppo import ESTIMATORS, SteeringPPO
from trainers.state import STATE_FILE, StateError, has_state, load_state, save_state

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
    return make_trainer(estimator=estimator, **{"kl": KLBudget(0.05, 0.1, 0.2), **EVERYTHING, **options})


def run(trainer: SteeringPPO, folder: Path, until: int, total: int = 6) -> None:
    """Train up to a step of a run of ``total``, whose schedule it follows."""
    trainer.set_logger(Logger(None, [JsonLines(folder / "metrics.jsonl", until=trainer.num_timesteps)]))
    batch = trainer.env.num_envs

    def stop(local: dict[str, Any], _: Any) -> bool:
        trainer.stop_requested = trainer.steps_done >= until
        return True

    trainer.learn(total * batch - trainer.num_timesteps, stop, reset_num_timesteps=False)
    trainer.stop_requested = False
    trainer.logger.close()


def everything(trainer: SteeringPPO) -> dict[str, Any]:
    """All that decides how a run goes on."""
    optimizer = trainer.policy.optimizer.state_dict()["state"]
    return {
        "operators": operators(trainer),
        "policy": {key: value.clone() for key, value in trainer.policy.state_dict().items()},
        "moments": {f"{i}/{key}": value for i, entry in optimizer.items() for key, value in entry.items()},
        "task": trainer.task.state_dict(),
        "sampler": trainer.env.inner.sampler.state_dict(),
        "handles": trainer.env.inner.handles.tolist(),
        "kl": trainer.kl.state_dict(),
        "counters": (trainer.num_timesteps, trainer._n_updates),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
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


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


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
    run(first, parts, until=4)
    save_state(parts / "state", first, {"best": torch.arange(3.0)}, {"note": [1, None, math.nan]})
    run(first, parts, until=5)  # killed after the state was saved: this step comes again
    torch.manual_seed(99)
    np.random.seed(99)
    second = build(estimator, baseline=baseline, seed=0)
    tensors, facts = load_state(parts / "state", second)
    assert torch.equal(tensors["best"], torch.arange(3.0))
    assert facts["note"][:2] == [1, None]
    assert math.isnan(facts["note"][2])
    run(second, parts, until=6)

    assert_same(everything(second), wanted)
    assert metrics(parts) == metrics(whole)
    assert len(metrics(whole)) == 6


def test_a_state_can_be_taken_before_the_first_step(tmp_path: Path) -> None:
    trainer = build()
    trainer._last_obs = trainer.env.reset()
    save_state(tmp_path, trainer, {}, {})
    run(trainer, tmp_path, until=2)
    other = build(seed=0)
    load_state(tmp_path, other)
    run(other, tmp_path, until=2)
    assert_same(everything(other), everything(trainer))


def test_a_state_is_one_file_without_pickle_and_without_the_backbone(tmp_path: Path) -> None:
    trainer = build(width=64)
    run(trainer, tmp_path, until=1)
    assert not has_state(tmp_path / "state")
    save_state(tmp_path / "state", trainer, {}, {})
    assert has_state(tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == [STATE_FILE]
    with safe_open(tmp_path / "state" / STATE_FILE, framework="pt") as file:
        sizes = {key: file.get_tensor(key).numel() for key in file.keys() if not key.startswith("random/")}  # noqa: SIM118
    learned = 5 * 2 * 64
    assert sum(sizes.values()) == 4 * learned + 10 + 8 + sum(n for key, n in sizes.items() if key.startswith("task/"))


def test_an_error_while_writing_keeps_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    run(trainer, tmp_path, until=1)
    save_state(tmp_path, trainer, {}, {})
    before = (tmp_path / STATE_FILE).read_bytes()
    run(trainer, tmp_path, until=2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dso.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*state.safetensors"):
        save_state(tmp_path, trainer, {}, {})
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.glob(".*")] == []


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
        load_state(folder, trainer)
    assert_same(everything(trainer), before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_state_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none", build()) == f"{tmp_path}/none/{STATE_FILE}: no saved state there"


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_state_is_refused(saved: Path, size: int) -> None:
    data = (saved / STATE_FILE).read_bytes()
    (saved / STATE_FILE).write_bytes(data[:size])
    assert "not a usable state" in refusal(saved, build())


def test_any_flipped_bit_is_found(saved: Path) -> None:
    data, trainer = (saved / STATE_FILE).read_bytes(), build()
    rng = np.random.default_rng(0)
    for at in [8, 9, *rng.integers(0, len(data), 40), len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        (saved / STATE_FILE).write_bytes(damaged)
        with pytest.raises(StateError, match="damaged|not a usable state"):
            load_state(saved, trainer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "reinforce"}, "saved with estimator expected, now it is reinforce"),
        ({"kl": FixedKL(0.1)}, "saved with KL constraint KLBudget, now it is FixedKL"),
        ({"ambiguous": 10}, "saved with decisions a step 8, now it is 12"),
        ({"decisions": letters_set("female", "nonbinary")}, "saved with decision set letters (24 decisions, "),
        ({"operator": "bias"}, "of another steering or baseline: steering._operators.0.a was (16,), now it is absent"),
        ({"width": 32}, "of another steering or baseline: steering._operators.0.a was (16,), now it is (32,)"),
        ({"baseline": "value"}, "of another steering or baseline: context_values was (4, 2), now it is (0, 2)"),
    ],
)
def test_a_state_of_another_set_up_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(saved, build(**change))
