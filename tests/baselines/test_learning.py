"""The trained rivals' loop and loss: by hand, on a clock of the test's own, and a few steps on a tiny model."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from fair_task import tiny_task
from tiny import role

from dso.baselines.baseline import BaselineError
from dso.baselines.learning import ANCHORS, Setting, learn, regression
from dso.decisions.decision import DecisionSet
from dso.evaluation.neutral import NeutralTexts
from dso.steering.model import Steering


def test_the_loss_by_hand() -> None:
    """Log-odds of log 3 where 0 is wanted, beyond Huber's 1; and a right answer that has a probability of 0.25."""
    task = tiny_task()
    rows = torch.tensor([0, len(task.decisions) - 1])
    assert task.decisions[0].ambiguous and task.decisions[-1].answer == 1
    task.fair[rows] = torch.tensor([0.5, 0.5]).log()
    found = regression(task)(torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log(), rows)
    # 2/K = 1 times the one pair's Huber loss, weight 0.5; 0.1 of 1 - 2 x 0.25.
    assert float(found) == pytest.approx(0.5 * (math.log(3) - 0.5) + 0.1 * 0.5)


def test_ambiguous_decisions_alone_have_no_second_part() -> None:
    task = tiny_task()
    rows = torch.tensor([0, 1])
    task.fair[rows] = torch.tensor([0.5, 0.5]).log()
    even = torch.full((2, 2), 0.5).log()
    assert float(regression(task)(even, rows)) == 0
    odd = torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log()
    assert float(regression(task)(odd, rows)) == pytest.approx(0.5 * math.log(1.5) ** 2 / 2 / 2)


def test_steps_lower_the_loss_and_stop_at_the_clock(clock) -> None:
    task = tiny_task()
    seen: list[tuple[int, float]] = []
    steering = Steering.for_model(task.backbone.model, operator="scale")
    with steering.on(task.backbone.model) as handle:
        losses = learn(
            task, handle, list(steering.parameters()), regression(task), Setting(rate=0.02, seconds=40.0),
            progress=lambda steps, loss: seen.append((steps, loss)),
        )  # fmt: skip
        assert handle.scale == 1.0
    # One look before the first step; then two a step, of which the one behind the last step finds 40 seconds over.
    assert len(losses) == 20 and seen == list(enumerate(losses, 1))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("prices", [{"price": 100.0}, {"mass_price": 100.0}])
def test_a_price_keeps_what_it_is_of(clock, prices: dict[str, float]) -> None:
    """Trained to lose the answer mass: the KL that costs, or the mass itself, is kept by its price."""
    kept = []
    for own in ({}, prices):
        task = tiny_task()
        steering = Steering.for_model(task.backbone.model, operator="bias")
        with steering.on(task.backbone.model) as handle:
            setting = Setting(rate=0.01, seconds=20.0, **{"price": 0.0, "mass_price": 0.0} | own)
            learn(task, handle, list(steering.parameters()), regression(task), setting)
            with torch.no_grad():
                after = task.backbone.score(task.decisions, next_token=True)
                handle.scale = 0.0
                before = task.backbone.score(task.decisions, next_token=True)
        lost = (before.answer_mass() - after.answer_mass()).clamp(min=0).mean() / before.answer_mass().mean()
        kept.append(float(after.kl(before.next_token).mean()) if "price" in prices else float(lost))
    assert kept[1] < 0.5 * kept[0]


def test_the_prices_by_hand() -> None:
    """One step's loss: that of the batch, beta mean KL and mu times the share of the mass that is lost."""
    pair = DecisionSet((role("nurse", "Ann", "Bob"), role("nurse", "Bob", "Ann", order=1)), ("female", "male"))
    task = tiny_task(pair)
    steering = Steering.for_model(task.backbone.model, operator="bias")
    for value in steering.tensors().values():
        value.data.fill_(-0.1)
    with steering.on(task.backbone.model) as handle:
        with torch.no_grad():
            after = task.backbone.score(pair, next_token=True)
            handle.scale = 0.0
            before = task.backbone.score(pair, next_token=True)
        setting = Setting(rate=0.01, seconds=1e-9, price=2.0, mass_price=3.0)
        (found,) = learn(task, handle, list(steering.parameters()), lambda policy, rows: policy.sum() * 0, setting)
    masses = [scores.log_probs.exp().sum(1) for scores in (before, after)]
    lost = float((masses[0] - masses[1]).clamp(min=0).sum() / masses[0].sum())
    assert lost > 0
    assert found == pytest.approx(2 * float(after.kl(before.next_token).mean()) + 3 * lost, rel=1e-4)


