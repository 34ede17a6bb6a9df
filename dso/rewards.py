"""Equiprobability rewards: pure functions of tensors.

With the group preference p_g(c) of the current policy and the target t_g, the reward for choosing group g in
context c is (DSO, arXiv 2512.15926, section 3: -1 for the over-chosen group, else +1)

    sign      r_g(c) = -sign(p_g(c) - t_g)                       0 inside the dead zone
    smooth    r_g(c) = -clip((p_g(c) - t_g) / width, -1, 1)      vanishes at parity, so nothing oscillates around it

With equally many samples a context, the gradient of the expected sign reward is minus the gradient of the bias

    mean_c sum_g |p_g(c) - t_g|

(for two groups and a uniform target this is the paper's |P(pro|c) - P(anti|c)|). The smooth form descends its square.
Where the paper is silent, this is ours: any number of groups and any target, a reward of its own for ``abstain``, and a
correctness reward of +1 and -1 for unambiguous decisions.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMS = ("sign", "smooth")
ABSTAINS = -1
ABSENT = -2
REGRESSION_WEIGHT = 0.5  # of :func:`relative_error`: with much more of it, steps follow single questions' noise
HUBER = 1.0  # difference in log-odds beyond which a question pulls no harder


def equiprobability_reward(
    preference: Tensor, target: Tensor, *, form: str = "smooth", width: float = 0.1, dead_zone: float = 0.0
) -> Tensor:
    """Reward for choosing each group.

    Args:
        preference: (..., G) p_g(c) of the current policy.
        target: (G,) the fair distribution.
        form: ``sign`` or ``smooth``.
        width: deviation at which the smooth form saturates.
        dead_zone: absolute deviation within which the reward is 0.

    Returns:
        (..., G) rewards in [-1, 1].
    """
    deviation = preference - target
    if form == "sign":
        reward = -deviation.sign()
    elif form == "smooth":
        reward = (-deviation / width).clamp(-1.0, 1.0)
    else:
        raise ValueError(f"reward form is {form!r}, expected one of {', '.join(FORMS)}")
    return torch.where(deviation.abs() <= dead_zone, torch.zeros_like(reward), reward)


def candidate_rewards(context_rewards: Tensor, groups: Tensor, answers: Tensor, abstain: float = -1.0) -> Tensor:
    """The reward of every candidate of N decisions.

    Args:
        context_rewards: (N, G) the equiprobability rewards of each decision's context.
        groups: (N, K) int64, each candidate's group index, ``ABSTAINS``, or ``ABSENT`` where there is no candidate.
        answers: (N,) int64, the right candidate of an unambiguous decision, -1 for an ambiguous one.
        abstain: the reward for abstaining where nothing is right; -1 makes it as bad as the over-chosen group.

    Returns:
        (N, K) rewards; 0 where there is no candidate.
    """
    fair = context_rewards.gather(1, groups.clamp(min=0))
    fair = torch.where(groups == ABSTAINS, torch.full_like(fair, abstain), fair)
    right = torch.arange(groups.shape[1], device=groups.device) == answers[:, None]
    correct = torch.where(right, 1.0, -1.0).to(fair.dtype)
    rewards = torch.where(answers[:, None] >= 0, correct, fair)
    return rewards.masked_fill(groups == ABSENT, 0.0)


def expected_reward(log_policy: Tensor, rewards: Tensor) -> Tensor:
    """(N,) sum_k pi_k r_k: the exact expectation over the candidates; absent ones (log pi = -inf) add nothing."""
    return (log_policy.exp() * rewards).sum(-1)


def relative_error(log_policy: Tensor, wanted: Tensor) -> Tensor:
    """(n,) how far the log-odds between candidates are from the wanted ones: Huber's loss, 2/K of the sum over pairs.

    Args:
        log_policy, wanted: (n, K), -inf where there is no candidate.
    """
    present = ~log_policy.isneginf()
    error = (log_policy - wanted).masked_fill(~present, 0.0)
    pair = error[:, :, None] - error[:, None, :]
    loss = torch.nn.functional.huber_loss(pair, torch.zeros_like(pair), reduction="none", delta=HUBER)
    both = present[:, :, None] & present[:, None, :]
    return (loss * both).sum((1, 2)) / present.sum(1).clamp(min=1)  # each pair is met twice


def group_shares(policy: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """(N, G) the probability of choosing each group, without ``abstain``; arguments as in :func:`group_preference`."""
    return _by_slot(policy, groups, n_groups)[:, :n_groups]


def group_log_shares(log_policy: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Log-probability of choosing each group (N, G), and whether a decision offers it (N, G); -inf where it does not.

    Arguments as in :func:`group_preference`, but for ``log_policy`` (N, K), -inf where there is no candidate.
    """
    own = groups[:, None, :] == torch.arange(n_groups, device=groups.device)[:, None]
    return log_policy[:, None, :].masked_fill(~own, -torch.inf).logsumexp(-1), own.any(-1)


