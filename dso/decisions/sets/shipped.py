"""The words of the built-in sets, which are shipped as files beside this module.

``data/*.csv`` have a header; ``data/*.jsonl`` have one object to a line.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data"


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file, in its order, by column."""
    with open(FOLDER / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def read_records(name: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, in its order."""
    with open(FOLDER / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
