"""The learning part of a run: steps with validation in between, saved so that it may be killed at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger

from dso.files import free_bytes, write_text
from launch.run.constants import FISHER_DAMPING, kept_limits
from launch.run.folder import LOW_BYTES, Plan, RunError, Stopped, failing_together, on_main
from launch.run.session import Session, fingerprints
from launch.run.validation import CutShort, Validator, validation_line
from trainers.callbacks import Checkpoints, Progress, Selection, Validation
from trainers.ppo import TrainingDiverged
from trainers.state.saved import SavedState, load_state, save_state, saved_states
from trainers.stopping import OrderlyStop
from trainers.tracking.base import Tracker
from trainers.tracking.jsonlines import JsonLines


class Keeper:
    """What a run keeps as it goes on: its records, and the state to go on from.

    Args:
        session: of the run.
        folder: of the run.
        selection: whose best operators and measurements are part of the state.
        validator: whose measurement of the base model is, too.
    """

    def __init__(self, session: Session, folder: Path, selection: Selection, validator: Validator):
        self.session = session
        self.folder = folder
        self.selection = selection
        self.validator = validator
        self._setup = fingerprints(session.config, session.decisions)
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
            tensors, facts = load_state(saved, self.session.trainer, self._setup)
            self.selection.restore(tensors, facts["selection"])
            self.validator.base_mass = facts["base_mass"]
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
        facts = {"selection": selection, "base_mass": self.validator.base_mass, "seconds": self.seconds}
        if world.is_main:
            facts["metrics"] = self.outputs[0].sync()  # records are on the disk before the state that counts on them
        with failing_together(world):
            save_state(self.folder / "state", trainer, tensors, facts, self._setup)
            if world.is_main and (free := free_bytes(self.folder)) < LOW_BYTES:
                done = f"stopped after step {trainer.steps_done}, which is saved"
                room = f"only {free / 1e6:.1f} MB are free on the disk of {self.folder}"
                raise RunError(f"{done}, as {room}; make room and go on with the same command and --resume")


def learn(session: Session, plan: Plan, stop: OrderlyStop, tracker: Tracker, *, quiet: bool = False) -> float:
    """Train to the last step, load the best operators and save them; the seconds that it took, before a resume too.

    Raises:
        Stopped: on a signal, after the state was saved.
        RunError: where it cannot go on; it says what was kept.
    """
    config, trainer, world = session.config, session.trainer, session.trainer.world
    steps, batch = config.train.max_steps, trainer.decisions_a_step
    progress = Progress(steps, quiet=quiet or not world.is_main)
    validator = Validator(session)
    selection = Selection(validator, every=config.evaluation.eval_steps, steps=steps, limits=kept_limits(config))
    keeper = Keeper(session, plan.folder, selection, validator)
    checkpoints = Checkpoints(keeper.save, config.run.save_steps)

    def measured(row: Validation, better: bool) -> None:
        progress.say(validation_line(row, better))
        checkpoints.due = True

    selection.on_measured = measured
    stop.say = progress.say
    keeper.open(plan.saved, progress.say)
    if plan.saved is None:
        first = f"measuring the base model on {len(validator.decisions)} decisions of validation"
        progress.say(f"{plan.folder}: {first}, then {steps} steps of {batch} decisions")
        validator.begin()
        if config.train.optimizer.fisher_batches:
            trainer.whiten(config.train.optimizer.fisher_batches, FISHER_DAMPING)
    told = tracker.outputs(batch, plan.folder / "metrics.jsonl" if plan.saved else None)
    trainer.set_logger(Logger(str(plan.folder), [*keeper.outputs, *told]))
    try:
        with stop.training(trainer):
            with suppress(CutShort):
                trainer.learn_until(steps, CallbackList([progress, selection, checkpoints]))
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
    session.steering.load_tensors(selection.best_tensors)

    def written() -> None:
        write_text(plan.folder / "validation.json", json.dumps(history, indent=1) + "\n")
        session.steering.save_pretrained(plan.folder / "steering")  # of use, whatever becomes of its measurement

    on_main(world, written)
    if selection.best is not None:
        tracker.selected(asdict(selection.best))
    return keeper.seconds


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
