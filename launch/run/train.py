"""Train a steering: ``dso train CONFIG``, and ``launch/train.py`` for launchers that start scripts.

A run is one folder: ``config.yaml`` (every value), ``metrics.jsonl``, ``times.jsonl`` (what the clock says), ``state/``
(to go on from), ``validation.json``, ``steering/`` (what is shipped), ``curve.json``, ``curve.png`` and ``report.md``;
one on free-form answers has ``answers.jsonl`` (what was said) as well. The config names the trainer, and with it
whether candidates or free-form answers are measured; everything else is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dso.evaluation.report import ScalePoint
from dso.files import as_path
from dso.steering.model import Steering
from launch.config.schema import ConfigError, TrainConfig, changes, load_config
from launch.run import constants
from launch.run.folder import Resume, RunError, Stopped, on_main
from launch.run.freeform import FreeformAnswers
from launch.run.learn import learn
from launch.run.measure import Measures
from launch.run.opening import claimed, opened
from launch.run.report import Result, found_result, report, write_results
from launch.run.session import Session, load_backbone, open_decisions, split_of
from launch.run.trainer import open_matcher
from trainers.parallel.ranks import World
from trainers.ppo import SteeringPPO
from trainers.state.saved import read_state
from trainers.tracking.records import decision_samples

__all__ = ["Result", "RunError", "Stopped", "is_learned", "last_step", "learned", "report", "said", "train"]


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

    A run that is finished already is not touched where it is to be resumed: its result is what it wrote.

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
    with claimed(config, name=name, resume=resume, overwrite=overwrite, deepspeed=deepspeed) as start:
        plan, world = start.plan, start.world
        quiet = quiet or not world.is_main
        if result := on_main(world, lambda: found_result(config, plan)):
            if not quiet:
                print(f"{plan.folder} is finished; this is its result", file=sys.stderr)
            return result
        with opened(config, start, quiet) as (session, tracker):
            seconds = learn(session, plan, start.stop, tracker, quiet=quiet)
            measures, points = measure(session, quiet)
            on_main(world, lambda: write_results(session, plan.folder, measures, points, seconds))
            tracker.results(points, _samples(session), plan.folder / "steering")
    return Result(plan.folder, points)


def learned(config: TrainConfig, *, name: str, quiet: bool = False) -> Path:
    """Train without measuring the test split, for who measures many steerings together; the run's folder.

    A run of the same config that is finished is left as it is, one that was stopped goes on, and one of another config
    is done again.

    Raises:
        UserError, Stopped: as :func:`train`.
    """
    folder = as_path(Path(config.run.output_dir) / (config.run.run_name or name))
    if is_learned(config, folder):
        return folder
    same = _is_of(config, folder)
    resume: Resume = "auto" if same else False
    with (
        claimed(config, name=name, resume=resume, overwrite=not same) as start,
        opened(config, start, quiet) as (session, tracker),
    ):
        learn(session, start.plan, start.stop, tracker, quiet=quiet)
        session.handle.detach()
    return start.plan.folder


def last_step(folder: Path) -> Steering:
    """The steering that a run ended with, whatever its selection kept."""
    steering, prefix = Steering.from_pretrained(folder / "steering"), "policy/steering."
    tensors = read_state(folder / "state").tensors
    steering.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    return steering


def is_learned(config: TrainConfig, folder: Path) -> bool:
    """Whether a folder holds a run of this config that was trained to its end."""
    return all((folder / name).exists() for name in ("validation.json", "steering")) and _is_of(config, folder)


def _is_of(config: TrainConfig, folder: Path) -> bool:
    try:
        return not changes(load_config(str(folder / "config.yaml")), config)
    except ConfigError:
        return False


def measure(session: Session, quiet: bool) -> tuple[Measures, list[ScalePoint]]:
    """The test split at the scales of the config, and at 0: the base model is what the others are held against."""
    scales = sorted({0.0, *session.config.evaluation.scales})
    decisions = session.split("test")
    with _told(len(decisions), len(scales), quiet) as progress:
        measures = session.measures(decisions, progress)
        return measures, measures.points(scales, constants.RESAMPLES)


def said(config: TrainConfig, source: str, quiet: bool = False) -> list[ScalePoint]:
    """What is said to the test split with a trained steering, or without one; nothing is written.

    Args:
        config: of free-form answers.
        source: folder or Hub id of a steering, whatever it was trained by; "none" for the base model alone.
        quiet: show no progress.

    Raises:
        UserError: if the config, the steering or the model cannot be used.
    """
    bare = source == "none"
    steering = None if bare else Steering.from_pretrained(source)
    decisions, matcher = split_of(config, open_decisions(config), "test"), open_matcher(config)
    backbone = load_backbone(config)
    handle = None if steering is None else steering.to(backbone.device).attach(backbone.model)
    scales = [0.0] if bare else sorted({0.0, *config.evaluation.scales})
    with _told(len(decisions), len(scales), quiet) as progress:
        answers = FreeformAnswers(config, backbone, decisions, matcher, handle, World(), progress)
        return answers.points(scales, constants.RESAMPLES)


@contextmanager
def _told(decisions: int, scales: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A bar over the decisions of a test at some scales, or a line where the output is piped."""
    hidden = quiet or not sys.stderr.isatty()
    if not quiet and hidden:
        print(f"measuring {scales} scales on {decisions} decisions of test", file=sys.stderr)
    with tqdm(total=decisions * scales, desc="measure", unit="decision", disable=hidden) as bar:
        yield bar.update


def _samples(session: Session) -> list[list[Any]]:
    """Decisions before and after, for who shows them; made by every process, as a model runs."""
    trainer, decisions = session.trainer, session.split("test")
    if session.config.run.report_to != "wandb" or not isinstance(trainer, SteeringPPO):
        return []
    return trainer.learner.pass_through(lambda: decision_samples(session.backbone, decisions, session.handle))
