"""Stable-Baselines3 callbacks of a training run: validation with selection, progress, an orderly stop."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter
from torch import Tensor
from tqdm import tqdm

from trainers.ppo import SteeringPPO


@dataclass(frozen=True, slots=True)
class Validation:
    """What one measurement of the validation split says.

    Attributes:
        step: optimiser steps done.
        bias: floor-corrected soft per-context bias.
        soft_bias, floor: the uncorrected bias and its noise floor.
        accuracy: on unambiguous decisions, nan if there are none.
        kl: mean KL in nats.
        answer_mass: mean probability of all candidates together, as a ratio to the base model's.
    """

    step: int
    bias: float
    soft_bias: float
    floor: float
    accuracy: float
    kl: float
    answer_mass: float


class Selection(BaseCallback):
    """Measure the validation split as training goes on and keep the best operators inside the constraints.

    The untrained steering (bias of the base model, KL 0) is the first candidate, so there always is one inside.

    Args:
        measure: step -> :class:`Validation`, with the operators as they are.
        every: steps between measurements; the last step is always measured.
        steps: of the whole run.
        kl_budget: candidates above it are passed over; None for no budget.
        min_answer_mass: likewise below this ratio to the base's.
        max_accuracy_loss: likewise below the base's accuracy by more than this.
        on_measured: told of each measurement and whether it is the best so far.
    """

    def __init__(
        self,
        measure: Callable[[int], Validation],
        *,
        every: int,
        steps: int,
        kl_budget: float | None,
        min_answer_mass: float = 0.9,
        max_accuracy_loss: float = 0.01,
        on_measured: Callable[[Validation, bool], None] | None = None,
    ):
        super().__init__()
        self.measure = measure
        self.every = every
        self.steps = steps
        self.kl_budget = kl_budget
        self.min_answer_mass = min_answer_mass
        self.max_accuracy_loss = max_accuracy_loss
        self.on_measured = on_measured
        self.history: list[Validation] = []
        self.best: Validation | None = None
        self.best_tensors: dict[str, Tensor] = {}

    def _on_training_start(self) -> None:
        self._check(self._steps_done())

    def _on_rollout_start(self) -> None:
        step = self._steps_done()
        if step and step % self.every == 0:
            self._check(step)

    def _on_training_end(self) -> None:
        if self._steps_done() >= self.steps:
            self._check(self._steps_done())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`restore` needs: the best operators, and all measurements."""
        return self.best_tensors, {"history": [asdict(row) for row in self.history], "best": self.best and self.best.step}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.history = [Validation(**row) for row in facts["history"]]
        self.best = next((row for row in self.history if row.step == facts["best"]), None)
        self.best_tensors = dict(tensors)

    def _on_step(self) -> bool:
        return True

    def _steps_done(self) -> int:
        return self.model.num_timesteps // self.model.env.num_envs

    def _check(self, step: int) -> None:
        if any(row.step == step for row in self.history):
            return
        row = self.measure(step)
        self.history.append(row)
        better = self.inside(row) and (self.best is None or row.bias < self.best.bias)
        if better:
            self.best = row
            self.best_tensors = {key: value.detach().clone() for key, value in self.model.policy.steering.tensors().items()}
        for name in ("bias", "soft_bias", "floor", "accuracy", "kl", "answer_mass"):
            self.logger.record(f"eval/{name}", getattr(row, name))
        if self.on_measured is not None:
            self.on_measured(row, better)

    def inside(self, row: Validation) -> bool:
        """Whether a measurement keeps the KL budget, the answer mass and the accuracy."""
        base = self.history[0]
        return (
            (self.kl_budget is None or row.kl <= self.kl_budget)
            and row.answer_mass >= self.min_answer_mass
            and not row.accuracy < base.accuracy - self.max_accuracy_loss
        )


class Progress(BaseCallback):
    """A bar with the time left on a terminal; a line every few steps when the output is piped.

    Args:
        steps: of the whole run.
        every: steps between lines when piped.
        quiet: print nothing.
    """

    def __init__(self, steps: int, every: int = 10, quiet: bool = False):
        super().__init__()
        self.steps = steps
        self.every = every
        self.quiet = quiet
        self.bar: tqdm | None = None

    def _on_training_start(self) -> None:
        done = self.model.num_timesteps // self.model.env.num_envs
        self.bar = tqdm(total=self.steps, initial=done, desc="train", unit="step", disable=self.quiet or not sys.stderr.isatty())

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        step = self.model.num_timesteps // self.model.env.num_envs
        values = self.model.logger.name_to_value
        said = {name: values[f"train/{name}"] for name in ("running_bias", "kl") if f"train/{name}" in values}
        self.bar.update(1)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in said.items()}, refresh=False)
        if not self.quiet and self.bar.disable and step % self.every == 0:
            self.say(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value:.3f}" for name, value in said.items()))

    def _on_training_end(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)


class OrderlyStop:
    """Within the block the first Ctrl-C ends training before the next step; a second one acts as usual.

    Args:
        model: what is being trained.
    """

    def __init__(self, model: SteeringPPO) -> None:
        self.model = model
        self._before: Any = None

    def __enter__(self) -> OrderlyStop:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.model.stop_requested = True
        signal.signal(signal.SIGINT, self._before)


class JsonLines(KVWriter):
    """SB3 logger output: one JSON object a dump, appended, so that a run that goes on adds to its file."""

    def __init__(self, path: str | Path):
        self._file = Path(path).open("a", encoding="utf-8")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        record = {"step": step} | {key: _plain(value) for key, value in sorted(key_values.items())}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
