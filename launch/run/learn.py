"""The learning part of a run: steps with validation in between, saved so that it may be killed at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger

from dso.evaluation.report import ScalePoint
from dso.files import free_bytes, write_text
from launch.run.constants import FISHER_DAMPING, LEAST_MASS, aimed_kl
from launch.run.folder import LOW_BYTES, Plan, RunError, Stopped, failing_together, on_main
from launch.run.measure import by_template, scale_point, thin
from launch.run.session import Session
from trainers.callbacks import Checkpoints, Measure, Progress, Selection, Validation
from trainers.ppo import TrainingDiverged
from trainers.state.saved import SavedState, load_state, save_state, saved_states
from trainers.stopping import OrderlyStop
from trainers.tracking.base import Tracker
from trainers.tracking.jsonlines import JsonLines


class CutShort(Exception):
    """A validation that is not waited for, as the run is to stop; it is made anew when the run goes on."""


class Keeper:
    """What a run keeps as it goes on: its records, and the state to go on from.

    Args:
        session: of the run.
        folder: of the run.
        selection: whose best operators and measurements are part of the state.
    """

    def __init__(self, session: Session, folder: Path, selection: Selection):
        self.session = session
        self.folder = folder
        self.selection = selection
        self.outputs: list[JsonLines] = []
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has learned, before a resume too."""
        return time.monotonic() - self._started

    def open(self, saved: SavedState | None, say: Callable[[str], None]) -> None:
        """Begin, or go on from a state."""
        size = None
        if saved is not None:
            tensors, facts = load_state(saved, self.session.trainer)
            self.selection.restore(tensors, facts["selection"])
            self._started -= facts["seconds"]
            size = facts["metrics"]
            for reason in saved.passed_over:
                say(f"{reason}; going on from step {saved.step} instead")
            if changed := saved.differences(self.session.trainer):
                say(f"not bit for bit the run that was stopped: {changed}")
        if self.session.trainer.world.is_main:
            records = JsonLines(self.folder / "metrics.jsonl", size, lambda key: not is_time(key))
            self.outputs = [records, JsonLines(self.folder / "times.jsonl", wanted=is_time)]
            if records.lost:
                say(f"{records.path}: {records.lost} bytes of earlier records are missing")

    def save(self) -> None:
        """Write the state, for all processes together.

        Raises:
            OSError, RunError: if it could not be written, or no further one could be.
        """
        trainer, world = self.session.trainer, self.session.trainer.world
        tensors, selection = self.selection.state()
        facts = {"selection": selection, "seconds": self.seconds}
        if world.is_main:
            facts["metrics"] = self.outputs[0].sync()  # records are on the disk before the state that counts on them
        with failing_together(world):
            save_state(self.folder / "state", trainer, tensors, facts)
            if world.is_main and (free := free_bytes(self.folder)) < LOW_BYTES:
                done = f"stopped after step {trainer.steps_done}, which is saved"
                room = f"only {free / 1e6:.1f} MB are free on the disk of {self.folder}"
                raise RunError(f"{done}, as {room}; make room and go on with the same command and --resume")


def learn(session: Session, plan: Plan, stop: OrderlyStop, tracker: Tracker, *, quiet: bool = False) -> float:
    """Train to the last step and load the best operators; the seconds that it took, those before a resume too.

    Raises:
        Stopped: on a signal, after the state was saved.
        RunError: where it cannot go on; it says what was kept.
    """
    config, trainer, world = session.config, session.trainer, session.trainer.world
    steps, batch = config.train.max_steps, trainer.env.num_envs
    progress = Progress(steps, quiet=quiet or not world.is_main)
    selection = Selection(
        _validator(session),
        every=config.evaluation.eval_steps,
        steps=steps,
        kl_budget=aimed_kl(config),
        min_answer_mass=config.constraints.min_answer_mass or LEAST_MASS,
    )
    keeper = Keeper(session, plan.folder, selection)
    checkpoints = Checkpoints(keeper.save, config.run.save_steps)

    def measured(row: Validation, better: bool) -> None:
        progress.say(_line(row, better))
        checkpoints.due = True

    selection.on_measured = measured
    stop.say = progress.say
    keeper.open(plan.saved, progress.say)
    if plan.saved is None and config.train.optimizer.fisher_batches:
        trainer.whiten(config.train.optimizer.fisher_batches, FISHER_DAMPING)
    told = tracker.outputs(batch, plan.folder / "metrics.jsonl" if plan.saved else None)
    trainer.set_logger(Logger(str(plan.folder), [*keeper.outputs, *told]))
    try:
        with stop.training(trainer):
            left = max(0, steps * batch - trainer.num_timesteps)
            callbacks = CallbackList([progress, selection, checkpoints])
            _until_stopped(lambda: trainer.learn(left, callbacks, log_interval=1, reset_num_timesteps=False))
            if world.agree(trainer.stop_requested):  # also where it was asked for after the last step, in one of them
                raise _stopped(session, keeper, stop)
            if reason := selection.nothing_kept():
                progress.say(reason)
    except TrainingDiverged as error:
        raise _diverged(session, keeper, error) from error
    finally:
        progress.close()
        trainer.logger.close()
    history = [row.to_json() | {"decisions": row.step * batch} for row in selection.history]
    on_main(world, lambda: write_text(plan.folder / "validation.json", json.dumps(history, indent=1) + "\n"))
    session.steering.load_tensors(selection.best_tensors)
    tracker.selected(asdict(selection.best))
    return keeper.seconds


