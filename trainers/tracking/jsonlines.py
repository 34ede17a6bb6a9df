"""SB3 logger output as JSON Lines, of which a run that goes on cuts off what it will write again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter


class JsonLines(KVWriter):
    """One JSON object a record, appended, so that a run that goes on adds to its file.

    ``step`` is SB3's: decisions seen, not optimiser steps.

    Args:
        path: of the file.
        size: bytes that the file had when the state was saved that the run goes on from; what follows them, which
            will be written again, is cut off. None keeps all.
        wanted: which keys go into it, all if None; a record without any is left out.

    Attributes:
        lost: how many of these bytes are missing, if someone took them away.
    """

    def __init__(self, path: str | Path, size: int | None = None, wanted: Callable[[str], bool] | None = None):
        self.path = Path(path)
        self.wanted = wanted
        self.lost = 0 if size is None else self._cut(size)
        self._file = self.path.open("ab", buffering=0)  # noqa: SIM115  (closed by close)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        wanted = (key for key in sorted(key_values) if self.wanted is None or self.wanted(key))
        record = {key: _plain(key_values[key]) for key in wanted}
        if not record:
            return
        rest = memoryview((json.dumps({"step": step} | record) + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk does not say where
            raise

    def sync(self) -> int:
        """Wait until all records are on the disk; the file's size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()

    def _cut(self, size: int) -> int:
        """Leave the first ``size`` bytes; how many of them are not there any more."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = size if len(data) >= size else data.rfind(b"\n") + 1  # no half record that the next would be added to
        if len(data) > whole:
            os.truncate(self.path, whole)
        return size - whole


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
