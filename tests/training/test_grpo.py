"""GRPO and RLOO on a steering: their gradients by hand, one copy of the model, constraints, and that they learn."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from answering import LETTERS, TOKENS, answer_task, answer_trainer

from dso.errors import UserError
from dso.evaluation.answers import AnswerEvaluator
from dso.evaluation.bias import bias_report
from dso.steering.model import Steering
from envs.task import DecisionTask
from trainers.answers import answer_log_probs, divide, reward_weights
from trainers.constraints import FixedKL, KLBudget
from trainers.grpo import BASE, MODULE, REPLACED, TRL_VERSIONS, SteeredAnswers, SteeringGRPO, SteeringRLOO
from trainers.steps import AnswerSteps

BOTH = pytest.mark.parametrize("kind", [SteeringGRPO, SteeringRLOO])


def perturbed(steering: Steering, size: float = 0.05) -> None:
    """Away from the identity, where the KL and its gradient are not 0."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.normal_(0, size)


def watched(trainer: Any) -> dict[str, Any]:
    """What one step samples, and the gradients that it ends with; the step itself is held back."""
    seen: dict[str, Any] = {}
    plain = trainer._sample

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        seen["prompts"], seen["answers"] = prompts, plain(prompts)
        return seen["answers"]

    trainer._sample = sample
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update(gradients=[p.grad.clone() for p in trainer.steering.parameters()])
    )
    trainer.optimizer.hold = True
    return seen


def log_probs(task: DecisionTask, prompt: list[int], answer: list[int], scale: float = 1.0) -> torch.Tensor:
    """(T,) of an answer's tokens, in a forward pass of its own."""
    task.handle.scale = scale
    logits = task.backbone.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
    task.handle.scale = 1.0
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def rewards_by_hand(task: DecisionTask, handles: list[int], answers: list[list[int]], weight: float) -> list[float]:
    """Each answer's reward with its weight: the preference is the batch's own, and the width is half."""
    decode = task.backbone.tokenizer.decode
    named = [
        LETTERS.match(decode(a, skip_special_tokens=True), task.decisions[h])
        for h, a in zip(handles, answers, strict=True)
    ]
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for handle, index in zip(handles, named, strict=True):
        if task.decisions[handle].ambiguous and index is not None:
            counts[task.decisions[handle].context][index] += 1
    kinds = [task.decisions[handle].ambiguous for handle in handles]
    free, bound = sum(kinds), len(kinds) - sum(kinds)
    found = []
    for handle, index, ambiguous in zip(handles, named, kinds, strict=True):
        if not ambiguous:
            found.append((1.0 if index == task.decisions[handle].answer else -1.0) * weight * len(kinds) / bound)
            continue
        if index is None:
            fair = -1.0
        else:
            count = counts[task.decisions[handle].context]
            fair = max(-1.0, min(1.0, -(count[index] / sum(count) - 0.5) / 0.5))
        found.append(fair * len(kinds) / free)
    return found


# The gradients


def run_one_step(kind: Any, beta: float, **options: Any) -> tuple[DecisionTask, dict[str, Any], Any, list[float]]:
    task, steering = answer_task()
    perturbed(steering)
    logged: list[dict[str, float]] = []
    trainer = answer_trainer(
        kind, task, steering, kl=FixedKL(beta), unambiguous_weight=0.5, on_step=lambda _, values: logged.append(values),
        **options,
    )  # fmt: skip
    seen = watched(trainer)
    handles = [int(handle) for handle in trainer.train_dataset["index"]]
    trainer.train()
    repeated = [handle for handle in handles for _ in range(4)]
    assert [task.backbone.encode(task.decisions[h]).prompt for h in repeated] == [tuple(p) for p in seen["prompts"]]
    trainer.release()
    return task, seen, trainer, rewards_by_hand(task, repeated, seen["answers"], 0.5)


def assert_gradients(steering: Steering, loss: torch.Tensor, seen: dict[str, Any]) -> None:
    expected = torch.autograd.grad(loss, list(steering.parameters()))
    assert max(float(g.abs().max()) for g in expected) > 1e-4
    for found, wanted in zip(seen["gradients"], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"share_prompts": False}, {"micro_batch": 20}], ids=["shared", "trl", "parts"])
