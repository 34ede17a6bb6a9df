"""The settings of the reward: its form, and how the policy's group preference is estimated."""

from __future__ import annotations

from dataclasses import dataclass

from dso.rewards import FORMS

ESTIMATES = ("context", "blocked", "controlled")
POOLINGS = ("linear", "logarithmic")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """How decisions are rewarded (:mod:`dso.rewards`) and how the policy's preference is estimated.

    Attributes:
        form, width, dead_zone, abstain: of the equiprobability reward.
        estimate: ``context`` (a running mean for each context by itself), ``blocked`` (what names and templates do
            cancels within blocks, :mod:`envs.preference`) or ``controlled`` (``blocked``, with the base model's
            decisions as control variates; every ambiguous decision passes through the base model once).
        decay: weight of the past in a running preference, from 0 (the batch alone) to below 1. With ``blocked``, in
            the part that all contexts share.
        context_decay: with ``blocked``, weight of the past in a context's own part.
        batch_weight: with ``context``, weight of the batch's own estimate in the preference that the reward looks at.
        local_weight: with ``blocked``, weight of this block's own evidence in a context's preference, because
            templates differ in how much a context matters.
        unit_weight: with ``blocked``, share of the reward that looks at the preference among these very people and
            not at the context's. It evens out which names the model likes, and new names inherit that.
        common_weight: with ``controlled``, share of what the base model prefers in all contexts alike that counts as
            bias. Most of it is which names the model likes; 0 leaves it where it is.
        block_weight: in the squared error of ``regression``, weight of what a block misses in all its contexts alike
            (:func:`envs.association.forgive_blocks`).
        pooling: how the orders of one question are combined: ``linear`` (their mean, so answering by the order alone
            is fair) or ``logarithmic`` (:func:`dso.rewards.logarithmic_pool`, in which the order cancels).

    Raises:
        ValueError: on a value outside its range; the message names it.
    """

    form: str = "smooth"
    width: float = 0.1
    dead_zone: float = 0.0
    abstain: float = -1.0
    estimate: str = "context"
    decay: float = 0.8
    context_decay: float = 0.8
    batch_weight: float = 0.3
    local_weight: float = 0.5
    unit_weight: float = 0.1
    common_weight: float = 1.0
    block_weight: float = 1.0
    pooling: str = "linear"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"reward form is {self.form!r}, expected {' or '.join(FORMS)}")
        if self.width <= 0 or self.dead_zone < 0:
            raise ValueError(f"reward width {self.width} must be > 0 and dead_zone {self.dead_zone} >= 0")
        if self.estimate not in ESTIMATES:
            raise ValueError(f"preference estimate is {self.estimate!r}, expected one of {', '.join(ESTIMATES)}")
        if not 0 <= self.context_decay < 1 or not 0 <= self.unit_weight <= 1 or not 0 <= self.local_weight <= 1:
            raise ValueError(
                f"context_decay {self.context_decay} must be in [0, 1), local_weight {self.local_weight} and "
                f"unit_weight {self.unit_weight} in [0, 1]"
            )
        if not 0 <= self.common_weight <= 1 or (self.common_weight < 1 and self.estimate != "controlled"):
            raise ValueError(
                f"common_weight {self.common_weight} must be in [0, 1], and 1 unless the estimate is controlled"
            )
        if not 0 <= self.block_weight <= 1:
            raise ValueError(f"block_weight {self.block_weight} must be in [0, 1]")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}, expected one of {', '.join(POOLINGS)}")
        if not 0 <= self.decay < 1 or not 0 <= self.batch_weight <= 1:
            raise ValueError(f"decay {self.decay} must be in [0, 1) and batch_weight {self.batch_weight} in [0, 1]")
