"""The learning part of a run on written answers: steps, records, validation in between, the best steering so far."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from dso.files import write_text
from launch.run.answer_report import answer_point
from launch.run.answer_session import AnswerSession, open_trainer
from launch.run.folder import RunError, Stopped, on_main
from launch.run.learn import validation_row
from trainers.callbacks import Selection, Validation
from trainers.stopping import OrderlyStop
from trainers.tracking.base import Tracker
from trainers.tracking.jsonlines import JsonLines

LINE_EVERY = 10  # steps, where the output is piped


def learn(session: AnswerSession, folder: Path, stop: OrderlyStop, tracker: Tracker, quiet: bool) -> float:
    """Train to the last step and load the best operators; the seconds that it took.

    Raises:
        Stopped: if a signal asked for it; the best steering so far was saved then.
    """
    started, world = time.monotonic(), session.world
    course = _Course(session, folder, tracker, quiet)
    trainer = open_trainer(session, course.on_step)
    try:
        course.validate(0)
        with stop.training(trainer), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
            trainer.train()
        if not trainer.stop_requested and (reason := course.selection.nothing_kept()):
            course.say(reason)
    finally:
        trainer.release()
        course.close()
    best = course.selection.best
    session.steering.load_tensors(course.selection.best_tensors)
    history = json.dumps([row.to_json() for row in course.selection.history], indent=1) + "\n"
    on_main(world, lambda: write_text(folder / "validation.json", history))
    tracker.selected(asdict(best))
    if trainer.stop_requested:
        on_main(world, lambda: session.steering.save_pretrained(folder / "steering"))
        done = f"stopped after step {trainer.state.global_step} of {session.config.train.max_steps}"
        kept = f"{folder / 'steering'} has the best steering so far, of step {best.step}, not measured"
        raise Stopped(f"{done}; {kept}. Runs on written answers are not resumed", world.agree(stop.preempted))
    return time.monotonic() - started


class _Course:
    """What goes on beside the steps; every process has one and measures its share.

    Args:
        session: of the run.
        folder: of the run, for ``metrics.jsonl``.
        tracker: who else hears of it.
        quiet: print nothing.
    """

    def __init__(self, session: AnswerSession, folder: Path, tracker: Tracker, quiet: bool):
        config = session.config
        self.session, self.quiet, self.steps = session, quiet, config.train.max_steps
        self.decisions = config.decisions
        lines = [JsonLines(folder / "metrics.jsonl")] if session.world.is_main else []
        self.outputs = [*lines, *tracker.outputs(self.decisions)]
        self.evaluator = session.evaluator(session.split("validation", config.evaluation.validation_stride))
        self.base_named = math.nan
        self.selection = Selection(
            self._measure,
            every=config.evaluation.eval_steps,
            steps=self.steps,
            kl_budget=config.constraints.kl_budget,
            max_accuracy_loss=config.constraints.max_accuracy_loss,
        )
        self.bar = tqdm(total=self.steps, desc="train", unit="step", disable=quiet or not sys.stderr.isatty())

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Told of each step and what TRL measured in it."""
        self._record(step, {f"train/{key}": value for key, value in values.items()})
        bias, kl = values["running_bias"], values.get("kl", math.nan)
        self.bar.set_postfix({"bias": f"{bias:.3f}", "kl": f"{kl:.4f}"}, refresh=False)
        self.bar.update()
        if self.bar.disable and step % LINE_EVERY == 0:
            nobody = f"names nobody {values['abstention']:.2f}"
            self.say(f"step {step}/{self.steps}  running bias {bias:.3f}  KL a token {kl:.4f}  {nobody}")
        if step % self.selection.every == 0 or step == self.steps:
            self.validate(step)

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

    def _measure(self, step: int) -> Validation:
        model, config = self.session.backbone.model, self.session.config
        scale = float(step > 0)  # an untrained steering is the identity
        training = model.training
        model.eval()
        point = answer_point(scale, self.evaluator.measure(scale), self.evaluator, config.data.target, 0)
        model.train(training)
        if step == 0:
            self.base_named = self._require_named(point.answer_mass)
        return validation_row(step, point, self.base_named)

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