def test_the_price_of_anchor_texts_by_hand() -> None:
    """One step's loss: nu times the mean KL of two texts, each the mean over its tokens behind the first one."""
    texts = ("the sea is wide", "a day")
    task = tiny_task(anchors=texts)
    steering = Steering.for_model(task.backbone.model, operator="bias")
    for value in steering.tensors().values():
        value.data.fill_(-0.1)
    tokenizer, model, kls = task.backbone.tokenizer, task.backbone.model, []
    with steering.on(model) as handle:
        for text in texts:
            logs = []
            for scale in (1.0, 0.0):
                handle.scale = scale
                with torch.no_grad():
                    ids = torch.tensor([tokenizer(text)["input_ids"]])
                    logs.append(model(ids).logits[0, :-1].log_softmax(-1))
            kls.append(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()))
        prices = {"price": 0.0, "mass_price": 0.0, "anchor_price": 5.0}
        setting = Setting(rate=0.01, seconds=1e-9, **prices)
        (found,) = learn(task, handle, list(steering.parameters()), lambda policy, rows: policy.sum() * 0, setting)
    assert min(kls) > 1e-3
    assert found == pytest.approx(5 * sum(kls) / 2, rel=1e-4)


def learned_beside(texts: tuple[str, ...], price: float) -> tuple[float, list[tuple[str, ...]]]:
    """The KL after some texts in the end, and those of them that each pass read, when they have a price."""
    task = tiny_task(anchors=texts)
    passes = Mock(wraps=task.backbone.likelihood)
    task.backbone.likelihood = passes
    steering = Steering.for_model(task.backbone.model, operator="scale")
    with steering.on(task.backbone.model) as handle:
        setting = Setting(rate=0.02, seconds=20.0, anchor_price=price)
        learn(task, handle, list(steering.parameters()), regression(task), setting)
        return NeutralTexts(task.backbone, texts).kl(handle), [tuple(call.args[0]) for call in passes.call_args_list]


def test_anchor_texts_are_left_alone(clock) -> None:
    texts = tuple(f"the sea is {n} miles wide" for n in range(2 * ANCHORS))
    moved, read = learned_beside(texts, 0.0)
    kept, again = learned_beside(texts, 200.0)
    assert 0 < kept < 0.5 * moved
    assert again == read  # a seed draws the same
    base, steered = read[::2], read[1::2]
    assert base == steered and {len(set(drawn)) for drawn in base} == {ANCHORS}
    assert len(set(base)) > 1


def test_learning_needs_ambiguous_decisions_and_finite_losses() -> None:
    task = tiny_task()
    steering = Steering.for_model(task.backbone.model, operator="scale")
    parameters = list(steering.parameters())
    with steering.on(task.backbone.model) as handle:
        with pytest.raises(BaselineError, match="step 1: the loss is no longer finite; lower the learning rate"):
            learn(
                task,
                handle,
                parameters,
                lambda log_policy, rows: log_policy.sum() * math.nan,
                Setting(rate=1, seconds=1),
            )
        facts = DecisionSet(tuple(d for d in task.decisions if not d.ambiguous), task.decisions.groups, "facts")
        with pytest.raises(BaselineError, match="facts: no ambiguous decisions to learn from"):
            learn(tiny_task(facts), handle, parameters, regression(task), Setting(rate=1, seconds=1))


def test_a_set_smaller_than_a_batch_is_drawn_whole(clock) -> None:
    pair = DecisionSet((role("nurse", "Ann", "Bob"), role("nurse", "Bob", "Ann", order=1)), ("female", "male"))
    task = tiny_task(pair)
    seen: list[list[int]] = []
    steering = Steering.for_model(task.backbone.model, operator="scale")

    def loss(log_policy: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.append(sorted(rows.tolist()))
        return regression(task)(log_policy, rows)

    with steering.on(task.backbone.model) as handle:
        learn(task, handle, list(steering.parameters()), loss, Setting(rate=0.01, seconds=4.0))
    assert seen == [[0, 1], [0, 1]]
