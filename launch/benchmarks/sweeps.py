"""Training runs by variant and seed, and what they score on splits that they never saw.

Every run is kept under ``runs/bench`` and every figure under the results folder; what is already there is not
done again, so a sweep may be stopped and started at will.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dso.backbone import Backbone
from dso.data import load_decisions
from dso.decisions import DecisionSet
from dso.evaluation import Evaluator
from dso.files import write_text
from dso.report import ScalePoint
from dso.steering import Steering
from launch.commands import quieten
from launch.config import load_config, resolved_yaml
from launch.measure import scale_point
from launch.train import learn_only

RUNS = Path("runs/bench")
PUBLISHED = (
    "train.estimator=reinforce",
    "train.reward=sign",
    "train.hard_preference=true",
    "train.preference=context",
    "train.batch_weight=1.0",
    "train.baseline=none",
    "train.unambiguous=0",
    "train.fisher_batches=0",
    "train.adam_eps=1e-8",
    "constraints.kl_budget=null",
    "constraints.kl_coefficient=0.1",
)


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
    folders = _train_all("smollm2-roles", variants, arguments)
    data = load_decisions("roles", splits=["test"]).select(split="test")
    _measure_all(folders, data, "test", Path(arguments.results) / "budgets.json")


def groups(arguments: argparse.Namespace) -> None:
    """Four groups, gender x race."""
    folders = _train_all("smollm2-gender-race", [Variant("gender-race", ())], arguments)
    data = load_decisions("roles", attribute="gender x race", splits=["test"]).select(split="test")
    _measure_all(folders, data, "test", Path(arguments.results) / "groups.json")


def estimators(arguments: argparse.Namespace) -> None:
    """Decisions until the validation bias first halves, and the bias at equal KL, by estimator."""
    variants = [
        Variant("expected", ()),
        Variant("reinforce", ("train.estimator=reinforce",)),
        Variant("ppo", ("train.estimator=ppo", "train.ppo_epochs=1")),
        Variant("published", PUBLISHED),
    ]
    rows = []
    for name, seed, folder in _train_all("smollm2-estimators", variants, arguments):
        history = json.loads((folder / "validation.json").read_text())
        rows.append({"variant": name, "seed": seed, "halved_at": decisions_until(history, 0.5), "history": history})
    write_text(Path(arguments.results) / "estimators.json", json.dumps(rows, indent=1) + "\n")
    print("variant     seed  decisions until halved   lowest bias (KL there)")
    for row in rows:
        best = min(row["history"], key=lambda r: r["bias"])
        halved = row["halved_at"] or "-"
        print(f"{row['variant']:<11} {row['seed']:>4}  {halved:>22}   {best['bias']:.3f} ({best['kl']:.3f})")


def transfer(arguments: argparse.Namespace) -> None:
    """Trained steerings on splits and sets that no training saw."""
    sets = {
        split: load_decisions("roles", splits=[split], units={split: 48}).select(split=split)
        for split in arguments.splits.split(",")
        if split
    }
    sets["pronouns"] = load_decisions("pronouns").select(split="test")
    if arguments.winobias:
        whole = load_decisions("winobias", path=arguments.winobias)
        sets |= {split: whole.select(split=split) for split in whole.splits}
    folders = [
        (Path(folder).parent.name, number, Path(folder).parent) for number, folder in enumerate(arguments.steerings)
    ]
    for label, data in sets.items():
        _measure_all(folders, data, label, Path(arguments.results) / f"transfer-{label}.json")


def decisions_until(history: Sequence[dict], share: float) -> int | None:
    """Training decisions after which the bias was first at most ``share`` of the base's; None if never."""
    base = history[0]["bias"]
    return next((row["decisions"] for row in history if row["bias"] <= share * base), None)


def _train_all(
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
                f"run.folder={RUNS}",
                f"run.name={folder.name}",
                f"train.seed={seed}",
                *variant.overrides,
                *arguments.overrides,
            ]
            config = load_config(config_name, settings)
            if finished(folder, config):
                continue
            started = time.monotonic()
            learn_only(config, name=folder.name)
            cost = {
                "seconds": time.monotonic() - started,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
            write_text(folder / "cost.json", json.dumps(cost))
    return done


def finished(folder: Path, config: object) -> bool:
    """Whether a run of this very config is there to its end; one of another config is done again."""
    try:
        return (folder / "steering").exists() and (folder / "config.yaml").read_text() == resolved_yaml(config)
    except OSError:
        return False


def _measure_all(folders: Sequence[tuple[str, int, Path]], data: DecisionSet, label: str, results: Path) -> None:
    """Measure the base and each steering on one set, sharing the base's passes; print and keep the points."""
    quieten()
    steerings = [Steering.from_pretrained(folder / "steering") for _, _, folder in folders]
    backbone = Backbone.load(steerings[0].config.base_model)
    handles = [steering.to(backbone.device).attach(backbone.model, 0.0) for steering in steerings]
    measured = Evaluator(backbone, data).settings([(None, 0.0), *((handle, 1.0) for handle in handles)])
    points = [scale_point(float(number > 0), m, data, None, 1000) for number, m in enumerate(measured)]
    names = [("base", None), *((name, seed) for name, seed, _ in folders)]
    records = [{"variant": n, "seed": s, **p.to_json(contexts=False)} for (n, s), p in zip(names, points, strict=True)]
    write_text(results, json.dumps({"set": label, "decisions": len(data), "rows": records}, indent=1) + "\n")
    print(table(label, names, points))


def table(label: str, names: Sequence[tuple[str, int | None]], points: Sequence[ScalePoint]) -> str:
    """A fixed-width table of a sweep; the first point is the base."""
    base = points[0]
    lines = [
        f"{label}: floor-corrected bias [95%], cut, soft (floor), accuracy, answer mass to base, KL, KL unambiguous"
    ]
    for (name, seed), p in zip(names, points, strict=True):
        b = p.bias.corrected
        cut = 1 - b.value / base.bias.corrected.value
        lines.append(
            f"{name:<12} {'' if seed is None else seed!s:>2} {b.value:.3f} [{b.low:.3f}, {b.high:.3f}] {cut:6.1%}  "
            f"{p.bias.soft.value:.3f} ({p.bias.soft_floor:.3f})  {p.accuracy.value:.3f}  "
            f"{p.answer_mass / base.answer_mass:.2f}  {p.kl:.3f}  {p.kl_unambiguous:.3f}"
        )
    return "\n".join(lines)
