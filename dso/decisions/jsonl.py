"""Decisions as JSON Lines: one decision to a line, and every broken line refused with file, line number and reason.

A line::

    {"id": "...", "context": "nurse", "kind": "ambiguous", "prompt": "... The nurse is named",
     "candidates": [{"text": " Mary", "group": "female"}, {"text": " John", "group": "male"}],
     "answer": null, "template": "t01", "split": "train", "images": [], "unit": "Mary/John",
     "stereotype": "female"}

The keys are the attributes of :class:`dso.decisions.decision.Decision`. ``candidates[i].text`` is the exact
continuation of the prompt, with its leading blank. ``images`` are paths, relative ones from the file's folder; each has
its slot, ``<image>``, in the prompt, in the same order. ``images``, ``unit`` and ``stereotype`` may be left out.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dso.decisions.decision import (
    ABSTAIN,
    OPTIONAL,
    REQUIRED,
    Candidate,
    Decision,
    DecisionError,
    DecisionSet,
    Message,
)

ROLES = ("system", "user", "assistant")
SHOWN = 80  # characters of a value that an error message repeats


def read_jsonl(path: str | Path, groups: Iterable[str] = ()) -> DecisionSet:
    """Read a decision set; unless given, the groups are those of the file.

    Raises:
        DecisionError: with file, line number and reason, on the first line that cannot be used.
    """
    path = Path(path)
    groups = tuple(groups)
    seen: dict[str, int] = {}
    decisions = []
    for number, line in _lines(path):
        try:
            decision = _read_line(line, path.parent, groups)
            if decision.id in seen:
                raise DecisionError(f"duplicate id {decision.id!r}, first used on line {seen[decision.id]}")
        except DecisionError as error:
            raise DecisionError(f"{path}:{number}: {error}") from error
        seen[decision.id] = number
        decisions.append(decision)
    try:
        return DecisionSet(tuple(decisions), groups, path.stem)
    except DecisionError as error:
        raise DecisionError(f"{path}: {error}") from error


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file of any kind, each with its line's number.

    Raises:
        DecisionError: with file, line number and reason, on a line that is not a JSON object.
    """
    for number, line in _lines(path):
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise DecisionError(f"expected a JSON object, found {type(record).__name__}")
        except DecisionError as error:
            raise DecisionError(f"{path}:{number}: {error}") from error
        yield number, record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DecisionError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            yield number, line


def _read_line(line: bytes, folder: Path, groups: tuple[str, ...]) -> Decision:
    decision = decision_from_json(parse_json(line))
    if decision.images:
        decision = replace(decision, images=tuple(os.path.abspath(folder / image) for image in decision.images))
    known = {*groups, ABSTAIN}
    if groups and (unknown := [c.group for c in decision.candidates if c.group not in known]):
        raise DecisionError(f"unknown group {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return decision


def parse_json(line: bytes) -> Any:
    """The JSON value of one line of UTF-8.

    Raises:
        DecisionError: if it is not UTF-8 or not JSON, an object has a key twice, or numbers or nesting go beyond what
            Python reads.
    """
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise DecisionError(f"not valid UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DecisionError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DecisionError("lists and objects are nested too deeply") from error
    except ValueError as error:
        if isinstance(error, DecisionError):
            raise
        raise DecisionError("a number has too many digits") from error  # the one thing else that json refuses


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DecisionError(f"the key {_short(twice)} appears twice")
    return record


def decision_from_json(record: object) -> Decision:
    """Build a decision from the value of one line.

    Raises:
        DecisionError: if a key is missing, unknown or of the wrong type, or a value cannot be used.
    """
    if not isinstance(record, dict):
        raise DecisionError(f"expected a JSON object, found {type(record).__name__}")
    if missing := [name for name in REQUIRED if name not in record]:
        raise DecisionError(f"missing key(s) {', '.join(missing)}")
    if unknown := sorted(set(record) - {*REQUIRED, *OPTIONAL}):
        named = ", ".join(_short(name) for name in unknown[:5])
        raise DecisionError(f"unknown key(s) {named}; known are {', '.join((*REQUIRED, *OPTIONAL))}")
    for name in ("id", "context", "kind", "template", "split", "unit"):
        if not isinstance(record.get(name, ""), str):
            raise DecisionError(f"{name} must be a string, found {_short(record[name])}")
    if not isinstance(record.get("stereotype"), str | None):
        raise DecisionError(f"stereotype must be a group or null, found {_short(record['stereotype'])}")
    if not isinstance(record["answer"], int | None):
        raise DecisionError(f"answer must be the index of a candidate or null, found {_short(record['answer'])}")
    return Decision(
        id=record["id"],
        context=record["context"],
        kind=record["kind"],
        prompt=_prompt(record["prompt"]),
        candidates=_candidates(record["candidates"]),
        answer=record["answer"],
        template=record["template"],
        split=record["split"],
        images=_images(record.get("images", [])),
        unit=record.get("unit", ""),
        stereotype=record.get("stereotype"),
    )


def _prompt(value: object) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_record(item, {"role", "content"}) for item in value):
        if strange := [message["role"] for message in value if message["role"] not in ROLES]:
            raise DecisionError(f"unknown role {_short(strange[0])} in the prompt; known are {', '.join(ROLES)}")
        return tuple(value)
    raise DecisionError('prompt must be a string or a list of {"role", "content"} messages')


def _candidates(value: object) -> tuple[Candidate, ...]:
    if not isinstance(value, list):
        raise DecisionError(f"candidates must be a list, found {type(value).__name__}")
    for item in value:
        if not _is_record(item, {"text", "group"}):
            raise DecisionError(f'a candidate must be {{"text": string, "group": string}}, found {_short(item)}')
    return tuple(Candidate(**item) for item in value)


def _images(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DecisionError(f"images must be a list of paths, found {_short(value)}")
    return tuple(value)


def _is_record(item: object, keys: set[str]) -> bool:
    return isinstance(item, dict) and set(item) == keys and all(isinstance(value, str) for value in item.values())


def _short(value: object) -> str:
    """A value as Python writes it, cut short."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
