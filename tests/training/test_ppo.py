"""SteeringPPO: its gradients against references, its constraints, what it learns, and SB3's machinery around it."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import (
    bias,
    gradients,
    in_orders,
    learn,
    letters_set,
    make_trainer,
    mean_kl,
    operators,
    preferences,
    randomise,
)
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EveryNTimesteps
from stable_baselines3.common.logger import KVWriter, Logger
from torch import Tensor

from dso.decisions.decision import ABSTAIN
from dso.rewards import REGRESSION_WEIGHT, expected_reward, relative_error
from envs.reward import RewardConfig
from envs.task import DecisionTask
from trainers.constraints import AnswerMassFloor, FixedKL, KLBudget, sparsity
from trainers.lesson import ESTIMATORS, Lesson
from trainers.optimizer import Whitened
from trainers.ppo import SteeringPPO, TrainingDiverged
from trainers.vec import DecisionVecEnv

EVERY = pytest.mark.parametrize("estimator", ESTIMATORS)


class Records(KVWriter):
    """Everything that was logged, a dict a record."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict, step: int = 0) -> None:
        self.rows.append({"step": step, **key_values})

    def close(self) -> None:
        pass


class Spy(BaseCallback):
    """Counts its calls; may stop training after some step."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.events: list[str] = []
        self.rewards: list[np.ndarray] = []

    def _on_training_start(self) -> None:
        self.events.append("start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout")

    def _on_step(self) -> bool:
        self.events.append("step")
        self.rewards.append(self.locals["rewards"])
        return self.stop_after is None or self.n_calls < self.stop_after

    def _on_training_end(self) -> None:
        self.events.append("end")


# Gradients


def test_regression_pulls_log_odds_towards_the_wanted_ones_by_hand() -> None:
    # Two candidates, log-odds 0 now, 0.8 and 3 wanted: Huber's 0.8^2 / 2 = 0.32, and 3 - 1/2 = 2.5 beyond 1. Three
    # candidates with errors 0, 0.3, -0.6: pairs of 0.3, 0.6, 0.9 give (0.09 + 0.36 + 0.81) / 2 = 0.63, times 2/3.
    half, absent = math.log(0.5), -math.inf
    two = relative_error(
        torch.tensor([[half, half, absent]] * 2),
        torch.tensor([[0.8, 0.0, absent], [3.0, 0.0, absent]]).log_softmax(-1),
    )
    torch.testing.assert_close(two, torch.tensor([0.32, 2.5]))
    base = torch.tensor([[0.2, 0.3, 0.5]]).log()
    torch.testing.assert_close(
        relative_error(base + torch.tensor([[0.0, 0.3, -0.6]]), base), torch.tensor([0.63 * 2 / 3])
    )


def test_regression_at_the_base_model_is_the_natural_gradient_of_the_expected_reward() -> None:
    # In the log-odds z of two candidates with pi = (0.8, 0.2), the expected reward of r = (-0.3, 0.3) has the gradient
    # p (1 - p) (r_1 - r_2) = 0.16 * -0.6 = -0.096; the Fisher information of z is p (1 - p) = 0.16; their quotient is
    # -0.6 = r_1 - r_2, which is what the regression towards pi exp(r) / Z goes up by, times its weight.
    z = torch.tensor(math.log(4.0), requires_grad=True)
    log_policy = torch.stack([z, torch.zeros(())])[None].log_softmax(-1)
    rewards = torch.tensor([[-0.3, 0.3]])
    (plain,) = torch.autograd.grad(expected_reward(log_policy, rewards).sum(), z, retain_graph=True)
    wanted = (log_policy.detach() + rewards).log_softmax(-1)
    nothing = torch.zeros(1)
    lesson = Lesson(
        np.array([0]), torch.tensor([True]), nothing.long(), nothing, nothing, nothing, rewards=rewards, wanted=wanted
    )
    (relative,) = torch.autograd.grad(lesson.gain("regression", torch.tensor([0]), log_policy, 0.2).sum(), z)
    assert float(plain) == pytest.approx(-0.096)
    assert float(relative) == pytest.approx(REGRESSION_WEIGHT * float(plain) / 0.16)
    assert float(relative) == pytest.approx(REGRESSION_WEIGHT * -0.6)


def reference_gradient(trainer: SteeringPPO, form: str, width: float = 0.1) -> tuple[Tensor, float]:
    """The gradient of -mean_n sum_k pi_k r_k from bare forward passes, and the bias; two groups, one-token answers."""
    model, tokenizer, decisions = trainer.task.backbone.model, trainer.task.backbone.tokenizer, trainer.task.decisions
    letters = [tokenizer(c.text).input_ids[0] for c in decisions[0].candidates]
    rows = [model(tokenizer(d.prompt, return_tensors="pt").input_ids).logits[0, -1, letters] for d in decisions]
    pi = torch.softmax(torch.stack(rows), -1)
    rewards = torch.zeros_like(pi)
    biases = []
    for context in decisions.contexts:
        members = [index for index, d in enumerate(decisions) if d.context == context]
        deviation = pi[members].mean(0) - 0.5
        biases.append(deviation.abs().sum())
        fair = -deviation.detach().sign() if form == "sign" else (-deviation.detach() / width).clamp(-1, 1)
        rewards[members] = fair
    loss = -(pi * rewards).sum(-1).mean()
    parameters = list(trainer.policy.steering.parameters())
    gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
    of_bias = torch.autograd.grad(torch.stack(biases).mean(), parameters)
    if form == "sign":  # the paper's identity: the expected reward climbs as the bias falls
        torch.testing.assert_close(gradient, of_bias, rtol=1e-4, atol=1e-6)
    return torch.cat([value.flatten() for value in gradient]), torch.stack(biases).mean().item()


@pytest.mark.parametrize("form", ["sign", "smooth"])
def test_the_expected_gradient_is_the_analytic_one(form: str) -> None:
    reward = RewardConfig(form=form, width=0.1, decay=0.0, batch_weight=1.0)
    trainer = make_trainer(reward=reward, estimator="expected", learning_rate=0.0)
    randomise(trainer)
    wanted, by_definition = reference_gradient(trainer, form)
    learn(trainer, 1)
    found = gradients(trainer)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert found.norm() > 0.1
    assert trainer.measured["gradient_norm"] == pytest.approx(float(wanted.norm()), rel=1e-3)
    assert trainer.measured["running_bias"] == pytest.approx(by_definition, rel=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_pooled_gradient_is_that_of_the_pooled_reward(parts: int) -> None:
    """Against autograd through the geometric mean of each question's two decisions, also where parts divide them."""
    decisions = in_orders(letters_set(facts=False))
    reward = RewardConfig(form="smooth", width=0.1, decay=0.0, batch_weight=1.0, pooling="logarithmic")
    trainer = make_trainer(decisions, reward=reward, estimator="expected", learning_rate=0.0, accumulation=parts)
    randomise(trainer)
    model, tokenizer = trainer.task.backbone.model, trainer.task.backbone.tokenizer
    letters = [tokenizer(c.text).input_ids[0] for c in decisions[0].candidates]
    rows = [model(tokenizer(d.prompt, return_tensors="pt").input_ids).logits[0, -1, letters] for d in decisions]
    log_pi = torch.log_softmax(torch.stack(rows), -1)
    pooled = torch.softmax(log_pi.view(4, 2, 2, 2).mean(2), -1)  # job, question, order, letter
    fair = (-(pooled.detach().mean(1, keepdim=True) - 0.5) / 0.1).clamp(-1, 1)
    wanted = torch.autograd.grad(-(pooled * fair).sum(-1).mean(), list(trainer.policy.steering.parameters()))
    wanted = torch.cat([value.flatten() for value in wanted])
    learn(trainer, 1)
    torch.testing.assert_close(gradients(trainer), wanted, rtol=1e-3, atol=1e-5)
    assert wanted.norm() > 0.1
    assert trainer.measured["objective"] == pytest.approx((pooled * fair).sum(-1).mean().item(), rel=1e-4)


