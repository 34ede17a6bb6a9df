"""Train a steering: ``dso train CONFIG``, and ``launch/train.py`` for launchers that start scripts.

A run is one folder: ``config.yaml`` (every value), ``metrics.jsonl``, ``state/`` (to go on from), ``validation.json``,
``steering/`` (what is shipped), ``curve.json``, ``curve.png`` and ``report.md``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger
from tqdm import tqdm

from dso.card import model_card
from dso.embedded import HUB_IDS
from dso.errors import UserError
from dso.evaluation import Evaluator
from dso.figure import scale_figure
from dso.files import write_text
from dso.report import ScalePoint, contexts_table, markdown_table, scale_table
from launch.config import TrainConfig, resolved_yaml
from launch.measure import scale_point, scale_points, thin
from launch.session import Session, open_session
from trainers.callbacks import JsonLines, OrderlyStop, Progress, Selection, Validation
from trainers.state import has_state, load_state, save_state

FREE_BYTES = 200_000_000


class RunError(UserError):
    """A run folder that cannot be used or written; the message says why and what to do."""


class Stopped(Exception):
    """A run that ended early on request; the message says what was kept and how to go on."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run yields: its folder and the measured scales of the first test split."""

    folder: Path
    points: list[ScalePoint]


def train(
    config: TrainConfig, *, name: str, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Result:
    """Train, keep the best steering inside the constraints, measure it and write the report.

    Args:
        name: of the run's folder where the config names none.
        resume: go on from the folder's last saved state.
        overwrite: drop an existing run of that name.
        quiet: print nothing but the result.

    Raises:
        UserError: if the config or the folder cannot be used; an existing run is as it was then.
        Stopped: on Ctrl-C, after the state was saved.
    """
    folder = _check_folder(config, name, resume, overwrite)
    session = open_session(config)  # before the folder is touched, as most mistakes show here
    if not resume:
        _make_folder(folder, config)
    with _keeping(folder):
        seconds = _learn(session, folder, resume, quiet)
        points = _measure(session, quiet)
        _write_results(session, folder, points, seconds)
    return Result(folder, points)


def learn_only(config: TrainConfig, *, name: str) -> Path:
    """Train without measuring the test split: for sweeps that measure many steerings together."""
    folder = _check_folder(config, name, resume=False, overwrite=True)
    session = open_session(config)
    _make_folder(folder, config)
    with _keeping(folder):
        _learn(session, folder, resume=False, quiet=False)
        session.handle.detach()
        session.steering.save_pretrained(folder / "steering")
    return folder


def _check_folder(config: TrainConfig, name: str, resume: bool, overwrite: bool) -> Path:
    """The run's folder; refused without a change to the disk if the run cannot be kept there."""
    folder = Path(config.run.folder) / (config.run.name or name)
    if resume:
        _check_resumable(folder, config)
    elif folder.exists() and not overwrite:
        raise RunError(f"{folder}: exists; resume it with --resume, replace it with --overwrite, or set run.name=...")
    elif folder.exists() and not (folder / "config.yaml").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise RunError(f"{folder}: is no run (it has no config.yaml), so it is not overwritten; set run.name=...")
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{folder}: cannot be written; choose another place with run.folder=...")
    if (free := shutil.disk_usage(place).free) < FREE_BYTES:
        raise RunError(f"{folder}: only {free // 10**6} MB free on its disk; a run needs {FREE_BYTES // 10**6}")
    return folder


def _check_resumable(folder: Path, config: TrainConfig) -> None:
    if not has_state(folder / "state"):
        way = "replace it with --overwrite" if folder.exists() else "leave --resume away to start"
        raise RunError(f"{folder}: nothing to resume, as no state was saved there; {way}")
    try:
        written = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{folder}: its config.yaml cannot be read, so it cannot be resumed: {error}") from error
    if written != resolved_yaml(config):
        reason = "was trained with another config (see its config.yaml); give the same one to resume"
        raise RunError(f"{folder}: {reason}")


def _make_folder(folder: Path, config: TrainConfig) -> None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_text(folder / "config.yaml", resolved_yaml(config))
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written: {error.strerror}; choose another place with run.folder=..."
        ) from error


@contextmanager
def _keeping(folder: Path) -> Iterator[None]:
    """Where the block is left early, say what of the run was kept; a folder without anything learned is removed."""
    try:
        yield
    except BaseException as error:
        kept = has_state(folder / "state")
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        way = f"{folder} has what was done; go on with the same command and --resume" if kept else "nothing was kept"
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(f"interrupted; {way}") from error
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            raise RunError(f"{where}{error.strerror or error}; {way}") from error
        raise


