"""``dso report``: draw the report of a study again, or measure a steering's audit fields alone."""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from tqdm import tqdm

from dso import __version__
from dso.errors import UserError
from dso.evaluation.audit import audit
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.study import read_study
from dso.files import as_path, check_writable
from dso.reports.page import RECORD, write_audit, write_report
from dso.steering.model import Steering
from launch.commands.common import load_backbone, open_split, quieten, scale_of


def run(arguments: argparse.Namespace) -> int:
    """``dso report``."""
    if (arguments.study is None) == (arguments.audit is None):
        raise UserError("name a study, or a steering with --audit")
    if arguments.audit is not None:
        return _audit(arguments)
    place = as_path(arguments.study)
    file = place / RECORD if place.is_dir() else place
    print(write_report(read_study(file), arguments.out or file.parent))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    """Measure the base model and the steering."""
    if arguments.out is None:
        raise UserError("--audit needs --out, the folder to write")
    check_writable(as_path(arguments.out) / "audit.json")
    data = open_split(arguments.set, arguments)
    data.select(kind="ambiguous")
    quieten()
    steering = Steering.from_pretrained(arguments.audit)
    scale = scale_of(arguments.scale, steering)
    backbone = load_backbone(arguments, steering)
    handle = steering.to(backbone.device).attach(backbone.model, scale)
    hidden = arguments.quiet or not sys.stderr.isatty()
    with tqdm(total=2 * len(data), unit="decision", disable=hidden) as bar:
        base, steered = Evaluator(backbone, data, handle, progress=bar.update).curve([0.0, scale])
    sides = {"base": audit(base.policy, data).to_json(), "steered": audit(steered.policy, data).to_json()}
    about = {
        "command": shlex.join(["dso", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "model": backbone.name,
        "fingerprint": steering.config.base_id or "not stated",
        "steering": f"{arguments.audit}, coefficients {steering.key}, scale {scale:g}",
        "decisions": f"{data.name}, split {arguments.split}: {len(data)}",
        "versions": f"dso {__version__}",
    }
    print(write_audit(sides, about, arguments.out))
    return 0