def test_the_gradient_of_grpo_is_that_of_its_formula(options: dict[str, Any]) -> None:
    task, seen, trainer, rewards = run_one_step(SteeringGRPO, 0.3, **options)
    loss = torch.zeros(())
    for start in range(0, len(rewards), 4):
        mean = sum(rewards[start : start + 4]) / 4
        for row in range(start, start + 4):
            prompt, answer = seen["prompts"][row], seen["answers"][row]
            own = log_probs(task, prompt, answer)
            with torch.no_grad():
                base = log_probs(task, prompt, answer, scale=0.0)
            ratio = (own - own.detach()).exp()
            kl = (base - own).exp() - (base - own) - 1
            # dr_grpo: over the answers and the longest length; TRL's KL has the ratio for an unbiased gradient.
            loss = loss + (-(rewards[row] - mean) * ratio + 0.3 * kl * ratio).sum() / (len(rewards) * TOKENS)
    assert_gradients(trainer.steering, loss, seen)


@pytest.mark.parametrize("options", [{}, {"share_prompts": False}, {"micro_batch": 20}], ids=["shared", "trl", "parts"])
def test_the_gradient_of_rloo_is_that_of_its_formula(options: dict[str, Any]) -> None:
    task, seen, trainer, rewards = run_one_step(SteeringRLOO, 0.3, **options)
    totals = [log_probs(task, p, a).sum() for p, a in zip(seen["prompts"], seen["answers"], strict=True)]
    with torch.no_grad():
        base = [log_probs(task, p, a, 0.0).sum() for p, a in zip(seen["prompts"], seen["answers"], strict=True)]
    paid = [r - 0.3 * float(own.detach() - b) for r, own, b in zip(rewards, totals, base, strict=True)]
    loss = torch.zeros(())
    for start in range(0, len(paid), 4):
        group = paid[start : start + 4]
        for row in range(start, start + 4):
            advantage = paid[row] - (sum(group) - paid[row]) / 3
            loss = loss - advantage * totals[row] / len(paid)
    assert_gradients(trainer.steering, loss, seen)


def test_scaled_rewards_are_divided_by_the_spread_among_the_answers() -> None:
    task, seen, trainer, rewards = run_one_step(SteeringGRPO, 0.0, scale_rewards="group")
    loss = torch.zeros(())
    for start in range(0, len(rewards), 4):
        group = torch.tensor(rewards[start : start + 4])
        for row in range(start, start + 4):
            advantage = float((group[row - start] - group.mean()) / (group.std() + 1e-4))
            loss = loss - advantage * log_probs(task, seen["prompts"][row], seen["answers"][row]).sum() / (
                len(rewards) * TOKENS
            )
    assert_gradients(trainer.steering, loss, seen)


# One copy of the model


@BOTH
def test_the_reference_is_the_model_itself_at_scale_zero(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a second copy of the model was loaded")

    for module in (trl.trainer.grpo_trainer, trl.trainer.rloo_trainer):
        monkeypatch.setattr(module, "create_model_from_path", refuse)
    task, steering = answer_task()
    trainer = answer_trainer(kind, task, steering, kl=FixedKL(0.5))
    assert trainer.ref_model is BASE
    assert trainer.beta == 0.5
    perturbed(steering)
    prompt, answer = list(task.backbone.encode(task.decisions[0]).prompt), [65, 66, 67]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        found = [
            trainer._get_per_token_logps_and_entropies(m, ids, torch.ones_like(ids), 3)[0][0]
            for m in (BASE, trainer.model)
        ]
        for scale, values in zip((0.0, 1.0), found, strict=True):
            torch.testing.assert_close(values, log_probs(task, prompt, answer, scale), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*found)
    assert task.handle.scale == 1.0


@BOTH
def test_only_the_steering_is_trained_and_the_model_is_left_as_it_was(kind: Any) -> None:
    task, steering = answer_task()
    model = task.backbone.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = answer_trainer(kind, task, steering, steps=2)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in steering.parameters()}
    trainer.train()
    trainer.release()
    assert MODULE not in dict(model.named_modules())
    assert "forward" not in vars(model)
    assert not model.training
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(bool(value.any()) for value in steering.tensors().values())


# Shared prompts


