"""The order effect of a batch, and training that holds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import bias, gradients, in_orders, learn, letters_set, make_trainer, randomise

from dso.evaluation.bias import bias_report
from dso.rewards import ABSENT, ABSTAINS
from trainers.constraints import OrderLimit
from trainers.order import Orders

# Two orders of one question, another by itself, and a third in three orders; the last candidate abstains or is absent.
QUESTIONS = torch.tensor([0, 0, 1, 2, 2, 2])
GROUPS = torch.tensor([[0, 1, ABSENT], [1, 0, ABSENT], *[[0, 1, ABSTAINS]] * 2, [1, 0, ABSTAINS], [0, 1, ABSTAINS]])
POLICY = torch.tensor(
    [[0.8, 0.2, 0.0], [0.8, 0.2, 0.0], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
)


def test_the_order_effect_by_hand() -> None:
    orders = Orders.of(torch.arange(6), QUESTIONS, GROUPS, 2)
    first = 0.6  # (0.8, 0.2) against (0.2, 0.8)
    others = (0.2 + 0.6 + 0.6) / 3  # (.5 .3 .2), (.3 .5 .2) and (.1 .1 .8), each with each
    assert orders.effect(POLICY) == pytest.approx((first + others) / 2)
    assert orders.effect(POLICY[:, :2]) < orders.effect(POLICY)  # a batch with fewer candidates
    assert Orders.of(torch.arange(6), torch.arange(6), GROUPS, 2).effect(POLICY) == 0.0


def test_a_decision_that_is_drawn_twice_is_no_other_order_of_itself() -> None:
    alone = Orders.of(torch.tensor([7, 7]), torch.tensor([3, 3]), GROUPS[:2], 2)
    assert not alone.weights.any()
    drawn = torch.tensor([0, 1, 1, 2, 2])
    orders = Orders.of(drawn, torch.tensor([0, 0, 0, 1, 1]), GROUPS[[0, 1, 1, 2, 2]], 2)
    assert orders.effect(POLICY[[0, 1, 1, 2, 2]]) == pytest.approx(0.6)  # of the one question in two orders
    assert orders.weights.sum().item() == pytest.approx(1.0)
    assert not orders.weights[drawn[:, None] == drawn].any()


def test_parts_add_up_to_the_effect_and_to_all_of_its_gradient() -> None:
    orders = Orders.of(torch.arange(6), QUESTIONS, GROUPS, 2)
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = logits.masked_fill(GROUPS == ABSENT, -torch.inf).requires_grad_()
    log_policy = logits.log_softmax(-1)
    rows = [torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])]  # a question's orders in two parts
    decided = log_policy.detach().exp()
    parts = torch.stack([orders.part(part, log_policy[part], decided) for part in rows])
    assert parts.sum().item() == pytest.approx(orders.effect(decided))
    (found,) = torch.autograd.grad(parts.sum(), logits, retain_graph=True)
    answers = torch.zeros(6, 3, dtype=torch.float64)
    for row in range(6):
        for column in range(3):
            if (group := int(GROUPS[row, column])) != ABSENT:
                place = torch.zeros_like(answers)
                place[row, 2 if group == ABSTAINS else group] = 1
                answers = answers + place * log_policy[row, column].exp()
    pairs = {(0, 1): 1.0, (3, 4): 1 / 3, (3, 5): 1 / 3, (4, 5): 1 / 3}
    whole = sum(weight * (answers[one] - answers[other]).abs().sum() / 2 for (one, other), weight in pairs.items()) / 2
    (wanted,) = torch.autograd.grad(whole, logits)
    known = GROUPS != ABSENT
    torch.testing.assert_close(found[known], wanted[known])


def test_the_gradient_of_the_order_effect_is_the_reference_one() -> None:
    limit = OrderLimit(0.0, learning_rate=0.7, averaging=0.0)
    limit.update(1.0, 0.0)
    options = {"decisions": in_orders(letters_set()), "estimator": "expected", "learning_rate": 0.0}
    trainer, plain = make_trainer(order=limit, **options), make_trainer(**options)
    for each in (trainer, plain):
        randomise(each)
        learn(each, 1)
    task = trainer.task
    policy = trainer.policy.decide(np.arange(16)).log_policy.exp()
    women = torch.where(task.groups[:16, 0] == 0, policy[:, 0], policy[:, 1])
    effect = (women[0::2] - women[1::2]).abs().mean()
    wanted = torch.autograd.grad(0.7 * effect, list(trainer.policy.steering.parameters()))
    found = gradients(trainer) - gradients(plain)
    torch.testing.assert_close(found, torch.cat([value.flatten() for value in wanted]), rtol=1e-3, atol=1e-5)
    assert trainer.measured["order_effect"] == pytest.approx(effect.item(), rel=1e-4)
    free = task.decisions.select(kind="ambiguous")
    with torch.no_grad(), task.unsteered():
        base = bias_report(trainer.policy.decide(np.arange(16)).log_policy.exp(), free, bootstrap=0)
    assert trainer.measured["base_order_effect"] == pytest.approx(base.order_effect, rel=1e-4)
    assert not {"order_effect", "order_coefficient"} & plain.measured.keys()


def test_the_order_effect_is_held_by_its_own_price() -> None:
    def trained(limit: OrderLimit | None) -> tuple[float, float]:
        trainer = make_trainer(in_orders(letters_set()), order=limit, estimator="expected", learning_rate=0.003)
        learn(trainer, 80)
        free = trainer.task.decisions.select(kind="ambiguous")
        rows = np.arange(len(free))
        with torch.no_grad():
            steered = trainer.policy.decide(rows).log_policy.exp()
        policies = (steered, trainer.task.base_policy(rows))
        now, base = (bias_report(policy, free, bootstrap=0).order_effect for policy in policies)
        return now - base, bias(trainer)

    before = bias(make_trainer(in_orders(letters_set())))
    by_itself, held = trained(None), trained(OrderLimit(0.0))
    assert held[0] <= 0 < 0.03 < by_itself[0]
    assert max(held[1], by_itself[1]) < 0.02 * before


@pytest.mark.parametrize("estimator", ["regression", "ppo"])
def test_estimators_that_cannot_hold_the_order_effect_say_so(estimator: str) -> None:
    with pytest.raises(ValueError, match=f"'{estimator}' does not hold the order effect; expected and reinforce do"):
        make_trainer(in_orders(letters_set()), order=OrderLimit(0.0), estimator=estimator)
