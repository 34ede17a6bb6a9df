"""The association that the base model has between contexts and groups, in log-odds, and the policy without it.

KL-regularised reward maximisation has the closed form ``pi* = pi_0 exp(r / beta) / Z`` (Rafailov et al. 2023, Direct
preference optimization, section 4). Where ``r / beta`` is minus what a context adds to the log-odds of a group, pi* is
the base model with its association taken out and everything else, such as the liking for one of the people, where it
was; but for a share of what their order does (:data:`ORDER`). ``regression`` (:mod:`trainers.lesson`) learns towards
it.

Of question q in template t and context c, about the people of block b, averaged over the orders of the people,

    x[q,g] = log pi_0(g) - mean over g = common[t,g] + sensitivity[t] association[c,g] + people[b,g] + rest

is a two-way layout with a factor of rank one: templates differ in how much they let a context speak (on
SmolLM2-135M-Instruct from 0.3 to 2.0 of the mean). It is fitted by alternating least squares. People are random effects
(quasi-demeaning: Wooldridge 2010, Econometric Analysis of Cross Section and Panel Data, section 10.4); the others are
shrunk by a ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dso.rewards import ABSENT, group_log_shares
from envs.layout import Layout

# Variances that the shrinkage supposes, as multiples of the rest's; those of SmolLM2-135M-Instruct are near them.
PEOPLE = 6.0
ASSOCIATION = 1.0
TEMPLATE = 0.5  # of a template's own common part
SENSITIVITY = 0.2  # of the mean template's evidence: what is added for a sensitivity of 1
ROUNDS = 40
# Of what the order of the people does to log-odds, the share that is not wanted either: answers without the association
# are less certain, so that the order as it was would move them further than the base model's.
ORDER = 0.15


@dataclass(frozen=True, slots=True)
class Association:
    """Log-odds of the base model by template and context.

    Attributes:
        common: (T, G) what each template prefers in all contexts alike; each row sums to 0.
        context: (C, G) the contexts' differences from that; rows and columns sum to 0.
        sensitivity: (T,) factor of ``context`` in each template, 1 on average.
    """

    common: Tensor
    context: Tensor
    sensitivity: Tensor

    def of(self, templates: Tensor, contexts: Tensor, common_weight: float = 1.0) -> Tensor:
        """(N, G) of N questions; ``common_weight`` is the share of the common part that counts as association."""
        own = self.sensitivity[templates, None] * self.context[contexts]
        return own + common_weight * self.common[templates]


def fit_association(log_policy: Tensor, index: Tensor, layout: Layout, n_groups: int) -> Association:
    """The association in N ambiguous decisions.

    Args:
        log_policy: (N, K) the base model's.
        index: (N,) which decisions of the layout they are.
        layout: the decision set.
        n_groups: G.
    """
    questions, question = layout.questions[index].unique(return_inverse=True)
    first = torch.full_like(questions, len(index)).scatter_reduce(
        0, question, torch.arange(len(index), device=index.device), "amin"
    )
    members = index[first]
    templates, contexts = layout.templates[members], layout.contexts[members]
    blocks = layout.blocks[members].unique(return_inverse=True)[1]
    shares, present = group_log_shares(log_policy.double(), layout.groups[index][:, : log_policy.shape[1]], n_groups)
    known = present[first]
    values = _means(shares.masked_fill(~present, 0.0), question)
    return _alternate(values, known, templates, contexts, blocks, layout.n_templates, layout.n_contexts)


def _alternate(
    values: Tensor, known: Tensor, templates: Tensor, contexts: Tensor, blocks: Tensor, n_templates: int, count: int
) -> Association:
    rows = torch.arange(len(values), device=values.device)
    share = _people_share(blocks)
    met = torch.zeros(count, 1, dtype=values.dtype, device=values.device).index_fill(0, contexts.unique(), 1.0)
    ridge = torch.cat([values.new_full((count,), 1 / ASSOCIATION), values.new_full((n_templates,), 1 / TEMPLATE)])
    ridge = torch.cat([ridge, values.new_full((1,), 1e-6)])  # and the level of all templates
    sensitivity = values.new_ones(n_templates)
    filled = _centred(values, known, torch.zeros_like(values))
    for _ in range(ROUNDS):
        design = values.new_zeros(len(values), count + n_templates + 1)
        design[rows, contexts] = sensitivity[templates]
        design[rows, count + templates] = 1.0
        design[:, -1] = 1.0
        reduced = _quasi_demeaned(design, blocks, share)
        target = _quasi_demeaned(filled, blocks, share)
        found = torch.linalg.solve(reduced.T @ reduced + ridge.diag(), reduced.T @ target)
        context, common = found[:count], found[count:-1] + found[-1]
        mean = (context * met).sum(0) / met.sum()
        context, common = (context - mean) * met, common + sensitivity[:, None] * mean
        own = _quasi_demeaned(context[contexts], blocks, share)
        left = target - _quasi_demeaned(common[templates], blocks, share)
        evidence = values.new_zeros(n_templates).index_add(0, templates, (own * own).sum(1))
        agreed = values.new_zeros(n_templates).index_add(0, templates, (own * left).sum(1))
        prior = SENSITIVITY * evidence.mean() + 1e-12
        sensitivity = ((agreed + prior) / (evidence + prior)).clamp(min=0)
        level = ((sensitivity * evidence).sum() / evidence.sum().clamp(min=1e-12)).clamp(min=1e-6)
        sensitivity = sensitivity / level  # that of the contexts is shrunk, and stays so
        fixed = common[templates] + sensitivity[templates, None] * context[contexts]
        filled = _centred(values, known, fixed + _people(filled - fixed, blocks))
    return Association(common.float(), context.float(), sensitivity.float())


def _people_share(blocks: Tensor) -> Tensor:
    """(B,) what is taken off of each block's mean: 1 - sqrt(rest / (rest + n people))."""
    return 1 - (1 + PEOPLE * torch.bincount(blocks).double()).rsqrt()


