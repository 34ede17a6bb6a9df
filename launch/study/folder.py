"""The folder of a study: what it was asked, its parts, and what is done already.

study.yaml    the resolved config: what a folder is gone on with for
parts/        a JSON file a method and seed, written when it is done, so a study may be stopped at any moment; a process
              locks the one that it is at, so several share a study
runs/         the runs of dso train
study.json    all parts as one record (:mod:`dso.evaluation.study`); report.html and pictures are drawn from it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dso.errors import UserError
from dso.evaluation.study import Trial
from dso.files import as_path, lock, sweep, write_text
from launch.config.reading import dump_yaml, parse_yaml
from launch.config.schema import TrainConfig, to_dict


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """A study's folder.

    Args:
        path: where it is.
    """

    path: Path

    @classmethod
    def claim(cls, path: str | Path, config: TrainConfig) -> StudyFolder:
        """The folder for a study, made or gone on with.

        Raises:
            UserError: if it holds something else, or a study of another config, or cannot be written.
        """
        folder, stated = as_path(path), to_dict(config)
        place = folder / "study.yaml"
        held = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder, wait=True)  # of two that begin at once, one is the first
            if place.exists():
                if (found := parse_yaml(place.read_text(encoding="utf-8"))) != stated:
                    raise UserError(
                        f"{folder}: holds a study of other settings: {_difference(found, stated)}; "
                        "name another folder with --out, or remove this one"
                    )
            elif any(folder.iterdir()):
                raise UserError(f"{folder}: is not empty and holds no study; name another folder with --out")
            else:
                write_text(place, dump_yaml(stated))
            sweep(folder)
            (folder / "parts").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: a study cannot be written here: {error.strerror or error}") from error
        finally:
            if held is not None:
                os.close(held)
        return cls(folder)

    def part(self, name: str, seed: int) -> Path:
        """The file of one method and seed."""
        return self.path / "parts" / f"{name}-s{seed}.json"

    def done(self, name: str, seed: int) -> bool:
        """Whether it is there."""
        return self.part(name, seed).exists()

    @contextmanager
    def taking(self, name: str, seed: int) -> Iterator[bool]:
        """Whether the part is this process's to do within the block: it is not there, and no other process is at it."""
        place = self.part(name, seed).with_suffix(".lock")
        place.touch()
        held = lock(place)
        try:
            yield held is not None and not self.done(name, seed)
        finally:
            if held is not None:
                if self.done(name, seed):
                    place.unlink(missing_ok=True)
                os.close(held)

    def keep(self, name: str, seed: int, record: dict[str, Any]) -> None:
        """Write a part."""
        write_text(self.part(name, seed), json.dumps(record, indent=1) + "\n")

    def read(self, name: str, seed: int) -> dict[str, Any]:
        """A part that is there.

        Raises:
            UserError: if it is damaged.
        """
        place = self.part(name, seed)
        try:
            return dict(json.loads(place.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{place}: cannot be read ({error}); remove it, and it is made again") from error

    def trials(self, name: str) -> tuple[list[Trial], str]:
        """The trials of a method by seed, and why it has none, empty if it has."""
        trials, failed = [], ""
        for place in self.path.glob(f"parts/{name}-s*.json"):
            seed = place.stem.removeprefix(f"{name}-s")
            if seed.isdigit():
                record = self.read(name, int(seed))
                failed = failed or record.get("failed", "")
                if "trial" in record:
                    trials.append(Trial.from_json(record["trial"]))
        return sorted(trials, key=lambda trial: trial.seed), "" if trials else failed


def _difference(found: object, stated: object, path: str = "") -> str:
    """The first setting that differs, with both values."""
    if isinstance(found, dict) and isinstance(stated, dict):
        for key in dict.fromkeys((*found, *stated)):
            if found.get(key) != stated.get(key):
                return _difference(found.get(key), stated.get(key), f"{path}.{key}" if path else str(key))
    return f"{path} was {found!r} and is {stated!r}"
