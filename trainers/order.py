"""The order effect of a batch, with a gradient: how far the answer to one question follows the order of its people.

For pi_n the probabilities of groups and of abstention in decision n, it is the mean over questions, and over the pairs
of orders that a question is asked in, of the total variation ``1/2 sum_g |pi_n(g) - pi_m(g)|``, as
:mod:`dso.evaluation.bias` reports it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dso.rewards import ABSENT, ABSTAINS
from envs.layout import Indices
from envs.task import DecisionTask


@dataclass(frozen=True, slots=True)
class Orders:
    """N decisions, of which some ask one question with its people in another order.

    Attributes:
        offered: (N, K, G + 1) bool, the group of each candidate; the last is abstention.
        weights: (N, N) of each decision with another order of its question; they sum to 1, or are all 0.
    """

    offered: Tensor
    weights: Tensor

    @classmethod
    def of(cls, decisions: Tensor, questions: Tensor, groups: Tensor, n_groups: int) -> Orders:
        """The orders of N decisions.

        Args:
            decisions: (N,) their numbers: one that is drawn twice is no other order of itself.
            questions: (N,) number of the question that each asks.
            groups: (N, K) index of each candidate's group, as :class:`envs.layout.Layout` has it.
            n_groups: G.
        """
        codes = torch.where(groups == ABSTAINS, n_groups, groups.clamp(min=0))
        offered = torch.nn.functional.one_hot(codes, n_groups + 1).bool() & (groups != ABSENT)[..., None]
        same = (questions[:, None] == questions).float()
        pairs = same * (decisions[:, None] != decisions)
        of_question = same @ pairs.sum(1)  # how many pairs the question of each decision has
        asked = ((of_question > 0) / same.sum(1)).sum()  # questions in several orders
        return cls(offered, pairs / of_question.clamp(min=1)[:, None] / asked.clamp(min=1))

    def effect(self, policy: Tensor) -> float:
        """The mean order effect under a policy (N, K); 0 if no question is asked in two orders."""
        answers = self._answers(policy, slice(None))
        return float((self.weights * _total_variation(answers, answers)).sum())

    def part(self, rows: Tensor, log_policy: Tensor, decided: Tensor) -> Tensor:
        """What the decisions at ``rows`` (n,) are of the mean order effect; the parts of all rows add up to it.

        The other order of a question may be in another part of the batch, so it stands as it was decided: of each pair
        both rows bring half of the effect, and all of their own gradient.

        Args:
            log_policy: (n, k) as it is now.
            decided: (N, K) probabilities of the whole batch when it was decided, without gradient.
        """
        own = self._answers(log_policy.masked_fill(log_policy.isneginf(), -1e9).exp(), rows)
        half = (self.weights[rows] * _total_variation(own, self._answers(decided, slice(None)))).sum()
        return 2 * half - half.detach()

    def _answers(self, policy: Tensor, rows: Tensor | slice) -> Tensor:
        return torch.einsum("nk,nkg->ng", policy, self.offered[rows, : policy.shape[1]].to(policy.dtype))


@dataclass(frozen=True, slots=True)
class Decided:
    """How a batch of N decisions was decided.

    Attributes:
        policy: (N, K) probabilities.
        orders: which of them ask one question.
        base_effect: the base model's mean order effect in them.
    """

    policy: Tensor
    orders: Orders
    base_effect: float

    @classmethod
    def of(cls, task: DecisionTask, indices: Indices, policy: Tensor, base: Tensor) -> Decided:
        """Of decisions of a task, by a policy and by the base model (N, K)."""
        layout, index = task.layout, task.layout.index(indices)
        orders = Orders.of(index, layout.questions[index], layout.groups[index], len(task.target))
        return cls(policy, orders, orders.effect(base))


def _total_variation(one: Tensor, other: Tensor) -> Tensor:
    """(n, m) of the rows of (n, A) and (m, A) probabilities."""
    return (one[:, None] - other).abs().sum(-1) / 2
