"""One optimiser step on a batch: passes through the model, the loss under the constraints, gradients, the step.

Each process passes its own share of the batch, in one part or in several (gradient accumulation). A decision's weight
in the loss is that in the whole batch, so that gradients add up over parts and processes to those of one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dso.decisions.sampler import BlockSampler, divide
from dso.models.encoded import Positions
from dso.models.scores import kl_divergence
from trainers.constraints import Prices
from trainers.fisher import Share, fisher_diagonal
from trainers.learner import Learner
from trainers.lesson import Lesson
from trainers.policy import Outcome, SteeringPolicy


@dataclass(frozen=True, slots=True)
class Passed:
    """A share of a batch after its pass through the model.

    Attributes:
        rows: (n,) positions in the batch.
        outcome: of these n decisions.
        positions: the m answer positions of these decisions.
        reference: (m, V) log-probabilities of the base model there.
        base_mass: (n,) probability that the base model gives to all candidates together.
        anchored: (a,) KL to the base model in the anchor texts that were passed here.
    """

    rows: Tensor
    outcome: Outcome
    positions: Positions
    reference: Tensor
    base_mass: Tensor
    anchored: Tensor


class Updater:
    """Takes the steps of a policy.

    Args:
        policy, learner: what is learned, and by whom.
        estimator: see :mod:`trainers.lesson`.
        unambiguous_weight: weight of the unambiguous decisions' mean gain beside the ambiguous ones'.
        value_weight: weight of the value head's squared error.
        anchors: anchor texts of the task whose KL counts in each step.
    """

    def __init__(
        self,
        policy: SteeringPolicy,
        learner: Learner,
        *,
        estimator: str,
        unambiguous_weight: float,
        value_weight: float,
        anchors: int,
    ):
        self.policy = policy
        self.learner = learner
        self.task = policy.task
        self.estimator = estimator
        self.unambiguous_weight = unambiguous_weight
        self.value_weight = value_weight
        self.anchors = anchors

    def shares(self, indices: np.ndarray) -> list[Tensor]:
        """The positions (n,) of this process's decisions in a batch, by the parts that they are learned from in."""
        world, parts = self.learner.world, self.learner.parts
        blocks = self.task.blocks.cpu()[torch.as_tensor(indices)].tolist()
        divided = divide(blocks, world.size * parts)
        # The largest pieces come first: neighbours go to different processes.
        return [torch.as_tensor(divided[part * world.size + world.rank]) for part in range(parts)]

    def draw_anchors(self) -> list[str]:
        """The anchor texts of a step, the same in every process."""
        if not self.anchors:
            return []
        return [self.task.anchors[i] for i in torch.randperm(len(self.task.anchors))[: self.anchors]]

    def pass_through(self, indices: np.ndarray, rows: Tensor, anchors: Sequence[str], part: int = 0) -> Passed:
        """Pass the decisions at ``rows`` of a batch with gradient, and with the first part some of the anchor texts."""
        own = indices[rows.numpy()]
        # Every process passes some text, as under ZeRO-3 all of them have to take part.
        mine = anchors[self.learner.world.rank :: self.learner.world.size]
        texts = list(mine or anchors[:1]) if part == 0 else []
        reference = self.learner.pass_through(lambda: self.task.reference(own))
        base_mass = self.task.base_answer_mass(own)
        base = self.learner.pass_through(lambda: self.task.anchor_reference(texts)) if texts else None

        def work() -> tuple[Tensor, ...]:
            outcome = self.policy.decide(own, next_token=True)
            anchored = outcome.values.new_zeros(0) if base is None else self.task.anchor_kl(texts, base) * bool(mine)
            return (outcome.log_policy, _known(outcome.next_token), outcome.values, outcome.answer_mass, anchored)

        *decided, anchored = self.learner.forward(work)
        outcome = Outcome(*decided)
        positions = self.task.positions(own)
        return Passed(rows.to(reference.device), outcome, positions, reference, base_mass, anchored)

    def _next_token(self, indices: np.ndarray) -> Tensor:
        """Log-probabilities (M, V) at the answer positions, with gradient."""
        return _known(self.policy.decide(indices, next_token=True).next_token)

    def fisher(self, sampler: BlockSampler, batches: int) -> list[Tensor]:
        """The diagonal Fisher information of the steering's tensors over a few batches (:mod:`trainers.fisher`)."""
        world = self.learner.world

        def log_probs() -> Iterator[tuple[Tensor, Share] | Tensor]:
            for _ in range(batches):
                indices = sampler.draw()
                rows = torch.cat(self.shares(indices)).sort().values
                own = indices[rows.numpy()]
                table = self.learner.pass_through(partial(self._next_token, own))
                table = table[: len(own)]  # behind the prompts
                share = Share(rows.to(table.device), len(indices), world.all_sum)
                yield table if world.size == 1 else (table, share)

        return fisher_diagonal(log_probs, list(self.policy.steering.parameters()))

    def step(
        self, lesson: Lesson, prices: Prices, clip: float, kept: Passed | None = None
    ) -> tuple[dict[str, float], bool]:
        """Take one step up the weighted gain under the constraints.

        Args:
            lesson: what to learn from.
            prices: of the constraints.
            clip: eps of ``ppo``.
            kept: this process's whole share, where it was passed before.

        Returns:
            what was measured over the whole batch, and whether the step was taken: it is not, in any process, where
            the loss or the gradient is not finite.
        """
        shares = [kept.rows] if kept else self.shares(lesson.indices)
        totals = torch.zeros(10, dtype=torch.float64)
        for part, rows in enumerate(shares):
            passed = kept or self.pass_through(lesson.indices, rows, lesson.anchors, part)
            loss, seen = self._loss(lesson, passed, prices, clip)
            self.learner.backward(loss, first=part == 0, last=part == len(shares) - 1)
            totals += seen.cpu().double()  # MPS has no float64
        found = self.learner.world.all_sum(totals).tolist()
        loss, objective, kl, mass, base_mass, lost, clipped, anchor_kl, order, unambiguous = found
        norm, taken = self.learner.step(usable=bool(np.isfinite(loss)))
        measured = {"objective": objective, "loss": loss, "kl": kl, "gradient_norm": norm}
        measured |= {"answer_mass": mass, "base_answer_mass": base_mass, "lost_answer_mass": lost}
        measured |= {"clip_fraction": clipped} if self.estimator == "ppo" else {}
        measured |= {"anchor_kl": anchor_kl} if self.anchors else {}
        measured |= {} if lesson.ambiguous.all() else {"unambiguous_kl": unambiguous}
        if lesson.decided is not None:
            measured |= {"order_effect": order, "base_order_effect": lesson.decided.base_effect}
        return measured, taken

    def _loss(self, lesson: Lesson, passed: Passed, prices: Prices, clip: float) -> tuple[Tensor, Tensor]:
        """A part's share of the batch's loss; and of loss, objective, KL, answer masses, clip fraction, anchors' KL,
        order effect and the unambiguous decisions' KL, (10,)."""
        outcome, rows, count = passed.outcome, passed.rows, len(lesson.indices)
        gain = lesson.gain(self.estimator, rows, outcome.log_policy, clip)
        objective = lesson.objective(gain, rows, self.unambiguous_weight)
        divergence = passed.positions.mean(kl_divergence(_known(outcome.next_token), passed.reference))
        kl, unambiguous = divergence.sum() / count, lesson.of_unambiguous(divergence, rows)
        anchor_kl = passed.anchored.sum() / max(len(lesson.anchors), 1)
        masses = torch.stack(
            [outcome.answer_mass, passed.base_mass, (passed.base_mass - outcome.answer_mass).clamp(min=0)]
        )
        masses = masses.sum(1) / count
        loss = -objective + prices.kl * kl + prices.anchors * anchor_kl
        if prices.mass:
            loss = loss + prices.mass * masses[2]
        order = lesson.order_effect(rows, outcome.log_policy)
        if prices.order:
            loss = loss + prices.order * order
        if prices.unambiguous:
            loss = loss + prices.unambiguous * unambiguous
        loss = loss / prices.unit
        if outcome.values.requires_grad:
            error = (outcome.values - lesson.returns[rows]).square().sum() / count
            loss = loss + self.value_weight * error
        clipped = lesson.clipped(rows, outcome.log_policy, clip).sum() / count
        return loss, torch.stack([loss, objective, kl, *masses, clipped, anchor_kl, order, unambiguous]).detach()


def _known(next_token: Tensor | None) -> Tensor:
    if next_token is None:
        raise ValueError("the decisions were passed without their next tokens")
    return next_token