def test_the_expected_gradient_is_the_mean_of_sampled_ones() -> None:
    """REINFORCE's gradients scatter around the exact one; each coordinate's error is judged by its own spread."""
    frames = ("The {} is ",)
    sets = {estimator: letters_set(facts=False, frames=frames) for estimator in ("expected", "reinforce")}
    exact, sampled = (
        make_trainer(decisions, ambiguous=4, estimator=name, baseline="none", learning_rate=0.0)
        for name, decisions in sets.items()
    )
    for trainer in (exact, sampled):
        randomise(trainer)
    learn(exact, 1)
    wanted = gradients(exact)
    draws = []
    for _ in range(250):
        learn(sampled, 1)
        draws.append(gradients(sampled))
    table = torch.stack(draws).double()
    error = table.std(0) / len(table) ** 0.5
    scores = (table.mean(0) - wanted) / error
    assert scores.abs().max() < 4.0
    assert (table.mean(0) - wanted).norm() < 0.06 * wanted.norm()
    assert (table - wanted).norm(dim=1).median() > 0.25 * wanted.norm()  # so a single draw would not have passed


@pytest.mark.parametrize("baseline", ["context", "none"])
def test_the_first_epoch_of_ppo_has_the_sampled_gradient(baseline: str) -> None:
    found = {}
    for estimator in ("reinforce", "ppo"):
        trainer = make_trainer(estimator=estimator, baseline=baseline, n_epochs=1, learning_rate=0.0, unambiguous=8)
        randomise(trainer)
        found[estimator] = []
        for _ in range(4):
            learn(trainer, 1)
            found[estimator].append(gradients(trainer))
    for sampled, clipped in zip(found["reinforce"], found["ppo"], strict=True):
        torch.testing.assert_close(clipped, sampled, rtol=1e-3, atol=1e-5)
        assert sampled.norm() > 0.01