@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_shared_log_probabilities_are_those_of_each_answer_alone(layout: str) -> None:
    task, steering = answer_task()
    perturbed(steering)
    task.backbone.layout, task.backbone.max_tokens = layout, 40  # several passes
    prompts = [list(task.backbone.encode(task.decisions[row]).prompt) for row in (0, 0, 5, 0, 16)]
    answers = [[65, 66, 67], [65], [70, 71], [65, 66, 67], [80, 81, 82]]
    width, longest = 3, max(map(len, prompts))
    ids = torch.tensor(
        [[*[0] * (longest - len(p)), *p, *a, *[0] * (width - len(a))] for p, a in zip(prompts, answers, strict=True)]
    )
    mask = torch.tensor(
        [
            [*[0] * (longest - len(p)), *[1] * len(p + a), *[0] * (width - len(a))]
            for p, a in zip(prompts, answers, strict=True)
        ]
    )
    found, entropies = answer_log_probs(task.backbone, task.backbone.model, ids, mask, width, temperature=1.0)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        torch.testing.assert_close(found[row, : len(answer)], log_probs(task, prompt, answer), atol=1e-5, rtol=1e-5)
        assert not found[row, len(answer) :].any()
        assert not entropies[row, len(answer) :].any()
        table = task.backbone.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(entropies[row, : len(answer)], -(table.exp() * table).sum(-1), atol=1e-4, rtol=1e-4)
    assert found.requires_grad
    assert not entropies.requires_grad
    hot, _ = answer_log_probs(task.backbone, task.backbone.model, ids, mask, width, temperature=2.0)
    logits = task.backbone.model(torch.tensor([[*prompts[1], 65]])).logits[0, -2]
    torch.testing.assert_close(hot[1, 0], (logits / 2).log_softmax(-1)[65], atol=1e-5, rtol=1e-5)


# Constraints


@BOTH
def test_the_price_follows_the_kl_of_the_answers_by_dual_ascent(kind: Any) -> None:
    task, steering = answer_task()
    perturbed(steering, 0.1)
    logged: list[dict[str, float]] = []
    trainer = answer_trainer(
        kind,
        task,
        steering,
        kl=KLBudget(0.01, learning_rate=0.2),
        steps=3,
        on_step=lambda _, values: logged.append(values),
    )
    trainer.train()
    expected = KLBudget(0.01, learning_rate=0.2)
    assert trainer.kl.coefficient != expected.coefficient
    for values in logged:
        expected.update(values["kl"])
        assert values["kl_coefficient"] == pytest.approx(expected.coefficient)
    assert trainer.beta == trainer.kl.coefficient


def test_a_high_price_brings_the_answers_back() -> None:
    kls = []
    for beta in (0.0, 30.0):
        task, steering = answer_task()
        perturbed(steering, 0.1)
        logged: list[dict[str, float]] = []
        trainer = answer_trainer(
            SteeringGRPO, task, steering, kl=FixedKL(beta or 1e-9), steps=8, rate=lambda left: 0.01,
            on_step=lambda _, values, logged=logged: logged.append(values),
        )  # fmt: skip
        trainer.train()
        kls.append(logged[-1]["kl"])
    assert kls[1] < 0.7 * kls[0]


def test_the_proximal_step_leaves_exact_zeros() -> None:
    task, steering = answer_task()
    logged: list[dict[str, float]] = []
    answer_trainer(
        SteeringGRPO, task, steering, sparsity=0.02, steps=4, on_step=lambda _, values: logged.append(values)
    ).train()
    values = torch.cat([value.flatten() for value in steering.tensors().values()])
    zero = float((values == 0).float().mean())
    assert 0.05 < zero < 0.999
    assert logged[-1]["sparsity"] == pytest.approx(zero)


def test_whitening_gives_every_coordinate_its_own_step() -> None:
    task, steering = answer_task()
    trainer = answer_trainer(SteeringGRPO, task, steering)
    trainer.whiten(3, damping=0.1)
    sizes = [trainer.optimizer.state[p]["size"] for p in steering.parameters()]
    assert any(float(size.std()) > 0.1 for size in sizes)
    plain = answer_trainer(SteeringGRPO, *answer_task())
    assert all(bool((plain.optimizer.state[p]["size"] == 1).all()) for p in plain.steering.parameters())


# A run of steps


