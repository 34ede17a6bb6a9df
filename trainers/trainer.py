"""What a run asks of its trainer, whichever it is: :class:`trainers.ppo.SteeringPPO` on candidates' probabilities, or
:class:`trainers.grpo.SteeringGRPO` and ``SteeringRLOO`` on sampled answers.

Both drive Stable-Baselines3's callbacks (:mod:`trainers.callbacks`) and write to its logger, so validation, selection,
saving and records are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor

from dso.steering.model import Steering
from envs.task import DecisionTask
from trainers.constraints import FixedKL, KLBudget
from trainers.parallel.ranks import World


class Contents(NamedTuple):
    """What a trainer needs to go on bit for bit.

    Attributes:
        parts: tensors by part and name; a part's name has no slash.
        facts: plain JSON values.
    """

    parts: Mapping[str, Mapping[str, Tensor]]
    facts: dict[str, Any]


class SteeringTrainer(Protocol):
    """Learns a steering step by step.

    Attributes:
        estimator: its name in a config.
        kl: the constraint.
        world: the processes that learn together.
        stop_requested: set by whoever wants training to end before the next step.
        measured: what the last step recorded, by name.
        skipped_in_a_row: steps that were skipped last, as their numbers were not finite.
    """

    estimator: str
    kl: KLBudget | FixedKL
    world: World
    stop_requested: bool
    measured: dict[str, float]
    skipped_in_a_row: int

    @property
    def task(self) -> DecisionTask:
        """The decisions of the training, the backbone and the rewards."""
        ...

    @property
    def steering(self) -> Steering:
        """What is learned."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def logger(self) -> Logger:
        """Where records go."""
        ...

    @property
    def decisions_a_step(self) -> int:
        """How many decisions a step learns from, over all processes."""
        ...

    @property
    def steps_done(self) -> int:
        """Optimiser steps that were taken or skipped."""
        ...

    def set_logger(self, logger: Logger) -> None:
        """Where records go from now on."""

    def whiten(self, batches: int, damping: float) -> None:
        """Measure steps in KL from here on (:mod:`trainers.fisher`), by a few batches of the training decisions."""

    def learn_until(self, steps: int, callback: BaseCallback) -> None:
        """Learn up to so many steps in all, or until :attr:`stop_requested` in any process; to be called once."""

    def contents(self) -> Contents:
        """What :meth:`restore` needs; to be called by all processes together."""
        ...

    def restore(self, contents: Contents) -> None:
        """Go on where :meth:`contents` were taken; to be called by all processes together.

        Raises:
            ValueError: if they are of another steering; nothing is changed then.
        """