@pytest.mark.parametrize(("price", "unit"), [(0.4, 1.0), (3.0, 3.0)])
def test_the_kl_gradient_is_the_reference_one(price: float, unit: float) -> None:
    trainer = make_trainer(kl=FixedKL(price), estimator="expected", learning_rate=0.0, sparsity=0.06)
    plain = make_trainer(kl=FixedKL(0.0), estimator="expected", learning_rate=0.0)
    for each in (trainer, plain):
        randomise(each)
        learn(each, 1)
    model, decisions = trainer.task.backbone.model, trainer.task.decisions
    ids = [trainer.task.backbone.tokenizer(d.prompt, return_tensors="pt").input_ids for d in decisions]
    with torch.no_grad(), trainer.task.unsteered():
        base = [torch.log_softmax(model(row).logits[0, -1], -1) for row in ids]
    steered = [torch.log_softmax(model(row).logits[0, -1], -1) for row in ids]
    kl = torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(steered, base, strict=True)]).mean()
    wanted = torch.autograd.grad(price * kl, list(trainer.policy.steering.parameters()))
    found = unit * gradients(trainer) - gradients(plain)  # a price above 1 is what everything is divided by
    torch.testing.assert_close(found, torch.cat([value.flatten() for value in wanted]), rtol=1e-3, atol=1e-4)
    assert trainer.measured["kl"] == pytest.approx(kl.item(), rel=1e-3)
    loss = (price * kl.item() - trainer.measured["objective"]) / unit
    assert trainer.measured["loss"] == pytest.approx(loss, rel=1e-4)
    assert trainer.policy.optimizer.param_groups[0]["penalty"] == pytest.approx(0.06 / unit)


def test_a_small_budget_is_held_and_the_price_does_not_run_away() -> None:
    trainer = make_trainer(kl=KLBudget(0.01, initial=0.5), estimator="expected", learning_rate=0.003)
    before = bias(trainer)
    prices, spent = [], []
    for _ in range(12):
        learn(trainer, 10)
        prices.append(trainer.kl.coefficient)
        spent.append(mean_kl(trainer))
    assert max(prices) < 6  # it needs about 4; dual ascent by itself goes to 69 before KL has followed
    assert spent[-4:] == pytest.approx([0.009] * 4, rel=0.1)  # by itself it swings from 0.053 to 0.001 and back
    assert bias(trainer) < 0.4 * before


def test_the_gradient_of_answer_mass_is_the_reference_one() -> None:
    floor = AnswerMassFloor(1.0, learning_rate=0.5, averaging=0.0)
    floor.update(0.3, 0.5)  # a price of 0.3 for all of a base mass of 0.5
    trainer = make_trainer(mass_floor=floor, estimator="expected", learning_rate=0.0)
    plain = make_trainer(estimator="expected", learning_rate=0.0)
    for each in (trainer, plain):
        randomise(each)
        learn(each, 1)
    model, tokenizer, decisions = trainer.task.backbone.model, trainer.task.backbone.tokenizer, trainer.task.decisions
    letters = [tokenizer(c.text).input_ids[0] for c in decisions[0].candidates]

    def mass() -> Tensor:
        rows = [model(tokenizer(d.prompt, return_tensors="pt").input_ids).logits[0, -1] for d in decisions]
        return torch.softmax(torch.stack(rows), -1)[:, letters].sum(1)

    steered = mass()
    with torch.no_grad(), trainer.task.unsteered():
        base = mass()
    lost = (base - steered).clamp(min=0)
    assert 0 < int((lost > 0).sum()) < len(lost)  # what the others gain does not count
    wanted = torch.autograd.grad(0.3 / 0.5 * lost.mean(), list(trainer.policy.steering.parameters()))
    found = gradients(trainer) - gradients(plain)
    torch.testing.assert_close(found, torch.cat([value.flatten() for value in wanted]), rtol=1e-3, atol=1e-5)
    for name, masses in (("answer_mass", steered), ("base_answer_mass", base), ("lost_answer_mass", lost)):
        assert trainer.measured[name] == pytest.approx(masses.mean().item(), rel=1e-3)
    share = lost.mean().item() / base.mean().item()
    assert floor.coefficient == pytest.approx(0.3 + 0.5 * share, rel=1e-3)


def test_answer_mass_is_held_by_its_own_price() -> None:
    def trained(floor: AnswerMassFloor | None) -> tuple[float, float]:
        trainer = make_trainer(mass_floor=floor, estimator="expected", learning_rate=0.003)
        learn(trainer, 80)
        return trainer.measured["lost_answer_mass"] / trainer.measured["base_answer_mass"], bias(trainer)

    by_itself, held = trained(None), trained(AnswerMassFloor(0.98))
    assert held[0] <= 0.02 < 0.03 < by_itself[0]
    assert held[1] < 0.1 * bias(make_trainer())


