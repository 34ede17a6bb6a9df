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
from launch.cluster.processes import LaunchError, process_count, process_device, read_json, read_section
from launch.config.freeform import FreeformConfig
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
from trainers.parallel.ranks import Ranks, World

if TYPE_CHECKING:
    from trainers.grpo import SteeringGRPO, SteeringRLOO

OnStep = Callable[[int, dict[str, float]], None]
DEEPSPEED_KEYS = {"zero_optimization", "steps_per_print", "wall_clock_breakdown", "communication_data_type"}
PRECISIONS = ("amp", "bf16", "fp16")
DIVIDED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}


@dataclass(slots=True)
class AnswerSession:
    """Everything a run on written answers holds.

    Attributes:
        decisions: all splits.
        handle: the steering on the backbone, at scale 1.
        deepspeed: its configuration as transformers takes it, None without it.
    """

    config: FreeformConfig
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
            max_new_tokens=train.max_completion_length,
            temperature=train.temperature,
            seed=train.seed,
            progress=progress,
            rank=world.rank,
            size=world.size,
            add=world.all_sum,
        )


def open_answers(
    config: FreeformConfig, world: World, deepspeed: dict[str, Any] | None = None, steering: Steering | None = None
) -> AnswerSession:
    """Load what a config names; every mistake in it is raised before the model is loaded where possible.

    Args:
        world, deepspeed: of :func:`open_world`.
        steering: a trained one to measure; None makes a fresh one.

    Raises:
        UserError: naming what is wrong.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    decisions, matcher = open_decisions(config), config.matcher.matcher()
    for split in (config.data.train_split, config.data.validation_split, config.data.test_splits[0]):
        check_answers(decisions.select(split=split), matcher)
    backbone = load_backbone(config, world.device if world.size > 1 else None)
    seed_everything(config.train.seed)
    if steering is None:
        steering = open_steering(config, backbone, decisions)
    handle = steering.to(backbone.device).attach(backbone.model)
    return AnswerSession(config, world, deepspeed, backbone, decisions, matcher, steering, handle)


def open_trainer(session: AnswerSession, on_step: OnStep) -> SteeringGRPO | SteeringRLOO:
    """The trainer of a session; ``on_step`` is told of every step in every process."""
    from trainers.grpo import SteeringGRPO, SteeringRLOO

    config, train, limits = session.config, session.config.train, session.config.constraints
    task = DecisionTask(
        session.backbone,
        session.split(config.data.train_split),
        config.data.target,
        reward_config(train),
        session.handle,
    )
    own = {"scale_rewards": train.scale_rewards} if train.estimator == "grpo" else {}
    return (SteeringGRPO if train.estimator == "grpo" else SteeringRLOO)(
        task,
        session.steering,
        session.matcher,
        kl_constraint(limits),
        schedule(train),
        steps=train.steps,
        ambiguous=train.ambiguous,
        unambiguous=train.unambiguous,
        unambiguous_weight=train.unambiguous_weight,
        num_generations=train.num_generations,
        micro_batch=train.micro_batch,
        betas=tuple(train.betas),
        eps=train.adam_eps,
        sparsity=limits.sparsity,
        fisher_batches=train.fisher_batches,
        fisher_damping=train.fisher_damping,
        share_prompts=train.share_prompts,
        on_step=on_step,
        seed=train.seed,
        max_completion_length=train.max_completion_length,
        temperature=train.temperature,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        deepspeed=session.deepspeed,
        ddp_timeout=int(config.run.timeout),
        output_dir=str(Path(config.run.folder)),
        **own,
    )


def require_trl() -> None:
    """Refuse to start without TRL.

    Raises:
        LaunchError: naming what to install.
    """
    if importlib.util.find_spec("trl") is None:
        raise LaunchError("written answers are trained by TRL, which is not installed: pip install 'dso[train,grpo]'")


def open_world(config: FreeformConfig, deepspeed: str | None) -> tuple[World, dict[str, Any] | None]:
    """The processes that a launcher started, and DeepSpeed's configuration if a file is given.

    Raises:
        UserError: if the processes cannot share a step, or the file contradicts the config.
    """
    size, train = process_count(), config.train
    divide(train.ambiguous + train.unambiguous, train.num_generations, size, train.micro_batch)
    settings = None
    if deepspeed is not None:
        settings = read_deepspeed(deepspeed, config)
        _prepare_deepspeed()
    if size == 1:
        return World(), settings
    return Ranks(process_device(config.model.device), config.run.timeout), settings


def _prepare_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise LaunchError("--deepspeed needs DeepSpeed: pip install 'dso[train,grpo,distributed]'")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and says so
    from trainers.parallel.engine import import_deepspeed

    import_deepspeed()


def read_deepspeed(path: str, config: FreeformConfig) -> dict[str, Any]:
    """DeepSpeed's configuration from a JSON file; how a step is divided is the config's to say.

    Stage 0 only: what is trained are megabytes, of which stages 1 and 2 have nothing to divide, and sampling needs
    the weights whole, which stage 3 divides.

    Raises:
        LaunchError: naming the file and the key.
    """
    settings = read_json(path)
    sections = {key: read_section(path, settings, key) for key in ("zero_optimization", *PRECISIONS)}
    if (stage := sections["zero_optimization"].get("stage", 0)) != 0:
        reason = "written answers are sampled from whole weights, and what is trained is too small to divide"
        raise LaunchError(f"{path}: zero_optimization.stage is {stage}, expected 0: {reason}")
    for key in PRECISIONS:
        if sections[key].get("enabled", False) is True:
            raise LaunchError(f"{path}: {key} is switched on, but the operators are float32; set model.dtype instead")
    said = [key for key in sorted(DIVIDED & set(settings)) if settings[key] != "auto"]
    if said:
        raise LaunchError(f'{path}: {said[0]}: set by the config\'s section train; remove it, or make it "auto"')
    kept = {key: value for key, value in settings.items() if key in DEEPSPEED_KEYS}
    if unknown := sorted(set(settings) - DEEPSPEED_KEYS - DIVIDED - {*PRECISIONS}):
        raise LaunchError(f"{path}: {unknown[0]}: not used here; remove it")
    return {**kept, **dict.fromkeys(DIVIDED, "auto"), "zero_allow_untested_optimizer": True}
