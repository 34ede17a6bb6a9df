"""The trainer that a config names."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dso.decisions.matching import Matcher
from dso.steering.model import Steering
from envs.reward import RewardConfig
from envs.task import DecisionTask
from envs.vector import DecisionVectorEnv
from launch.cluster.processes import LaunchError, micro_batch
from launch.config.schema import TrainConfig
from launch.run.constants import (
    ADAM_BETAS,
    ANCHOR_PRICE,
    ANCHORS,
    LOWEST_RATE,
    MAX_GRAD_NORM,
    MAX_SKIPPED,
    UNAMBIGUOUS_PRICE,
    WARMUP,
    adam_epsilon,
    constants,
)
from trainers.constraints import AnswerMassFloor, Constraints, FixedKL, KLBudget, OrderLimit
from trainers.lesson import ORDERED
from trainers.parallel.ranks import World
from trainers.ppo import SteeringPPO
from trainers.trainer import SteeringTrainer
from trainers.vec import DecisionVecEnv


def open_trainer(
    config: TrainConfig, task: DecisionTask, steering: Steering, world: World, deepspeed: dict[str, Any] | None
) -> SteeringTrainer:
    """The trainer of a run; the steering is attached to the task's backbone.

    Args:
        world, deepspeed: of :func:`launch.cluster.processes.open_world`.

    Raises:
        UserError: if it cannot learn from such decisions.
    """
    return (_of_answers if config.freeform else _of_candidates)(config, task, steering, world, deepspeed)


def _of_candidates(
    config: TrainConfig, task: DecisionTask, steering: Steering, world: World, deepspeed: dict[str, Any] | None
) -> SteeringPPO:
    train = config.train
    env = DecisionVecEnv(DecisionVectorEnv(task, train.ambiguous, train.unambiguous, seed=train.seed, infos=False))
    return SteeringPPO(
        env,
        policy_kwargs={
            "steering": steering,
            "baseline": train.baseline,
            "optimizer_kwargs": {"betas": ADAM_BETAS, "eps": adam_epsilon(config)},
        },
        estimator=train.estimator,
        constraints=held_constraints(config),
        unambiguous_weight=train.unambiguous_weight,
        sparsity=config.constraints.sparsity,
        anchors=ANCHORS,
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


def _of_answers(
    config: TrainConfig, task: DecisionTask, steering: Steering, world: World, deepspeed: dict[str, Any] | None
) -> SteeringTrainer:
    from trainers.grpo import SteeringGRPO, SteeringRLOO  # TRL is not there where no one trains free-form answers

    train = config.train
    return (SteeringGRPO if train.estimator == "grpo" else SteeringRLOO)(
        task,
        steering,
        open_matcher(config),
        kl_constraint(config),
        schedule(train.optimizer.learning_rate),
        steps=train.max_steps,
        ambiguous=train.ambiguous,
        unambiguous=train.unambiguous,
        unambiguous_weight=train.unambiguous_weight,
        num_generations=train.freeform.num_generations,
        micro_batch=micro_batch(config, world.size),
        betas=ADAM_BETAS,
        eps=adam_epsilon(config),
        sparsity=config.constraints.sparsity,
        world=world,
        seed=train.seed,
        max_completion_length=train.freeform.max_completion_length,
        temperature=train.freeform.temperature,
        max_grad_norm=MAX_GRAD_NORM,
        deepspeed=deepspeed,
        ddp_timeout=int(config.run.ddp_timeout),
        output_dir=str(Path(config.run.output_dir)),
    )


def require_trl() -> None:
    """Refuse to train on free-form answers without a TRL that does.

    Raises:
        UserError: naming what to install.
    """
    if importlib.util.find_spec("trl") is None:
        raise LaunchError("free-form answers are trained by TRL, which is not installed: pip install 'dso[train,grpo]'")
    from trainers.grpo import require_trl as require_methods

    require_methods()


def open_matcher(config: TrainConfig) -> Matcher:
    """What reads whom a free-form answer names.

    Raises:
        UserError: if it could never read anything.
    """
    wanted = config.matcher.model_dump()
    if wanted["abstentions"] is None:
        del wanted["abstentions"]
    return Matcher(**wanted)


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
        block_weight=1.0 if preference.common_weight else fixed.block_weight,
        pooling=preference.pooling,
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


def held_constraints(config: TrainConfig) -> Constraints:
    """What training on candidates holds, each limit by a dual variable of its own."""
    limits, fixed = config.constraints, constants(config)
    anchors: KLBudget | FixedKL | None = None
    if limits.anchors is not None:
        budget, rate = limits.neutral_kl, fixed.dual_learning_rate
        anchors = KLBudget(budget, rate, floor=ANCHOR_PRICE) if budget else FixedKL(ANCHOR_PRICE)
    unambiguous = None
    if limits.unambiguous_kl is not None and config.train.unambiguous:
        unambiguous = KLBudget(limits.unambiguous_kl, fixed.dual_learning_rate, floor=UNAMBIGUOUS_PRICE)
    increase = limits.order_increase if config.train.estimator in ORDERED else None
    return Constraints(
        kl_constraint(config),
        mass_floor=None if limits.min_answer_mass is None else AnswerMassFloor(limits.min_answer_mass),
        anchors=anchors,
        order=None if increase is None else OrderLimit(increase),
        unambiguous=unambiguous,
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