def test_both_kinds_count_by_their_own_mean() -> None:
    """objective = mean over the ambiguous + weight * mean over the others, however many there are of each."""
    trainer = make_trainer(unambiguous=8, unambiguous_weight=0.25, estimator="expected", learning_rate=0.0)
    tables = []
    real = trainer.env.state_policy
    trainer.env.state_policy = lambda policy: tables.append((policy, real(policy))) or tables[-1][1]
    learn(trainer, 1)
    policy, rewards = tables[0]
    gain = (policy * rewards).sum(-1)
    assert rewards[16:].abs().eq(1).all()  # the batch has the ambiguous decisions first
    by_hand = gain[:16].mean() + 0.25 * gain[16:].mean()
    assert trainer.measured["objective"] == pytest.approx(float(by_hand), rel=1e-5)


def test_clipping_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], requires_grad=True)
    nothing, actions = torch.zeros(5), torch.tensor([0, 1, 0, 1, 1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    lesson = Lesson(np.arange(5), nothing > 0, actions, nothing, advantages, nothing)
    log_policy = torch.zeros(5, 2).scatter(1, actions[:, None], ratio.log()[:, None])  # the other one's plays no part
    rows = torch.arange(5)
    gain = lesson.gain("ppo", rows, log_policy, clip=0.2)
    assert gain.tolist() == pytest.approx([1.2, -1.5, 0.5, -0.8, 2.2])
    gain.sum().backward()
    # Only what would move further away is stopped: too likely and good, too unlikely and bad.
    assert ratio.grad.tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0, 2.0])
    assert lesson.clipped(rows, log_policy, clip=0.2).tolist() == [1, 1, 1, 1, 0]
    assert lesson.clipped(rows[3:], log_policy[3:], clip=0.2).tolist() == [1, 0]


def test_ppo_takes_a_step_a_minibatch_and_epoch() -> None:
    prices = []
    kl = KLBudget(0.1)
    kl.update = prices.append  # type: ignore[method-assign]
    trainer = make_trainer(estimator="ppo", n_epochs=3, batch_size=8, ambiguous=16, learning_rate=0.01, kl=kl)
    learn(trainer, 2)
    assert len(prices) == 2 * 3 * 2
    assert prices[0] == pytest.approx(0.0, abs=1e-6)  # nothing was learned yet
    assert prices[1] > 1e-4  # the second minibatch sees the first one's step
    assert (trainer.num_timesteps, trainer.steps_done, trainer._n_updates) == (32, 2, 2)


def test_every_token_of_the_anchors_has_a_price_of_its_own() -> None:
    texts = ("It rains.", "Two and two", "Once upon a time")
    options = {"anchors_a_step": 5, "anchor_limit": FixedKL(7.0), "estimator": "expected", "learning_rate": 0.0}
    trainer = make_trainer(anchors=texts, **options)
    assert trainer.anchors == 3  # there are no more
    randomise(trainer)
    learn(trainer, 1)
    backbone = trainer.task.backbone
    by_text = []
    for text in texts:
        starts = [text[:end] for end in range(1, len(text))]  # a token is a byte
        with torch.no_grad():
            steered = backbone.next_token(starts)
            with trainer.task.unsteered():
                base = backbone.next_token(starts)
        by_text.append(float((steered.exp() * (steered - base)).sum(1).mean()))
    measured = trainer.measured
    assert measured["anchor_kl"] == pytest.approx(sum(by_text) / 3, rel=1e-4)
    assert measured["kl"] == pytest.approx(mean_kl(trainer), rel=1e-4)  # of decisions alone
    assert measured["loss"] == pytest.approx(7 * sum(by_text) / 3 - measured["objective"], rel=1e-4)


def test_a_price_keeps_the_anchors_as_they_are() -> None:
    texts = ("It rains.", "Two and two", "Once upon a time")
    found = []
    for price in (0.0, 100.0):
        options = {"estimator": "expected", "learning_rate": 0.01, "anchor_limit": FixedKL(price)}
        trainer = learn(make_trainer(anchors=texts, anchors_a_step=3, **options), 5)
        found.append(trainer.measured["anchor_kl"])
    assert 0 < found[1] < found[0] / 4


# Baselines


def test_the_value_head_learns_what_decisions_earn() -> None:
    """With the operators held still the rewards of stated facts are fixed: the head has to find them."""
    trainer = make_trainer(letters_set(), ambiguous=0, unambiguous=8, baseline="value", learning_rate=0.05, vf_coef=0.5)
    trainer.policy.optimizer.param_groups[0]["params"] = []
    handles = np.arange(16, 24)
    with torch.no_grad():
        pi = trainer.policy.decide(handles).log_policy.exp()
    right = torch.tensor([d.answer for d in trainer.task.decisions[16:]])
    earned = 2 * pi.gather(1, right[:, None])[:, 0] - 1
    learn(trainer, 150)
    values = trainer.policy.decide(handles).values.detach()
    before, after = earned.square().mean(), (values - earned).square().mean()
    assert before > 0.01
    assert after < 0.05 * before
    assert not any(value.any() for value in trainer.policy.steering.parameters())