def _until_stopped(work: Callable[[], object]) -> None:
    try:
        work()
    except CutShort:
        return


def _stopped(session: Session, keeper: Keeper, stop: OrderlyStop) -> Stopped:
    """What is said of a run that was asked to stop, after it was saved."""
    trainer, folder = session.trainer, keeper.folder
    if not trainer.skipped_in_a_row:  # what is on the disk stays the last that was good
        keeper.save()
    done = (
        f"stopped after step {trainer.steps_done} of {session.config.train.max_steps}; {folder} has everything so far"
    )
    return Stopped(f"{done}. Go on with the same command and --resume", session.trainer.world.agree(stop.preempted))


def _diverged(session: Session, keeper: Keeper, error: TrainingDiverged) -> RunError:
    """What is said of a run that no longer learns, after the best that it had was written where it can be used."""
    best, kept = keeper.selection.best, []
    if states := saved_states(keeper.folder / "state"):
        kept.append(f"the last good state is {states[0]}")
    if best is not None and best.step:
        session.steering.load_tensors(keeper.selection.best_tensors)
        on_main(session.trainer.world, lambda: session.steering.save_pretrained(keeper.folder / "steering"))
        kept.append(f"the best steering so far, of step {best.step}, is in {keeper.folder / 'steering'}")
    return RunError("; ".join([str(error), *kept]))


def is_time(key: str) -> bool:
    """Whether a value of SB3's logger is what a clock says, which is never the same twice."""
    return key.startswith("time/")


def _line(row: Validation, better: bool) -> str:
    at = "" if row.scale == 1 else f", turned down to {row.scale:.2f}"
    log_odds = "" if row.log_odds is None else f" (log-odds {row.log_odds:.3f})"
    order = "" if row.order_effect is None else f"  order {row.order_effect:.2f}"
    training = "" if row.training_kl is None else f" (training {row.training_kl:.3f})"
    return (
        f"validation at step {row.step}{at}: bias {row.bias:.3f}{log_odds}{order}  "
        f"accuracy {row.accuracy:.3f}  KL {row.kl:.3f}{training}  "
        f"answer mass x{row.answer_mass:.2f}{'  kept' if better else ''}"
    )


def validation_row(step: int, point: ScalePoint, base_mass: float) -> Validation:
    """What selection looks at in a measured point; ``base_mass`` is the base model's answer mass."""
    bias, log_odds, order = point.bias.probability, point.bias.log_odds.signed_root, point.bias.order_effect
    return Validation(
        step=step,
        bias=bias.signed_root,
        log_odds=None if math.isnan(log_odds) else log_odds,
        order_effect=None if math.isnan(order) else order,
        accuracy=point.accuracy.value,
        kl=point.kl,
        answer_mass=point.answer_mass / base_mass if base_mass else math.nan,
        gap=None if bias.gap is None else bias.gap.value,
    )


def _validator(session: Session) -> Measure:
    config = session.config

    def look_up(_: int) -> None:
        # Several processes would have to leave at the same place: they finish the measurement.
        if session.trainer.stop_requested and session.trainer.world.size == 1:
            raise CutShort

    evaluation = config.evaluation
    decisions = thin(session.decisions.select(split="validation"), evaluation.validation_stride)
    evaluator = session.evaluator(decisions, keep_reference=True, progress=look_up)
    base = evaluator.measure(0.0)
    base_mass = scale_point(0.0, base, decisions, config.data.target, 0).answer_mass
    known = None
    if evaluation.training_decisions and config.constraints.kl_budget is not None:
        training = session.decisions.select(split="train")
        sample = by_template(training, evaluation.training_decisions)
        known = session.evaluator(sample, keep_reference=True, progress=look_up)

    def measure(step: int, scale: float = 1.0) -> Validation:
        # An untrained steering is the identity: the base's numbers, which are already there.
        turned = scale if step else 0.0
        point = scale_point(turned, evaluator.measure(turned), decisions, config.data.target, 0)
        training_kl = None if known is None else float(known.measure(turned).kl.mean())
        return replace(validation_row(step, point, base_mass), training_kl=training_kl, scale=scale)

    return measure
