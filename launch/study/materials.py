"""What all methods of a study share: the model, the decisions of each split, and how a method is measured on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dso.baselines.baseline import Attachable, Task
from dso.decisions.decision import DecisionSet, check_target
from dso.evaluation.evaluator import Evaluator, Measurement
from dso.evaluation.neutral import NeutralTexts, anchor_texts, neutral_texts
from dso.evaluation.report import ScalePoint
from dso.evaluation.study import Point
from dso.files import write_bytes
from dso.rewards import ABSENT
from envs.task import DecisionTask
from launch.config.schema import TrainConfig
from launch.run.constants import RESAMPLES
from launch.run.measure import scale_point, thinned
from launch.run.session import load_backbone, open_decisions
from launch.run.trainer import reward_config
from launch.run.validation import validation_row
from launch.study.tuning import Judge
from trainers.callbacks import Validation


class Materials:
    """See the module.

    Whole splits are measured: everybody in every context, so that liking for people cancels also where they are few.
    The base model's distributions are kept, as every method is held against them.

    Args:
        config: of the study.
        cache: the file that keeps what the base model says to the training split.
        progress: told of how many decisions were passed since the last time.
    """

    def __init__(self, config: TrainConfig, cache: Path, progress: Callable[[int], None] | None = None):
        self.config = config
        self._cache = cache
        self._progress = progress
        self.decisions = open_decisions(config)
        self.asked = {name: self.decisions.select(split=name) for name in ("validation", "test")}
        self.backbone = load_backbone(config)

    @cached_property
    def _test(self) -> Evaluator:
        return self._evaluator(self.asked["test"])

    def _evaluator(self, decisions: DecisionSet) -> Evaluator:
        return Evaluator(self.backbone, decisions, keep_reference=True, progress=self._progress)

    @cached_property
    def _neutral(self) -> NeutralTexts:
        return NeutralTexts(self.backbone, neutral_texts(self.config.constraints.neutral_texts))

    @cached_property
    def judge(self) -> Judge:
        """Validation."""
        return self._judge(self.asked["validation"])

    @cached_property
    def part(self) -> Judge | None:
        """Validation thinned as a run's own is, where that is less of it."""
        asked = thinned(self.asked["validation"])
        return self._judge(asked) if len(asked) < len(self.asked["validation"]) else None

    def _judge(self, decisions: DecisionSet) -> Judge:
        """What measures a steering on some decisions, without intervals."""
        evaluator = self._evaluator(decisions)

        def row(measured: Measurement, scale: float) -> Validation:
            point = scale_point(scale, measured, decisions, self.config.data.target, 0)
            return validation_row(int(scale != 0), point, 1.0)

        base = row(evaluator.measure(0.0), 0.0)

        def measure(steering: Attachable, scale: float) -> Validation:
            handle = steering.attach(self.backbone.model, scale)
            try:
                measured = row(evaluator.settings([(handle, scale)])[0], scale)
                handle.scale = scale
                neutral = self._neutral.kl(handle)
            finally:
                handle.detach()
            mass = measured.answer_mass / base.answer_mass
            return replace(measured, answer_mass=mass, neutral_kl=neutral, scale=scale)

        return Judge(measure, base)

    @cached_property
    def base(self) -> Measurement:
        """The base model on the test."""
        return self._test.measure(0.0)

    def base_point(self) -> Point:
        """The base model on the test, as a point of scale 0."""
        return Point(result=self._scale_point(0.0, self.base, None), neutral_kl=0.0)

    def point(self, steering: Attachable, scale: float) -> tuple[Point, Measurement]:
        """A steering on the test, cut against the base model on the same people; and what it says to each decision."""
        base = self.base  # before anything is on the model
        handle = steering.attach(self.backbone.model, scale)
        try:
            measured = self._test.settings([(handle, scale)])[0]
            handle.scale = scale
            neutral, perplexity = self._neutral.kl(handle), self._neutral.perplexity(handle)
        finally:
            handle.detach()
        result = self._scale_point(scale, measured, base)
        return Point(result=result, neutral_kl=neutral, perplexity=perplexity), measured

    def _scale_point(self, scale: float, measured: Measurement, base: Measurement | None) -> ScalePoint:
        return scale_point(scale, measured, self._test.decisions, self.config.data.target, RESAMPLES, base)

    def task(self, seed: int, seconds: float) -> Task:
        """What baselines are made from; what the base model says to the training split is asked once and kept."""
        training = self.decisions.select(split="train")
        base, fair = self._answers
        target = check_target(self.config.data.target, training.groups)
        return Task(
            backbone=self.backbone,
            decisions=training,
            base=base,
            fair=fair,
            target=target,
            anchors=tuple(anchor_texts(self.config.constraints.anchors)),
            seed=seed,
            seconds=seconds,
        )

    @cached_property
    def _answers(self) -> tuple[Tensor, Tensor]:
        """(N, K) log-probabilities of the base model on the training split, and without its association."""
        from safetensors.torch import load_file, save

        if self._cache.exists():
            kept = load_file(self._cache)
            return kept["base"], kept["fair"]
        training = self.decisions.select(split="train")
        task = DecisionTask(self.backbone, training, self.config.data.target, reward_config(self.config))
        every = list(range(len(training)))
        base = task.base_policy(every)
        base = base.clamp(min=torch.finfo(base.dtype).tiny).log().masked_fill(task.groups == ABSENT, -torch.inf)
        fair = torch.where((task.answers < 0)[:, None], task.start_wanted(), base)
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self._cache, save({"base": base.contiguous().cpu(), "fair": fair.contiguous().cpu()}))
        return base.cpu(), fair.cpu()