def test_the_baseline_does_not_change_the_expected_gradient() -> None:
    found = []
    for baseline in ("none", "context", "value"):
        trainer = make_trainer(baseline=baseline, estimator="expected", learning_rate=0.0)
        randomise(trainer)
        learn(trainer, 2)
        found.append(gradients(trainer))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_sampled_gain_is_the_advantage_over_the_baseline() -> None:
    trainer = make_trainer(estimator="reinforce", baseline="context", learning_rate=0.0)
    trainer.policy.context_values.fill_(0.3)
    tables = []
    real = trainer.env.state_policy
    trainer.env.state_policy = lambda policy: tables.append((policy, real(policy))) or tables[-1][1]
    spy = Spy()
    learn(trainer, 1, spy)
    policy, table = tables[0]
    actions = trainer.rollout_buffer.actions.reshape(-1).astype(int)
    rewards = table[torch.arange(16), actions]
    np.testing.assert_allclose(spy.rewards[0], rewards.numpy(), rtol=1e-6)
    log_pi = policy[torch.arange(16), actions].log()
    assert trainer.measured["objective"] == pytest.approx(float((log_pi * (rewards - 0.3)).mean()), rel=1e-4)
    np.testing.assert_allclose(trainer.rollout_buffer.advantages.reshape(-1), rewards.numpy() - 0.3, atol=1e-6)
    np.testing.assert_allclose(trainer.rollout_buffer.returns.reshape(-1), rewards.numpy(), atol=1e-6)


# What is learned


@EVERY
def test_bias_falls_within_the_kl_budget(estimator: str) -> None:
    kl = KLBudget(0.05, 0.1, 0.1)
    trainer = make_trainer(estimator=estimator, kl=kl, learning_rate=0.003, n_epochs=1, clip_range=0.2)
    before = bias(trainer)
    learn(trainer, 60)
    assert before > 0.25
    assert bias(trainer) < (0.3 if estimator == "regression" else 0.25) * before  # it slows down near its goal
    assert mean_kl(trainer) < 0.05


@EVERY
def test_stated_facts_are_learned_beside(estimator: str) -> None:
    trainer = make_trainer(estimator=estimator, unambiguous=8, learning_rate=0.01, n_epochs=1, kl=FixedKL(0.01))
    facts = [d for d in trainer.task.decisions if not d.ambiguous]

    @torch.no_grad()
    def right() -> float:
        pi = trainer.task.backbone.score(facts).policy().exp()
        return float(pi[torch.arange(8), [d.answer for d in facts]].mean())

    chance, before = right(), bias(trainer)
    learn(trainer, 60)
    assert chance < 0.6
    assert right() > 0.9
    assert bias(trainer) < 0.5 * before


@EVERY
def test_three_groups_reach_a_target_that_is_not_uniform(estimator: str) -> None:
    target = {"female": 0.5, "male": 0.2, "nonbinary": 0.3}
    decisions = letters_set("female", "male", "nonbinary", facts=False)
    trainer = make_trainer(decisions, target=target, estimator=estimator, learning_rate=0.003, n_epochs=1)
    before = bias(trainer, target)
    learn(trainer, 80)
    assert before > 0.3
    assert bias(trainer, target) < 0.2 * before
    for shares in preferences(trainer).values():
        assert shares == pytest.approx(target, abs=0.08)


def abstention(trainer: SteeringPPO) -> float:
    with torch.no_grad():
        policy = trainer.task.backbone.score(list(trainer.task.decisions)).policy().exp()
    return float(policy[:, -1].mean())


def test_abstaining_is_paid_by_its_own_reward() -> None:
    after = {}
    for reward in (-1.0, 1.0):
        decisions = letters_set("female", "male", ABSTAIN, facts=False)
        config = RewardConfig(form="smooth", width=0.1, decay=0.0, batch_weight=1.0, abstain=reward)
        trainer = make_trainer(decisions, reward=config, estimator="expected", learning_rate=0.003)
        before = abstention(trainer)
        learn(trainer, 40)
        after[reward] = abstention(trainer)
    assert after[-1.0] < 0.3 * before
    assert after[1.0] > 1.5 * before
    trainer = make_trainer(letters_set("female", "male", ABSTAIN, facts=False), learning_rate=0.003)
    before = bias(trainer)
    learn(trainer, 40)
    assert bias(trainer) < 0.3 * before


def test_a_hard_preference_is_that_of_the_sampled_answers() -> None:
    reward = RewardConfig(form="sign", decay=0.0, batch_weight=1.0)
    trainer = make_trainer(reward=reward, estimator="reinforce", hard_preference=True, learning_rate=0.0)
    spy = Spy()
    learn(trainer, 1, spy)
    handles = trainer.rollout_buffer.observations.reshape(-1).astype(int)
    actions = trainer.rollout_buffer.actions.reshape(-1).astype(int)
    decisions = [trainer.task.decisions[handle] for handle in handles]
    chosen = [d.candidates[a].group for d, a in zip(decisions, actions, strict=True)]
    for job in trainer.task.decisions.contexts:
        women = [group == "female" for d, group in zip(decisions, chosen, strict=True) if d.context == job]
        share = sum(women) / len(women)
        for d, group, paid in zip(decisions, chosen, spy.rewards[0], strict=True):
            if d.context == job:
                over = share > 0.5 if group == "female" else share < 0.5
                assert paid == (0.0 if share == 0.5 else -1.0 if over else 1.0)


