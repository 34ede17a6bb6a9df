"""KL by hand, dual ascent on a problem with a known solution, the proximal step against the lasso's closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import tensor

from dso.models.scores import kl_divergence
from trainers.constraints import (
    AnswerMassFloor,
    Constraints,
    FixedKL,
    KLBudget,
    OrderLimit,
    Prices,
    soft_threshold,
    sparsity,
    step_sizes,
)

# KL


def test_kl_by_hand() -> None:
    p, q = tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]), tensor([[0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    # 0.5 ln 2 + 0.25 ln 1 + 0.25 ln 0.5 = 0.25 ln 2
    torch.testing.assert_close(kl_divergence(p.log(), q.log()), tensor([0.25 * math.log(2), 0.0]))


def test_kl_is_not_symmetric_and_has_the_steered_model_in_front() -> None:
    p, q = tensor([[0.9, 0.1]]), tensor([[0.5, 0.5]])
    forward = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(forward, rel=1e-5)
    assert kl_divergence(q.log(), p.log()).item() == pytest.approx(backward, rel=1e-5)


def test_kl_gradient_against_its_formula() -> None:
    logits = tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    log_q = torch.log_softmax(tensor([[0.0, 0.2, -0.4]], dtype=torch.float64), -1)
    kl = kl_divergence(torch.log_softmax(logits, -1), log_q)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    p = torch.softmax(logits, -1)
    # d KL / d z_i = p_i (log p_i - log q_i - KL)
    torch.testing.assert_close(gradient, p * (p.log() - log_q - kl))


# Dual ascent


def solve(dual: KLBudget, gain: float, steps: int, rate: float = 0.05) -> tuple[list[float], list[float]]:
    """Maximise ``gain * x`` under a price on KL = x^2 / 2, whose optimum is x = gain / beta; (KL, beta) a step."""
    x, path, prices = 0.0, [], []
    for _ in range(steps):
        x += rate * (gain - dual.coefficient * x)
        path.append(x * x / 2)
        prices.append(dual.coefficient)
        dual.update(path[-1])
    return path, prices


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("initial", [0.01, 1.0, 30.0])
def test_dual_ascent_ends_at_the_budget_and_at_its_price(budget: float, initial: float) -> None:
    path, prices = solve(KLBudget(budget, 0.05, initial, margin=1.0), gain=1.0, steps=3000)
    assert path[-500:] == pytest.approx([budget] * 500, rel=0.03)
    assert prices[-1] == pytest.approx(1.0 / math.sqrt(2 * budget), rel=0.03)  # the multiplier: gain / sqrt(2 eps)


def test_the_margin_is_the_share_of_the_budget_that_is_aimed_at() -> None:
    path, _ = solve(KLBudget(0.1, 0.05, 1.0, margin=0.9), gain=1.0, steps=3000)
    assert path[-1] == pytest.approx(0.09, rel=0.03)


def test_the_price_rises_with_what_a_nat_is_worth() -> None:
    cheap, dear = (solve(KLBudget(0.1, 0.05, 1.0, margin=1.0), gain, steps=4000)[1][-1] for gain in (0.5, 2.0))
    assert dear / cheap == pytest.approx(4.0, rel=0.05)


def test_a_slack_budget_has_no_price() -> None:
    dual, floored = KLBudget(0.1, 0.5, 1.0, floor=1e-4), KLBudget(0.1, 0.5, 1.0, floor=0.3)
    for _ in range(200):
        dual.update(0.001)  # whatever the price: the optimum is inside
        floored.update(0.001)
    assert dual.coefficient == pytest.approx(1e-4)  # as good as none
    assert floored.coefficient == pytest.approx(0.3)
    assert KLBudget(0.1, initial=0.1, floor=0.5).coefficient == pytest.approx(0.5)


def test_one_step_by_hand() -> None:
    dual = KLBudget(0.1, learning_rate=0.2, initial=2.0, margin=0.5, averaging=0.75)
    dual.update(0.06)  # the first KL is the running one: 0.06 / 0.05 - 1 = 0.2
    assert dual.coefficient == pytest.approx(2.0 * math.exp(0.2 * 0.2))
    dual.update(0.02)  # running 0.75 * 0.06 + 0.25 * 0.02 = 0.05: on target
    assert dual.coefficient == pytest.approx(2.0 * math.exp(0.2 * 0.2))


def test_one_bad_batch_moves_the_price_by_no_more_than_one_step() -> None:
    dual = KLBudget(0.1, learning_rate=0.1, initial=1.0)
    dual.update(1e6)
    assert dual.coefficient == pytest.approx(math.exp(0.1))


@pytest.mark.parametrize(("initial", "second", "rises"), [
    (2.0, 0.17, False),  # running 0.194: log(0.194 / 0.1) / log(0.2 / 0.194) = 21.8 steps left, fewer than 3 / 0.1
    (2.0, 0.19, True),  # running 0.198: 68 steps left
    (2.0, 0.25, True),  # it does not fall
    (0.9, 0.17, True),  # at a price below 1 a higher one makes KL fall faster
])  # fmt: skip
def test_a_price_above_one_waits_for_kl_that_falls(initial: float, second: float, rises: bool) -> None:
    dual = KLBudget(0.1, learning_rate=0.1, initial=initial, margin=1.0, averaging=0.8)
    dual.update(0.2)
    before = dual.coefficient
    dual.update(second)
    assert before == pytest.approx(initial * math.exp(0.1))
    running = 0.8 * 0.2 + 0.2 * second
    expected = before * math.exp(0.1 * min(running / 0.1 - 1, 1.0)) if rises else before
    assert dual.coefficient == pytest.approx(expected)


def test_the_price_stays_within_its_range() -> None:
    dual = KLBudget(0.1, learning_rate=10.0, initial=1.0)
    for _ in range(5):
        dual.update(100.0)
    assert dual.coefficient == pytest.approx(1e4)


def test_a_fixed_price_never_moves() -> None:
    kl = FixedKL(0.3)
    kl.update(100.0)
    assert (kl.coefficient, kl.budget) == (0.3, None)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="KL budget is .* expected a finite number of nats > 0"):
        KLBudget(budget)


@pytest.mark.parametrize(
    "values", [{"initial": 0.0}, {"learning_rate": -1.0}, {"margin": 1.1}, {"averaging": 1.0}, {"floor": 0.0}]
)
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
        KLBudget(0.1, **values)


@pytest.mark.parametrize("coefficient", [-0.1, math.nan, math.inf])
def test_an_impossible_fixed_price_is_refused(coefficient: float) -> None:
    with pytest.raises(ValueError, match="KL coefficient"):
        FixedKL(coefficient)


def test_state_round_trip_goes_on_bit_for_bit() -> None:
    dual = KLBudget(0.1, 0.07, 0.3)
    for kl in (0.05, 0.2, 0.31):
        dual.update(kl)
    other = KLBudget(0.1, 0.07)
    other.load_state_dict(json.loads(json.dumps(dual.state_dict())))
    for kl in (0.02, 0.4):
        dual.update(kl)
        other.update(kl)
    assert other.coefficient == dual.coefficient
    fixed = FixedKL(0.0)
    fixed.load_state_dict(FixedKL(0.7).state_dict())
    assert fixed.coefficient == 0.7


# The floor under the answer mass


def test_the_price_of_lost_answer_mass_by_hand() -> None:
    floor = AnswerMassFloor(0.9, learning_rate=0.5, averaging=0.75)
    assert floor.price == 0.0
    floor.update(0.02, 0.1)  # a fifth is lost, a tenth may be: 0.5 * (0.2 - 0.1)
    assert floor.coefficient == pytest.approx(0.05)
    assert floor.price == pytest.approx(0.05 / 0.1)
    floor.update(0.04, 0.2)  # running 0.025 and 0.125
    assert floor.coefficient == pytest.approx(0.1)
    assert floor.price == pytest.approx(0.1 / 0.125)
    for _ in range(20):
        floor.update(0.0, 0.125)  # nothing is lost: down to no price and not below
    assert floor.coefficient == floor.price == 0.0


def test_lost_answer_mass_ends_at_what_may_be_lost_and_at_its_price() -> None:
    """Maximise -x - x^2 / 2 with mass 1 + x: by itself x = -1; where 0.3 may be lost, x = -0.3 at a price of 0.7."""
    floor, x = AnswerMassFloor(0.7, learning_rate=0.1), 0.0
    for _ in range(3000):
        x += 0.05 * (-1 - x + floor.price)
        floor.update(max(0.0, -x), 1.0)
    assert x == pytest.approx(-0.3, abs=1e-3)
    assert floor.coefficient == pytest.approx(0.7, abs=1e-3)


def test_answer_mass_that_the_base_does_not_have_is_not_asked_for() -> None:
    floor = AnswerMassFloor(0.9)
    floor.update(0.0, 0.0)
    assert floor.price == 0.0
    for _ in range(1000):
        floor.update(0.1, 0.1)
    assert floor.coefficient == 10.0


def test_no_floor_costs_nothing() -> None:
    limits = Constraints(FixedKL(0.0))
    limits.load_state_dict(json.loads(json.dumps(limits.state_dict())))
    for _ in range(3):
        limits.update({"kl": 0.1, "lost_answer_mass": 0.1, "base_answer_mass": 0.1})  # all of it is lost
    assert limits.prices() == Prices(kl=0.0, mass=0.0, anchors=0.0, order=0.0, unit=1.0)
    assert limits.coefficients() == {"kl_coefficient": 0.0}


def test_the_state_of_the_floor_goes_on_bit_for_bit() -> None:
    floor, other = AnswerMassFloor(0.95), AnswerMassFloor(0.95)
    other.load_state_dict(json.loads(json.dumps(floor.state_dict())))  # before the first step
    floor.update(0.02, 0.1)
    other.load_state_dict(json.loads(json.dumps(floor.state_dict())))
    for each in (floor, other):
        each.update(0.03, 0.09)
    assert other.coefficient == floor.coefficient > 0
    assert other.price == floor.price


@pytest.mark.parametrize("values", [{"share": 0.0}, {"share": 1.1}, {"learning_rate": 0.0}, {"averaging": 1.0}])
def test_an_impossible_floor_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
        AnswerMassFloor(**{"share": 0.9, **values})


# The order effect, and all of them together


def test_the_price_of_the_order_effect_by_hand() -> None:
    limit = OrderLimit(0.05, learning_rate=2.0, averaging=0.75)
    limit.update(0.5, 0.3)  # 0.15 beyond what is allowed
    assert limit.coefficient == pytest.approx(0.3)
    limit.update(0.3, 0.3)  # running 0.45 and 0.3: 0.1 beyond
    assert limit.coefficient == pytest.approx(0.5)
    for _ in range(30):
        limit.update(0.1, 0.3)
    assert limit.coefficient == 0.0


def test_the_order_effect_ends_at_what_is_allowed_and_at_its_price() -> None:
    """Maximise x - x^2 / 2 for an effect of x: by itself x = 1; where 0.4 is allowed, x = 0.4 at a price of 0.6."""
    limit, x = OrderLimit(0.1, learning_rate=0.1), 0.0
    for _ in range(3000):
        x += 0.05 * (1 - x - limit.coefficient)
        limit.update(x, 0.3)
    assert x == pytest.approx(0.4, abs=1e-3)
    assert limit.coefficient == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("values", [{"increase": -0.1}, {"increase": math.nan}, {"learning_rate": 0.0}])
def test_an_impossible_limit_on_the_order_effect_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
        OrderLimit(**{"increase": 0.0, **values})


def test_every_limit_has_a_price_of_its_own_and_goes_on_bit_for_bit() -> None:
    def limits() -> Constraints:
        anchors = KLBudget(0.01, learning_rate=0.5, margin=1.0, averaging=0.0, floor=15.0)
        facts = KLBudget(0.1, learning_rate=0.5, initial=0.1, margin=1.0, averaging=0.0, floor=1.0)
        return Constraints(KLBudget(0.2, initial=0.5), AnswerMassFloor(0.9, 0.5), anchors, OrderLimit(0.0, 2.0), facts)

    ours, other = limits(), limits()
    assert ours.prices() == Prices(kl=pytest.approx(0.5), anchors=pytest.approx(15.0), unambiguous=1.0, unit=1.0)
    seen = {"kl": 0.2, "lost_answer_mass": 0.02, "base_answer_mass": 0.1, "anchor_kl": 0.015}
    seen |= {"order_effect": 0.4, "base_order_effect": 0.3, "unambiguous_kl": 0.18}
    ours.update(seen)
    raised = math.exp(0.5 * 0.5)  # half as much again as the limit
    found = ours.prices()
    assert (found.mass, found.order) == (pytest.approx(0.05 / 0.1), pytest.approx(0.2))
    assert found.anchors == pytest.approx(15 * raised)
    assert found.unambiguous == found.unit == pytest.approx(math.exp(0.5 * 0.8))  # the one that rose most
    other.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    for each in (ours, other):
        each.update(seen)
    assert other.prices() == ours.prices() != found
    names = ("kl", "mass", "anchor", "order", "unambiguous")
    assert tuple(ours.coefficients()) == tuple(f"{name}_coefficient" for name in names)
    del seen["unambiguous_kl"]  # a minibatch without such decisions
    ours.update(seen)
    assert ours.prices().unambiguous == pytest.approx(math.exp(2 * 0.5 * 0.8))  # of the two before it


# The proximal step


def test_soft_threshold_by_hand() -> None:
    values = tensor([3.0, -3.0, 0.5, -0.5, 1.0, 0.0, -1.0])
    soft_threshold([values], 1.0)
    assert values.tolist() == [2.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert not torch.signbit(values[[2, 4, 5]]).any()
    assert sparsity([values]) == 5 / 7


def test_soft_threshold_is_in_place_without_gradient_and_zero_changes_nothing() -> None:
    parameter = torch.nn.Parameter(tensor([0.3, -0.2]))
    soft_threshold([parameter], 0.0)
    assert parameter.tolist() == pytest.approx([0.3, -0.2])
    soft_threshold([parameter], 0.25)
    assert parameter.requires_grad
    assert parameter.grad is None
    assert parameter.tolist() == pytest.approx([0.05, 0.0])
    assert parameter[1].item() == 0.0


def test_gradient_and_proximal_steps_end_at_the_lasso() -> None:
    """minimise sum_i d_i/2 (x_i - y_i)^2 + lambda |x_i|: x_i = sign(y_i) max(|y_i| - lambda / d_i, 0)."""
    d = tensor([1.0, 2.0, 0.5, 4.0, 1.0], dtype=torch.float64)
    y = tensor([1.5, -0.4, 0.7, -0.05, 0.3], dtype=torch.float64)
    penalty, rate = 0.4, 0.1
    solution = y.sign() * (y.abs() - penalty / d).clamp(min=0)
    assert (solution == 0).tolist() == [False, False, True, True, True]
    x = torch.zeros_like(y)
    for _ in range(1000):
        x -= rate * d * (x - y)
        soft_threshold([x], rate * penalty)
    torch.testing.assert_close(x, solution, rtol=1e-9, atol=1e-12)
    assert ((x == 0) == (solution == 0)).all()
    after = x.clone()
    after -= rate * d * (after - y)
    soft_threshold([after], rate * penalty)
    torch.testing.assert_close(after, x, rtol=1e-12, atol=1e-12)  # a fixed point


def test_sparsity_counts_over_all_tensors() -> None:
    assert sparsity([tensor([0.0, 1.0]), tensor([[0.0], [0.0]])]) == 0.75
    assert sparsity([]) == 0.0


def test_step_sizes_of_adam_by_hand() -> None:
    parameter = torch.nn.Parameter(tensor([1.0, 1.0, 1.0]))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.75), eps=1e-3)
    for gradient in (tensor([3.0, 0.1, 0.0]), tensor([4.0, 0.1, 0.0])):
        parameter.grad = gradient
        optimizer.step()
    ((found, rate),) = step_sizes(optimizer)
    assert found is parameter
    # v = (0.25 * 0.75 * 9 + 0.25 * 16) / (1 - 0.75^2) = 13; a constant gradient has v = g^2
    assert rate.tolist() == pytest.approx([0.1 / (13**0.5 + 1e-3), 0.1 / 0.101, 100.0], rel=1e-5)
    assert [rate for _, rate in step_sizes(torch.optim.SGD([parameter], lr=0.3))] == [0.3]


def test_under_adam_too_the_end_is_the_lasso() -> None:
    """Adam steps as far along weak coordinates as along strong ones; the penalty must not be fooled by it."""
    d = tensor([1.0, 2.0, 0.5, 4.0, 1.0], dtype=torch.float64)
    y = tensor([1.5, -0.4, 0.7, -0.05, 0.3], dtype=torch.float64)
    solution = y.sign() * (y.abs() - 0.4 / d).clamp(min=0)
    x = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.Adam([x], lr=0.01, eps=1e-8)
    for _ in range(3000):
        x.grad = d * (x.detach() - y)
        optimizer.step()
        for parameter, rate in step_sizes(optimizer):
            soft_threshold([parameter], rate * 0.4)
    torch.testing.assert_close(x.detach(), solution, rtol=1e-3, atol=1e-3)
    assert ((x == 0) == (solution == 0)).all()
