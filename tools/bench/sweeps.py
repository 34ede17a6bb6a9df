"""Training runs by variant and seed, and what they score on splits that they never saw.

Every run, and what each steering answered, is kept under ``runs/bench``, every figure under the results folder; what is
already there is not done again, so a sweep may be stopped and started at will.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dso.decisions.decision import DecisionSet
from dso.decisions.sets import load_decisions
from dso.evaluation.comparison import cut_text
from dso.evaluation.evaluator import Evaluator, Measurement
from dso.evaluation.report import ScalePoint, fixed_rows, interval_text
from dso.files import write_bytes, write_text
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from dso.steering.model import Steering
from launch.commands.common import quieten
from launch.config.schema import load_config
from launch.run.measure import scale_point, thin
from launch.run.train import is_learned, learned

RUNS = Path("runs/bench")
FIELDS = ("policy", "answer_mass", "kl")  # of a Measurement


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a sweep: a name and the overrides that make it."""

    name: str
    overrides: tuple[str, ...]


def budgets(arguments: argparse.Namespace) -> None:
    """The default run at each KL budget and seed, measured on names and templates that were both held out."""
    variants = [
        Variant(f"kl-{budget}", (f"constraints.kl_budget={budget}",)) for budget in arguments.budgets.split(",")
    ]
    folders = train_all("smollm2-roles", variants, arguments)
    data = load_decisions("roles", splits=["test"]).select(split="test")
    measure_all(folders, data, "test", Path(arguments.results) / "budgets.json")


def groups(arguments: argparse.Namespace) -> None:
    """Four groups, gender x race."""
    folders = train_all("smollm2-gender-race", [Variant("gender-race", ())], arguments)
    data = load_decisions("roles", attribute="gender x race", splits=["test"]).select(split="test")
    measure_all(folders, data, "test", Path(arguments.results) / "groups.json")


def transfer(arguments: argparse.Namespace) -> None:
    """Trained steerings on splits and sets that no training saw."""
    sets = {split: _of_roles(split) for split in arguments.splits.split(",") if split}
    sets["pronouns"] = load_decisions("pronouns").select(split="test")
    if arguments.winobias:
        whole = load_decisions("winobias", path=arguments.winobias)
        sets |= {split: whole.select(split=split) for split in whole.splits}
    folders = [
        (Path(folder).parent.name, number, Path(folder).parent) for number, folder in enumerate(arguments.steerings)
    ]
    for label, data in sets.items():
        measure_all(folders, data, label, Path(arguments.results) / f"transfer-{label}.json")


def _of_roles(split: str) -> DecisionSet:
    """48 couples of a split in all of its contexts; of ``test-people`` all 441, each in a third of them."""
    if split == "test-people":
        return thin(load_decisions("roles", splits=[split]).select(split=split), 3)
    return load_decisions("roles", splits=[split], units={split: 48}).select(split=split)


def train_all(
    config_name: str, variants: Iterable[Variant], arguments: argparse.Namespace
) -> list[tuple[str, int, Path]]:
    """Train every variant and seed that has no finished run yet; returns (variant, seed, run folder)."""
    quieten()
    wanted = arguments.only.split(",") if arguments.only else None
    done = []
    for seed in (int(part) for part in arguments.seeds.split(",")):
        for variant in variants:
            if wanted and variant.name not in wanted:
                continue
            folder = RUNS / f"{Path(config_name).stem}-{variant.name}-s{seed}"
            done.append((variant.name, seed, folder))
            settings = [
                f"run.output_dir={RUNS}",
                f"run.run_name={folder.name}",
                f"train.seed={seed}",
                *variant.overrides,
                *arguments.overrides,
            ]
            config = load_config(config_name, settings)
            if is_learned(config, folder):
                continue
            started = time.monotonic()
            learned(config, name=folder.name)
            cost = {
                "seconds": time.monotonic() - started,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
            write_text(folder / "cost.json", json.dumps(cost))
    return done


def measure_all(folders: Sequence[tuple[str, int, Path]], data: DecisionSet, label: str, results: Path) -> None:
    """Measure the base and each steering on one set, sharing the base's passes; print and keep the points.

    What each says to every decision is kept beside its run, so that only steerings that are new are run.
    """
    quieten()
    loaded = [Steering.from_pretrained(folder / "steering") for _, _, folder in folders]
    names = [("base", None), *((name, seed) for name, seed, _ in folders)]
    steerings = [None, *loaded]
    paths = [_kept(data, steering, loaded[0].config.base_model) for steering in steerings]
    if missing := [place for place, path in enumerate(paths) if not path.exists()]:
        backbone = Backbone.load(loaded[0].config.base_model)
        settings = [(_attached(steerings[place], backbone), float(place > 0)) for place in missing]
        for place, measured in zip(missing, Evaluator(backbone, data).settings(settings), strict=True):
            buffer = io.BytesIO()
            np.savez(buffer, **{field: getattr(measured, field) for field in FIELDS})
            paths[place].parent.mkdir(parents=True, exist_ok=True)
            write_bytes(paths[place], buffer.getvalue())
    measured = []
    for path in paths:
        with np.load(path) as arrays:
            measured.append(Measurement(*(arrays[field] for field in FIELDS)))
    points = [scale_point(0.0, measured[0], data, None, 1000)]
    points += [scale_point(1.0, each, data, None, 1000, measured[0]) for each in measured[1:]]
    records = [{"variant": n, "seed": s, **p.to_json(contexts=False)} for (n, s), p in zip(names, points, strict=True)]
    write_text(results, json.dumps({"set": label, "decisions": len(data), "rows": records}, indent=1) + "\n")
    print(table(label, names, points))


def _kept(data: DecisionSet, steering: Steering | None, model: str) -> Path:
    """Where answers are kept: named by the decisions, the model and the operators, so that no other's are taken."""
    digest = hashlib.sha256(model.encode())
    for decision in data:
        digest.update(json.dumps(decision.to_json()).encode())
    for name, tensor in sorted(steering.tensors().items()) if steering is not None else ():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return RUNS / "measured" / f"{digest.hexdigest()[:20]}.npz"


def _attached(steering: Steering | None, backbone: Backbone) -> Handle | None:
    return None if steering is None else steering.to(backbone.device).attach(backbone.model, 0.0)


def table(label: str, names: Sequence[tuple[str, int | None]], points: Sequence[ScalePoint]) -> str:
    """A fixed-width table of a sweep; the first point is the base."""
    header = (
        "run",
        "seed",
        "bias [95%]",
        "cut [95%]",
        "context part [95%]",
        "cut [95%]",
        "log-odds [95%]",
        "cut [95%]",
    )
    cells = [(*header, "order", "accuracy [95%]", "mass", "KL", "KL unamb.")]
    for (name, seed), p in zip(names, points, strict=True):
        bias, cut = p.bias, p.cut
        shares = (cut.bias, cut.context_part, cut.log_odds) if cut else (None, None, None)
        sizes = (bias.bias, bias.context_part, bias.log_odds.bias)
        pairs = zip(map(interval_text, sizes), map(cut_text, shares), strict=True)
        cells.append(
            (name, "" if seed is None else str(seed), *(text for pair in pairs for text in pair))
            + (f"{bias.order_effect:.2f}", interval_text(p.accuracy))
            + (f"{p.answer_mass / points[0].answer_mass:.2f}", f"{p.kl:.3f}", f"{p.kl_unambiguous:.3f}")
        )
    return f"{label}\n{fixed_rows(cells)}"
