"""What the commands of evidence take: benchmarks, audits, calibration, patches. Light, as the parsers beside it."""

from __future__ import annotations

import argparse

from launch.commands.arguments import add_model, positive


def add_evidence(commands: argparse._SubParsersAction) -> None:
    """Add the commands; each is a file beside this one."""
    _add_benchmark(commands)
    _add_report(commands)


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    text = "published benchmarks of a steering beside its base model, and what it does to other attributes"
    benchmark = commands.add_parser("benchmark", help=text, epilog="Exit code 3: some could not be measured.")
    benchmark.add_argument("steering", help="folder or Hub id of a steering; 'none' for the base model alone")
    benchmark.add_argument("names", nargs="*", metavar="NAME", help="such as crows_pairs; 'all' for all that are there")
    benchmark.add_argument("--data", metavar="DIR", help="the folder with a folder for each benchmark's files")
    benchmark.add_argument("--scale", type=float, default=1.0, help="of the steering (default: 1)")
    benchmark.add_argument("--limit", type=positive, metavar="N", help="items of each benchmark (default: all)")
    benchmark.add_argument("--spillover", action="store_true", help="also show the bias about other attributes")
    benchmark.add_argument("--write-card", action="store_true", help="likewise, and write it into the steering's card")
    text = "a task of lm-evaluation-harness, repeatable"
    benchmark.add_argument("--harness", action="append", default=[], metavar="TASK", help=text)
    benchmark.add_argument("--harness-path", metavar="DIR", help="with YAML files of further harness tasks")
    benchmark.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    benchmark.add_argument("--quiet", action="store_true", help="no progress bars")
    add_model(benchmark)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="draw the report of a study again")
    report.add_argument("study", help="the study.json that dso compare wrote, or its folder")
    report.add_argument("--out", metavar="DIR", help="the folder to write (default: that of the study)")
