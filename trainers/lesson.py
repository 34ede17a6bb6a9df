"""What one optimiser step learns from, and the estimators as functions of it.

With pi the policy over the K candidates, r their rewards, v a baseline, and pi* the base policy without its association
(:mod:`envs.association`):

    expected     sum_k pi_k r_k                                      exact: no sampling variance
    reinforce    log pi(k) (r_k - v),  k ~ pi                        DSO (arXiv 2512.15926, section 3)
    ppo          min(q A, clip(q, 1 -+ eps) A), q = pi(k) / pi_old(k), A = r_k - v     Schulman et al. 2017
    regression   -w 2/K sum_{j<k} huber(log pi(k)/pi(j) - log pi*(k)/pi*(j))  Gao et al. 2024, REBEL (arXiv 2404.16767)

``regression`` has no factor pi(k): it learns from answers of which the model is certain, and near pi_0 its gradient in
the log-odds is the natural gradient of the expected reward ``log pi*/pi_0``. Unambiguous decisions have no pi*; they
are learned from as by ``expected``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dso.rewards import REGRESSION_WEIGHT, expected_reward, relative_error
from trainers.order import Decided

ESTIMATORS = ("regression", "expected", "reinforce", "ppo")
EXACT = ("regression", "expected")  # that look at every candidate, not at a sampled one
ORDERED = ("expected", "reinforce")  # that a limit on the order effect can be held with


def require_usable(estimator: str, *, hard_preference: bool, pooling: str, holds_order: bool) -> None:
    """Refuse an estimator that cannot learn so.

    Args:
        hard_preference, pooling: how the reward sees what is decided (:class:`envs.reward.RewardConfig`).
        holds_order: whether there is a limit on the order effect.

    Raises:
        ValueError: saying which estimators can.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if estimator in EXACT and hard_preference:
        raise ValueError(f"estimator {estimator!r} samples no answers to take a preference from; use reinforce or ppo")
    if estimator != "expected" and pooling != "linear":
        raise ValueError(f"estimator {estimator!r} is paid for single answers; pooling needs to be linear")
    if estimator not in ORDERED and holds_order:
        raise ValueError(f"estimator {estimator!r} does not hold the order effect; {' and '.join(ORDERED)} do")


@dataclass(frozen=True, slots=True)
class Lesson:
    """N decisions of all processes, with what was found of them when they were decided.

    Attributes:
        indices: (N,) the decisions.
        ambiguous: (N,) bool.
        actions: (N,) candidates that were chosen.
        returns: (N,) their rewards.
        advantages: (N,) returns less the baseline.
        log_probs: (N,) log pi of the actions.
        anchors: texts whose KL to the base model counts too.
        rewards: (N, K) every candidate's, or None where the estimator does not need them.
        pooled: (N, K) what each question's orders say together (:meth:`envs.task.DecisionTask.pool`), if that is what
            ``expected`` is the reward of.
        wanted: (N, K) log pi* of the ambiguous decisions, if the estimator is ``regression``.
        decided: how they were decided, where the order effect is held.
    """

    indices: np.ndarray
    ambiguous: Tensor
    actions: Tensor
    returns: Tensor
    advantages: Tensor
    log_probs: Tensor
    anchors: Sequence[str] = ()
    rewards: Tensor | None = None
    pooled: Tensor | None = None
    wanted: Tensor | None = None
    decided: Decided | None = None

    def gain(self, estimator: str, rows: Tensor, log_policy: Tensor, clip: float) -> Tensor:
        """(n,) what a step goes up, for the decisions at ``rows`` (n,) with ``log_policy`` (n, k) as it is now."""
        if estimator in EXACT:
            if self.rewards is None:
                raise ValueError(f"{estimator!r} learns from the reward of every candidate")
            rewards = self.rewards[rows, : log_policy.shape[1]]
            if self.wanted is not None:
                missed = relative_error(log_policy, self.wanted[rows, : log_policy.shape[1]])
                right = expected_reward(log_policy.masked_fill(log_policy.isneginf(), -1e9), rewards)
                return torch.where(self.ambiguous[rows], -REGRESSION_WEIGHT * missed, right)
            if self.pooled is not None:
                return _pooled_gain(log_policy, self.pooled[rows, : log_policy.shape[1]], rewards)
            return expected_reward(log_policy.masked_fill(log_policy.isneginf(), -1e9), rewards)
        chosen = log_policy.gather(1, self.actions[rows, None])[:, 0]
        if estimator == "reinforce":
            return chosen * self.advantages[rows]
        ratio = (chosen - self.log_probs[rows]).exp()
        return torch.min(ratio * self.advantages[rows], ratio.clamp(1 - clip, 1 + clip) * self.advantages[rows])

    def order_effect(self, rows: Tensor, log_policy: Tensor) -> Tensor:
        """The rows' part of the mean order effect; 0 where it is not held."""
        if self.decided is None:
            return log_policy.new_zeros(())
        return self.decided.orders.part(rows, log_policy, self.decided.policy)

    def clipped(self, rows: Tensor, log_policy: Tensor, clip: float) -> Tensor:
        """(n,) whether the ratio to the policy that decided is beyond the clip range."""
        chosen = log_policy.detach().gather(1, self.actions[rows, None])[:, 0]
        return (((chosen - self.log_probs[rows]).exp() - 1).abs() > clip).float()

    def objective(self, gain: Tensor, rows: Tensor, unambiguous_weight: float) -> Tensor:
        """The rows' part of the mean gain of ambiguous decisions plus the weighted mean of the others."""
        ambiguous = (gain * self.ambiguous[rows]).sum() / self.ambiguous.sum().clamp(min=1)
        return ambiguous + unambiguous_weight * self.of_unambiguous(gain, rows)

    def of_unambiguous(self, values: Tensor, rows: Tensor) -> Tensor:
        """The rows' part of the mean of ``values`` (n,) over the unambiguous decisions; 0 where there are none."""
        return (values * ~self.ambiguous[rows]).sum() / (~self.ambiguous).sum().clamp(min=1)


def _pooled_gain(log_policy: Tensor, pooled: Tensor, rewards: Tensor) -> Tensor:
    """(n,) sum_k q_k r_k of the pooled q, with the part of its gradient that runs through this decision.

    As log q is the mean of the orders' log pi but for its norm, that part is q_k (r_k - sum_j q_j r_j) d log pi_k; the
    question's other orders may be with another process.
    """
    value = (pooled * rewards).sum(-1)
    gain = (pooled * (rewards - value[:, None]) * log_policy.masked_fill(log_policy.isneginf(), 0.0)).sum(-1)
    return value + gain - gain.detach()
