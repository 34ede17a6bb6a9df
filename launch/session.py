"""From a config to the objects of a run: backbone, decisions, steering, environment, trainer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dso.backbone import Backbone
from dso.data import load_decisions
from dso.decisions import DecisionSet, check_target
from dso.steering import Handle, Steering
from envs.decision import DecisionVectorEnv
from envs.task import DecisionTask, RewardConfig
from launch.config import ConfigError, TrainConfig, TrainSection
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
        UserError: naming what is wrong, as a ConfigError, DecisionError, ModelNotFound or SteeringError.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    decisions = open_decisions(config)
    anchors = _anchors(config.constraints.anchors)
    backbone = load_backbone(config)
    seed_everything(config.train.seed)
    steering = _steering(config, backbone, decisions)
    handle = steering.attach(backbone.model)
    training = decisions.select(split=config.data.train_split)
    reward = RewardConfig(
        form=config.train.reward,
        width=config.train.smooth_width,
        dead_zone=config.train.dead_zone,
        abstain=config.train.abstain_reward,
        estimate=config.train.preference,
        decay=config.train.preference_decay,
        context_decay=config.train.context_decay,
        batch_weight=config.train.batch_weight,
        local_weight=config.train.local_weight,
        unit_weight=config.train.unit_weight,
    )
    task = DecisionTask(backbone, training, config.data.target, reward, handle, anchors=anchors)
    return Session(config, backbone, decisions, steering, handle, _trainer(config, task, steering))


def open_decisions(config: TrainConfig) -> DecisionSet:
    """The decision set of a config, with something of each kind in each split that the run will ask for.

    Raises:
        UserError: if there is no such set, or not that much in it.
    """
    data = config.data
    decisions = load_decisions(data.set, **data.options)
    if data.groups is not None:
        decisions = DecisionSet(decisions.decisions, data.groups, decisions.name)
    check_target(data.target, decisions.groups)
    for split in (data.train_split, data.validation_split, data.test_splits[0]):
        decisions.select(split=split, kind="ambiguous")
    training = decisions.select(split=data.train_split)
    if config.train.unambiguous and all(decision.ambiguous for decision in training):
        reason = f"the split {data.train_split!r} of {data.set} has no unambiguous decisions; set it to 0"
        raise ConfigError(reason, "train.unambiguous")
    return decisions


def load_backbone(config: TrainConfig) -> Backbone:
    """The backbone of a config.

    Raises:
        ConfigError: if the device is none that torch knows, or is not there.
        ModelNotFound: if there is no such model.
    """
    model = config.model
    if model.device is not None:
        try:
            torch.empty(0, device=model.device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with the device
            raise ConfigError(
                f"{model.device!r} cannot be used: {str(error).splitlines()[0]}", "model.device"
            ) from error
    return Backbone.load(
        model.name, revision=model.revision, dtype=model.dtype, device=model.device, max_tokens=model.max_tokens
    )


def _steering(config: TrainConfig, backbone: Backbone, decisions: DecisionSet) -> Steering:
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
        )
    except ValueError as error:  # patterns and rank can be held against the model only
        raise ConfigError(str(error), "steering") from error
    return steering.to(backbone.device)


def seed_everything(seed: int) -> None:
    """Seed every generator that a run may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _trainer(config: TrainConfig, task: DecisionTask, steering: Steering) -> SteeringPPO:
    train, limits = config.train, config.constraints
    env = DecisionVecEnv(DecisionVectorEnv(task, train.ambiguous, train.unambiguous, seed=train.seed))
    if limits.kl_budget is not None:
        kl: KLBudget | FixedKL = KLBudget(
            limits.kl_budget, limits.dual_learning_rate, limits.initial_beta, floor=limits.minimum_beta
        )
    else:
        kl = FixedKL(limits.kl_coefficient or 0.0)
    return SteeringPPO(
        env,
        policy_kwargs={
            "steering": steering,
            "baseline": train.baseline,
            "length_normalised": train.length_normalised,
            "optimizer_kwargs": {"betas": tuple(train.betas), "eps": train.adam_eps},
        },
        estimator=train.estimator,
        kl=kl,
        unambiguous_weight=train.unambiguous_weight,
        sparsity=limits.sparsity,
        hard_preference=train.hard_preference,
        anchors=max(1, train.ambiguous // 6) if limits.anchors else 0,
        learning_rate=schedule(train),
        n_epochs=train.ppo_epochs,
        clip_range=train.clip_range,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
    )


def schedule(train: TrainSection) -> Callable[[float], float]:
    """The learning rate as a function of the share of training that remains (1 to 0), as Stable-Baselines3 takes it.

    It rises linearly over the warm-up, then falls to a twentieth by the schedule. The first step has a rate above 0.
    """
    shapes = {
        "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
        "linear": lambda t: 1 - t,
        "constant": lambda t: 1.0,
    }
    shape, lowest = shapes[train.schedule], 0.05

    def rate(remaining: float) -> float:
        done = 1 - remaining
        if done < train.warmup:
            return train.learning_rate * max(done / train.warmup, lowest)
        fallen = (done - train.warmup) / (1 - train.warmup) if train.warmup < 1 else 0.0
        return train.learning_rate * (lowest + (1 - lowest) * shape(fallen))

    return rate


def _anchors(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 at byte {error.start}", "constraints.anchors") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", "constraints.anchors") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise ConfigError(f"{path} holds no text", "constraints.anchors")
    return lines
