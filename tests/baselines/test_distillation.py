"""FairDistillation's teacher by hand, the distillation's loss, and a steering in the end."""

from __future__ import annotations

import math

import pytest
import torch
from fair_task import tiny_task
from tiny import fact, role

from dso.baselines import distillation
from dso.baselines.distillation import equalised, following
from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionSet
from dso.evaluation.evaluator import Evaluator
from dso.steering.model import Steering


def many(*groups: str) -> Decision:
    candidates = tuple(Candidate(text=f" {chr(97 + n)}", group=group) for n, group in enumerate(groups))
    return Decision(id="-".join(groups), context="c", kind="ambiguous", prompt="who?", candidates=candidates)


def test_the_teacher_of_two_groups_is_the_mean_of_it_and_of_it_swapped() -> None:
    decisions = DecisionSet((role("nurse", "Ann", "Bob"), fact("nurse", "pilot", "Eve", "Dan")), ("female", "male"))
    policy = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    wanted = torch.stack([(policy[0] + policy[0].flip(0)) / 2, policy[1]])  # who has a right answer keeps it
    torch.testing.assert_close(equalised(policy.log(), decisions, (0.5, 0.5)).exp(), wanted)


def test_groups_share_what_they_hold_as_the_target_says() -> None:
    decisions = DecisionSet((many("a", "a", "b", ABSTAIN), many("b", "c")), ("a", "b", "c"))
    policy = torch.tensor([[0.3, 0.1, 0.4, 0.2], [0.5, 0.5, 0.0, 0.0]])
    teacher = equalised(policy.log(), decisions, (0.5, 0.3, 0.2)).exp()
    # 0.8 is divided 5 to 3 between a and b, and what is a's 3 to 1; without an a, b and c have 3 to 2.
    torch.testing.assert_close(teacher[0], torch.tensor([0.375, 0.125, 0.3, 0.2]))
    torch.testing.assert_close(teacher[1], torch.tensor([0.6, 0.4, 0.0, 0.0]))


def test_the_loss_is_the_kl_from_the_teacher() -> None:
    teacher = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    student = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.2, 0.0]]).log().requires_grad_()
    by_hand = 0.5 * math.log(2)  # the second term; the first one is 0.5 log 1
    loss = following(teacher)(student[:1, :], torch.tensor([0]))
    assert float(loss.detach()) == pytest.approx(by_hand)
    loss.backward()
    assert torch.isfinite(student.grad[0]).all()


def test_every_setting_becomes_a_steering_that_is_fairer(monkeypatch, clock) -> None:
    monkeypatch.setattr(distillation, "SETTINGS", (("scale", 0.02), ("affine", 0.02)))
    task = tiny_task(seconds=120.0)  # of the test's clock
    before = {name: value.clone() for name, value in task.backbone.model.state_dict().items()}
    candidates = list(distillation.BASELINE.propose(task))
    assert [c.label for c in candidates] == ["scale, learning rate 0.02", "affine, learning rate 0.02"]
    free = torch.tensor([d.ambiguous for d in task.decisions])
    for candidate in candidates:
        assert isinstance(candidate.steering, Steering) and not any(
            p.requires_grad for p in candidate.steering.parameters()
        )
        handle = candidate.steering.attach(task.backbone.model)
        base, steered = Evaluator(task.backbone, task.decisions, handle).curve([0.0, 1.0])
        handle.detach()
        uneven = [abs(measured.policy[free.numpy(), 0] - 0.5).mean() for measured in (base, steered)]
        assert uneven[1] < 0.8 * uneven[0]
    assert all(torch.equal(value, before[name]) for name, value in task.backbone.model.state_dict().items())
