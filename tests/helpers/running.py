"""Runs of the tiny model: their configs, their files, and what of them does not depend on the clock."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_runs import contents, write_config

from launch.config.schema import TrainConfig, load_config
from trainers.state.saved import read_state

FILES = {
    "config.yaml", "metrics.jsonl", "times.jsonl", "validation.json",
    "state/step-4.safetensors", "state/step-6.safetensors",
    "curve.json", "curve.png", "report.md",
    "steering/dso_config.json", "steering/dso_model.safetensors", "steering/README.md",
}  # fmt: skip
TIMELESS = ("metrics.jsonl", "validation.json", "curve.json", "steering/dso_model.safetensors")


def config_of(folder: Path, model: Path, **options: Any) -> TrainConfig:
    return load_config(str(write_config(folder, model, **options)))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[int]:
    """The decisions that had been seen at each recorded training step."""
    return [row["step"] for row in rows_of(folder) if "train/kl" in row]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run has, to the last bit, but for what the clock says."""
    files, saved = contents(folder), read_state(folder / "state")
    facts = dict(saved.facts)
    facts["extra"] = {key: value for key, value in facts["extra"].items() if key != "seconds"}
    tensors = {key: (value.dtype, tuple(value.shape), value.numpy().tobytes()) for key, value in saved.tensors.items()}
    names = [*TIMELESS, *(["answers.jsonl"] if "answers.jsonl" in files else [])]
    return {name: files[name] for name in names} | {"facts": json.dumps(facts), "tensors": tensors}


def full_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Let the disk be full from the given write of a whole file on; records still fit."""
    real, done = os.replace, []

    def replace(*paths: Any) -> None:
        done.append(paths)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*paths)

    monkeypatch.setattr("dso.files.os.replace", replace)
