"""``dso verify``: whether a merged folder, or a server that should be running it, gives the answers of its probe."""

from __future__ import annotations

import argparse
import math

from dso.exports.probe import read_probe
from dso.exports.verify import verify_folder, verify_url
from dso.files import as_path
from launch.commands.common import quieten

EXIT_DIFFERS = 1


def run(arguments: argparse.Namespace) -> int:
    """``dso verify``."""
    quieten()
    folder = as_path(arguments.folder)
    probe = read_probe(folder)
    note = ""
    if arguments.url:
        verdict, note = verify_url(arguments.url, arguments.model, probe)
    else:
        verdict = verify_folder(folder, probe)
    says = "yes, it is the merged model" if verdict.passed else "no, it is another model, or skips a part of this one"
    print(f"{arguments.url or arguments.folder}: {says}")
    print(f"largest difference {verdict.largest:.2g} nats, tolerance {verdict.tolerance:g}")
    for name, share in verdict.shares.items():
        if math.isnan(share):
            print(f"the {name} says the same to these prompts")
        else:
            print(f"{round(100 * share)}% of the way from the {name} to the merged model")
    if note:
        print(f"Note: {note}.")
    return 0 if verdict.passed else EXIT_DIFFERS
