"""Runs with anchor texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import config_of, rows_of

from dso.errors import UserError
from launch.config.schema import ConfigError
from launch.run.train import train


def test_anchors_of_ones_own_are_priced_in_each_step(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "own.txt").write_text("Water boils.\\nIt does.\nThe sea\n", encoding="utf-8")
    anchors = {"constraints__anchors": str(tmp_path / "own.txt")}
    config = config_of(tmp_path, model_folder, train__max_steps=2, **anchors)
    rows = [row for row in rows_of(train(config, name="x", quiet=True).folder) if "train/kl" in row]
    first, second = (row["train/anchor_kl"] for row in rows)
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-4
    (tmp_path / "own.txt").write_text("The sea\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"saved with anchors \S+own.txt \(.*\), now it is \S+own.txt \("):
        train(config, name="x", quiet=True, resume=True)
    plain = config_of(tmp_path / "plain", model_folder, train__max_steps=1)
    assert not any("train/anchor_kl" in row for row in rows_of(train(plain, name="x", quiet=True).folder))


def test_anchors_that_cannot_be_read_stop_a_run_before_it_begins(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, constraints__anchors=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"none.txt: anchor texts cannot be read"):
        train(config, name="x", quiet=True)
    (tmp_path / "long.txt").write_text("short\n" + "It rains. " * 1000, encoding="utf-8")
    config = config_of(tmp_path, model_folder, constraints__anchors=str(tmp_path / "long.txt"))
    with pytest.raises(ConfigError, match=r"^constraints.anchors: text 'It rains.*': \d+ tokens, but .* takes at most"):
        train(config, name="x", quiet=True)
