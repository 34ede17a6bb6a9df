"""Stable-Baselines3 callbacks of a training run: validation with selection, progress, an orderly stop."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter
from torch import Tensor
from tqdm import tqdm

from dso.files import write_text
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
        answer_mass: mean probability of all candidates together, as a ratio to the base model's; nan if the base has
            none that a float can hold.
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

    The untrained steering (bias of the base model, KL 0) is the first candidate, so there always is one inside. Of
    two with the same bias the one with the smaller KL is better, of two alike the earlier one.

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
        if self.model.steps_done == 0:
            self._check(0)

    def _on_rollout_start(self) -> None:
        # Here, not after the step before: what a run measures does not depend on where it was stopped and resumed.
        if self.model.steps_done % self.every == 0:
            self._check(self.model.steps_done)

    def _on_training_end(self) -> None:
        if self.model.steps_done >= self.steps:
            self._check(self.model.steps_done)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`restore` needs: the best operators, and all measurements."""
        facts = {
            "history": [asdict(row) for row in self.history],
            "best": None if self.best is None else self.best.step,
        }
        return self.best_tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.history = [Validation(**row) for row in facts["history"]]
        self.best = next((row for row in self.history if row.step == facts["best"]), None)
        self.best_tensors = dict(tensors)

    def _on_step(self) -> bool:
        return True

    def _check(self, step: int) -> None:
        if any(row.step == step for row in self.history):
            return
        row = self.measure(step)
        better = self.offer(row)
        if better:
            own = self.model.policy.steering.tensors()
            self.best_tensors = {key: value.detach().clone() for key, value in own.items()}
        for name in ("bias", "soft_bias", "floor", "accuracy", "kl", "answer_mass"):
            self.logger.record(f"eval/{name}", getattr(row, name))
        self.logger.dump(self.model.num_timesteps)  # a record of its own: the next one is of a later step
        if self.on_measured is not None:
            self.on_measured(row, better)

    def offer(self, row: Validation) -> bool:
        """Add a measurement to the history; whether it is the best so far, which it then is."""
        self.history.append(row)
        better = self.inside(row) and (self.best is None or (row.bias, row.kl) < (self.best.bias, self.best.kl))
        if better:
            self.best = row
        return better

    def inside(self, row: Validation) -> bool:
        """Whether a measurement keeps the KL budget, the answer mass and the accuracy; what is nan is not held to."""
        base = self.history[0]
        return (
            (self.kl_budget is None or row.kl <= self.kl_budget)
            and not row.answer_mass < self.min_answer_mass
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
        self._shown = 0

    def _on_training_start(self) -> None:
        self._shown = self.model.steps_done
        hidden = self.quiet or not sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=self._shown, desc="train", unit="step", disable=hidden)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._show()

    def _on_training_end(self) -> None:
        self._show()
        self.bar.close()

    def _show(self) -> None:
        """Show the steps that were learned from since the last time."""
        step, measured = self.model.steps_done, self.model.measured
        if step <= self._shown or not measured:
            return
        said = {name: f"{measured[name]:.3f}" for name in ("running_bias", "kl")}
        self.bar.set_postfix(said, refresh=False)
        self.bar.update(step - self._shown)
        if self.bar.disable and step // self.every > self._shown // self.every:
            self.say(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value}" for name, value in said.items()))
        self._shown = step

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)


class OrderlyStop:
    """Within the block the first Ctrl-C ends training before the next step; a second one acts as usual.

    In other threads than the main one, which get no signals, it does nothing.

    Args:
        model: what is being trained.
        say: told that the first Ctrl-C was heard.
    """

    def __init__(self, model: SteeringPPO, say: Callable[[str], None] | None = None) -> None:
        self.model = model
        self._say = say
        self._before: Any = None

    def __enter__(self) -> OrderlyStop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.model.stop_requested = True
        signal.signal(signal.SIGINT, self._before)
        if self._say is not None:
            self._say("stopping after this step; Ctrl-C again stops at once")


class JsonLines(KVWriter):
    """SB3 logger output: one JSON object a record, appended, so that a run that goes on adds to its file.

    ``step`` is SB3's: decisions seen, not optimiser steps.

    Args:
        path: of the file.
        until: where the run goes on from; later records, which will be written again, are dropped. None keeps all.
    """

    def __init__(self, path: str | Path, until: int | None = None):
        path = Path(path)
        if until is not None and path.exists():
            write_text(path, "".join(line for line in path.read_text("utf-8").splitlines(True) if _step(line) <= until))
        self._file = path.open("a", encoding="utf-8")  # noqa: SIM115  (closed by close)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        record = {"step": step} | {key: _plain(value) for key, value in sorted(key_values.items())}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    """The step of a record, infinity for one that was not written to its end."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
