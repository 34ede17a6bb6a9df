"""What every benchmark is: where its files belong, how they become a task, and what a task asks and reports."""

from __future__ import annotations

import csv
import io
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dso.errors import UserError, first_line
from dso.evaluation.benchmarks.figures import Figure, paired
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.comparison import Compared

Answers = TypeVar("Answers")
Item = TypeVar("Item")


class MissingData(UserError):
    """A benchmark's files are not there; the message says how to get them and where to put them."""


class Task(ABC, Generic[Answers]):
    """A benchmark with its items read: :meth:`ask` each model, then :meth:`compare`.

    Attributes:
        items: how many there are.
        asks: how many prompts or texts :meth:`ask` hands to the model, for a progress bar.
    """

    items: int
    asks: int

    @abstractmethod
    def ask(self, probe: Probe) -> Answers:
        """What the model says to every item, as it is now."""

    @abstractmethod
    def compare(self, base: Answers, steered: Answers | None) -> dict[str, Compared]:
        """Every figure of both models by name, with the paired difference; None for no second model."""


class FigureTask(Task[Answers]):
    """A task all of whose results are :class:`dso.evaluation.benchmarks.figures.Figure`."""

    @abstractmethod
    def figures(self, answers: Answers) -> list[Figure]:
        """The figures of one model, always the same ones in the same order."""

    def compare(self, base: Answers, steered: Answers | None) -> dict[str, Compared]:
        return paired(self.figures(base), None if steered is None else self.figures(steered))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One published benchmark.

    Attributes:
        name: on the command line, and the folder of its files.
        source: the paper and the section that it is scored by.
        obtain: how to get its files; "" where it needs none.
        load: from its folder, and at most how many items (None: all), the task. Raises :class:`MissingData` where
            files are not there, and UserError where one is not as published.
    """

    name: str
    source: str
    obtain: str
    load: Callable[[Path, int | None], Task]

    def open(self, data: Path | None, limit: int | None = None) -> Task:
        """The task, from the folder of all benchmarks.

        Raises:
            MissingData: naming what is not there, how to get it and where to put it.
            UserError: if a file is not as published.
        """
        if data is None and self.obtain:
            raise MissingData(f"{self.name}: name the folder of its files with --data DIR. {self.obtain}")
        folder = (data or Path()) / self.name
        try:
            return self.load(folder, limit)
        except FileNotFoundError as error:
            place = Path(error.filename or folder)
            raise MissingData(f"{self.name}: {place} is not there. {self.obtain} Put it into {folder}") from error


def found_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match, sorted.

    Raises:
        FileNotFoundError: if there is none.
    """
    if files := sorted(folder.glob(pattern)):
        return files
    raise FileNotFoundError(2, "No such file", str(folder / pattern))


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def read_json(path: Path) -> Any:
    """A file's JSON value."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error


def read_jsonl(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, each with at least these keys."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from error
        rows.append(with_keys(row, keys, f"{path}:{number}"))
    return _some(rows, path)


def read_csv(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table with a header that names at least these columns."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    header = reader.fieldnames or ()
    if lost := [column for column in columns if column not in header]:
        raise UserError(f"{path}:1: lacks the column {lost[0]!r}; is it another version? Found: {', '.join(header)}")
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        if any(row[column] is None for column in columns):
            raise UserError(f"{path}:{number}: has fewer columns than its header")
    return _some(rows, path)


def with_keys(row: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    """The object itself, if it has the keys.

    Raises:
        UserError: naming the key that it lacks.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    if lost := [key for key in keys if key not in row]:
        raise UserError(f"{where}: lacks {lost[0]!r}; is the file another version? Found: {', '.join(row)}")
    return row


def drawn(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most so many of the items, drawn at random, the same ones each time, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    places = random.Random(0).sample(range(len(items)), limit)
    return [items[place] for place in sorted(places)]


def mapped(table: Mapping[str, str], key: str, where: str) -> str:
    """What a table says for a key of a file.

    Raises:
        UserError: if it has no such key.
    """
    if key not in table:
        raise UserError(f"{where}: unknown {key!r}; expected one of {', '.join(table)}")
    return table[key]


def _some(rows: list[Item], path: Path) -> list[Item]:
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows
