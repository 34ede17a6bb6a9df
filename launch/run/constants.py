"""What a run is told by no config: numbers that were chosen once and that nobody had reason to change since.

Those of :class:`Constants` differ between probabilities of candidates, which are exact, and free-form answers, which
are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.config.schema import TrainConfig
from trainers.callbacks import Limits

ADAM_BETAS = (0.9, 0.999)
PLAIN_EPSILON = 1e-8  # Adam's own, where steps are not measured in KL
WARMUP = 0.1  # share of the steps in which the learning rate rises: preferences are not known yet
LOWEST_RATE = 0.05  # share of the learning rate at the first step, and at the end of the cosine
MAX_GRAD_NORM = 1e3  # only against a single absurd step: Adam's steps do not grow with the gradient
FISHER_DAMPING = 0.1  # share of the mean Fisher information that every coordinate has at least
MAX_SKIPPED = 5  # steps in a row whose numbers are not finite before the run stops
LEAST_MASS = 0.9  # share of the base's answer mass that a steering keeps on validation, where the config asks for none
RESAMPLES = 1000  # of an interval
ANCHORS = 16  # anchor texts a step, where the config has some
ANCHOR_PRICE = 15.0  # of a nat in them, at least: a gentle step costs 1e-4, and is turned up to about forty times that
UNAMBIGUOUS_PRICE = 0.3  # of a nat on unambiguous decisions under a limit, at least: more takes what accuracy gains


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Numbers of one kind of training.

    Attributes:
        smooth_width: the deviation at which the smooth reward reaches +-1.
        decay, context_decay, local_weight, unit_weight: of the estimated preference (:mod:`envs.preference`).
        block_weight: where nothing of what all contexts share is taken off (``common_weight`` 0), of what a block
            misses in all of its contexts alike (:class:`envs.reward.RewardConfig`).
        kl_margin: share of the KL budget to aim at: unseen prompts cost more, and sampled KL varies between steps.
        dual_learning_rate, initial_beta: of the price of a nat.
        adam_epsilon: near the gradients' own size, so that coordinates without a clear gradient stay put.
    """

    smooth_width: float
    decay: float = 0.9
    context_decay: float = 0.85
    local_weight: float
    unit_weight: float
    block_weight: float = 1.0
    kl_margin: float
    dual_learning_rate: float
    initial_beta: float = 0.5
    adam_epsilon: float


DECISIONS = Constants(
    smooth_width=0.05,
    local_weight=0.7,
    unit_weight=0.3,
    block_weight=0.16,
    kl_margin=0.7,
    dual_learning_rate=0.1,
    adam_epsilon=0.03,
)
FREEFORM = Constants(
    smooth_width=0.1, local_weight=0.5, unit_weight=0.1, kl_margin=0.45, dual_learning_rate=0.2, adam_epsilon=1e-3
)


def constants(config: TrainConfig) -> Constants:
    """Those of a config's kind of training."""
    return FREEFORM if config.freeform else DECISIONS


def adam_epsilon(config: TrainConfig) -> float:
    """Of Adam: its own where steps are not measured in KL."""
    return constants(config).adam_epsilon if config.train.optimizer.fisher_batches else PLAIN_EPSILON


def aimed_kl(config: TrainConfig) -> float | None:
    """Nats that training aims at, and that validation may use on decisions; None without a budget."""
    budget = config.constraints.kl_budget
    return None if budget is None else constants(config).kl_margin * budget


def kept_limits(config: TrainConfig) -> Limits:
    """What :class:`trainers.callbacks.Selection` holds a steering to."""
    limits = config.constraints
    if config.freeform:
        return Limits(kl_budget=limits.kl_budget, max_accuracy_loss=limits.max_accuracy_loss)
    return Limits(
        kl_budget=aimed_kl(config),
        min_answer_mass=limits.min_answer_mass or LEAST_MASS,
        neutral_kl=limits.neutral_kl,
        unambiguous_kl=limits.unambiguous_kl,
        order_increase=limits.order_increase,
    )
