"""Train a steering: ``dso train CONFIG``, and ``launch/train.py`` for launchers that start scripts.

A run is one folder: ``config.yaml`` (every value), ``metrics.jsonl``, ``state/`` (to go on from), ``steering/`` (what is
shipped), ``curve.json``, ``curve.png`` and ``report.md``.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger
from tqdm import tqdm

from dso.card import model_card
from dso.checkpoint import SteeringConfig
from dso.decisions import DecisionSet
from dso.evaluation import Evaluator
from dso.figure import scale_figure
from dso.files import write_text
from dso.report import ScalePoint, contexts_table, markdown_table, scale_table
from launch.config import TrainConfig, resolved_yaml
from launch.measure import scale_point, scale_points
from launch.session import Session, open_session
from trainers.callbacks import JsonLines, OrderlyStop, Progress, Selection, Validation
from trainers.state import load_state, save_state

FREE_BYTES = 200_000_000


class RunError(ValueError):
    """A run folder that cannot be used; the message says why and what to do."""


class Stopped(Exception):
    """Training ended early on request; the message says how to go on."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run yields: its folder and the measured scales of the first test split."""

    folder: Path
    points: list[ScalePoint]


def train(config: TrainConfig, *, name: str, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> Result:
    """Train, keep the best steering inside the constraints, measure it and write the report.

    Args:
        name: of the run's folder where the config names none.
        resume: go on from the folder's last saved state.
        overwrite: drop an existing folder of that name.
        quiet: print nothing but the result.

    Raises:
        RunError: if the folder cannot be used.
        Stopped: on Ctrl-C, after the state was saved.
    """
    folder = _prepare(config, name, resume, overwrite)
    started = time.monotonic()
    session = open_session(config)
    _learn(session, folder, resume, quiet)
    trained = time.monotonic() - started
    points = _measure(session, quiet)
    _write_results(session, folder, points, trained)
    return Result(folder, points)


def _prepare(config: TrainConfig, name: str, resume: bool, overwrite: bool) -> Path:
    folder = Path(config.run.folder) / (config.run.name or name)
    written = resolved_yaml(config)
    if resume:
        if not (folder / "state").is_dir():
            raise RunError(f"{folder}: nothing to resume (no state/); leave --resume away to start")
        if (folder / "config.yaml").read_text(encoding="utf-8") != written:
            raise RunError(f"{folder}: was trained with another config (see its config.yaml); give the same one to resume")
        return folder
    if folder.exists() and not overwrite:
        raise RunError(f"{folder}: exists; resume it with --resume, replace it with --overwrite, or set run.name=...")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < FREE_BYTES:
            raise RunError(f"{folder}: only {free // 10**6} MB free on its disk; a run needs {FREE_BYTES // 10**6}")
        write_text(folder / "config.yaml", written)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}; choose another place with run.folder=...") from error
    return folder


def _learn(session: Session, folder: Path, resume: bool, quiet: bool) -> None:
    config, trainer = session.config, session.trainer
    steps, batch = config.train.steps, trainer.env.num_envs
    progress = Progress(steps, quiet=quiet)
    selection = Selection(
        _validator(session),
        every=config.evaluation.every,
        steps=steps,
        kl_budget=config.constraints.kl_budget,
    )

    def measured(row: Validation, better: bool) -> None:
        progress.say(
            f"validation at step {row.step}: bias {row.bias:.3f} (soft {row.soft_bias:.3f}, floor {row.floor:.3f})  "
            f"accuracy {row.accuracy:.3f}  KL {row.kl:.3f}  answer mass x{row.answer_mass:.2f}{'  kept' if better else ''}"
        )
        save_state(folder / "state", trainer, *selection.state())

    selection.on_measured = measured
    if resume:
        selection.restore(*load_state(folder / "state", trainer))
    trainer.set_logger(Logger(str(folder), [JsonLines(folder / "metrics.jsonl")]))
    left = steps * batch - trainer.num_timesteps
    with OrderlyStop(trainer):
        if left > 0:
            trainer.learn(left, CallbackList([selection, progress]), log_interval=1, reset_num_timesteps=False)
    trainer.logger.close()
    if trainer.stop_requested:
        save_state(folder / "state", trainer, *selection.state())
        done = trainer.num_timesteps // batch
        raise Stopped(f"stopped after step {done} of {steps}; everything so far is in {folder}. Go on with the same command and --resume")
    session.steering.load_tensors(selection.best_tensors)


