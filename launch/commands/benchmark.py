"""``dso benchmark``: published benchmarks of a base model and of a steering on it, and what spilled over.

Exit code 0: all that was asked for was measured (of ``all``: all whose files are there). 3: something that was asked
for by name could not be; stderr names it and how to get it, and the rest was measured. 2: nothing could be.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dso.errors import UserError
from dso.evaluation.benchmarks.harness import HarnessTask
from dso.evaluation.benchmarks.registry import BENCHMARKS, Measured, measure, named
from dso.evaluation.benchmarks.report import figures_json, figures_table
from dso.evaluation.benchmarks.task import MissingData, Task
from dso.evaluation.card import with_section
from dso.evaluation.spillover import Spillover, spillover, steered_attributes
from dso.files import as_path, check_writable, write_text
from dso.steering.model import Steering
from launch.commands.common import load_backbone, quieten, scale_of
from launch.exits import EXIT_INPUT, EXIT_PARTLY

CARD = "README.md"


def run(arguments: argparse.Namespace) -> int:
    """``dso benchmark``."""
    check_writable(arguments.json)
    bare = arguments.steering == "none"
    spills = arguments.spillover or arguments.write_card
    if bare and spills:
        raise UserError("spillover is what a steering does; name one instead of none")
    card = _card(arguments.steering) if arguments.write_card else None
    quieten()
    tasks, left_out = _tasks(arguments)
    if not tasks:
        return EXIT_INPUT
    steering = None if bare else Steering.from_pretrained(arguments.steering)
    backbone = load_backbone(arguments, steering)
    handle = steering.to(backbone.device).attach(backbone.model, 0.0) if steering else None
    scale = scale_of(arguments.scale, steering) if steering else None
    record: dict[str, Any] = {
        "steering": None if bare else arguments.steering,
        "scale": scale,
        "model": backbone.name,
        "limit": arguments.limit,
        "benchmarks": {},
        "left_out": left_out,
    }
    measured: dict[str, Measured] = {}
    for name, task in tasks.items():
        try:
            with _bar(name, task, handle is not None, arguments.quiet) as bar:
                measured[name] = measure(task, backbone, handle, scale or 0.0, bar.update)
        except UserError as error:
            _leave_out(left_out, name, error)
            continue
        rows = task.compare(measured[name].base, measured[name].steered)
        source = BENCHMARKS[name].source if name in BENCHMARKS else "lm-evaluation-harness"
        print(f"{name}: {task.items} items ({source})\n\n{figures_table(rows)}")
        record["benchmarks"][name] = {"source": source, "items": task.items, "figures": figures_json(rows)}
        _write(arguments.json, record)
    if spills and steering is not None and measured:
        try:
            found = spillover(measured, steered_attributes(steering.config.groups))
            _show(found, card)
            record["spillover"] = found.to_json()
        except UserError as error:
            _leave_out(left_out, "spillover", error)
    _write(arguments.json, record)
    if not measured:
        return EXIT_INPUT
    return EXIT_PARTLY if left_out else 0


def _tasks(arguments: argparse.Namespace) -> tuple[dict[str, Task], dict[str, str]]:
    """What can be asked, and why the rest cannot; of ``all``, missing data are no failure."""
    if not (arguments.names or arguments.harness):
        raise UserError(f"name a benchmark: {', '.join(BENCHMARKS)}, or all; or a --harness task")
    data = as_path(arguments.data) if arguments.data else None
    tasks: dict[str, Task] = {}
    left_out: dict[str, str] = {}
    for benchmark in named(arguments.names):
        try:
            tasks[benchmark.name] = benchmark.open(data, arguments.limit)
        except MissingData as error:
            if "all" in arguments.names:
                print(f"dso: left out: {error}", file=sys.stderr)
            else:
                _leave_out(left_out, benchmark.name, error)
        except UserError as error:
            _leave_out(left_out, benchmark.name, error)
    folder = as_path(arguments.harness_path) if arguments.harness_path else None
    for name in arguments.harness:
        try:
            tasks[f"harness {name}"] = HarnessTask(name, folder, arguments.limit)
        except UserError as error:
            _leave_out(left_out, f"harness {name}", error)
    return tasks, left_out


def _leave_out(left_out: dict[str, str], name: str, error: UserError) -> None:
    left_out[name] = str(error)
    print(f"dso: {error}", file=sys.stderr)


def _bar(name: str, task: Task, twice: bool, quiet: bool) -> tqdm:
    hidden = quiet or not sys.stderr.isatty()
    return tqdm(total=task.asks * (2 if twice else 1) or None, desc=name, disable=hidden, leave=False)


def _card(steering: str) -> Path:
    card = as_path(steering) / CARD
    if not card.is_file():
        raise UserError(f"--write-card: {card} is not there; name the local folder of a steering that has a card")
    return card


def _show(found: Spillover, card: Path | None) -> None:
    print(f"spillover\n\n{found.table()}")
    for row in found.grown:
        print(f"dso: warning: the bias about {row.attribute} grew ({row.benchmark})", file=sys.stderr)
    if card is not None:
        text = card.read_text(encoding="utf-8")
        write_text(card, with_section(text, "Spillover", found.section()))
        print(f"card      {card}")


def _write(place: str | None, record: dict[str, Any]) -> None:
    """What is measured so far, so that a later benchmark that fails takes nothing with it."""
    if place:
        write_text(place, json.dumps(record, indent=1) + "\n")
