"""Train a steering: ``dso train CONFIG``, and ``launch/train.py`` for launchers that start scripts.

A run is one folder: ``config.yaml`` (every value), ``metrics.jsonl``, ``times.jsonl`` (what the clock says), ``state/``
(to go on from), ``validation.json``, ``steering/`` (what is shipped), ``curve.json``, ``curve.png`` and ``report.md``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dso.evaluation.card import model_card
from dso.evaluation.figure import scale_figure
from dso.evaluation.report import ScalePoint, contexts_table, markdown_table, scale_table
from dso.files import write_text
from dso.models.embedded import HUB_IDS
from launch.cluster.processes import open_world
from launch.config.schema import TrainConfig
from launch.run import constants
from launch.run.folder import Resume, RunError, Stopped, on_main
from launch.run.learn import learn
from launch.run.measure import scale_points
from launch.run.opening import Run, opened
from launch.run.session import Session, open_session
from trainers.tracking.records import decision_samples

__all__ = ["Result", "RunError", "Stopped", "learn_only", "report", "train"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run yields: its folder and the measured scales of the first test split."""

    folder: Path
    points: list[ScalePoint]


def train(
    config: TrainConfig,
    *,
    name: str,
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
    deepspeed: str | None = None,
) -> Result:
    """Train, keep the best steering inside the constraints, measure it and write the report.

    Args:
        name: of the run's folder where the config names none.
        resume: go on from the folder's last saved state; "auto" starts the run if there is none.
        overwrite: drop an existing run of that name.
        quiet: print nothing but the result.
        deepspeed: DeepSpeed's configuration, a JSON file, for runs of a launcher.

    Raises:
        UserError: if the config or the folder cannot be used; an existing run is as it was then.
        Stopped: on Ctrl-C and SIGTERM, after the state was saved.
    """
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "quiet": quiet, "deepspeed": deepspeed}
    with _run(config, name=name, **options) as (session, plan, stop, tracker, world):
        seconds = learn(session, plan, stop, tracker, quiet=quiet)
        points = _measure(session, quiet)
        on_main(world, lambda: _write_results(session, plan.folder, points, seconds))
        samples = _samples(session) if config.run.report_to == "wandb" else []  # by every process, as a model runs
        tracker.results(points, samples, plan.folder / "steering")
    return Result(plan.folder, points)


def learn_only(config: TrainConfig, *, name: str) -> Path:
    """Train without measuring the test split: for sweeps that measure many steerings together."""
    with _run(config, name=name, overwrite=True) as (session, plan, stop, tracker, world):
        learn(session, plan, stop, tracker)
        session.handle.detach()
        on_main(world, lambda: session.steering.save_pretrained(plan.folder / "steering"))
    return plan.folder


@contextmanager
def _run(config: TrainConfig, **options: Any) -> Iterator[Run[Session]]:
    """:func:`launch.run.opening.opened` for this trainer."""
    with _deterministic(config.train.full_determinism), opened(config, open_world, open_session, **options) as run:
        yield run


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Within the block operations that have no deterministic form on this device are refused."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _samples(session: Session) -> list[list[Any]]:
    decisions = session.decisions.select(split="test")
    return session.trainer.learner.pass_through(lambda: decision_samples(session.backbone, decisions, session.handle))


def _measure(session: Session, quiet: bool) -> list[ScalePoint]:
    config = session.config
    split = "test"
    scales = sorted({0.0, *config.evaluation.scales})  # the base model is what the others are held against
    decisions = session.decisions.select(split=split)
    quiet = quiet or not session.trainer.world.is_main
    hidden = quiet or not sys.stderr.isatty()
    if not quiet and hidden:
        print(f"measuring {len(scales)} scales on {len(decisions)} decisions of {split}", file=sys.stderr)
    with tqdm(total=len(decisions) * len(scales), desc="measure", unit="decision", disable=hidden) as bar:
        evaluator = session.evaluator(decisions, progress=bar.update)
        return scale_points(evaluator, scales, config.data.target, constants.RESAMPLES)


def _write_results(session: Session, folder: Path, points: list[ScalePoint], seconds: float) -> None:
    config, split = session.config, "test"
    curve = [point.to_json(contexts=False) for point in points]
    session.steering.config = replace(session.steering.config, scale_curve=tuple(curve))
    decisions = session.decisions.select(split=split)
    training = {
        "decision set": f"{config.data.set}, split train",
        "estimator": config.train.estimator,
        "steps x decisions": f"{config.train.max_steps} x {config.decisions}",
        "KL budget (nats)": config.constraints.kl_budget,
        "seed": config.train.seed,
        "seconds": round(seconds),
    }
    data = f"{len(decisions)} decisions of the split {split} of {config.data.set}"
    card = model_card(
        session.steering.config,
        points,
        name=folder.name,
        data=data,
        training=training,
        source=str(folder / "steering"),
        base_model=HUB_IDS.get(config.model.name),
        kl_budget=config.constraints.kl_budget,
    )
    session.steering.save_pretrained(folder / "steering", card)
    write_text(folder / "curve.json", json.dumps([point.to_json() for point in points], indent=1))
    scale_figure(points, folder / "curve.png", config.constraints.kl_budget, title=f"{folder.name}: {split}")
    worst = contexts_table(points[0].bias, points[-1].bias, markdown=True)
    report = [f"# {folder.name}\n", f"Measured on: {data}\n", markdown_table(points), "![curve](curve.png)\n", worst]
    write_text(folder / "report.md", "\n".join(report))


def report(result: Result) -> str:
    """What a finished run prints."""
    folder = result.folder
    return "\n".join(
        [
            scale_table(result.points),
            f"picture   {folder / 'curve.png'}",
            f"report    {folder / 'report.md'}",
            f"steering  {folder / 'steering'}   (dso generate {folder / 'steering'} --scale 0.5 PROMPT)",
        ]
    )
