"""Who else hears of a run: nobody, TensorBoard's files, or Weights & Biases. What a run needs itself is in its folder.

Scalars come from Stable-Baselines3's logger: each tracker adds an output to it. Training never waits for a tracker and
never fails with it; :meth:`Tracker.close` takes a bounded time (:mod:`trainers.tracking.wandb_relay`).

In W&B the scalars ``train/...``, ``eval/...``, ``rollout/...`` and ``time/...`` are drawn against
``train/global_step``, the optimiser steps; ``selected/...`` is the validation of the steering that was kept. At the end
come the bias-scale curve as charts and a table, some decisions before and after, and the steering as an artifact.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, make_output_format

from dso.errors import UserError
from dso.evaluation.report import ScalePoint
from dso.files import write_text
from trainers.tracking.records import SAMPLE_COLUMNS, curve_records, scalars, without_credentials
from trainers.tracking.wandb_relay import Relay

ID_FILE = "wandb.json"
NEEDS = {"wandb": "train", "tensorboard": "tensorboard"}  # the extra that installs it


class Tracker:
    """Tells nobody. To be used as a context, so that the end is told too, whatever it is."""

    def outputs(self, decisions: int, metrics: Path | None = None) -> list[KVWriter]:
        """What Stable-Baselines3's logger is to write to as well.

        Args:
            decisions: of one step.
            metrics: the metrics that a resumed run has already, as JSON Lines; None for a new run.
        """
        return []

    def selected(self, row: Mapping[str, float | None]) -> None:
        """The validation of the steering that is kept; None is what was not measured."""

    def results(self, points: Sequence[ScalePoint], samples: Sequence[Sequence[Any]], steering: Path) -> None:
        """What a finished run has found.

        Args:
            points: the measured scales.
            samples: rows of :data:`trainers.tracking.records.SAMPLE_COLUMNS`.
            steering: folder of what is shipped; it must stay as it is.
        """

    def close(self, code: int = 0) -> None:
        """End, with the exit code of the run."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(0 if kind is None else 1)


class TensorBoardTracker(Tracker):
    """Scalars in ``tensorboard/`` of the run, against the decisions that were seen, as Stable-Baselines3 counts."""

    def __init__(self, folder: Path):
        self._folder = folder / "tensorboard"

    def outputs(self, decisions: int, metrics: Path | None = None) -> list[KVWriter]:
        return [make_output_format("tensorboard", str(self._folder))]


class WandbTracker(Tracker):
    """A W&B run.

    Args:
        relay: takes the records.
        name: of the training run.
    """

    def __init__(self, relay: Relay, name: str):
        self._relay = relay
        self._name = name
        self._metadata: dict[str, Any] = {}

    def outputs(self, decisions: int, metrics: Path | None = None) -> list[KVWriter]:
        earlier = [] if metrics is None else metrics.read_text(encoding="utf-8").splitlines()
        self._relay.begin([{"log": scalars(json.loads(line), decisions)} for line in earlier])
        return [ScalarWriter(self._relay.put, decisions)]

    def selected(self, row: Mapping[str, float | None]) -> None:
        self._metadata = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        values = {f"selected/{name}": value for name, value in self._metadata.items()}
        self._relay.put({"log": {"train/global_step": row["step"], **values}})

    def results(self, points: Sequence[ScalePoint], samples: Sequence[Sequence[Any]], steering: Path) -> None:
        for record in curve_records(points):
            self._relay.put(record)
        table = {"key": "samples", "columns": list(SAMPLE_COLUMNS), "rows": [list(row) for row in samples]}
        self._relay.put({"table": table})
        artifact = {
            "name": re.sub(r"[^\w.-]", "-", f"steering-{self._name}")[:128],
            "type": "steering",
            "folder": str(steering.resolve()),
            "aliases": ["best", "latest"],
            "metadata": self._metadata,
        }
        self._relay.put({"artifact": artifact})

    def close(self, code: int = 0) -> None:
        self._relay.close(code)


class ScalarWriter(KVWriter):
    """SB3 logger output: hands the finite numbers of each record on.

    Args:
        put: takes a record.
        decisions: of one step.
    """

    def __init__(self, put: Callable[[dict[str, Any]], None], decisions: int):
        self._put = put
        self._decisions = decisions

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self._put({"log": scalars({"step": step, **key_values}, self._decisions)})

    def close(self) -> None:
        """Nothing is held here."""


def open_tracker(
    kind: str,
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    say: Callable[[str], None],
    warn: Callable[[str], None],
    is_main: bool = True,
    mode: str = "auto",
    timeout: float = 30.0,
    **init: Any,
) -> Tracker:
    """The tracker of a run; nothing is started yet.

    Args:
        kind: ``none``, ``tensorboard`` or ``wandb``.
        folder: of the run, which exists; its name is the run's.
        config: what the run was told, as plain values.
        say: told what happens.
        warn: told what goes wrong.
        is_main: whether this is the process that speaks for the others; they tell nobody.
        mode: of W&B: ``auto`` is online with a key and offline without one, unless WANDB_MODE says otherwise.
        timeout: seconds that W&B's server has to let the run begin, and again to take the rest at its end.
        init: further arguments of ``wandb.init``: project, entity, group, tags.
    """
    folder = Path(folder)
    mode = _environment_mode(mode)
    if kind == "none" or not is_main or (kind == "wandb" and mode == "disabled"):
        return Tracker()
    if kind == "tensorboard":
        return TensorBoardTracker(folder)
    setup = {
        "mode": mode,
        "folder": str(folder.resolve()),
        "config": without_credentials(config),
        "timeout": timeout,
        "process": os.getpid(),
        "init": {"id": run_id(folder), "name": folder.name, **init},
    }
    return WandbTracker(Relay(setup, say, warn), folder.name)


def check_tracker(kind: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: naming what to install.
    """
    if kind in NEEDS:
        found = importlib.util.find_spec(kind)
        if found is None or found.origin is None:  # a folder named wandb is a package of its own kind
            raise UserError(f"run.tracking: {kind} is not installed; pip install 'dso[{NEEDS[kind]}]'")


def run_id(folder: Path) -> str:
    """The id under which W&B knows the run of a folder: the one it was given before, that of a sweep, or a new one."""
    path = folder / ID_FILE
    given = os.environ.get("WANDB_RUN_ID")
    if given is None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    own = given or secrets.token_hex(4)
    write_text(path, json.dumps({"id": own}) + "\n")
    return own


def _environment_mode(mode: str) -> str:
    named = os.environ.get("WANDB_MODE")
    return named if mode == "auto" and named in ("online", "offline", "disabled") else mode
