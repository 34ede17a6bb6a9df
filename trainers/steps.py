"""How training on free-form answers goes through the steps of a run: the half of :mod:`trainers.grpo` that a run sees.

transformers' trainer has callbacks of its own; here they call those of Stable-Baselines3, at the moments at which
:class:`trainers.ppo.SteeringPPO` does. Its checkpoints are not used either: they hold the whole model, and know neither
the preferences nor the price of KL. Which decisions a step asks follows from the seed and the step's number.
"""

from __future__ import annotations

import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState

from dso.steering.model import Steering
from envs.task import DecisionTask
from trainers.constraints import FixedKL, KLBudget
from trainers.parallel.ranks import World
from trainers.state.generators import random_state, restore_random
from trainers.state.saved import require_same_shapes
from trainers.trainer import Contents

CLOCKS = {"step_time": "time/step"}  # what TRL measures that is never the same twice, and what it is called here


class AnswerSteps(metaclass=ABCMeta):  # no further base: TRL's trainer comes next
    """What a run asks of its trainer (:class:`trainers.trainer.SteeringTrainer`), for a trainer of TRL.

    Attributes:
        begun: steps that were done before a restore.
    """

    estimator: str
    skipped_in_a_row = 0  # no step is skipped
    args: Any
    beta: float
    kl: KLBudget | FixedKL
    logger: Logger
    measured: dict[str, float]
    model: Any
    own_optimizer: Optimizer
    state: TrainerState
    steering: Steering
    task: DecisionTask
    train: Any
    train_dataset: Any

    def __init__(self, task: DecisionTask, steering: Steering, kl: KLBudget | FixedKL, world: World | None):
        self.task, self.steering, self.kl = task, steering, kl
        self.world = world or World()
        self.stop_requested = False
        self.measured = {}
        self.logger = Logger(None, [])
        self.begun = self._tokens = 0
        self._drawn: list[list[int]] = []  # the decisions of each step
        self._random: Callable[[], None] | None = None  # sets the generators as the first step begins
        self._callback: BaseCallback | None = None

    @abstractmethod
    def rows(self) -> Dataset:
        """The decisions of the steps to do."""

    @abstractmethod
    def release(self) -> None:
        """Leave the model as it was found."""

    @abstractmethod
    def after_step(self) -> None:
        """What the trainer does after each step."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.task.backbone.device

    @property
    def decisions_a_step(self) -> int:
        """Decisions of a step, over all processes."""
        return len(self._drawn[0])

    @property
    def steps_done(self) -> int:
        """Optimiser steps that were taken."""
        return self.state.global_step

    @property
    def num_timesteps(self) -> int:
        """Decisions that were asked, as Stable-Baselines3 counts."""
        return self.steps_done * self.decisions_a_step

    def set_logger(self, logger: Logger) -> None:
        """Where records go from now on."""
        self.logger = logger

    def learn_until(self, steps: int, callback: BaseCallback) -> None:
        """See :meth:`trainers.trainer.SteeringTrainer.learn_until`; the model is as it was found afterwards."""
        self.args.max_steps, self._callback = steps, callback
        callback.init_callback(cast(BaseAlgorithm, self))  # it asks no more of it than there is
        try:
            with self.evaluating():
                callback.on_training_start({}, {})
            if self.steps_done < steps:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
                    self.train()
            with self.evaluating():
                callback.on_training_end()
        finally:
            self.release()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block dropout is off in the whole model."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def contents(self) -> Contents:
        """See :meth:`trainers.trainer.SteeringTrainer.contents`."""
        task = self.task.state_dict()  # which may ask the base model, in all processes
        generators = gather_object([random_state(self.device)])
        parts = {
            "steering": self.steering.tensors(),
            "task": task,
            "optimizer": {
                f"{number}/{key}": value
                for number, parameter in enumerate(self.steering.parameters())
                for key, value in self.own_optimizer.state[parameter].items()
            },
            "random": {f"{rank}/{key}": v for rank, (found, _) in enumerate(generators) for key, v in found.items()},
        }
        facts = {
            "steps": self.steps_done,
            "tokens": self.state.num_input_tokens_seen,
            "kl": self.kl.state_dict(),
            "random": [said for _, said in generators],
        }
        return Contents(parts, facts)

    def restore(self, contents: Contents) -> None:
        """See :meth:`trainers.trainer.SteeringTrainer.restore`."""
        parts, facts = contents
        require_same_shapes(parts["steering"], self.steering.tensors())
        self.steering.load_tensors({key: value.to(self.device) for key, value in parts["steering"].items()})
        self.task.load_state_dict({key: value.to(self.device) for key, value in parts["task"].items()})
        for number, parameter in enumerate(self.steering.parameters()):
            entries = self.own_optimizer.state[parameter]
            for key in entries:
                entries[key].copy_(parts["optimizer"][f"{number}/{key}"])
        self.kl.load_state_dict(facts["kl"])
        self.beta = self.kl.coefficient
        self.begun, self._tokens = facts["steps"], facts["tokens"]
        self.take_up()
        self.train_dataset = self.rows()
        if self.world.rank < len(facts["random"]):
            start = f"{self.world.rank}/"
            own = {key.removeprefix(start): v for key, v in parts["random"].items() if key.startswith(start)}
            self._random = partial(restore_random, own, facts["random"][self.world.rank], self.device)
            self._random()

    def take_up(self) -> None:
        """Count on from the steps that were done before, as transformers does with a checkpoint of its own."""
        self.state.global_step = self._globalstep_last_logged = self.begun
        self.state.num_input_tokens_seen = self._tokens

    def before_step(self) -> None:
        """What is measured and saved at the start of a step."""
        if self._random is not None:  # not earlier: a loader draws where it starts
            self._random()
            self._random = None
        if self._callback is not None:
            with self.evaluating():
                self._callback.on_rollout_start()

    def record(self, measured: dict[str, float]) -> None:
        """A step's record, of what TRL measured."""
        self.measured = measured
        for key, value in measured.items():
            self.logger.record(CLOCKS.get(key, f"train/{key}"), value)
        self.logger.dump(self.num_timesteps)


class Told(TrainerCallback):
    """Where a trainer of TRL tells of its steps."""

    def __init__(self, trainer: AnswerSteps):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.take_up()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.after_step()
        if self.trainer.world.agree(self.trainer.stop_requested):  # a signal may have reached one process only
            self.trainer.stop_requested = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        logs: dict[str, float] = rest["logs"]
        if "reward" in logs:  # the last record is of the whole run
            # Epochs are of the decisions that one process had to do, which are fewer where it goes on from a state.
            self.trainer.record({key: value for key, value in logs.items() if key != "epoch"})
