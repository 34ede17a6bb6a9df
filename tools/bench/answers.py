"""Free-form answers of the embedded model: what is said before and after training on it, and with other steerings.

Every figure is of the same test decisions (names and templates that no training saw) and the same seeds of sampling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dso.evaluation.comparison import cut_text
from dso.evaluation.report import ScalePoint, interval_text
from dso.files import write_text
from launch.commands.common import quieten
from launch.config.schema import TrainConfig, load_config
from launch.run.train import is_learned, said, train
from tools.bench.sweeps import RUNS

Row = tuple[str, ScalePoint]


def freeform(arguments: argparse.Namespace) -> None:
    """Train a steering a seed on what is said, measure it beside the base model and beside steerings that are given.

    Without seeds (``none``) nothing is trained.
    """
    quieten()
    rows: list[Row] = []
    for seed in (int(part) for part in arguments.seeds.split(",") if part != "none"):
        name = f"freeform-{Path(arguments.config).stem}-s{seed}"
        places = [f"run.output_dir={RUNS}", f"run.run_name={name}", f"train.seed={seed}"]
        config = load_config(arguments.config, [*arguments.overrides, *places])
        points = _trained(config, RUNS / name)
        rows += [("base", points[0])] if not rows else []
        rows.append((f"{config.train.estimator} s{seed}", points[-1]))
    for source in arguments.also:
        base, steered = said(load_config(arguments.config, arguments.overrides), source)
        rows += [(source, steered)] if rows else [("base", base), (source, steered)]
    records = [{"steering": name, **point.to_json(contexts=False)} for name, point in rows]
    write_text(Path(arguments.results) / "freeform.json", json.dumps(records, indent=1) + "\n")
    print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """A fixed-width table; the first row is the base model's."""
    lines = ["steering: gap [95%], bias [95%], cut [95%], names nobody, accuracy, KL a token"]
    for name, point in rows:
        gap = f"{interval_text(point.bias.gap)}  " if point.bias.gap is not None else ""
        cut = cut_text(point.cut.bias if point.cut else None)
        lines.append(
            f"{name:<12} {gap}{interval_text(point.bias.bias)}  {cut}  {point.bias.abstention:.3f}  "
            f"{point.accuracy.value:.3f}  {point.kl:.4f}"
        )
    return "\n".join(lines)


def _trained(config: TrainConfig, folder: Path) -> list[ScalePoint]:
    """The curve of a run, which is made unless it is there."""
    if is_learned(config, folder) and (folder / "curve.json").exists():
        return [ScalePoint.from_json(record) for record in json.loads((folder / "curve.json").read_text("utf-8"))]
    return train(config, name=folder.name, overwrite=True).points
