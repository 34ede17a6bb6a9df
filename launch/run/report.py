"""What a run leaves and prints: the steering with its evidence, the curve, the picture, tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dso.evaluation.card import model_card
from dso.evaluation.figure import scale_figure
from dso.evaluation.report import ScalePoint, contexts_table, markdown_table, scale_table
from dso.files import write_text
from dso.models.embedded import HUB_IDS
from launch.config.schema import TrainConfig
from launch.run.folder import RESULTS, Plan
from launch.run.freeform import ANSWERS, explained
from launch.run.measure import Measures
from launch.run.session import Session


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run yields: its folder and the measured scales of the test split."""

    folder: Path
    points: list[ScalePoint]


def write_results(
    session: Session, folder: Path, measures: Measures, points: Sequence[ScalePoint], seconds: float
) -> None:
    """Write everything that a finished run has, the report last: a run that has it has the rest."""
    config, steering = session.config, session.steering
    curve = [point.to_json(contexts=False) for point in points]
    steering.config = replace(steering.config, scale_curve=tuple(curve))
    data = f"{measures.what} of the split test of {config.data.set}"
    card = model_card(
        steering.config,
        points,
        name=folder.name,
        data=data,
        training=_training(session, seconds),
        source=str(folder / "steering"),
        base_model=HUB_IDS.get(config.model.name),
        kl_budget=config.constraints.kl_budget,
        unambiguous_kl=config.constraints.unambiguous_kl,
        limits=measures.limits,
    )
    steering.save_pretrained(folder / "steering", card)
    write_text(folder / "curve.json", json.dumps([point.to_json() for point in points], indent=1))
    shown = measures.write(folder, points)
    scale_figure(points, folder / "curve.png", config.constraints.kl_budget, title=f"{folder.name}: test")
    parts = [f"# {folder.name}\n", f"Measured on: {data}\n", markdown_table(points)]
    if config.freeform:
        parts.append(explained(points) + "\n")
    worst = contexts_table(points[0].bias, points[-1].bias, markdown=True)
    write_text(folder / "report.md", "\n".join([*parts, "![curve](curve.png)\n", worst, *shown]))


def _training(session: Session, seconds: float) -> dict[str, object]:
    """What the card says of the training."""
    config, train = session.config, session.config.train
    about: dict[str, object] = {
        "decision set": f"{config.data.set}, split train",
        "estimator": train.estimator,
        "steps x decisions": f"{train.max_steps} x {config.decisions}",
        "KL budget (nats a token)" if config.freeform else "KL budget (nats)": config.constraints.kl_budget,
        "seed": train.seed,
        "processes": session.trainer.world.size,
        "seconds": round(seconds),
    }
    return about | ({"answers a decision": train.freeform.num_generations} if config.freeform else {})


def found_result(config: TrainConfig, plan: Plan) -> Result | None:
    """The result of a run that is finished, as it was written; None if it has steps to learn, or lacks a file."""
    folder = plan.folder
    if plan.saved is None or plan.saved.step < config.train.max_steps:
        return None
    wanted = (*RESULTS, ANSWERS) if config.freeform else RESULTS
    if not all((folder / name).exists() for name in wanted):
        return None
    try:
        records = json.loads((folder / "curve.json").read_text("utf-8"))
        return Result(folder, [ScalePoint.from_json(record) for record in records])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: it is measured again


def report(result: Result) -> str:
    """What a finished run prints."""
    folder, answers = result.folder, result.folder / ANSWERS
    spoken = [explained(result.points), f"answers   {answers}"] if answers.exists() else []
    return "\n".join(
        [
            scale_table(result.points),
            *spoken,
            f"picture   {folder / 'curve.png'}",
            f"report    {folder / 'report.md'}",
            f"steering  {folder / 'steering'}   (dso generate {folder / 'steering'} --scale 0.5 PROMPT)",
        ]
    )
