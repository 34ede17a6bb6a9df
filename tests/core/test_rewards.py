"""Rewards: numbers by hand, and the identity of the paper: the reward's policy gradient is that of the bias."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionSet
from dso.evaluation.bias import bias_report
from dso.rewards import (
    ABSENT,
    ABSTAINS,
    candidate_rewards,
    equiprobability_reward,
    expected_reward,
    group_preference,
    group_shares,
    logarithmic_pool,
)

HALF = torch.tensor([0.5, 0.5])


# the equiprobability reward


def test_the_sign_form_pays_minus_one_for_the_group_that_is_over_chosen() -> None:
    preference = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    expected = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    assert torch.equal(equiprobability_reward(preference, HALF, form="sign"), expected)


@pytest.mark.parametrize(
    ("width", "female", "expected"), [(0.1, 0.52, -0.2), (0.1, 0.7, -1.0), (0.4, 0.7, -0.5), (0.4, 0.4, 0.25)]
)
def test_the_smooth_form_is_the_deviation_over_its_width(width: float, female: float, expected: float) -> None:
    reward = equiprobability_reward(torch.tensor([female, 1 - female]), HALF, form="smooth", width=width)
    assert reward.tolist() == pytest.approx([expected, -expected], abs=1e-6)


def test_three_groups_are_held_against_a_target_that_is_not_uniform() -> None:
    preference, target = torch.tensor([0.6, 0.25, 0.15]), torch.tensor([0.7, 0.2, 0.1])
    assert equiprobability_reward(preference, target, form="sign").tolist() == [1.0, -1.0, -1.0]
    smooth = equiprobability_reward(preference, target, form="smooth", width=0.2)
    assert smooth.tolist() == pytest.approx([0.5, -0.25, -0.25], abs=1e-6)


@pytest.mark.parametrize(("form", "outside"), [("sign", -1.0), ("smooth", -0.6)])
def test_within_the_dead_zone_nothing_is_paid_and_outside_it_nothing_is_shifted(form: str, outside: float) -> None:
    preference = torch.tensor([[0.54, 0.46], [0.56, 0.44]])
    reward = equiprobability_reward(preference, HALF, form=form, width=0.1, dead_zone=0.05)
    assert reward[0].tolist() == [0.0, 0.0]
    assert reward[1].tolist() == pytest.approx([outside, -outside], abs=1e-5)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'cubic', expected one of sign, smooth"):
        equiprobability_reward(HALF, HALF, form="cubic")


# the rewards of candidates


def test_candidates_earn_what_their_group_does_and_unambiguous_ones_what_is_right() -> None:
    groups = torch.tensor([[0, 1, ABSTAINS], [1, 0, ABSENT], [0, 1, ABSENT], [0, 1, ABSTAINS]])
    context_rewards = torch.tensor([[-0.5, 0.5], [-0.5, 0.5], [0.3, -0.3], [0.3, -0.3]])
    answers = torch.tensor([-1, -1, 1, 2])
    rewards = candidate_rewards(context_rewards, groups, answers, abstain=-0.25)
    assert rewards.tolist() == [[-0.5, 0.5, -0.25], [0.5, -0.5, 0.0], [-1.0, 1.0, 0.0], [-1.0, -1.0, 1.0]]


def test_abstaining_is_as_bad_as_the_over_chosen_group_unless_said_otherwise() -> None:
    rewards = candidate_rewards(torch.tensor([[-1.0, 1.0]]), torch.tensor([[0, 1, ABSTAINS]]), torch.tensor([-1]))
    assert rewards.tolist() == [[-1.0, 1.0, -1.0]]


def test_the_expected_reward_is_the_exact_mean_over_candidates() -> None:
    log_policy = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]]).log()
    rewards = torch.tensor([[-1.0, 1.0, 5.0], [1.0, 0.5, -1.0]])
    assert expected_reward(log_policy, rewards).tolist() == pytest.approx([0.5, -0.15])


def test_a_candidate_that_is_not_there_leaves_the_gradient_finite() -> None:
    scores = torch.tensor([[0.0, 1.0, 7.0]], requires_grad=True)
    log_policy = torch.log_softmax(scores.masked_fill(torch.tensor([[False, False, True]]), -torch.inf), dim=-1)
    expected_reward(log_policy, torch.tensor([[-1.0, 1.0, 0.0]])).sum().backward()
    p = 1 / (1 + np.exp(1.0))  # of the first: d/ds_1 of (1 - 2 p) = -2 p (1 - p)
    assert scores.grad[0].tolist() == pytest.approx([-2 * p * (1 - p), 2 * p * (1 - p), 0.0], abs=1e-6)


# what orders say together


def test_an_answer_by_the_order_alone_pools_to_a_half_and_a_preference_in_both_orders_stays() -> None:
    policy = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [0.7, 0.3]])
    groups, questions = torch.tensor([[0, 1]] * 5), torch.tensor([0, 0, 1, 1, 2])
    pooled = logarithmic_pool(policy.log(), groups, questions, 2).exp()
    # odds 9 and 1/9 have the geometric mean 1; 4 and 1 have 2; a question in one order is as it is
    wanted = torch.tensor([[0.5, 0.5], [0.5, 0.5], [2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.7, 0.3]])
    torch.testing.assert_close(pooled, wanted, rtol=0, atol=1e-6)


def test_groups_are_pooled_wherever_their_candidates_stand_and_share_as_they_did() -> None:
    policy = torch.tensor([[0.6, 0.2, 0.2, 0.0], [0.1, 0.4, 0.3, 0.2]])
    groups = torch.tensor([[0, 1, ABSTAINS, ABSENT], [ABSTAINS, 1, 0, 0]])
    pooled = logarithmic_pool(policy.log(), groups, torch.tensor([0, 0]), 2).exp()
    # group 0: 0.6 and 0.5, group 1: 0.2 and 0.4, abstain: 0.2 and 0.1
    roots = np.sqrt([0.6 * 0.5, 0.2 * 0.4, 0.2 * 0.1])
    first, second, abstain = roots / roots.sum()
    wanted = torch.tensor([[first, second, abstain, 0.0], [abstain, second, first * 0.6, first * 0.4]])
    torch.testing.assert_close(pooled, wanted.float(), rtol=0, atol=1e-6)


def test_single_choices_pool_too() -> None:
    policy = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    pooled = logarithmic_pool(policy.log(), torch.tensor([[0, 1]] * 4), torch.tensor([0, 0, 1, 1]), 2).exp()
    # the first question's answer is the same in both orders, the second's is the order
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    torch.testing.assert_close(pooled, wanted, rtol=0, atol=1e-6)


# the preference


def test_the_preference_is_the_mean_share_renormalised_without_abstain() -> None:
    policy = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [0.3, 0.7, 0.0]])
    groups = torch.tensor([[0, 1, ABSTAINS], [0, 1, ABSTAINS], [1, 0, ABSENT]])
    preference, mass = group_preference(policy, groups, torch.tensor([0, 0, 2]), 3, HALF)
    # context 0: (0.6 + 0.2) to (0.2 + 0.2) of 1.2
    assert preference[0].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert preference[1].tolist() == [0.5, 0.5]
    assert preference[2].tolist() == pytest.approx([0.7, 0.3], abs=1e-6)
    assert mass.tolist() == pytest.approx([1.2, 0.0, 1.0], abs=1e-6)
    assert torch.equal(group_shares(policy, groups, 2), torch.tensor([[0.6, 0.2], [0.2, 0.2], [0.7, 0.3]]))


def test_where_all_abstain_nothing_is_known() -> None:
    preference, mass = group_preference(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0, 1, ABSTAINS]]), torch.tensor([0]), 1, HALF
    )
    assert preference.tolist() == [[0.5, 0.5]]
    assert mass.tolist() == [0.0]


def test_a_decision_that_offers_two_of_four_groups_is_held_against_the_target_among_those() -> None:
    target = torch.tensor([0.4, 0.3, 0.2, 0.1])
    policy, groups = torch.tensor([[0.8, 0.2], [0.5, 0.5]]), torch.tensor([[0, 3], [0, 3]])
    preference, _ = group_preference(policy, groups, torch.tensor([0, 1]), 2, target)
    # fair between 0.4 and 0.1 is 0.8 to 0.2
    assert preference[0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-6)
    assert preference[1].tolist() == pytest.approx([0.4 - 0.3, 0.3, 0.2, 0.1 + 0.3], abs=1e-6)


def test_the_reward_sees_the_deviations_that_the_metrics_report() -> None:
    """Three contexts, decisions that offer 2 to 4 groups and sometimes abstention, against dso.evaluation.bias."""
    rng = np.random.default_rng(0)
    names = ("a", "b", "c", "d")
    target = dict(zip(names, (0.4, 0.3, 0.2, 0.1), strict=True))
    decisions, probs, groups = [], np.zeros((24, 5)), torch.full((24, 5), ABSENT)
    for number in range(24):
        offered = [*rng.permutation(4)[: rng.integers(2, 5)].tolist(), *([4] if number % 3 == 0 else [])]
        probs[number, : len(offered)] = rng.dirichlet(np.ones(len(offered)))
        groups[number, : len(offered)] = torch.tensor([ABSTAINS if g == 4 else g for g in offered])
        tags = [ABSTAIN if g == 4 else names[g] for g in offered]
        decisions.append(
            Decision(
                id=str(number),
                context=str(number % 3),
                kind="ambiguous",
                prompt="?",
                candidates=tuple(Candidate(text=f"{i}", group=tag) for i, tag in enumerate(tags)),
            )
        )
    report = bias_report(probs, DecisionSet(tuple(decisions), names), target, bootstrap=0)
    goal = torch.tensor(list(target.values()), dtype=torch.float64)
    preference, _ = group_preference(torch.tensor(probs), groups, torch.arange(24) % 3, 3, goal)
    found = (preference - goal).abs().sum(1)
    assert found.tolist() == pytest.approx([report.context_bias[str(c)] for c in range(3)])
    assert float(found.mean()) == pytest.approx(report.paper)


# the identity


class Batch:
    """Random decisions of C contexts, candidates in another order in each, with the policy's logits as the leaf."""

    def __init__(self, target: tuple[float, ...], counts: tuple[int, ...] = (6, 6, 6), per_group: int = 1):
        draw = torch.Generator().manual_seed(0)
        self.target = torch.tensor(target, dtype=torch.float64)
        self.contexts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.counts = torch.tensor(counts)
        tags = torch.arange(len(target)).repeat(per_group)
        self.groups = torch.stack([tags[torch.randperm(len(tags), generator=draw)] for _ in self.contexts])
        self.logits = 2 * torch.randn(self.groups.shape, generator=draw, dtype=torch.float64)
        self.logits.requires_grad_()

    def deviation(self) -> Tensor:
        """(C, G) p_g(c) - t_g, without the functions under test."""
        policy = self.logits.softmax(-1)
        rows = []
        for context in range(len(self.counts)):
            mine = self.contexts == context
            shares = [(policy[mine] * (self.groups[mine] == g)).sum(-1).mean() for g in range(len(self.target))]
            rows.append(torch.stack(shares))
        return torch.stack(rows) - self.target

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]

    def reward_gradient(self, **options: object) -> Tensor:
        """Gradient of the batch's mean expected reward, the rewards held fixed."""
        log_policy = self.logits.log_softmax(-1)
        policy = log_policy.detach().exp()
        preference, _ = group_preference(policy, self.groups, self.contexts, len(self.counts), self.target)
        fair = equiprobability_reward(preference, self.target, **options)
        rewards = candidate_rewards(fair[self.contexts], self.groups, torch.full_like(self.contexts, -1))
        return self.gradient(expected_reward(log_policy, rewards).mean())


