"""What every tracker of a run does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter

from dso.evaluation.report import ScalePoint


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