def _people(left: Tensor, blocks: Tensor) -> Tensor:
    """(N, G) the best linear predictor of each question's people."""
    count = torch.bincount(blocks)
    sums = left.new_zeros(len(count), left.shape[1]).index_add(0, blocks, left)
    return (sums * (PEOPLE / (1 + PEOPLE * count))[:, None])[blocks]


def _quasi_demeaned(values: Tensor, blocks: Tensor, share: Tensor) -> Tensor:
    sums = values.new_zeros(len(share), values.shape[1]).index_add(0, blocks, values)
    return values - (share / torch.bincount(blocks))[blocks, None] * sums[blocks]


def _centred(values: Tensor, known: Tensor, predicted: Tensor) -> Tensor:
    """Values less their mean over groups; a group that a question does not offer stands as predicted."""
    shift = ((values - predicted) * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    filled = torch.where(known, values - shift, predicted)
    return filled - filled.mean(1, keepdim=True)


def without_association(
    log_policy: Tensor,
    index: Tensor,
    layout: Layout,
    target: Tensor,
    common_weight: float = 1.0,
    order_weight: float = 0.0,
) -> Tensor:
    """The policy that is learned towards: (N, K) log-probabilities of N ambiguous decisions, -inf without a candidate.

    The association is taken off; then one offset a group, the same in all decisions, lets the groups' mean shares be
    the target's, or, where only a share of the common part is taken off, goes as far towards the target's log-odds. An
    ``abstain`` is moved by neither.

    Args:
        log_policy: (N, K) the base model's.
        index: (N,) which decisions of the layout they are.
        layout: the decision set.
        target: (G,) the fair distribution.
        common_weight: share of what all contexts prefer alike that is taken off as well; 0 leaves it to the model.
        order_weight: share of what the order of the people does to the log-odds that is taken off as well.
    """
    found = fit_association(log_policy, index, layout, len(target))
    groups = layout.groups[index][:, : log_policy.shape[1]]
    present = group_log_shares(log_policy, groups, len(target))[1]
    shift = -found.of(layout.templates[index], layout.contexts[index], common_weight).to(log_policy.dtype)
    if order_weight:
        shift = shift - order_weight * _order(log_policy, groups, layout.questions[index], len(target))
    # Rows sum to 0 over all groups; where some are not offered, those that are would move against an abstention.
    shift = shift - (shift * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    level = target.clamp(min=1e-6).log()
    offset = common_weight * (level - level.mean())  # 0 where the target is uniform
    fair = (present * target) / (present * target).sum(1, keepdim=True).clamp(min=1e-12)
    count = present.sum(0).clamp(min=1)
    for _ in range(ROUNDS if common_weight == 1 else 0):
        shares = group_log_shares(_moved(log_policy, shift + offset, groups), groups, len(target))[0].exp()
        wanted = (fair * shares.sum(1, keepdim=True)).sum(0) / count  # an abstention takes its own share
        offset = offset + wanted.clamp(min=1e-6).log() - (shares.sum(0) / count).clamp(min=1e-6).log()
    return _moved(log_policy, shift + offset, groups)


def forgive_blocks(
    wanted: Tensor, log_policy: Tensor, index: Tensor, layout: Layout, n_groups: int, weight: float
) -> Tensor:
    """(N, K) the wanted log-probabilities, nearer to the policy by 1 - weight of each block's mean error.

    Which of the contexts a block is in is chance, so what it misses in all of them alike is mostly noise in a step's
    gradient. With e the error of a decision's log-odds and m its block's mean, the gradient of
    ``(e - m)^2 + weight m^2``, summed over a block, is that of ``(e - (1 - weight) m)^2`` with m held fixed: least
    squares with people as random effects, as in :func:`fit_association`. Its minimum stays where it was. A block that
    is there in one context only tells nothing apart, and stays as it is.

    Args:
        wanted: (N, K) of :func:`without_association`.
        log_policy: (N, K) as the policy is now.
        index: (N,) which decisions of the layout they are, ambiguous ones.
        layout: the decision set.
        n_groups: G.
        weight: of a block's mean error, from 0 to 1.
    """
    if weight == 1 or not len(index):
        return wanted
    groups = layout.groups[index][:, : log_policy.shape[1]]
    blocks = layout.blocks[index].unique(return_inverse=True)[1]
    now, present = _log_odds(log_policy, groups, n_groups)
    missed = (now - _log_odds(wanted, groups, n_groups)[0]) * present
    nothing = missed.new_zeros(int(blocks.max()) + 1, n_groups)
    count = nothing.index_add(0, blocks, present.to(missed.dtype))
    mean = nothing.index_add(0, blocks, missed) / count.clamp(min=1)
    contexts = torch.bincount(torch.stack([blocks, layout.contexts[index]]).unique(dim=1)[0])
    return _moved(wanted, (1 - weight) * (mean * (contexts > 1)[:, None])[blocks], groups)


def _order(log_policy: Tensor, groups: Tensor, questions: Tensor, n_groups: int) -> Tensor:
    """(N, G) log-odds of each decision less their mean over the orders of its question."""
    values, _ = _log_odds(log_policy, groups, n_groups)
    question = questions.unique(return_inverse=True)[1]
    return values - _means(values, question)[question]


def _log_odds(log_policy: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """(N, G) each group's log-share less the mean of those that are offered, and (N, G) which are."""
    shares, present = group_log_shares(log_policy, groups, n_groups)
    return _centred(shares.masked_fill(~present, 0.0), present, torch.zeros_like(shares)), present


def _means(values: Tensor, question: Tensor) -> Tensor:
    """(Q, G) the mean of each question's decisions, from (N, G) values."""
    count = torch.bincount(question)
    return values.new_zeros(len(count), values.shape[1]).index_add(0, question, values) / count[:, None]


def _moved(log_policy: Tensor, shift: Tensor, groups: Tensor) -> Tensor:
    own = torch.where(groups >= 0, shift.gather(1, groups.clamp(min=0)), shift.new_zeros(()))
    return (log_policy + own).masked_fill(groups == ABSENT, -torch.inf).log_softmax(-1)
