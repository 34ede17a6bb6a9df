"""Train the embedded vision-language model and write it where the package ships it from.

The same kind of processor, number of threads and versions give the same weights bit for bit, whether the training was
cut off or not; others may round differently, and then give another model of the same kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from dso.files import cache_folder
from dso.models.embedded import SHIPPED


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m tools.embedded_vlm``."""
    from tools.embedded_vlm.training import Recipe

    parser = argparse.ArgumentParser(prog="python -m tools.embedded_vlm", description=__doc__)
    parser.add_argument("--out", type=Path, default=SHIPPED["vlm-scenes"], help="folder of the model (the package's)")
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "embedded_vlm", help="where a training that is cut off goes on"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 made the shipped weights")
    for field in fields(Recipe):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on training, and write the model."""
    arguments = vars(build_parser().parse_args(argv))
    import torch

    from tools.embedded_vlm.model import save
    from tools.embedded_vlm.training import Recipe, Training

    out, work = arguments.pop("out"), arguments.pop("work")
    torch.set_num_threads(arguments.pop("threads"))
    torch.use_deterministic_algorithms(True)
    training = Training(Recipe(**arguments), work)
    save(training.run(lambda line: print(line, flush=True)), training.processor, out)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
