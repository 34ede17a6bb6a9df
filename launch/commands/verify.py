"""``dso verify``: whether a merged folder, or a server that should be running it, gives the answers of its probe."""

from __future__ import annotations

import argparse

from dso.exports.probe import read_probe
from dso.exports.verify import folder_difference, url_difference
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
        what = arguments.url
        largest, note = url_difference(arguments.url, arguments.model, probe)
    else:
        what = arguments.folder
        largest = folder_difference(folder, probe)
    passed = largest <= probe.tolerance
    verdict = "yes, it is the merged model" if passed else "no, it is another model, or part of it was skipped"
    print(f"{what}: {verdict}; largest difference {largest:.2g} nats, tolerance {probe.tolerance:g}")
    base = max(prompt.base for prompt in probe.prompts)
    print(f"The base model without the steering would differ by {base:.2g}.")
    if note:
        print(f"Note: {note}.")
    return 0 if passed else EXIT_DIFFERS
