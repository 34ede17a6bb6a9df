"""From a config of ``dso freeform`` to the objects of a run: processes, decisions, matcher, steering, trainer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dso.decisions.decision import DecisionSet
from dso.decisions.matching import Matcher
from dso.evaluation.answers import AnswerEvaluator, check_answers
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from dso.steering.model import Steering
from envs.task import DecisionTask
from launch.cluster.processes import LaunchError, process_count, process_device, read_deepspeed
from launch.config.schema import ConfigError, TrainConfig
from launch.run.constants import ADAM_BETAS, FISHER_DAMPING, MAX_GRAD_NORM, adam_epsilon
from launch.run.measure import thin
from launch.run.session import (
    kl_constraint,
    load_backbone,
    open_decisions,
    open_steering,
    reward_config,
    schedule,
    seed_everything,
)
from trainers.answers import divide
from trainers.checkpointing import checkpoint_layers
from trainers.parallel.ranks import Ranks, World

if TYPE_CHECKING:
    from trainers.grpo import SteeringGRPO, SteeringRLOO

OnStep = Callable[[int, dict[str, float]], None]


@dataclass(slots=True)
class AnswerSession:
    """Everything a run on free-form answers holds.

    Attributes:
        decisions: all splits.
        handle: the steering on the backbone, at scale 1.
        deepspeed: its configuration as transformers takes it, None without it.
    """

    config: TrainConfig
    world: World
    deepspeed: dict[str, Any] | None
    backbone: Backbone
    decisions: DecisionSet
    matcher: Matcher
    steering: Steering
    handle: Handle

    def split(self, name: str, stride: int = 1) -> DecisionSet:
        """The decisions of one split, of its contexts and units as :func:`launch.run.measure.thin` leaves them."""
        return thin(self.decisions.select(split=name), stride)

    def evaluator(self, decisions: DecisionSet, progress: Callable[[int], None] | None = None) -> AnswerEvaluator:
        """What asks decisions; the processes share the work."""
        train, world = self.config.train, self.world
        return AnswerEvaluator(
            self.backbone,
            decisions,
            self.matcher,
            self.handle,
            samples=self.config.evaluation.samples,
            max_new_tokens=train.freeform.max_completion_length,
            temperature=train.freeform.temperature,
            seed=train.seed,
            progress=progress,
            rank=world.rank,
            size=world.size,
            add=world.all_sum,
        )


def open_answers(
    config: TrainConfig, world: World, deepspeed: dict[str, Any] | None = None, steering: Steering | None = None
) -> AnswerSession:
    """Load what a config names; every mistake in it is raised before the model is loaded where possible.

    Args:
        world, deepspeed: of :func:`open_world`.
        steering: a trained one to measure; None makes a fresh one.

    Raises:
        UserError: naming what is wrong.
    """
    decisions, matcher = open_decisions(config), open_matcher(config)
    for split in ("train", "validation", "test"):
        check_answers(decisions.select(split=split), matcher)
    backbone = load_backbone(config, world.device if world.size > 1 else None)
    if config.train.gradient_checkpointing and not checkpoint_layers(backbone.model):
        raise ConfigError(f"{config.model.name} has no layers that can be checkpointed", "train.gradient_checkpointing")
    seed_everything(config.train.seed)
    if steering is None:
        steering = open_steering(config, backbone, decisions)
    handle = steering.to(backbone.device).attach(backbone.model)
    return AnswerSession(config, world, deepspeed, backbone, decisions, matcher, steering, handle)


def open_trainer(session: AnswerSession, on_step: OnStep, begun: int = 0) -> SteeringGRPO | SteeringRLOO:
    """The trainer of a session; ``on_step`` is told of every step after ``begun`` in every process."""
    from trainers.grpo import SteeringGRPO, SteeringRLOO

    config, train, limits = session.config, session.config.train, session.config.constraints
    task = DecisionTask(
        session.backbone,
        session.split("train"),
        config.data.target,
        reward_config(config),
        session.handle,
    )
    return (SteeringGRPO if train.estimator == "grpo" else SteeringRLOO)(
        task,
        session.steering,
        session.matcher,
        kl_constraint(config),
        schedule(train.optimizer.learning_rate),
        steps=train.max_steps,
        ambiguous=train.ambiguous,
        unambiguous=train.unambiguous,
        unambiguous_weight=train.unambiguous_weight,
        num_generations=train.freeform.num_generations,
        micro_batch=micro_batch(config, session.world.size),
        betas=ADAM_BETAS,
        eps=adam_epsilon(config),
        sparsity=limits.sparsity,
        fisher_batches=train.optimizer.fisher_batches,
        fisher_damping=FISHER_DAMPING,
        on_step=on_step,
        begun=begun,
        seed=train.seed,
        max_completion_length=train.freeform.max_completion_length,
        temperature=train.freeform.temperature,
        max_grad_norm=MAX_GRAD_NORM,
        deepspeed=session.deepspeed,
        ddp_timeout=int(config.run.ddp_timeout),
        output_dir=str(Path(config.run.output_dir)),
    )


def open_matcher(config: TrainConfig) -> Matcher:
    """What reads whom an answer names.

    Raises:
        UserError: if it could never read anything.
    """
    wanted = config.matcher.model_dump()
    if wanted["abstentions"] is None:
        del wanted["abstentions"]
    return Matcher(**wanted)


def micro_batch(config: TrainConfig, size: int) -> int | None:
    """Answers of one pass in one of ``size`` processes; None where a process passes its whole share at once."""
    parts = config.train.gradient_accumulation_steps
    answers = config.decisions * config.train.freeform.num_generations
    return None if parts == 1 else max(1, answers // (size * parts))


def require_trl() -> None:
    """Refuse to start without a TRL that trains here.

    Raises:
        UserError: naming what to install.
    """
    if importlib.util.find_spec("trl") is None:
        raise LaunchError("free-form answers are trained by TRL, which is not installed: pip install 'dso[train,grpo]'")
    from trainers.grpo import require_trl as require_methods

    require_methods()


def open_world(config: TrainConfig, deepspeed: str | None) -> tuple[World, dict[str, Any] | None]:
    """The processes that a launcher started, and DeepSpeed's configuration if a file is given.

    Raises:
        UserError: if the processes cannot share a step, or the file contradicts the config.
    """
    size, train = process_count(), config.train
    divide(config.decisions, train.freeform.num_generations, size, micro_batch(config, size))
    settings = None
    if deepspeed is not None:
        settings = as_transformers_takes_it(read_deepspeed(deepspeed, config, size))
        _prepare_deepspeed()
    if size == 1:
        return World(), settings
    return Ranks(process_device(config.model.device), config.run.ddp_timeout), settings


def _prepare_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise LaunchError("--deepspeed needs DeepSpeed: pip install 'dso[train,grpo,distributed]'")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and says so
    from trainers.parallel.engine import import_deepspeed

    import_deepspeed()


def as_transformers_takes_it(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration with what transformers fills in from its own arguments."""
    divided = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**settings, **dict.fromkeys(divided, "auto"), "zero_allow_untested_optimizer": True}
