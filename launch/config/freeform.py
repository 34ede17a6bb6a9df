"""The config of ``dso freeform``, on written answers; the shipped ones are in ``configs/freeform``.

Sections that mean the same as in ``dso train`` are those of :mod:`launch.config.schema`. The others have only keys that
written answers know, so that every key that is accepted has an effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dso.errors import UserError
from launch.config.bounds import at_least, below_one, of_adam, one_price, place_of_run, positive, rising, share, within
from launch.config.reading import ConfigError, require
from launch.config.schema import DataSection, ModelSection, SteeringSection, WandbSection, read_config

FOLDER = "freeform"


@dataclass(kw_only=True, slots=True, frozen=True)
class AnswerTrainSection:
    """The policy gradient on sampled answers (:mod:`trainers.grpo`)."""

    estimator: Literal["grpo", "rloo"] = "grpo"
    steps: int = 60
    ambiguous: int = 24  # decisions, a step
    unambiguous: int = 8  # decisions, a step
    unambiguous_weight: float = 0.2  # of their mean reward, beside the ambiguous decisions' 1
    num_generations: int = 8  # answers a decision
    max_completion_length: int = 8  # tokens
    temperature: float = 1.0
    micro_batch: int | None = None  # answers of one forward and backward pass in one process; all of a step
    scale_rewards: Literal["none", "group", "batch"] = "none"  # of grpo: divide rewards by their standard deviation
    share_prompts: bool = True  # one pass for the answers to a prompt; off for long answers and large vocabularies
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)  # of Adam
    adam_eps: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    max_grad_norm: float = 1e3
    fisher_batches: int = (
        12  # drawn once to measure steps in KL (trainers/fisher.py); 0 leaves coefficients as they are
    )
    fisher_damping: float = 0.1
    reward: Literal["sign", "smooth"] = "smooth"
    smooth_width: float = 0.1  # the deviation at which the smooth reward reaches +-1
    dead_zone: float = 0.0
    abstain_reward: float = -1.0  # of an answer that names nobody
    preference: Literal["controlled", "blocked", "context"] = "blocked"  # estimate of it (envs/preference.py)
    preference_decay: float = 0.9
    context_decay: float = 0.85
    batch_weight: float = 0.3
    local_weight: float = 0.5
    unit_weight: float = 0.1
    seed: int = 0
    threads: int | None = None  # torch's own choice

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, ambiguous=self.ambiguous, micro_batch=self.micro_batch, threads=self.threads)
        at_least(0, unambiguous=self.unambiguous, unambiguous_weight=self.unambiguous_weight)
        at_least(0, fisher_batches=self.fisher_batches)
        least = "must be at least 1 token: an empty answer names nobody"
        require(
            self.max_completion_length >= 1, "max_completion_length", f"{least}, found {self.max_completion_length}"
        )
        alike = "must be at least 2: an answer is held against the others to its prompt"
        require(self.num_generations >= 2, "num_generations", f"{alike}, found {self.num_generations}")
        positive(temperature=self.temperature, learning_rate=self.learning_rate, adam_eps=self.adam_eps)
        positive(smooth_width=self.smooth_width, max_grad_norm=self.max_grad_norm)
        positive(fisher_damping=self.fisher_damping)
        of_adam(self.betas)
        share(
            warmup=self.warmup,
            batch_weight=self.batch_weight,
            local_weight=self.local_weight,
            unit_weight=self.unit_weight,
        )
        below_one(dead_zone=self.dead_zone, preference_decay=self.preference_decay, context_decay=self.context_decay)
        within(-1, 1, abstain_reward=self.abstain_reward)
        within(0, 2**32 - 1, seed=self.seed)
        plain = self.estimator == "grpo" or self.scale_rewards == "none"
        require(plain, "scale_rewards", "estimator rloo does not divide rewards; remove it, or use grpo")
        batch = (self.ambiguous + self.unambiguous) * self.num_generations
        wrong = f"must divide the {batch} answers of a step (decisions x num_generations), found {self.micro_batch}"
        require(batch % (self.micro_batch or 1) == 0, "micro_batch", wrong)


@dataclass(kw_only=True, slots=True, frozen=True)
class MatcherSection:
    """How it is read whom an answer names (:mod:`dso.decisions.matching`)."""

    rule: Literal["first", "only", "start"] = "first"
    after: str | None = None  # what the answer stands behind, as in "Answer:"; the whole text is read
    ignore_case: bool = False
    whole_words: bool = True
    abstentions: tuple[str, ...] | None = None  # phrases that decline to choose; dso.decisions.matching.ABSTENTIONS

    def __post_init__(self) -> None:
        try:
            self.matcher()
        except UserError as error:
            raise ConfigError(str(error)) from error

    def matcher(self) -> Any:
        """The matcher of these settings."""
        from dso.decisions.matching import ABSTENTIONS, Matcher

        phrases = ABSTENTIONS if self.abstentions is None else self.abstentions
        settings = {name: getattr(self, name) for name in ("rule", "after", "ignore_case", "whole_words")}
        return Matcher(abstentions=phrases, **settings)


@dataclass(kw_only=True, slots=True, frozen=True)
class AnswerConstraintsSection:
    """What the steering may cost: nats of KL to the base model a token, neurons that are not zero."""

    kl_budget: float | None = 0.2  # mean over the tokens of the answers; held by dual ascent
    kl_margin: float = 0.45  # share of the budget to aim at: unseen prompts cost more, and KL varies from step to step
    kl_coefficient: float | None = None  # fixed instead
    dual_learning_rate: float = 0.2
    initial_beta: float = 0.5  # price of one nat at the start
    minimum_beta: float = 0.05  # and the least
    sparsity: float = 0.0  # lambda of the L1 norm

    def __post_init__(self) -> None:
        positive(kl_budget=self.kl_budget, initial_beta=self.initial_beta)
        positive(minimum_beta=self.minimum_beta, dual_learning_rate=self.dual_learning_rate)
        at_least(0, kl_coefficient=self.kl_coefficient, sparsity=self.sparsity)
        share(kl_margin=self.kl_margin)
        positive(kl_margin=self.kl_margin)
        one_price(self.kl_budget, self.kl_coefficient)


@dataclass(kw_only=True, slots=True, frozen=True)
class AnswerEvaluationSection:
    """How answers are measured, and when."""

    every: int = 20  # steps between measurements of the validation split
    samples: int = 8  # answers a decision
    validation_stride: int = 3  # a unit is asked about in every third context
    test_stride: int = 1
    max_accuracy_loss: float = 0.05  # against the base model's, as sampled; what loses more is not kept
    scales: tuple[float, ...] = (0.0, 1.0)
    bootstrap: int = 1000  # resamples of an interval

    def __post_init__(self) -> None:
        at_least(1, every=self.every, samples=self.samples, bootstrap=self.bootstrap)
        at_least(1, validation_stride=self.validation_stride, test_stride=self.test_stride)
        within(0, 1, max_accuracy_loss=self.max_accuracy_loss)
        rising(scales=self.scales)


@dataclass(kw_only=True, slots=True, frozen=True)
class AnswerRunSection:
    """Where a run is kept, and who else hears of it."""

    folder: str = "runs"
    name: str | None = None  # the config's
    tracking: Literal["none", "tensorboard", "wandb"] = "none"
    wandb: WandbSection = field(default_factory=WandbSection)
    timeout: float = 1800.0  # seconds that a process waits for the others

    def __post_init__(self) -> None:
        at_least(1, timeout=self.timeout)
        place_of_run(self.folder, self.name)


@dataclass(kw_only=True, slots=True, frozen=True)
class FreeformConfig:
    """Everything that a run on written answers is told."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=lambda: DataSection(options={"texts": "questions"}))
    steering: SteeringSection = field(default_factory=SteeringSection)
    train: AnswerTrainSection = field(default_factory=AnswerTrainSection)
    matcher: MatcherSection = field(default_factory=MatcherSection)
    constraints: AnswerConstraintsSection = field(default_factory=AnswerConstraintsSection)
    evaluation: AnswerEvaluationSection = field(default_factory=AnswerEvaluationSection)
    run: AnswerRunSection = field(default_factory=AnswerRunSection)


def load_freeform(name_or_path: str, overrides: Sequence[str] = ()) -> FreeformConfig:
    """The config of a name in ``configs/freeform`` or of a YAML file, with ``key=value`` overrides applied in order.

    Raises:
        ConfigError: as :func:`launch.config.schema.read_config`.
    """
    return read_config(FreeformConfig, name_or_path, overrides, FOLDER)