def _validator(session: Session) -> Callable[[int], Validation]:
    config = session.config
    decisions = session.decisions.select(split=config.data.validation_split)
    evaluator = Evaluator(
        session.backbone, decisions, session.handle, keep_reference=True, length_normalised=config.train.length_normalised
    )
    base = evaluator.measure(0.0)
    base_mass = scale_point(0.0, base, decisions, config.data.target, 1).answer_mass

    def measure(step: int) -> Validation:
        # An untrained steering is the identity: the base's numbers, which are already there.
        scale = float(step > 0)
        point = scale_point(scale, evaluator.measure(scale), decisions, config.data.target, 1)
        return Validation(
            step=step,
            bias=point.bias.corrected.value,
            soft_bias=point.bias.soft.value,
            floor=point.bias.soft_floor,
            accuracy=point.accuracy.value,
            kl=point.kl,
            answer_mass=point.answer_mass / base_mass,
        )

    return measure


def _measure(session: Session, quiet: bool) -> list[ScalePoint]:
    config = session.config
    decisions = session.decisions.select(split=config.data.test_splits[0])
    total = len(decisions) * len(config.evaluation.scales)
    hidden = quiet or not sys.stderr.isatty()
    if not quiet and hidden:
        print(f"measuring {len(config.evaluation.scales)} scales on {len(decisions)} decisions of {config.data.test_splits[0]}", file=sys.stderr)
    with tqdm(total=total, desc="measure", unit="decision", disable=hidden) as bar:
        evaluator = Evaluator(
            session.backbone, decisions, session.handle, length_normalised=config.train.length_normalised, progress=bar.update
        )
        return scale_points(evaluator, config.evaluation.scales, config.data.target, config.evaluation.bootstrap)


def _write_results(session: Session, folder: Path, points: list[ScalePoint], seconds: float) -> None:
    config, split = session.config, session.config.data.test_splits[0]
    curve = [point.to_json(contexts=False) for point in points]
    stated: SteeringConfig = replace(session.steering.config, scale_curve=tuple(curve))
    session.steering.config = stated
    decisions = session.decisions.select(split=split)
    training = {
        "decision set": f"{config.data.set}, split {config.data.train_split}",
        "estimator": config.train.estimator,
        "steps x decisions": f"{config.train.steps} x {config.train.ambiguous + config.train.unambiguous}",
        "KL budget (nats)": config.constraints.kl_budget,
        "seed": config.train.seed,
        "seconds": round(seconds),
    }
    data = f"{len(decisions)} decisions of the split {split} of {config.data.set}"
    card = model_card(
        stated, points, name=folder.name, data=data, training=training, source=str(folder / "steering"),
        kl_budget=config.constraints.kl_budget,
    )  # fmt: skip
    session.steering.save_pretrained(folder / "steering", card)
    write_text(folder / "curve.json", json.dumps([point.to_json() for point in points], indent=1))
    scale_figure(points, folder / "curve.png", config.constraints.kl_budget, title=f"{folder.name}: {split}")
    report = [f"# {folder.name}\n", f"Measured on: {data}\n", markdown_table(points), "![curve](curve.png)\n"]
    write_text(folder / "report.md", "\n".join([*report, contexts_table(points[0].bias, points[-1].bias, markdown=True)]))


def report(result: Result) -> str:
    """What a finished run prints."""
    return "\n".join(
        [
            scale_table(result.points),
            f"picture   {result.folder / 'curve.png'}",
            f"report    {result.folder / 'report.md'}",
            f"steering  {result.folder / 'steering'}   (dso generate {result.folder / 'steering'} --scale 0.5 PROMPT)",
        ]
    )


if __name__ == "__main__":
    from launch.cli import main

    torch.set_float32_matmul_precision("high")
    raise SystemExit(main(["train", *sys.argv[1:]]))
