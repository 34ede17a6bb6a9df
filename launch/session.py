"""From a config to the objects of a run: backbone, decisions, steering, environment, trainer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dso.backbone import Backbone
from dso.data import load_decisions
from dso.decisions import DecisionSet, check_target
from dso.steering import Handle, Steering
from envs.decision import DecisionVectorEnv
from envs.task import DecisionTask, RewardConfig
from launch.config import TrainConfig, TrainSection
from trainers.constraints import FixedKL, KLBudget
from trainers.ppo import SteeringPPO
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


def open_session(config: TrainConfig) -> Session:
    """Load and wire up what a config names; every mistake in it is raised before the model is loaded where possible.

    Raises:
        DecisionError, ModelNotFound, SteeringError, ValueError: each naming what is wrong.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    decisions = load_decisions(config.data.set, **config.data.options)
    if config.data.groups is not None:
        decisions = DecisionSet(decisions.decisions, config.data.groups, decisions.name)
    check_target(config.data.target, decisions.groups)
    training = decisions.select(split=config.data.train_split)
    decisions.select(split=config.data.validation_split, kind="ambiguous")
    backbone = load_backbone(config)
    seed_everything(config.train.seed)
    steering = Steering.for_model(
        backbone.model,
        operator=config.steering.operator,
        rank=config.steering.rank,
        sites=None if config.steering.sites is None else list(config.steering.sites),
        base_model=config.model.name,
        revision=config.model.revision,
        groups=decisions.groups,
        target=check_target(config.data.target, decisions.groups),
    ).to(backbone.device)
    handle = steering.attach(backbone.model)
    return Session(config, backbone, decisions, steering, handle, _trainer(config, backbone, training, steering, handle))


def load_backbone(config: TrainConfig) -> Backbone:
    """The backbone of a config."""
    return Backbone.load(
        config.model.name, revision=config.model.revision, dtype=config.model.dtype, device=config.model.device, max_tokens=config.model.max_tokens
    )


def seed_everything(seed: int) -> None:
    """Seed every generator that a run may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _trainer(config: TrainConfig, backbone: Backbone, training: DecisionSet, steering: Steering, handle: Handle) -> SteeringPPO:
    train, limits = config.train, config.constraints
    reward = RewardConfig(
        form=train.reward,
        width=train.smooth_width,
        dead_zone=train.dead_zone,
        abstain=train.abstain_reward,
        decay=train.preference_decay,
        batch_weight=train.batch_weight,
    )
    task = DecisionTask(backbone, training, config.data.target, reward, handle, anchors=_anchors(limits.anchors))
    env = DecisionVecEnv(DecisionVectorEnv(task, train.ambiguous, train.unambiguous, seed=train.seed))
    if limits.kl_budget is not None:
        kl: KLBudget | FixedKL = KLBudget(limits.kl_budget, limits.dual_learning_rate, limits.initial_beta)
    else:
        kl = FixedKL(limits.kl_coefficient or 0.0)
    return SteeringPPO(
        env,
        policy_kwargs={
            "steering": steering,
            "baseline": train.baseline,
            "length_normalised": train.length_normalised,
            "optimizer_kwargs": {"betas": tuple(train.betas), "eps": 1e-8},
        },
        estimator=train.estimator,
        kl=kl,
        unambiguous_weight=train.unambiguous_weight,
        sparsity=limits.sparsity,
        hard_preference=train.hard_preference,
        anchors=train.ambiguous // 6 if limits.anchors else 0,
        learning_rate=schedule(train),
        n_epochs=train.ppo_epochs,
        clip_range=train.clip_range,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
    )


def schedule(train: TrainSection) -> Callable[[float], float]:
    """The learning rate as a function of the share of training that remains (1 to 0), as Stable-Baselines3 takes it."""
    floor = 0.05

    def cosine(remaining: float) -> float:
        return train.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (1 - remaining))))

    def linear(remaining: float) -> float:
        return train.learning_rate * (floor + (1 - floor) * remaining)

    return {"cosine": cosine, "linear": linear, "constant": lambda _: train.learning_rate}[train.schedule]


def _anchors(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8") as file:
            lines = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"constraints.anchors: {path}: cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"constraints.anchors: {path} holds no text")
    return lines