def _by_slot(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """(N, G + 2) sums of the candidates' values (N, K) by group; those of ``ABSTAINS`` and ``ABSENT`` come last."""
    return values.new_zeros(len(values), n_groups + 2).scatter_add(1, groups % (n_groups + 2), values)


def logarithmic_pool(log_policy: Tensor, groups: Tensor, questions: Tensor, n_groups: int) -> Tensor:
    """What the decisions of one question say together: the normalised geometric mean of their group probabilities.

    A question's decisions differ in the order of the people. Their plain mean finds a model fair that nearly always
    chooses the first person, however biased its other choices are. In the mean of logarithms a preference for a place
    cancels (logarithmic opinion pool; Genest and Zidek 1986, Combining probability distributions).

    Args:
        log_policy: (N, K), -inf where there is no candidate.
        groups: (N, K) as in :func:`candidate_rewards`; the decisions of a question offer the same groups.
        questions: (N,) int64 index of each decision's question.

    Returns:
        (N, K) log-probabilities; each group's is divided among its candidates in their own proportion, or evenly where
        the group had none.
    """
    slots = groups % (n_groups + 2)
    chosen = _by_slot(log_policy.exp(), groups, n_groups)
    candidates = _by_slot((groups != ABSENT).to(log_policy.dtype), groups, n_groups)
    shares = chosen.clamp(min=torch.finfo(log_policy.dtype).tiny).log()
    count = torch.bincount(questions)
    total = log_policy.new_zeros(len(count), n_groups + 2).index_add(0, questions, shares)
    pooled = (total / count.clamp(min=1)[:, None])[questions].masked_fill(candidates == 0, -torch.inf).log_softmax(-1)
    evenly = -candidates.clamp(min=1).log().gather(1, slots)
    within = torch.where(chosen.gather(1, slots) > 0, log_policy - shares.gather(1, slots), evenly)
    return (pooled.gather(1, slots) + within).masked_fill(groups == ABSENT, -torch.inf)


def group_preference(
    policy: Tensor, groups: Tensor, contexts: Tensor, n_contexts: int, target: Tensor
) -> tuple[Tensor, Tensor]:
    """p_g(c) over a batch: the mean probability of each group in each context, renormalised without ``abstain``.

    A decision that offers only some of the groups is compared with the target restricted to those, as in
    :mod:`dso.evaluation.bias`: in general ``p_g(c)`` is the target plus the mean deviation from what is fair in each
    decision.

    Args:
        policy: (N, K) probabilities.
        groups: (N, K) as in :func:`candidate_rewards`.
        contexts: (N,) int64 context index.
        target: (G,) the fair distribution.

    Returns:
        preference (C, G), and the probability (C,) that the groups hold together in each context. Where that is 0, the
        batch knows nothing of the context, or all of it abstains, and the preference is the target.
    """
    n_groups = len(target)
    share = group_shares(policy, groups, n_groups)
    fair = (group_shares(torch.ones_like(policy), groups, n_groups) > 0) * target
    fair = fair / fair.sum(-1, keepdim=True).clamp(min=1e-12)
    mass = share.sum(-1, keepdim=True)
    deviation = policy.new_zeros(n_contexts, n_groups).index_add(0, contexts, share - fair * mass)
    total = policy.new_zeros(n_contexts, 1).index_add(0, contexts, mass)
    return target + deviation / total.clamp(min=1e-12), total[:, 0]