@BOTH
def test_bias_of_what_is_said_falls(kind: Any) -> None:
    task, steering = answer_task(facts=False)
    evaluator = AnswerEvaluator(task.backbone, task.decisions, LETTERS, task.handle, samples=64, max_new_tokens=TOKENS)

    def said(scale: float) -> tuple[float, float]:
        report = bias_report(evaluator.measure(scale).measurement.policy, evaluator.decisions, bootstrap=0)
        return report.paper, report.abstention

    bias, nobody = said(0.0)
    answer_trainer(
        kind, task, steering, steps=20, unambiguous=0, num_generations=8, rate=lambda left: 0.01 * left
    ).train()
    after, nobody_after = said(1.0)
    assert bias > 0.4
    assert after < 0.8 * bias  # 0.5 to 0.7 of it with the seeds 0 to 3
    assert nobody_after < 0.5 * nobody


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for seed in (0, 0, 1):
        task, steering = answer_task()
        answer_trainer(SteeringGRPO, task, steering, steps=2, seed=seed).train()
        runs.append(steering.tensors())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not all(torch.equal(runs[0][key], runs[2][key]) for key in runs[0])


def test_the_learning_rate_follows_the_schedule() -> None:
    logged: list[float] = []
    answer_trainer(
        SteeringGRPO, *answer_task(), steps=4, rate=lambda left: 0.01 * left + 0.001,
        on_step=lambda _, values: logged.append(values["learning_rate"]),
    ).train()  # fmt: skip
    assert logged == pytest.approx([0.01 * left + 0.001 for left in (1.0, 0.75, 0.5, 0.25)])


def test_training_ends_where_it_is_asked_to() -> None:
    steps: list[int] = []

    def on_step(step: int, _: dict[str, float]) -> None:
        steps.append(step)
        trainer.stop_requested = step == 2

    trainer = answer_trainer(SteeringGRPO, *answer_task(), steps=6, on_step=on_step)
    trainer.train()
    assert steps == [1, 2, 3]  # the flag is looked at when a step ends


def test_prompts_are_those_of_the_backbone() -> None:
    task, steering = answer_task()
    trainer = answer_trainer(SteeringGRPO, task, steering)
    row = trainer.train_dataset[0]
    decision = task.decisions[row["index"]]
    assert row["prompt"] == task.backbone.prompt_text(decision)
    assert trainer._tokenize_prompts([row["prompt"]])[0] == [list(task.backbone.encode(decision).prompt)]


@BOTH
def test_every_method_of_trl_that_is_replaced_is_there(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [SteeredAnswers, AnswerSteps, kind]
    own = {name for cls in mixed for name in vars(cls) if callable(vars(cls)[name]) and name != "__init__"}
    replaced = {
        name for name in own if any(hasattr(base, name) for base in kind.__mro__ if base not in (*mixed, object))
    }
    assert replaced == set(REPLACED)
    trainer = kind.__mro__[3]
    for name in REPLACED:
        with monkeypatch.context() as patch:
            for base in trainer.__mro__:
                if name in vars(base):
                    patch.delattr(base, name)
            with pytest.raises(UserError, match=rf"has no {trainer.__name__}\.{name}, .*pip install 'trl>=1.16,<1.17'"):
                answer_trainer(kind, *answer_task())


@BOTH
def test_a_step_calls_every_method_of_trl_that_is_replaced(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of ours is passed by, as it would be where TRL goes another way."""
    called: set[str] = set()
    for owner in (SteeredAnswers, kind):
        for name in set(vars(owner)) & set(REPLACED):
            plain = vars(owner)[name]

            def noted(*args: Any, plain: Any = plain, name: str = name, **options: Any) -> Any:
                called.add(name)
                return plain(*args, **options)

            monkeypatch.setattr(owner, name, noted)
    answer_trainer(kind, *answer_task(), steps=1).train()
    assert called == set(REPLACED)


def test_the_package_asks_for_the_versions_of_trl_that_work() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"trl{TRL_VERSIONS}" in project["optional-dependencies"]["grpo"]


# How a step is divided


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "expected"), [(1, None, (80, 1)), (2, None, (40, 1)), (2, 10, (10, 4)), (5, 16, (16, 1))]
)
def test_the_answers_of_a_step_are_divided(ranks: int, micro_batch: int | None, expected: tuple[int, int]) -> None:
    assert divide(20, 4, ranks, micro_batch) == expected


def test_answers_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UserError, match=r"80 answers \(20 decisions x num_generations 4\), which 3 processes cannot"):
        divide(20, 4, 3, None)
    with pytest.raises(UserError, match=r"40 in each of 2 processes, which a micro_batch of 12 does not divide"):
        divide(20, 4, 2, 12)


def test_the_weights_make_a_mean_of_each_kind() -> None:
    assert reward_weights(12, 4, 0.5) == pytest.approx([16 / 12, 0.5 * 16 / 4])
    assert reward_weights(12, 0, 0.5) == [1.0, 0.0]
