"""FairDistillation's rule, distilled into a steering: the teacher's group probabilities are made equal, then followed.

Delobelle and Berendt 2022, FairDistillation: mitigating stereotyping in language models, section 3 (arXiv 2207.04546):
the teacher's predictions of tokens that should be equally probable are replaced by their mean, and the student learns
to predict what the teacher then says. In a decision with the probabilities p_1, ..., p_G of its groups,

    q_g = t_g (p_1 + ... + p_G),  the mean of p and of p with its groups swapped where the target t is uniform,
    loss = KL(q || pi) + what keeps everything else (:mod:`dso.baselines.learning`)

with q = p where a decision has a right answer. The first part is the distillation of the candidates, the second one of
everything else that the teacher predicts. There the student is a smaller model; here it is the same operator that DSO
trains, at the same sites, so that what differs is the rule. There is no reward and no estimate of an association: every
decision is to be even, whatever the model thinks of the people in it or of their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dso.baselines.baseline import Baseline, Candidate, Task
from dso.baselines.fitted import facts
from dso.baselines.learning import Loss, Setting, learn, seconds_each
from dso.decisions.decision import ABSTAIN, DecisionSet
from dso.steering.model import Steering

SETTINGS = (("scale", 3e-3), ("affine", 2e-3))  # operator, learning rate
SCALES = (1.0, 2.0, 3.0)


def equalised(log_policy: Tensor, decisions: DecisionSet, target: tuple[float, ...]) -> Tensor:
    """The fair teacher: what the groups of a decision hold together is divided among them as the target says.

    Candidates of one group keep their proportions, and an abstention keeps its probability; so does every candidate of
    an unambiguous decision.

    Args:
        log_policy: (N, K) the teacher's, -inf where there is no candidate.
        decisions: N of them.
        target: (G,) the fair share of each group; where a decision offers only some, theirs are scaled up.

    Returns:
        (N, K) log-probabilities.
    """
    teacher = log_policy.clone()
    for row, decision in enumerate(decisions):
        if not decision.ambiguous:
            continue
        names = [c.group for c in decision.candidates]
        own = {g: torch.tensor([k for k, name in enumerate(names) if name == g]) for g in names if g != ABSTAIN}
        shares = {group: log_policy[row, places].logsumexp(0) for group, places in own.items()}
        mass = torch.stack(list(shares.values())).logsumexp(0)
        total = sum(target[decisions.groups.index(group)] for group in own)
        for group, places in own.items():
            fair = torch.tensor(target[decisions.groups.index(group)] / total).log()
            teacher[row, places] = log_policy[row, places] - shares[group] + mass + fair
    return teacher


def following(teacher: Tensor) -> Loss:
    """KL(q || pi), mean over the batch's decisions.

    Args:
        teacher: (N, K) log q, -inf where there is no candidate.
    """

    def loss(log_policy: Tensor, rows: Tensor) -> Tensor:
        wanted = teacher[rows].to(log_policy)[:, : log_policy.shape[1]]
        missed = (wanted - log_policy).masked_fill(wanted.isneginf(), 0.0)
        return (wanted.exp() * missed).sum(-1).mean()

    return loss


def propose(task: Task) -> Iterator[Candidate]:
    """A steering for each setting, all trained for the same time."""
    loss = following(equalised(task.base, task.decisions, task.target))
    for operator, rate in SETTINGS:
        stated = facts(task) | {"scale_range": (0.0, SCALES[-1])}
        steering = Steering.for_model(task.backbone.model, operator=operator, **stated)
        setting = Setting(rate=rate, seconds=seconds_each(task, len(SETTINGS)))
        with steering.on(task.backbone.model) as handle:
            learn(task, handle, list(steering.parameters()), loss, setting)
        yield Candidate(f"{operator}, learning rate {rate:g}", steering.requires_grad_(False))


BASELINE = Baseline(
    name="distillation",
    title="FairDistillation, same operator",
    source="Delobelle and Berendt 2022 (arXiv 2207.04546), section 3",
    propose=propose,
    scales=SCALES,
)