@pytest.mark.parametrize("estimator", ["reinforce", "ppo"])
def test_a_hard_preference_learns_too(estimator: str) -> None:
    reward = RewardConfig(form="sign", decay=0.8, batch_weight=0.3)
    trainer = make_trainer(
        reward=reward, estimator=estimator, hard_preference=True, learning_rate=0.003, n_epochs=1, kl=FixedKL(0.1)
    )
    before = bias(trainer)
    learn(trainer, 100)
    assert bias(trainer) < 0.5 * before


def test_a_fixed_price_buys_less_kl_the_higher_it_is() -> None:
    after = []
    for price in (0.0, 1.0, 30.0):
        trainer = make_trainer(kl=FixedKL(price), estimator="expected", learning_rate=0.003)
        learn(trainer, 40)
        after.append((mean_kl(trainer), bias(trainer)))
        assert trainer.kl.coefficient == price
    assert after[0][0] > 1.2 * after[1][0] > 3 * after[2][0]
    assert after[2][1] > after[1][1]


# Sparsity


class WhitenedDescent(Whitened, torch.optim.SGD):
    """Gradient descent whose rate is the same for all."""


@pytest.mark.parametrize("adam", [False, True])
def test_the_proximal_step_by_hand(adam: bool) -> None:
    """x = -rate g, then |x| shrinks by rate lambda; rate is lr for plain descent, lr / |g| in Adam's first step."""
    policy: dict[str, Any] = {"optimizer_class": WhitenedDescent, "optimizer_kwargs": {"momentum": 0.0}}
    if adam:
        policy = {"optimizer_kwargs": {"eps": 1e-8}}
    trainer = make_trainer(estimator="expected", learning_rate=0.1, sparsity=0.02, baseline="value", policy=policy)
    learn(trainer, 1)
    gradient = gradients(trainer)
    rate = 0.1 / gradient.abs() if adam else 0.1
    found = torch.cat([value.detach().flatten() for value in trainer.policy.steering.parameters()])
    wanted = -rate * gradient.sign() * (gradient.abs() - 0.02).clamp(min=0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(found == 0, gradient.abs() <= 0.02)
    assert all(value.all() for value in trainer.policy.value_head.parameters())  # no operator: left as it is
    assert 0.2 < trainer.measured["sparsity"] < 0.9
    assert trainer.measured["sparsity"] == pytest.approx(float((found == 0).float().mean()))


def test_sparse_operators_are_exactly_zero_and_still_fair() -> None:
    trainer, dense = (
        make_trainer(estimator="expected", learning_rate=0.003, sparsity=weight) for weight in (0.01, 0.0)
    )
    before = bias(trainer)
    learn(trainer, 60)
    learn(dense, 60)
    assert sparsity(dense.policy.steering.parameters()) == 0.0
    assert sparsity(trainer.policy.steering.parameters()) > 0.4
    assert bias(trainer) < 0.25 * before


def test_a_price_on_size_that_is_too_high_leaves_the_base_model() -> None:
    trainer = make_trainer(estimator="expected", learning_rate=0.003, sparsity=5.0)
    learn(trainer, 5)
    assert sparsity(trainer.policy.steering.parameters()) == 1.0


# The same run twice


@EVERY
def test_the_same_seed_gives_the_same_run_and_another_another(estimator: str) -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        options = {"n_epochs": 2, "batch_size": 8, "unambiguous": 4, "learning_rate": 0.01, "ambiguous": 12}
        trainer = make_trainer(estimator=estimator, seed=seed, kl=KLBudget(0.05), **options)
        records = Records()
        trainer.set_logger(Logger(None, [records]))
        trainer.learn(4 * 16)
        rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in records.rows]
        return operators(trainer), rows

    first, again, other = run(3), run(3), run(4)
    assert all(torch.equal(first[0][key], again[0][key]) for key in first[0])
    assert first[1] == again[1]
    assert len(first[1]) == 4
    assert any(not torch.equal(first[0][key], other[0][key]) for key in first[0])


# SB3's machinery


def test_a_record_holds_the_values_of_its_own_step() -> None:
    trainer = make_trainer(estimator="expected", learning_rate=0.01, kl=KLBudget(0.05), unambiguous=8)
    records = Records()
    trainer.set_logger(Logger(None, [records]))
    kls = []
    real = trainer.kl.update
    trainer.kl.update = lambda kl: (kls.append(kl), real(kl))  # type: ignore[method-assign]
    trainer.learn(5 * 24)
    assert [row["step"] for row in records.rows] == [24, 48, 72, 96, 120]
    assert [row["train/kl"] for row in records.rows] == kls
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert [row["train/n_updates"] for row in records.rows] == [1, 2, 3, 4, 5]
    names = ("objective", "loss", "kl_coefficient", "gradient_norm", "running_bias", "answer_mass", "sparsity")
    assert all(f"train/{name}" in row for row in records.rows for name in names)
    assert records.rows[0]["train/kl_coefficient"] == pytest.approx(0.1)  # what this step paid
    assert "rollout/ep_rew_mean" in records.rows[0]


