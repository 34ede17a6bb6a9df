"""Stable-Baselines3 callbacks of a training run: validation with selection, progress, saving."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from tqdm import tqdm

from trainers.trainer import SteeringTrainer


@dataclass(frozen=True, slots=True)
class Validation:
    """What one measurement of the validation split says.

    Attributes:
        step: optimiser steps done.
        bias: root mean square over contexts, noise taken off, and of what they share only what is beyond doubt; below 0
            where the sample shows less than its own noise, so that no two measurements are tied at 0.
        log_odds: the same in log-odds; None where that cannot be measured.
        order_effect: how far answers follow the order of the people; None where each question has one order.
        accuracy: on unambiguous decisions, nan if there are none.
        kl: mean KL in nats on ambiguous decisions.
        answer_mass: mean probability of all candidates together, as a ratio to the base model's; nan if the base has
            none that a float can hold.
        gap: signed mean over contexts of P(stereotype's group) - P(the other), which people's names cancel from; None
            where there are no stereotypes or more groups than two.
        neutral_kl: mean KL in nats after neutral texts (:mod:`dso.evaluation.neutral`); None if it was not measured.
        unambiguous_kl: mean KL in nats on unambiguous decisions; None if there are none.
        scale: what the operators were turned to; 1 is as they are.
    """

    step: int
    bias: float
    accuracy: float
    kl: float
    answer_mass: float
    log_odds: float | None = None
    order_effect: float | None = None
    gap: float | None = None
    neutral_kl: float | None = None
    unambiguous_kl: float | None = None
    scale: float = 1.0

    def to_json(self) -> dict[str, float | None]:
        """The row as a JSON object: null for what was not measured, as JSON has no nan."""
        return {k: v if v is None or math.isfinite(v) else None for k, v in asdict(self).items()}

    def scalars(self) -> dict[str, float]:
        """What is recorded of it, by name: everything that was measured."""
        measured = asdict(self)
        return {f"eval/{name}": v for name, v in measured.items() if name not in ("step", "scale") and v is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a steering may cost on validation.

    Attributes:
        kl_budget: KL on validation; None for no budget.
        min_answer_mass: ratio to the base's.
        max_accuracy_loss: below the base's accuracy.
        neutral_kl: KL after neutral texts; None for no limit.
        unambiguous_kl: KL on unambiguous decisions; None for no limit.
        order_increase: of the order effect over the base's; None for no limit.
    """

    kl_budget: float | None = None
    min_answer_mass: float = 0.9
    max_accuracy_loss: float = 0.01
    neutral_kl: float | None = None
    unambiguous_kl: float | None = None
    order_increase: float | None = None

    def divergences(self, row: Validation) -> dict[str, tuple[float, float]]:
        """The KLs that were measured and have a limit, each with it."""
        pairs = {
            "KL": (row.kl, self.kl_budget),
            "neutral KL": (row.neutral_kl, self.neutral_kl),
            "KL on unambiguous decisions": (row.unambiguous_kl, self.unambiguous_kl),
        }
        return {what: (kl, limit) for what, (kl, limit) in pairs.items() if kl is not None and limit is not None}

    def broken(self, row: Validation, base: Validation) -> list[str]:
        """The limits that a measurement does not keep; ``base`` is the base model's. What is nan is not held to."""
        order = None
        if base.order_effect is not None and self.order_increase is not None:
            order = base.order_effect + self.order_increase
        divergences = self.divergences(row).items()
        limits = {
            **{f"{what} above {limit}": _above(kl, limit) for what, (kl, limit) in divergences},
            f"answer mass below {self.min_answer_mass} of the base's": row.answer_mass < self.min_answer_mass,
            "order effect above the base's": _above(row.order_effect, order),
            "accuracy below the base's": row.accuracy < base.accuracy - self.max_accuracy_loss,
        }
        return [limit for limit, is_broken in limits.items() if is_broken]


class Measure(Protocol):
    """Measures the operators as they are after a step, or turned to a scale."""

    def __call__(self, step: int, scale: float = 1.0) -> Validation: ...


class TrainingCallback(BaseCallback):
    """A callback of a :class:`trainers.trainer.SteeringTrainer`; it never ends the training."""

    @property
    def trainer(self) -> SteeringTrainer:
        """Who calls: Stable-Baselines3 knows it as an algorithm of its own only."""
        return cast(SteeringTrainer, self.model)

    def _on_step(self) -> bool:
        return True


class Selection(TrainingCallback):
    """Measure the validation split as training goes on and keep the best operators inside the constraints.

    Best is the least bias, which may be below 0 and is therefore never tied (:class:`Validation`). A steering that
    does nothing (bias of the base model, KL 0) is the first candidate, so there always is one inside. Of two with the
    same bias the one with the smaller KL is better, of two alike the earlier one.

    In the end the last operators are turned up, by a factor of :attr:`FACTOR` at a time, as long as that is inside and
    better; then the distance of the best to the next is halved :attr:`HALVINGS` times: gentle training turned up costs
    less than hard training. Where no trained steering was inside, they are turned down instead, until they keep the KL
    budget and the answer mass. Operators turned to a scale are those with coefficients as much larger or smaller: at
    scale 1 they say what the trained ones say at that scale.

    Args:
        measure: (step, scale) -> :class:`Validation`; the scale is left out where it is 1.
        every: steps between measurements; the last step is always measured.
        steps: of the whole run.
        limits: candidates that break one are passed over.
        on_measured: told of each measurement and whether it is the best so far.
    """

    TRIES = 3  # smaller scales that are measured
    CLOSE = 0.97  # share of what a limit allows that a smaller scale aims at
    FACTOR = 2.0
    HALVINGS = 2
    HIGHEST = 8.0  # scale that operators are turned up to

    def __init__(
        self,
        measure: Measure,
        *,
        every: int,
        steps: int,
        limits: Limits,
        on_measured: Callable[[Validation, bool], None] | None = None,
    ):
        super().__init__()
        self.measure = measure
        self.every = every
        self.steps = steps
        self.limits = limits
        self.on_measured = on_measured
        self.history: list[Validation] = []
        self.best: Validation | None = None
        self.best_tensors: dict[str, Tensor] = {}

    def _on_training_start(self) -> None:
        if self.trainer.steps_done == 0:
            self._check(0)

    def _on_rollout_start(self) -> None:
        # Here, not after the step before: what a run measures does not depend on where it was stopped and resumed.
        if self.trainer.steps_done % self.every == 0:
            self._check(self.trainer.steps_done)

    def _on_training_end(self) -> None:
        if self.trainer.steps_done < self.steps:
            return
        self._check(self.steps)
        self._turn_up()
        while sum(row.scale < 1 for row in self.history) < self.TRIES:  # those before a resume are among them
            kept = self.best is not None and self.best.step > 0
            if kept or (scale := self.turned_down(self.history[-1])) is None:
                return
            self._measure(self.steps, scale)

    def _turn_up(self) -> None:
        """Measure the last operators at higher scales."""
        while (scale := self._higher()) is not None:
            self._measure(self.steps, scale)

    def _higher(self) -> float | None:
        """The next scale to try; it depends on what was measured alone, so a resumed run tries the same ones."""
        tried = [row.scale for row in self.history if row.step == self.steps and row.scale >= 1]
        if self.best is None or self.best.step != self.steps or self.best.scale < 1:
            return None
        above = [scale for scale in tried if scale > self.best.scale]
        if not above:
            return scale if (scale := self.best.scale * self.FACTOR) <= self.HIGHEST else None
        halved = len(tried) - 1 - tried.index(max(tried))  # what was tried after the doubling that went too far
        return math.sqrt(self.best.scale * min(above)) if halved < self.HALVINGS else None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`restore` needs: the best operators, and all measurements."""
        facts = {
            "history": [asdict(row) for row in self.history],
            "best": None if self.best is None else self.best.step,
            "best_scale": None if self.best is None else self.best.scale,
        }
        return self.best_tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.history = [Validation(**row) for row in facts["history"]]
        best = (facts["best"], facts["best_scale"])
        self.best = next((row for row in self.history if (row.step, row.scale) == best), None)
        self.best_tensors = dict(tensors)

    def _check(self, step: int) -> None:
        if any(row.step == step for row in self.history):
            return
        row = self._measure(step)
        for name, value in row.scalars().items():
            self.logger.record(name, value)
        self.logger.dump(self.model.num_timesteps)  # a record of its own: the next one is of a later step

    def _measure(self, step: int, scale: float = 1.0) -> Validation:
        row = self.measure(step) if scale == 1 else self.measure(step, scale)
        # Step 0 is the base model, also where training starts from another steering.
        better = self.offer(row, self.trainer.steering.scaled_tensors(scale if step else 0.0))
        if self.on_measured is not None:
            self.on_measured(row, better)
        return row

    def turned_down(self, row: Validation) -> float | None:
        """The scale at which operators would be inside that are not; None if they are, or if no scale would help.

        KL grows about as the square of the scale, and what is lost of the answer mass in proportion to it.
        """
        divergences = self.limits.divergences(row).values()
        shares = [math.sqrt(self.CLOSE * limit / kl) for kl, limit in divergences if _above(kl, limit)]
        if row.answer_mass < (least := self.limits.min_answer_mass):
            shares.append(self.CLOSE * (1 - least) / (1 - row.answer_mass))
        scale = row.scale * min(shares, default=math.nan)
        return scale if scale > 0 else None

    def offer(self, row: Validation, tensors: Mapping[str, Tensor]) -> bool:
        """Add a measurement to the history; whether it is the best so far, as which its operators are then kept."""
        self.history.append(row)
        better = self.inside(row) and (self.best is None or (row.bias, row.kl) < (self.best.bias, self.best.kl))
        if better:
            self.best = row
            self.best_tensors = {key: value.detach().clone() for key, value in tensors.items()}
        return better

    def inside(self, row: Validation) -> bool:
        """Whether a measurement keeps the KL budget, the answer mass and the accuracy; what is nan is not held to."""
        return not self.broken(row)

    def broken(self, row: Validation) -> list[str]:
        """The limits that a measurement does not keep."""
        return self.limits.broken(row, self.history[0])

    def nothing_kept(self) -> str | None:
        """Why the base model is all that is kept; None if a trained steering is."""
        if self.best is None or self.best.step:
            return None
        trained = [row for row in self.history if row.step and row.scale == 1]
        broken = Counter(limit for row in trained for limit in self.broken(row))
        reasons = [f"{limit}: {number}" for limit, number in broken.items()]
        if unhelpful := sum(not self.broken(row) for row in trained):
            reasons.append(f"no less biased: {unhelpful}")
        return f"none of {len(trained)} measured steps was kept ({', '.join(reasons)}); the steering is the base model"


def _above(value: float | None, limit: float | None) -> bool:
    """Whether a measured value is above a limit; what is nan is."""
    return value is not None and limit is not None and not value <= limit


class Progress(TrainingCallback):
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
        self._shown = self.trainer.steps_done
        hidden = self.quiet or not sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=self._shown, desc="train", unit="step", disable=hidden)

    def _on_rollout_start(self) -> None:
        self._show()

    def _on_training_end(self) -> None:
        self._show()

    def _show(self) -> None:
        """Show the steps that were learned from since the last time."""
        step, measured = self.trainer.steps_done, self.trainer.measured
        if self.bar is None or step <= self._shown or not measured:
            return
        said = {name: f"{measured[name]:.3f}" for name in ("running_bias", "kl", "abstention") if name in measured}
        self.bar.set_postfix(said, refresh=False)
        self.bar.update(step - self._shown)
        if self.bar.disable and step // self.every > self._shown // self.every:
            self.say(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value}" for name, value in said.items()))
        self._shown = step

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)


class Checkpoints(TrainingCallback):
    """Save what the run needs to go on, at the start of a step: every few steps, and wherever something was measured.

    Not while steps are being skipped: what is on the disk stays the last that was good.

    Args:
        save: does it.
        every: steps.
    """

    def __init__(self, save: Callable[[], None], every: int):
        super().__init__()
        self.save = save
        self.every = every
        self.due = False  # set by whoever has something to keep

    def _on_rollout_start(self) -> None:
        step = self.trainer.steps_done
        if self.due or (step and step % self.every == 0):
            self._keep()

    def _on_training_end(self) -> None:
        if self.due:
            self._keep()

    def _keep(self) -> None:
        if not self.trainer.skipped_in_a_row:
            self.save()
            self.due = False
