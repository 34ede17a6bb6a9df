"""How the rivals that are trained learn: Adam on batches of decisions, until their share of the wall clock is over.

With the prices beta of a nat, mu of lost answer mass m and nu of a nat in anchor texts, a step goes down

    loss(log pi of the batch) + beta mean KL(pi_s || pi_0) + mu mean max(0, m_0 - m) / mean m_0
    + nu mean KL(p_s || p_0) of anchor texts

where the first KL is that of the whole next-token distribution at the answer positions, m what all candidates hold
together, and the last KL that behind every token of a few texts that the task says to leave alone. All three are what a
steering of ours is held to; here their prices are fixed. The learning rate falls to 0 on a cosine of the time that has
passed, so a slow machine ends as gently as a fast one, after fewer steps.

:func:`regression` is the loss of ``estimator: regression``: REBEL's squared difference of log-odds (Gao et al. 2024,
arXiv 2404.16767) to the policy that is wanted, in Huber's form, beside the expected reward of unambiguous decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn

from dso.baselines.baseline import BaselineError, Task
from dso.decisions.sampler import BlockSampler
from dso.models.scores import Scores
from dso.rewards import REGRESSION_WEIGHT, relative_error
from dso.steering.handle import Turnable

AMBIGUOUS, UNAMBIGUOUS = 24, 6  # decisions a step: two blocks of the built-in roles
ANCHORS = 8  # texts a step, where the task has some; `dso train` has twice as many beside 44 decisions
UNAMBIGUOUS_WEIGHT = 0.1  # as `dso train` has it
MAX_NORM = 1.0
SHARE = 0.75  # of a task's seconds that go into training; the others are for trying scales

Loss = Callable[[Tensor, Tensor], Tensor]
"""(n, k) log pi of the decisions at rows (n,) of a task -> the loss of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How long and how fast.

    Attributes:
        rate: Adam's learning rate at the start.
        seconds: of wall clock; the step that passes them is the last one.
        price: beta.
        mass_price: mu.
        anchor_price: nu, at least what `dso train` pays.
    """

    rate: float
    seconds: float
    price: float = 0.1
    mass_price: float = 0.3
    anchor_price: float = 15.0


def learn(
    task: Task,
    handle: Turnable,
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    setting: Setting,
    *,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train what is attached to the task's backbone, at scale 1.

    Args:
        handle: on the backbone; scale 0 is the base model.
        parameters: what is trained.
        loss: of a batch.
        progress: called with the number of steps and the last loss after each step.

    Returns:
        the loss of each step.

    Raises:
        BaselineError: if the loss or its gradient is no longer finite.
    """
    sampler, anchors = _sampler(task), _anchors(task)
    optimizer = torch.optim.Adam(parameters, lr=setting.rate)
    losses: list[float] = []
    start = monotonic()
    while not losses or monotonic() - start < setting.seconds:
        done = min((monotonic() - start) / setting.seconds, 1.0)
        optimizer.param_groups[0]["lr"] = setting.rate * (1 + math.cos(math.pi * done)) / 2
        rows = torch.from_numpy(sampler.draw())
        optimizer.zero_grad()
        found = _step(task, handle, rows, next(anchors), loss, setting)
        norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        if not torch.isfinite(norm + found):
            raise BaselineError(f"step {len(losses) + 1}: the loss is no longer finite; lower the learning rate")
        optimizer.step()
        losses.append(float(found))
        if progress is not None:
            progress(len(losses), losses[-1])
    return losses


def _step(task: Task, handle: Turnable, rows: Tensor, texts: Sequence[str], loss: Loss, setting: Setting) -> Tensor:
    """The loss of a batch, and prices; its gradient is in the parameters afterwards."""
    decisions = [task.decisions[int(row)] for row in rows]

    def passed() -> tuple[Scores, Scores | None]:
        read = task.backbone.likelihood(texts, start=False, next_token=True) if texts else None
        return task.backbone.score(decisions, next_token=True), read

    handle.scale = 0.0
    with torch.no_grad():
        base, base_read = passed()
    handle.scale = 1.0
    with torch.enable_grad():
        scores, read = passed()
        lost = (base.answer_mass() - scores.answer_mass()).clamp(min=0).mean() / base.answer_mass().mean()
        kept = setting.price * scores.kl(base.asked()[0]).mean() + setting.mass_price * lost
        if read is not None and base_read is not None:
            kept = kept + setting.anchor_price * read.kl(base_read.asked()[0]).mean()
        found = loss(scores.policy(), rows) + kept
        found.backward()
    return found.detach()


def _anchors(task: Task) -> Iterator[list[str]]:
    """The anchor texts of each step; none where the task has none."""
    generator = torch.Generator().manual_seed(task.seed)
    while True:
        drawn = torch.randperm(len(task.anchors), generator=generator)[:ANCHORS]
        yield [task.anchors[int(place)] for place in drawn]


def _sampler(task: Task) -> BlockSampler:
    """Batches of whole blocks where the set is large enough, of what there is where it is not."""
    ambiguous = sum(d.ambiguous for d in task.decisions)
    if not ambiguous:
        raise BaselineError(f"{task.decisions.name}: no ambiguous decisions to learn from")
    others = len(task.decisions) - ambiguous
    return BlockSampler(task.decisions, min(AMBIGUOUS, ambiguous), min(UNAMBIGUOUS, others), task.seed)


def seconds_each(task: Task, candidates: int) -> float:
    """Seconds that each of several candidates may be trained for."""
    return SHARE * task.seconds / candidates


def regression(task: Task) -> Loss:
    """The loss that a steering of ours is trained with, by ``estimator: regression``.

    With the mean over the batch's decisions of each kind, and 1 - 2 pi(right) minus the expected reward of +1 and -1,

        w mean_ambiguous 2/K sum_{j<k} huber(log pi(k)/pi(j) - log pi*(k)/pi*(j))
        + 0.1 mean_unambiguous (1 - 2 pi(right))
    """
    answers = torch.tensor([-1 if d.answer is None else d.answer for d in task.decisions])

    def loss(log_policy: Tensor, rows: Tensor) -> Tensor:
        answer = answers[rows].to(log_policy.device)
        free = answer < 0
        wanted = task.fair[rows].to(log_policy)[:, : log_policy.shape[1]]
        total = REGRESSION_WEIGHT * relative_error(log_policy[free], wanted[free]).mean()
        if not free.all():
            right = log_policy[~free].gather(1, answer[~free, None]).exp()
            total = total + UNAMBIGUOUS_WEIGHT * (1 - 2 * right).mean()
        return total

    return loss
