"""The learning part of a run on free-form answers: steps, records, validation in between, the best steering so far."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from stable_baselines3.common.logger import KVWriter
from tqdm import tqdm

from dso.files import write_text
from launch.run.answer_report import answer_point
from launch.run.answer_session import AnswerSession, open_trainer
from launch.run.folder import Plan, RunError, Stopped, failing_together, on_main
from launch.run.learn import is_time, validation_row
from trainers.callbacks import Selection, Validation
from trainers.state.saved import SavedState, below
from trainers.stopping import OrderlyStop
from trainers.tracking.base import Tracker
from trainers.tracking.jsonlines import JsonLines

if TYPE_CHECKING:
    from trainers.grpo import SteeredAnswers

LINE_EVERY = 10  # steps, where the output is piped
CLOCKS = {"step_time": "time/step"}  # what TRL measures that is never the same twice, and what it is called here


def learn(session: AnswerSession, plan: Plan, stop: OrderlyStop, tracker: Tracker, quiet: bool) -> float:
    """Train to the last step, load the best operators and save them; the seconds that it took, those before a resume
    too.

    Raises:
        Stopped: if a signal asked for it, after the state was saved.
    """
    world, folder = session.world, plan.folder
    course = _Course(session, plan, tracker, quiet)
    try:
        if plan.saved is None:
            course.validate(0)
        if course.begun < course.steps:
            _train(session, plan, stop, course)
        if reason := course.selection.nothing_kept():
            course.say(reason)
    finally:
        course.close()
    session.steering.load_tensors(course.selection.best_tensors)
    history = json.dumps([row.to_json() for row in course.selection.history], indent=1) + "\n"

    def written() -> None:
        write_text(folder / "validation.json", history)
        session.steering.save_pretrained(folder / "steering")  # of use, whatever becomes of its measurement

    on_main(world, written)
    if course.selection.best is not None:
        tracker.selected(asdict(course.selection.best))
    return course.seconds


def _train(session: AnswerSession, plan: Plan, stop: OrderlyStop, course: _Course) -> None:
    trainer = open_trainer(session, course.on_step, course.begun)
    try:
        course.enter(trainer, plan.saved)
        with stop.training(trainer), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
            trainer.train()
            if session.world.agree(trainer.stop_requested):  # also where it was asked for after the last step
                done = f"stopped after step {trainer.state.global_step} of {course.steps}"
                kept = f"{plan.folder} has everything so far. Go on with the same command and --resume"
                raise Stopped(f"{done}; {kept}", session.world.agree(stop.preempted))
    finally:
        trainer.release()


class _Course:
    """What goes on beside the steps; every process has one and measures its share.

    Args:
        session: of the run.
        plan: the run's folder, for ``metrics.jsonl`` and ``state``, and what it goes on from.
        tracker: who else hears of it.
        quiet: print nothing.

    Attributes:
        begun: steps that were done before.
    """

    trainer: SteeredAnswers

    def __init__(self, session: AnswerSession, plan: Plan, tracker: Tracker, quiet: bool):
        config, saved = session.config, plan.saved
        self.session, self.quiet, self.steps, self.folder = session, quiet, config.train.max_steps, plan.folder
        self.decisions = config.decisions
        self.base_named = math.nan
        self.evaluator = session.evaluator(session.split("validation", config.evaluation.validation_stride))
        self.selection = Selection(
            self._measure,
            every=config.evaluation.eval_steps,
            steps=self.steps,
            kl_budget=config.constraints.kl_budget,
            max_accuracy_loss=config.constraints.max_accuracy_loss,
        )
        self.begun, size, self._started = 0, None, time.monotonic()
        if saved is not None:
            self.begun, size = saved.step, self._restore(saved)
        self._records: list[JsonLines] = []
        if session.world.is_main:
            records = JsonLines(self.folder / "metrics.jsonl", size, lambda key: not is_time(key))
            self._records = [records, JsonLines(self.folder / "times.jsonl", wanted=is_time)]
        told = tracker.outputs(self.decisions, None if saved is None else self.folder / "metrics.jsonl")
        self.outputs: list[KVWriter] = [*self._records, *told]
        hidden = quiet or not sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=self.begun, desc="train", unit="step", disable=hidden)

    def _restore(self, saved: SavedState) -> int:
        """Go on from a state; the bytes of ``metrics.jsonl`` that count.

        Raises:
            StateError: if it is of other decisions or another model.
        """
        from trainers.state.freeform import require_setup, setup

        require_setup(saved, setup(self.session.split("train"), self.session.steering))
        facts, device = saved.facts["extra"], self.session.backbone.device
        best = {key: value.to(device) for key, value in below(saved.tensors, "extra").items()}
        self.selection.restore(best, facts["selection"])
        self.base_named = facts["base_named"]
        self._started -= facts["seconds"]
        for reason in saved.passed_over:
            self.say(f"{reason}; going on from step {saved.step} instead")
        return facts["metrics"]

    @property
    def seconds(self) -> float:
        """How long the run has learned, before a resume too."""
        return time.monotonic() - self._started

    def enter(self, trainer: SteeredAnswers, saved: SavedState | None) -> None:
        """Begin to train, or go on from a state."""
        from trainers.state.freeform import load_state

        self.trainer = trainer
        if saved is not None and (changed := load_state(saved, trainer)):
            self.say(f"not bit for bit the run that was stopped: {changed}")

    def save(self) -> None:
        """Write the state, for all processes together."""
        from trainers.state.freeform import save_state

        tensors, selection = self.selection.state()
        facts = {"selection": selection, "base_named": self.base_named, "seconds": self.seconds}
        if self._records:
            facts["metrics"] = self._records[0].sync()  # records are on the disk before the state that counts on them
        with failing_together(self.session.world):
            save_state(self.folder / "state", self.trainer, tensors, facts)

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Told of each step and what TRL measured in it."""
        self._record(step, {CLOCKS.get(key, f"train/{key}"): value for key, value in values.items()})
        bias, kl = values["running_bias"], values.get("kl", math.nan)
        self.bar.set_postfix({"bias": f"{bias:.3f}", "kl": f"{kl:.4f}"}, refresh=False)
        self.bar.update()
        if self.bar.disable and step % LINE_EVERY == 0:
            nobody = f"names nobody {values['abstention']:.2f}"
            self.say(f"step {step}/{self.steps}  running bias {bias:.3f}  KL a token {kl:.4f}  {nobody}")
        measured = step % self.selection.every == 0 or step == self.steps
        if measured:
            self.validate(step)
        if measured or step % self.session.config.run.save_steps == 0 or self.trainer.stopping:
            self.save()

    def validate(self, step: int) -> None:
        """Measure the validation split, and keep the operators if they are the best so far."""
        row = self.selection.measure(step)
        better = self.selection.offer(row, self.session.steering.tensors())
        self._record(step, row.scalars())
        order = "" if row.order_effect is None else f"  order {row.order_effect:.2f}"
        self.say(
            f"validation at step {step}: bias {row.bias:.3f}{order}  "
            f"accuracy {row.accuracy:.3f}  KL a token {row.kl:.4f}  named x{row.answer_mass:.2f}"
            f"{'  kept' if better else ''}"
        )

    def close(self) -> None:
        """End the records."""
        self.bar.close()
        for output in self.outputs:
            output.close()

    def _measure(self, step: int, scale: float = 1.0) -> Validation:
        model, config = self.session.backbone.model, self.session.config
        turned = scale if step else 0.0  # an untrained steering is the identity
        training = model.training
        model.eval()
        point = answer_point(turned, self.evaluator.measure(turned), self.evaluator, config.data.target, 0)
        model.train(training)
        if step == 0:
            self.base_named = self._require_named(point.answer_mass)
        return replace(validation_row(step, point, self.base_named), scale=scale)

    def _require_named(self, share: float) -> float:
        """Nothing can be learned where nobody is ever named: every answer would earn the same."""
        if share > 0:
            return share
        config, asked = self.session.config, len(self.evaluator.asked)
        said = next((text for texts in self.evaluator.measure(0.0).texts for text in texts if text.strip()), "")
        raise RunError(
            f"none of the base model's {asked * config.evaluation.samples} answers of up to "
            f"{config.train.freeform.max_completion_length} tokens names a candidate (one is {said.strip()[:40]!r}); "
            "change the prompts, the matcher, train.freeform.max_completion_length or train.freeform.temperature"
        )

    def _record(self, step: int, values: dict[str, float]) -> None:
        for output in self.outputs:
            output.write(values, {}, step * self.decisions)

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)
