"""The KL of unambiguous decisions, and training that holds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import gradients, learn, letters_set, make_trainer, randomise

from dso.models.scores import kl_divergence
from trainers.constraints import KLBudget
from trainers.ppo import SteeringPPO


def right_answers(trainer: SteeringPPO) -> np.ndarray:
    """The decisions of the training set that have one."""
    return np.array([row for row, decision in enumerate(trainer.task.decisions) if not decision.ambiguous])


def kl_of(trainer: SteeringPPO, rows: np.ndarray) -> torch.Tensor:
    """Mean KL of some decisions to the base model, with gradient, the reference asked anew."""
    steered = trainer.policy.decide(rows, next_token=True).next_token
    with torch.no_grad(), trainer.task.unsteered():
        base = trainer.policy.decide(rows, next_token=True).next_token
    return trainer.task.positions(rows).mean(kl_divergence(steered, base)).mean()


@pytest.mark.parametrize("estimator", ["expected", "regression"])
def test_its_gradient_is_the_reference_one(estimator: str) -> None:
    """A batch of every decision, so that what is measured is that of the set."""
    decisions = letters_set(facts=True)
    counts = {"ambiguous": sum(d.ambiguous for d in decisions), "unambiguous": sum(not d.ambiguous for d in decisions)}
    limit = KLBudget(0.1, initial=0.7, floor=0.7)
    options = {"decisions": decisions, "estimator": estimator, "learning_rate": 0.0, **counts}
    trainer, plain = make_trainer(unambiguous_limit=limit, **options), make_trainer(**options)
    for each in (trainer, plain):
        randomise(each)
        learn(each, 1)
    kl = kl_of(trainer, right_answers(trainer))
    wanted = torch.autograd.grad(0.7 * kl, list(trainer.policy.steering.parameters()))
    found = gradients(trainer) - gradients(plain)
    torch.testing.assert_close(found, torch.cat([value.flatten() for value in wanted]), rtol=1e-3, atol=1e-5)
    for each in (trainer, plain):
        assert each.measured["unambiguous_kl"] == pytest.approx(kl.item(), rel=1e-4) != each.measured["kl"]
    assert "unambiguous_coefficient" not in plain.measured


def test_it_is_held_by_its_own_price() -> None:
    def trained(limit: KLBudget | None) -> float:
        trainer = make_trainer(unambiguous=8, unambiguous_limit=limit, estimator="expected", learning_rate=0.003)
        learn(trainer, 80)
        with torch.no_grad():
            return kl_of(trainer, right_answers(trainer)).item()

    by_itself = trained(None)
    assert trained(KLBudget(by_itself / 4, learning_rate=0.2)) < by_itself / 3


def test_a_limit_on_what_no_step_looks_at_is_refused() -> None:
    assert "unambiguous_kl" not in learn(make_trainer(), 1).measured
    with pytest.raises(ValueError, match="a limit on unambiguous decisions and none of them in a step"):
        make_trainer(unambiguous_limit=KLBudget(0.1))
    with pytest.raises(ValueError, match="a limit on anchor texts and none of them in a step"):
        make_trainer(anchor_limit=KLBudget(0.1))
