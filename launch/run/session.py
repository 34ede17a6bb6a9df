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
from dso.models.scores import Scoring
from dso.steering.handle import Handle
from dso.steering.model import Steering
from envs.reward import RewardConfig
from envs.task import DecisionTask
from envs.vector import DecisionVectorEnv
from launch.config.freeform import AnswerConstraintsSection, AnswerTrainSection, FreeformConfig
from launch.config.reading import to_dict
from launch.config.schema import ConfigError, ConstraintsSection, TrainConfig, TrainSection
from trainers.checkpointing import checkpoint_layers
from trainers.constraints import AnswerMassFloor, FixedKL, KLBudget
from trainers.measuring import SharedEvaluator
from trainers.parallel.ranks import World
from trainers.ppo import SteeringPPO
from trainers.tracking.tracker import Tracker, open_tracker
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
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    decisions = open_decisions(config)
    anchors = _anchors(config.constraints.anchors)
    divided = deepspeed is not None and deepspeed["zero_optimization"].get("stage") == 3
    # What no single accelerator may have room for is read into host memory, and divided from there.
    scoring = Scoring(length_normalised=config.train.length_normalised)
    backbone = load_backbone(config, "cpu" if divided else world.device, scoring)
    if config.train.gradient_checkpointing and not checkpoint_layers(backbone.model):
        raise ConfigError(f"{config.model.name} has no layers that can be checkpointed", "train.gradient_checkpointing")
    seed_everything(config.train.seed)
    steering = open_steering(config, backbone, decisions)
    handle = steering.attach(backbone.model)
    if divided:
        from trainers.parallel.engine import divide_weights

        divide_weights(backbone.model, deepspeed, world)
        steering.to(backbone.device)
    training = decisions.select(split=config.data.train_split)
    # Sampled answers have neither: no base model's preference, and no probabilities to pool.
    reward = reward_config(config.train, common_weight=config.train.common_weight, pooling=config.train.pooling)
    task = DecisionTask(backbone, training, config.data.target, reward, handle, anchors=anchors)
    return Session(config, backbone, decisions, steering, handle, _trainer(config, task, steering, world, deepspeed))


def reward_config(train: TrainSection | AnswerTrainSection, **more: Any) -> RewardConfig:
    """How decisions are rewarded, from the keys of that name in the section ``train``, and ``more``."""
    return RewardConfig(
        form=train.reward,
        width=train.smooth_width,
        dead_zone=train.dead_zone,
        abstain=train.abstain_reward,
        estimate=train.preference,
        decay=train.preference_decay,
        context_decay=train.context_decay,
        batch_weight=train.batch_weight,
        local_weight=train.local_weight,
        unit_weight=train.unit_weight,
        **more,
    )


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


def load_backbone(
    config: TrainConfig, device: str | torch.device | None = None, scoring: Scoring | None = None
) -> Backbone:
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
        model.name, revision=model.revision, dtype=model.dtype, device=device, max_tokens=model.max_tokens,
        scoring=scoring,
    )  # fmt: skip


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


def open_run_tracker(config: TrainConfig | FreeformConfig, folder: Path, world: World, quiet: bool) -> Tracker:
    """Who else hears of a run, by its section ``run``."""

    def warn(line: str) -> None:
        tqdm.write(f"dso: {line}", file=sys.stderr)

    def say(line: str) -> None:
        if not quiet:
            tqdm.write(line, file=sys.stderr)

    wandb = to_dict(config.run.wandb)
    return open_tracker(
        config.run.tracking, folder, config=to_dict(config), say=say, warn=warn, is_main=world.is_main, **wandb
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
            "optimizer_kwargs": {"betas": tuple(train.betas), "eps": train.adam_eps},
        },
        estimator=train.estimator,
        kl=kl_constraint(limits),
        mass_floor=None if limits.min_answer_mass is None else AnswerMassFloor(limits.min_answer_mass),
        unambiguous_weight=train.unambiguous_weight,
        sparsity=limits.sparsity,
        hard_preference=train.hard_preference,
        anchors=max(1, train.ambiguous // 6) if limits.anchors else 0,
        learning_rate=schedule(train),
        n_epochs=train.ppo_epochs,
        clip_range=train.clip_range,
        max_grad_norm=train.max_grad_norm,
        accumulation=train.accumulation,
        max_skipped=train.max_skipped,
        world=world,
        deepspeed=deepspeed,
        seed=train.seed,
    )


def kl_constraint(limits: ConstraintsSection | AnswerConstraintsSection) -> KLBudget | FixedKL:
    """The price of KL that a section ``constraints`` asks for."""
    if limits.kl_budget is None:
        return FixedKL(limits.kl_coefficient or 0.0)
    return KLBudget(
        limits.kl_budget,
        limits.dual_learning_rate,
        limits.initial_beta,
        margin=limits.kl_margin,
        floor=limits.minimum_beta,
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
