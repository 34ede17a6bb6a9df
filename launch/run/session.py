"""From a config to the objects of a run: backbone, decisions, steering, trainer."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from dso.decisions.decision import DecisionSet, check_target
from dso.decisions.sets import load_decisions
from dso.errors import UserError
from dso.evaluation.answers import check_answers
from dso.evaluation.neutral import anchor_texts, neutral_texts
from dso.models.backbone import Backbone
from dso.models.loading import find_model
from dso.steering.config import TRAINED_AT, SteeringError
from dso.steering.fingerprint import require_same
from dso.steering.handle import Handle
from dso.steering.model import Steering
from envs.task import DecisionTask
from launch.config.schema import ConfigError, TrainConfig, to_dict
from launch.run.candidates import Candidates
from launch.run.freeform import FreeformAnswers
from launch.run.measure import Measures, thinned
from launch.run.trainer import open_matcher, open_trainer, require_trl, reward_config
from trainers.checkpointing import checkpoint_layers
from trainers.parallel.ranks import World
from trainers.ppo import SteeringPPO
from trainers.state.saved import fingerprint
from trainers.tracking.base import Tracker
from trainers.tracking.tracker import open_tracker
from trainers.trainer import SteeringTrainer

T = TypeVar("T")
SPLITS = ("train", "validation", "test")


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
    trainer: SteeringTrainer

    def split(self, name: str) -> DecisionSet:
        """The decisions of one split that the run asks."""
        return split_of(self.config, self.decisions, name)

    def measures(
        self, decisions: DecisionSet, progress: Callable[[int], None] | None = None, keep_reference: bool = False
    ) -> Measures:
        """What measures some decisions with the steering; the processes share the work.

        Args:
            decisions: to measure.
            progress: told of how many decisions were passed or asked since the last time.
            keep_reference: keep the base's distributions, as the decisions are measured again and again.
        """
        if self.config.freeform:
            matcher, world = open_matcher(self.config), self.trainer.world
            return FreeformAnswers(self.config, self.backbone, decisions, matcher, self.handle, world, progress)
        assert isinstance(self.trainer, SteeringPPO)  # as open_trainer has it for all other configs
        learner, target = self.trainer.learner, self.config.data.target
        return Candidates(self.backbone, decisions, self.handle, learner, target, progress, keep_reference)

    def pass_through(self, work: Callable[[], T]) -> T:
        """Run work that passes texts through the model; all processes do so together."""
        return self.trainer.learner.pass_through(work) if isinstance(self.trainer, SteeringPPO) else work()


def open_session(config: TrainConfig, world: World | None = None, deepspeed: dict[str, Any] | None = None) -> Session:
    """Load and wire up what a config names; every mistake in it is raised before the model is loaded where possible.

    Args:
        world, deepspeed: of :func:`launch.cluster.processes.open_world`, where a launcher started several processes.

    Raises:
        UserError: naming what is wrong, as a ConfigError, DecisionError, ModelNotFound or SteeringError.
    """
    if config.freeform:
        require_trl()
    world = world or World()
    decisions = open_decisions(config)
    if config.constraints.neutral_kl is not None:
        neutral_texts(config.constraints.neutral_texts)
    anchors = anchor_texts(config.constraints.anchors)
    divided = deepspeed if deepspeed and deepspeed["zero_optimization"].get("stage") == 3 else None
    with nullcontext() if divided is None else _dividing(config, divided, world):
        backbone = load_backbone(config, world.device)
        if world.is_main and (line := backbone.layout_line()):
            print(f"dso: {line}", file=sys.stderr)
        if config.train.gradient_checkpointing and not checkpoint_layers(backbone.model):
            reason = f"{config.model.name} has no layers that can be checkpointed"
            raise ConfigError(reason, "train.gradient_checkpointing")
        seed_everything(config.train.seed)
        steering = open_steering(config, backbone, decisions)
        handle = steering.attach(backbone.model, TRAINED_AT)
        try:
            backbone.encode_texts(anchors, start=False)
        except UserError as error:
            raise ConfigError(str(error), "constraints.anchors") from error
    training = decisions.select(split="train")
    task = DecisionTask(backbone, training, config.data.target, reward_config(config), handle, anchors)
    trainer = open_trainer(config, task, steering, world, deepspeed)
    return Session(config, backbone, decisions, steering, handle, trainer)


def _dividing(config: TrainConfig, deepspeed: dict[str, Any], world: World) -> AbstractContextManager[None]:
    """What divides the model as it is loaded, once every process has found it."""
    from trainers.parallel.loading import dividing  # which imports DeepSpeed

    missing: UserError | None = None
    try:
        find_model(config.model.name, config.model.revision)
    except UserError as error:
        missing = error
    world.require(missing)
    return dividing(deepspeed, world, config.model.dtype)


def open_decisions(config: TrainConfig) -> DecisionSet:
    """The decision set of a config, with something of each kind in each split that the run will ask for.

    Raises:
        UserError: if there is no such set, or not that much in it.
    """
    data = config.data
    decisions = load_decisions(data.set, **data.options)
    check_target(data.target, decisions.groups)
    for split in SPLITS:
        decisions.select(split=split, kind="ambiguous")
    training = decisions.select(split="train")
    if config.train.unambiguous and all(decision.ambiguous for decision in training):
        reason = f"the split 'train' of {data.set} has no unambiguous decisions; set it to 0"
        raise ConfigError(reason, "train.unambiguous")
    if config.constraints.unambiguous_kl is not None and all(d.ambiguous for d in decisions.select(split="validation")):
        reason = f"the split 'validation' of {data.set} has no unambiguous decisions that it could hold; set it to null"
        raise ConfigError(reason, "constraints.unambiguous_kl")
    preference = config.train.preference
    differences = not config.freeform and preference.estimate == "controlled" and preference.common_weight == 0
    if differences and len({decision.context for decision in training if decision.ambiguous}) == 1:
        reason = f"at 0 only differences between contexts count, and {data.set} trains in one context; set it to 1"
        raise ConfigError(reason, "train.preference.common_weight")
    if config.freeform:
        matcher = open_matcher(config)
        for split in SPLITS:
            check_answers(decisions.select(split=split), matcher)
    return decisions


def split_of(config: TrainConfig, decisions: DecisionSet, name: str) -> DecisionSet:
    """The decisions of one split that a run asks: those of validation thinned, and of the test where it is sampled."""
    asked = decisions.select(split=name)
    return thinned(asked) if name == "validation" or (config.freeform and name == "test") else asked


def fingerprints(config: TrainConfig, decisions: DecisionSet) -> dict[str, str]:
    """What tells the decisions and anchors of a run from others, under the names that messages call them by."""
    names = {"decision set": "train", "validation decisions": "validation", "test decisions": "test"}
    found = {name: fingerprint(split_of(config, decisions, split)) for name, split in names.items()}
    if (place := config.constraints.anchors) is not None:
        digest = hashlib.sha256("\n\n".join(anchor_texts(place)).encode()).hexdigest()
        found["anchors"] = f"{place} ({digest[:12]})"
    return found


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
    """A steering as a config wants it, on the backbone's device: a fresh one, or with the coefficients of another.

    Raises:
        ConfigError: if the model has no such sites, or the steering to start from is for another model or has others.
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
    if wanted.init is not None:
        start = Steering.from_pretrained(wanted.init)
        made_for = f"it is for {start.config.base_model!r}"
        try:
            steering.load_tensors(start.tensors())
            require_same(start.config.fingerprint, backbone.model, start.config.sites, made_for)
        except SteeringError as error:
            raise ConfigError(f"{wanted.init} cannot be started from: {error}", "steering.init") from error
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