def test_the_log_interval_is_heeded() -> None:
    trainer = make_trainer(learning_rate=0.01)
    records = Records()
    trainer.set_logger(Logger(None, [records]))
    trainer.learn(5 * 16, log_interval=2)
    assert [row["step"] for row in records.rows] == [32, 64]
    assert [row["train/n_updates"] for row in records.rows] == [2, 4]


def test_schedules_are_functions_of_what_remains() -> None:
    trainer = make_trainer(estimator="ppo", n_epochs=2, learning_rate=lambda left: 0.01 * left, clip_range=0.1)
    records = Records()
    trainer.set_logger(Logger(None, [records]))
    trainer.learn(5 * 16)
    rates = [row["train/learning_rate"] for row in records.rows]
    assert rates == pytest.approx([0.008, 0.006, 0.004, 0.002, 0.0])
    assert trainer.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_callbacks_are_called_at_every_step() -> None:
    trainer = make_trainer(learning_rate=0.01)
    spy, nested = Spy(), Spy()
    trainer.learn(4 * 16, [spy, EveryNTimesteps(32, nested)], log_interval=None)
    assert spy.events == ["start", *["rollout", "step"] * 4, "end"]
    assert nested.events.count("step") == 2
    assert spy.num_timesteps == 64


def test_a_callback_can_stop_and_training_goes_on_with_the_next_batch() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    learn(trainer, 5, Spy(stop_after=3))
    assert trainer.steps_done == 3
    assert trainer._n_updates == 2
    assert trainer._last_obs.tolist() == trainer.env.inner.indices.tolist()
    learn(trainer, 2)
    assert (trainer.steps_done, trainer._n_updates) == (5, 4)


def test_a_stop_is_heeded_before_the_next_batch() -> None:
    trainer = make_trainer(learning_rate=0.01)
    learn(trainer, 1)
    trainer.stop_requested = True
    spy = Spy()
    learn(trainer, 3, spy)
    assert trainer.steps_done == 1
    assert spy.events == ["start", "end"]


def test_archives_hold_no_backbone_and_restore_the_rest(tmp_path: Path) -> None:
    trainer = make_trainer(width=64, baseline="value", learning_rate=0.01, kl=KLBudget(0.1))
    learn(trainer, 4, CheckpointCallback(save_freq=2, save_path=str(tmp_path), name_prefix="run"))
    paths = sorted(tmp_path.glob("run_*_steps.zip"))
    assert [path.name for path in paths] == ["run_32_steps.zip", "run_64_steps.zip"]
    trainer.save(tmp_path / "last")
    backbone = sum(value.numel() * value.element_size() for value in trainer.task.backbone.model.parameters())
    learned = sum(value.numel() * value.element_size() for value in trainer.policy.parameters())
    with zipfile.ZipFile(tmp_path / "last.zip") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        weights = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
        facts = json.loads(archive.read("data"))
    assert weights.keys() == trainer.policy.state_dict().keys()
    assert sum(sizes.values()) < 5 * learned + 40_000 < backbone  # step sizes twice, two moments; the rest is names
    assert not {"policy_kwargs", "env", "_kept", "kl", "learner", "updater", "world"} & facts.keys()
    other = make_trainer(width=64, baseline="value", learning_rate=0.01)
    other.set_parameters(str(tmp_path / "last.zip"))
    restored = other.policy.state_dict()
    assert all(torch.equal(value, restored[key]) for key, value in trainer.policy.state_dict().items())
    with pytest.raises(TypeError, match="set_parameters"):
        SteeringPPO.load(tmp_path / "last.zip")


def test_the_vector_environment_serves_sb3() -> None:
    env = make_trainer().env
    assert isinstance(env, DecisionVecEnv)
    assert env.get_attr("num_envs", [0, 1]) == [16, 16]
    assert env.env_is_wrapped(KVWriter) == [False] * 16
    env.set_attr("mark", 7)
    assert env.get_attr("mark") == [7] * 16
    assert len(env.env_method("close")) == 16
    env.seed(5)
    first = env.reset().tolist()
    env.step(np.zeros(16, dtype=np.int64))
    env.seed(5)
    assert env.reset().tolist() == first
    handles, rewards, dones, infos = env.step(np.zeros((16, 1), dtype=np.int64))
    assert (handles.shape, rewards.dtype, dones.all()) == ((16,), np.float32, True)
    assert [info["episode"]["r"] for info in infos] == rewards.tolist()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "a2c"}, "estimator is 'a2c', expected one of regression, expected, reinforce, ppo"),
        ({"estimator": "expected", "hard_preference": True}, "use reinforce or ppo"),
        ({"normalize_advantage": True}, "normalize_advantage is True, but SteeringPPO does not use it"),
        ({"ent_coef": 0.01}, "ent_coef is 0.01"),
        ({"n_steps": 4}, "n_steps is 4"),
        ({"target_kl": 0.1}, "target_kl is 0.1"),
        ({"estimator": "ppo", "reward": RewardConfig(pooling="logarithmic")}, "pooling needs to be linear"),
    ],
)
def test_settings_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_an_optimizer_that_knows_no_step_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer_class is .*SGD.*expected one with trainers.optimizer.Whitened"):
        make_trainer(policy={"optimizer_class": torch.optim.SGD})


