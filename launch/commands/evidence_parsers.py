"""What the commands of evidence take: benchmarks, audits, calibration, patches. Light, as the parsers beside it."""

from __future__ import annotations

import argparse

from launch.commands.arguments import OWN_SCALE, add_model, add_option, positive


def add_evidence(commands: argparse._SubParsersAction) -> None:
    """Add the commands; each is a file beside this one."""
    _add_benchmark(commands)
    _add_report(commands)
    _add_calibrate(commands)
    _add_patch(commands)


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    text = "published benchmarks of a steering beside its base model, and what it does to other attributes"
    benchmark = commands.add_parser("benchmark", help=text, epilog="Exit code 3: some could not be measured.")
    benchmark.add_argument("steering", help="folder or Hub id of a steering; 'none' for the base model alone")
    benchmark.add_argument("names", nargs="*", metavar="NAME", help="such as crows_pairs; 'all' for all that are there")
    benchmark.add_argument("--data", metavar="DIR", help="the folder with a folder for each benchmark's files")
    benchmark.add_argument("--scale", type=float, help=f"of the steering {OWN_SCALE}")
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
    report = commands.add_parser("report", help="draw the report of a study again; or write audit fields alone")
    report.add_argument("study", nargs="?", help="the study.json that dso compare wrote, or its folder")
    report.add_argument("--out", metavar="DIR", help="the folder to write (default: that of the study)")
    report.add_argument("--audit", metavar="STEERING", help="instead: measure the audit fields of this steering")
    report.add_argument("--scale", type=float, help=f"of the steering {OWN_SCALE}")
    report.add_argument("--set", default="roles", help="name of a decision set or a .jsonl file (default: roles)")
    add_option(report)
    report.add_argument("--split", default="test", help="split to measure (default: test)")
    report.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model(report)


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    text = "find the scale that meets limits on validation, and make it the steering's own"
    calibrate = commands.add_parser("calibrate", help=text, epilog="Exit code 4: no scale does; nothing is written.")
    calibrate.add_argument("steering", help="folder of a steering, or with --out a Hub id")
    bias = "of the bias; the upper end of its 95%% interval must not be above it"
    calibrate.add_argument("--max-bias", type=float, metavar="BIAS", help=bias)
    calibrate.add_argument("--max-kl", type=float, metavar="NATS", help="of KL to the base on ambiguous decisions")
    calibrate.add_argument(
        "--max-accuracy-loss", type=float, metavar="SHARE", help="of the base's accuracy, as in 0.02"
    )
    calibrate.add_argument("--max-perplexity", type=float, metavar="SHARE", help="more on neutral texts, as in 0.05")
    calibrate.add_argument("--out", metavar="DIR", help="the steering to write (default: the one that was read)")
    calibrate.add_argument("--set", default="roles", help="name of a decision set or a .jsonl file (default: roles)")
    add_option(calibrate)
    calibrate.add_argument("--split", default="validation", help="split to measure (default: validation)")
    resamples = "resamples of the intervals (default: 1000)"
    calibrate.add_argument("--bootstrap", type=positive, default=1000, help=resamples)
    calibrate.add_argument("--quiet", action="store_true", help="print only the result")
    add_model(calibrate)


def _add_patch(commands: argparse._SubParsersAction) -> None:
    patch = commands.add_parser("patch", help="write the weights in which two models differ as a sparse patch")
    patch.add_argument("target", help="model that the patch is for: a folder, a Hub id, or an embedded one")
    patch.add_argument("reference", help="model of the same architecture, with more or less of what is to change")
    patch.add_argument("--method", choices=("value", "mask"), default="value", help="(default: value)")
    edits = ("interpolate", "extrapolate", "prune", "switch")
    patch.add_argument("--edit", choices=edits, default="extrapolate", help="(default: extrapolate)")
    patch.add_argument("--k", type=float, default=0.005, help="share of the weights, or their number (default: 0.005)")
    patch.add_argument("--sparsity", type=float, help="share that is pruned for masks (default: 0.3 with mask, else 0)")
    patch.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
