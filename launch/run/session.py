"""From a config to the objects of a run: backbone, decisions, steering, environment, trainer."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dso.decisions.decision import DecisionSet, check_target
from dso.decisions.sets import load_decisions
from dso.evaluation.evaluator import Evaluator
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from dso.steering.model import Steering
from envs.reward import RewardConfig
from envs.task import DecisionTask
from envs.vector import DecisionVectorEnv
from launch.config.schema import ConfigError, TrainConfig, to_dict
from launch.run.constants import (
    ADAM_BETAS,
    LOWEST_RATE,
    MAX_GRAD_NORM,
    MAX_SKIPPED,
    WARMUP,
    adam_epsilon,
    constants,
)
from trainers.checkpointing import checkpoint_layers
from trainers.constraints import AnswerMassFloor, FixedKL, KLBudget
from trainers.measuring import SharedEvaluator
from trainers.parallel.ranks import World
from trainers.ppo import SteeringPPO
from trainers.tracking.base import Tracker
from trainers.tracking.tracker import open_tracker
from trainers.vec import DecisionVecEnv


@dataclass(slots=True)
class Session:
    """Everything a run holds.

    Attributes:
        decisions: all splits.
        handle: the steering on the backbone, at scale 1.
    """

    config: TrainConfig
    backbone: Backbone
    decisions: DecisionSet
    steering: Steering
    handle: Handle
    trainer: SteeringPPO

    def evaluator(self, decisions: DecisionSet, **options: Any) -> Evaluator | SharedEvaluator:
        """An evaluator of some decisions with the steering; with several processes, for all of them together."""
        if not self.trainer.learner.shared:
            return Evaluator(self.backbone, decisions, self.handle, **options)
        return SharedEvaluator(self.trainer.learner, self.backbone, decisions, self.handle, **options)


def open_session(config: TrainConfig, world: World | None = None, deepspeed: dict[str, Any] | None = None) -> Session:
    """Load and wire up what a config names; every mistake in it is raised before the model is loaded where possible.

    Args:
        world, deepspeed: of :func:`launch.cluster.processes.open_world`, where a launcher started several processes.

    Raises:
        UserError: naming what is wrong, as a ConfigError, DecisionError, ModelNotFound or SteeringError.
    """
    world = world or World()
    decisions = open_decisions(config)
    divided = deepspeed is not None and deepspeed["zero_optimization"].get("stage") == 3
    # What no single accelerator may have room for is read into host memory, and divided from there.
    backbone = load_backbone(config, "cpu" if divided else world.device)
    if world.is_main and (line := backbone.layout_line()):
        print(f"dso: {line}", file=sys.stderr)
    if config.train.gradient_checkpointing and not checkpoint_layers(backbone.model):
        raise ConfigError(f"{config.model.name} has no layers that can be checkpointed", "train.gradient_checkpointing")
    seed_everything(config.train.seed)
    steering = open_steering(config, backbone, decisions)
    handle = steering.attach(backbone.model)
    if divided:
        from trainers.parallel.engine import divide_weights

        divide_weights(backbone.model, deepspeed, world)
        steering.to(backbone.device)
    training = decisions.select(split="train")
    task = DecisionTask(backbone, training, config.data.target, reward_config(config), handle)
    return Session(config, backbone, decisions, steering, handle, _trainer(config, task, steering, world, deepspeed))


def reward_config(config: TrainConfig) -> RewardConfig:
    """How decisions are rewarded."""
    train, fixed = config.train, constants(config)
    preference = train.preference
    return RewardConfig(
        form=train.reward,
        width=fixed.smooth_width,
        abstain=train.freeform.abstain_reward,
        estimate=preference.estimate,
        decay=fixed.decay,
        context_decay=fixed.context_decay,
        batch_weight=preference.batch_weight,
        local_weight=fixed.local_weight,
        unit_weight=fixed.unit_weight,
        common_weight=preference.common_weight,
        pooling=preference.pooling,
    )


def open_decisions(config: TrainConfig) -> DecisionSet:
    """The decision set of a config, with something of each kind in each split that the run will ask for.

    Raises:
        UserError: if there is no such set, or not that much in it.
    """
    data = config.data
    decisions = load_decisions(data.set, **data.options)
    check_target(data.target, decisions.groups)
    for split in ("train", "validation", "test"):
        decisions.select(split=split, kind="ambiguous")
    training = decisions.select(split="train")
    if config.train.unambiguous and all(decision.ambiguous for decision in training):
        reason = f"the split 'train' of {data.set} has no unambiguous decisions; set it to 0"
        raise ConfigError(reason, "train.unambiguous")
    return decisions


def load_backbone(config: TrainConfig, device: str | torch.device | None = None) -> Backbone:
    """The backbone of a config, on the device that it names unless another one is given.

    Raises:
        ConfigError: if the device is none that torch knows, or is not there.
        ModelNotFound: if there is no such model.
    """
    model = config.model
    device = model.device if device is None else str(device)
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with the device
            raise ConfigError(f"{device!r} cannot be used: {str(error).splitlines()[0]}", "model.device") from error
    return Backbone.load(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=device,
        max_tokens=model.max_tokens,
        attn_implementation=model.attn_implementation,
    )


def open_steering(config: TrainConfig, backbone: Backbone, decisions: DecisionSet) -> Steering:
    """A fresh steering as a config wants it, on the backbone's device.

    Raises:
        ConfigError: if the model has no such sites.
    """
    wanted = config.steering
    try:
        steering = Steering.for_model(
            backbone.model,
            operator=wanted.operator,
            rank=wanted.rank,
            sites=None if wanted.sites is None else list(wanted.sites),
            base_model=config.model.name,
            revision=config.model.revision,
            groups=decisions.groups,
            target=check_target(config.data.target, decisions.groups),
            scale_range=(0.0, max(1.0, *config.evaluation.scales)),  # what will be measured, and 1 to train
            scoring=backbone.scoring,
        )
    except ValueError as error:  # patterns and rank can be held against the model only
        raise ConfigError(str(error), "steering") from error
    return steering.to(backbone.device)


def open_run_tracker(config: TrainConfig, folder: Path, world: World, quiet: bool) -> Tracker:
    """Who else hears of a run, by its section ``run``."""

    def warn(line: str) -> None:
        tqdm.write(f"dso: {line}", file=sys.stderr)

    def say(line: str) -> None:
        if not quiet:
            tqdm.write(line, file=sys.stderr)

    wandb = config.run.wandb.model_dump()
    return open_tracker(
        config.run.report_to, folder, config=to_dict(config), say=say, warn=warn, is_main=world.is_main, **wandb
    )


def seed_everything(seed: int) -> None:
    """Seed every generator that a run may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _trainer(
    config: TrainConfig, task: DecisionTask, steering: Steering, world: World, deepspeed: dict[str, Any] | None
) -> SteeringPPO:
    train, limits = config.train, config.constraints
    env = DecisionVecEnv(DecisionVectorEnv(task, train.ambiguous, train.unambiguous, seed=train.seed, infos=False))
    return SteeringPPO(
        env,
        policy_kwargs={
            "steering": steering,
            "baseline": train.baseline,
            "optimizer_kwargs": {"betas": ADAM_BETAS, "eps": adam_epsilon(config)},
        },
        estimator=train.estimator,
        kl=kl_constraint(config),
        mass_floor=None if limits.min_answer_mass is None else AnswerMassFloor(limits.min_answer_mass),
        unambiguous_weight=train.unambiguous_weight,
        sparsity=limits.sparsity,
        hard_preference=train.preference.hard,
        learning_rate=schedule(train.optimizer.learning_rate),
        n_epochs=train.ppo.n_epochs,
        clip_range=train.ppo.clip_range,
        max_grad_norm=MAX_GRAD_NORM,
        accumulation=train.gradient_accumulation_steps,
        max_skipped=MAX_SKIPPED,
        world=world,
        deepspeed=deepspeed,
        seed=train.seed,
    )


def kl_constraint(config: TrainConfig) -> KLBudget | FixedKL:
    """The price of KL that a config asks for."""
    limits, fixed = config.constraints, constants(config)
    if limits.kl_budget is None:
        return FixedKL(limits.beta)
    return KLBudget(
        limits.kl_budget,
        fixed.dual_learning_rate,
        fixed.initial_beta,
        margin=fixed.kl_margin,
        floor=limits.minimum_beta,
    )


def schedule(highest: float) -> Callable[[float], float]:
    """The learning rate as a function of the share of training that remains (1 to 0), as Stable-Baselines3 takes it.

    It rises linearly over the warm-up, then falls by a cosine. The first step has a rate above 0.
    """

    def rate(remaining: float) -> float:
        done = 1 - remaining
        if done < WARMUP:
            return highest * max(done / WARMUP, LOWEST_RATE)
        fallen = (done - WARMUP) / (1 - WARMUP)
        return highest * (LOWEST_RATE + (1 - LOWEST_RATE) * (0.5 * (1 + math.cos(math.pi * fallen))))

    return rate