def test_more_parts_than_decisions_are_refused() -> None:
    with pytest.raises(ValueError, match="a step of 16 decisions cannot be divided among 1 processes x 17 parts"):
        make_trainer(accumulation=17)
    with pytest.raises(ValueError, match="a step of 1 decisions cannot be divided"):
        make_trainer(estimator="ppo", batch_size=5, accumulation=2)  # 5 + 5 + 5 + 1


# Numbers that are not finite


@EVERY
def test_numbers_that_are_no_longer_finite_end_training_with_a_message(estimator: str) -> None:
    trainer = make_trainer(estimator=estimator, n_epochs=1, learning_rate=1e30, max_skipped=3)
    with pytest.raises(TrainingDiverged, match="3 steps in a row were skipped, as .* not finite; lower the learning"):
        learn(trainer, 8)
    assert (trainer.skipped_steps, trainer.skipped_in_a_row) == (3, 3)


@EVERY
def test_a_step_that_is_not_finite_is_skipped_and_the_next_one_taken(estimator: str) -> None:
    trainer = make_trainer(estimator=estimator, n_epochs=1, learning_rate=0.01, kl=KLBudget(0.05), max_skipped=2)
    plain = make_trainer(estimator=estimator, n_epochs=1, learning_rate=0.01, kl=KLBudget(0.05))
    learn(trainer, 2)
    before, price, moments = operators(trainer), trainer.kl.state_dict(), trainer.optimizer_state()
    task = trainer.task
    task.reference = lambda handles: DecisionTask.reference(task, handles) * torch.nan  # type: ignore[method-assign]
    learn(trainer, 1)
    assert trainer.measured["loss"] != trainer.measured["loss"]
    assert (trainer.skipped_steps, trainer.skipped_in_a_row, trainer.steps_done) == (1, 1, 3)
    assert trainer.logger.name_to_value["train/skipped_steps"] == 1
    assert all(torch.equal(value, before[key]) for key, value in operators(trainer).items())
    assert all(torch.equal(value, moments[key]) for key, value in trainer.optimizer_state().items())
    assert trainer.kl.state_dict() == price
    del task.reference
    learn(trainer, 1)
    assert (trainer.skipped_steps, trainer.skipped_in_a_row) == (1, 0)
    assert any(not torch.equal(value, before[key]) for key, value in operators(trainer).items())
    learn(plain, 4)
    assert trainer.steps_done == plain.steps_done


def test_a_batch_that_cannot_be_decided_is_passed_over() -> None:
    trainer = make_trainer(learning_rate=0.01, max_skipped=2, ambiguous=4)
    learn(trainer, 2)
    before, seen = operators(trainer), {key: value.clone() for key, value in trainer.task.state_dict().items()}
    trainer.policy.steering.load_tensors({key: value * torch.nan for key, value in before.items()})
    spy = Spy()
    learn(trainer, 1, spy)
    assert spy.events == ["start", "rollout", "step", "end"]
    assert (trainer.steps_done, trainer.skipped_steps) == (3, 1)
    assert all(torch.equal(value, seen[key]) for key, value in trainer.task.state_dict().items())
    trainer.policy.steering.load_tensors(before)
    learn(trainer, 1)
    assert trainer.skipped_in_a_row == 0
    trainer.skipped_steps, trainer.skipped_in_a_row = 7, 1
    trainer.policy.steering.load_tensors({key: value * torch.nan for key, value in before.items()})
    with pytest.raises(TrainingDiverged, match="step 5: 2 steps in a row were skipped, as the policy is not finite"):
        learn(trainer, 1)
    assert trainer.skipped_steps == 8


# In parts


@EVERY
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_add_up_to_the_whole(estimator: str, parts: int) -> None:
    """Float32 sums in another order: operators agree to 1e-5 of a step of 0.01 each."""
    found = []
    for accumulation in (1, parts):
        options = {"anchors": ("It rains.", "Two and two"), "anchors_a_step": 2, "unambiguous": 4, "ambiguous": 12}
        policy = {"optimizer_kwargs": {"eps": 1e-3}}  # small gradients' signs would be noise
        trainer = make_trainer(
            estimator=estimator, n_epochs=2, batch_size=8, baseline="value", learning_rate=0.01, kl=FixedKL(0.5),
            sparsity=0.001, accumulation=accumulation, policy=policy, **options,
        )  # fmt: skip
        learn(trainer, 3)
        found.append((operators(trainer), dict(trainer.measured), trainer.policy.value_head.weight.detach().clone()))
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=0, atol=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3, abs=1e-5)