def _learn(session: Session, folder: Path, resume: bool, quiet: bool) -> float:
    """Train to the last step and load the best operators; the seconds that it took, those before a resume too."""
    config, trainer = session.config, session.trainer
    steps, batch = config.train.steps, trainer.env.num_envs
    progress = Progress(steps, quiet=quiet)
    selection = Selection(
        _validator(session), every=config.evaluation.every, steps=steps, kl_budget=config.constraints.kl_budget
    )
    started = time.monotonic()

    def save() -> None:
        tensors, facts = selection.state()
        save_state(folder / "state", trainer, tensors, facts | {"seconds": time.monotonic() - started})

    def measured(row: Validation, better: bool) -> None:
        progress.say(
            f"validation at step {row.step}: bias {row.bias:.3f} (soft {row.soft_bias:.3f}, floor {row.floor:.3f})  "
            f"accuracy {row.accuracy:.3f}  KL {row.kl:.3f}  "
            f"answer mass x{row.answer_mass:.2f}{'  kept' if better else ''}"
        )
        save()

    selection.on_measured = measured
    if resume:
        tensors, facts = load_state(folder / "state", trainer)
        selection.restore(tensors, facts)
        started -= facts["seconds"]
    elif config.train.fisher_batches:
        trainer.whiten(config.train.fisher_batches, config.train.fisher_damping)
    lines = JsonLines(folder / "metrics.jsonl", until=trainer.num_timesteps if resume else None)
    trainer.set_logger(Logger(str(folder), [lines]))
    with OrderlyStop(trainer, progress.say):
        if left := max(0, steps * batch - trainer.num_timesteps):
            trainer.learn(left, CallbackList([progress, selection]), log_interval=1, reset_num_timesteps=False)
    trainer.logger.close()
    if trainer.stop_requested:
        save()
        done = f"stopped after step {trainer.steps_done} of {steps}; {folder} has everything so far"
        raise Stopped(f"{done}. Go on with the same command and --resume")
    history = [asdict(row) | {"decisions": row.step * batch} for row in selection.history]
    write_text(folder / "validation.json", json.dumps(history, indent=1) + "\n")
    session.steering.load_tensors(selection.best_tensors)
    return time.monotonic() - started


def _validator(session: Session) -> Callable[[int], Validation]:
    config = session.config
    decisions = thin(session.decisions.select(split=config.data.validation_split), config.evaluation.validation_stride)
    evaluator = Evaluator(
        session.backbone,
        decisions,
        session.handle,
        keep_reference=True,
        length_normalised=config.train.length_normalised,
    )
    base = evaluator.measure(0.0)
    base_mass = scale_point(0.0, base, decisions, config.data.target, 1).answer_mass

    def measure(step: int) -> Validation:
        # An untrained steering is the identity: the base's numbers, which are already there.
        scale = float(step > 0)
        point = scale_point(scale, evaluator.measure(scale), decisions, config.data.target, 1)
        bias = point.bias.corrected.value
        return Validation(
            step=step,
            bias=point.bias.soft.value if math.isnan(bias) else bias,  # a context needs two units to be corrected
            soft_bias=point.bias.soft.value,
            floor=point.bias.soft_floor,
            accuracy=point.accuracy.value,
            kl=point.kl,
            answer_mass=point.answer_mass / base_mass if base_mass else math.nan,
        )

    return measure


def _measure(session: Session, quiet: bool) -> list[ScalePoint]:
    config = session.config
    split = config.data.test_splits[0]
    scales = sorted({0.0, *config.evaluation.scales})  # the base model is what the others are held against
    decisions = session.decisions.select(split=split)
    hidden = quiet or not sys.stderr.isatty()
    if not quiet and hidden:
        print(f"measuring {len(scales)} scales on {len(decisions)} decisions of {split}", file=sys.stderr)
    with tqdm(total=len(decisions) * len(scales), desc="measure", unit="decision", disable=hidden) as bar:
        evaluator = Evaluator(
            session.backbone,
            decisions,
            session.handle,
            length_normalised=config.train.length_normalised,
            progress=bar.update,
        )
        return scale_points(evaluator, scales, config.data.target, config.evaluation.bootstrap)


def _write_results(session: Session, folder: Path, points: list[ScalePoint], seconds: float) -> None:
    config, split = session.config, session.config.data.test_splits[0]
    curve = [point.to_json(contexts=False) for point in points]
    session.steering.config = replace(session.steering.config, scale_curve=tuple(curve))
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


if __name__ == "__main__":
    from launch.cli import main

    raise SystemExit(main(["train", *sys.argv[1:]]))