TARGETS = [(0.5, 0.5), (0.25, 0.25, 0.25, 0.25), (0.5, 0.3, 0.2)]


@pytest.mark.parametrize("per_group", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_of_the_reward_is_minus_that_of_the_bias(target: tuple[float, ...], per_group: int) -> None:
    """With n decisions a context, mean_N sum_g r_g d pi(g) = mean_c sum_g r_g(c) d p_g(c): the constant is 1."""
    batch = Batch(target, per_group=per_group)
    bias = batch.deviation().abs().sum(-1).mean()
    gradient = batch.reward_gradient(form="sign")
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, -batch.gradient(bias), rtol=1e-10, atol=1e-14)


def test_for_two_groups_that_bias_is_the_difference_of_their_probabilities() -> None:
    batch = Batch((0.5, 0.5))
    female = (batch.deviation() + 0.5)[:, 0]
    difference = (female - (1 - female)).abs().mean()
    torch.testing.assert_close(batch.reward_gradient(form="sign"), -batch.gradient(difference), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("target", TARGETS)
def test_the_smooth_form_descends_a_square_that_turns_into_the_bias(target: tuple[float, ...]) -> None:
    """Its potential: e^2 / (2 w) up to |e| = w, |e| - w / 2 beyond."""
    batch = Batch(target)
    size = batch.deviation().abs()
    width = float(size.detach().min() + size.detach().max()) / 2  # so that some are within it and some beyond
    potential = torch.where(size < width, size**2 / (2 * width), size - width / 2).sum(-1).mean()
    gradient = batch.reward_gradient(form="smooth", width=width)
    torch.testing.assert_close(gradient, -batch.gradient(potential), rtol=1e-10, atol=1e-14)


def test_with_a_dead_zone_the_sign_form_descends_the_bias_beyond_it() -> None:
    batch, zone = Batch((0.25, 0.25, 0.25, 0.25)), 0.08
    size = batch.deviation().abs()
    assert bool((size < zone).any()) and bool((size > zone).any())
    beyond = (size - zone).clamp(min=0).sum(-1).mean()
    gradient = batch.reward_gradient(form="sign", dead_zone=zone)
    torch.testing.assert_close(gradient, -batch.gradient(beyond), rtol=1e-10, atol=1e-14)


def test_with_unequal_samples_contexts_count_by_their_share_of_the_batch() -> None:
    """What equal samples are needed for: 2, 4 and 12 decisions weigh 1/9, 2/9 and 6/9 instead of a third each."""
    batch = Batch((0.5, 0.5), counts=(2, 4, 12))
    size = batch.deviation().abs().sum(-1)
    gradient = batch.reward_gradient(form="sign")
    weighted = (size * torch.tensor([1 / 9, 2 / 9, 6 / 9], dtype=torch.float64)).sum()
    torch.testing.assert_close(gradient, -batch.gradient(weighted), rtol=1e-10, atol=1e-14)
    assert not torch.allclose(gradient, -batch.gradient(size.mean()), rtol=1e-2)
