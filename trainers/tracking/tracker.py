"""Who else hears of a run: nobody, TensorBoard's files, or Weights & Biases. What a run needs itself is in its folder.

Scalars come from Stable-Baselines3's logger: each tracker adds an output to it. Training never waits for a tracker and
never fails with it; :meth:`Tracker.close` takes a bounded time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, make_output_format

from dso.errors import UserError
from trainers.tracking.base import Tracker

NEEDS = {"wandb": "train", "tensorboard": "tensorboard"}  # the extra that installs it


class TensorBoardTracker(Tracker):
    """Scalars in ``tensorboard/`` of the run, against the decisions that were seen, as Stable-Baselines3 counts."""

    def __init__(self, folder: Path):
        self._folder = folder / "tensorboard"

    def outputs(self, decisions: int, metrics: Path | None = None) -> list[KVWriter]:
        return [make_output_format("tensorboard", str(self._folder))]


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
        mode: of W&B: ``auto`` is online with a key and offline without one, unless W&B's own settings say otherwise.
        timeout: seconds that W&B's server has to let the run begin, and again to take the rest at its end.
        init: further arguments of ``wandb.init``: project, entity, group, tags.
    """
    if kind == "none" or not is_main:
        return Tracker()
    if kind == "tensorboard":
        return TensorBoardTracker(Path(folder))
    if (os.environ.get("WANDB_MODE") if mode == "auto" else mode) == "disabled":
        return Tracker()
    from trainers.tracking.weights_and_biases import WandbTracker

    return WandbTracker(Path(folder), config=config, mode=mode, timeout=timeout, say=say, warn=warn, **init)


def check_tracker(kind: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: naming what to install.
    """
    if kind in NEEDS:
        found = importlib.util.find_spec(kind)
        if found is None or found.origin is None:  # a folder named wandb is a package of its own kind
            raise UserError(f"run.report_to: {kind} is not installed; pip install 'dso[{NEEDS[kind]}]'")
