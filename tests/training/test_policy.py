"""The SB3 policy is the steered model's own distribution, and only operators and value head are its parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_runs import learn, letters_set, make_trainer
from torch import Tensor

from dso.decisions.decision import Candidate, Decision, DecisionSet
from trainers.policy import choose
from trainers.ppo import SteeringPPO


def randomise(trainer: SteeringPPO, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    for value in trainer.policy.steering.tensors().values():
        value.data.copy_(size * torch.randn(value.shape, generator=generator))


@torch.no_grad()
def log_prob(trainer: SteeringPPO, prompt: str, candidate: str) -> float:
    """log p(candidate | prompt) from one bare forward pass of the model as it is."""
    backbone = trainer.task.backbone
    prefix, whole = (backbone.tokenizer(text, return_tensors="pt").input_ids for text in (prompt, prompt + candidate))
    table = torch.log_softmax(backbone.model(whole).logits[0].double(), -1)
    return sum(float(table[at - 1, whole[0, at]]) for at in range(prefix.shape[1], whole.shape[1]))


def mixed_set() -> DecisionSet:
    """Three, two and two candidates, of one to five tokens."""
    texts = (("F", "M", "X"), ("Fay", "M"), ("Marge", "Xi"))
    groups = {"F": "female", "M": "male", "X": "nonbinary"}
    decisions = [
        Decision(
            id=str(number), context="nurse", kind="ambiguous", prompt=f"{number}: the nurse is ",
            candidates=tuple(Candidate(text=text, group=groups[text[0]]) for text in names),
        )
        for number, names in enumerate(texts)
    ]  # fmt: skip
    return DecisionSet(tuple(decisions), ("female", "male", "nonbinary"), "mixed")


# What it decides


@pytest.mark.parametrize("length_normalised", [False, True])
def test_the_policy_is_the_softmax_of_the_candidates_log_probabilities(length_normalised: bool) -> None:
    trainer = make_trainer(mixed_set(), ambiguous=3, length_normalised=length_normalised)
    randomise(trainer)
    outcome = trainer.policy.decide(np.array([2, 0, 1]), next_token=True)
    for row, handle in enumerate((2, 0, 1)):
        decision = trainer.task.decisions[handle]
        scores = torch.tensor([log_prob(trainer, decision.prompt, c.text) for c in decision.candidates])
        if length_normalised:
            scores /= torch.tensor([len(c.text) for c in decision.candidates])  # one token a byte
        expected = torch.full((3,), -torch.inf)
        expected[: len(scores)] = torch.log_softmax(scores, 0)
        torch.testing.assert_close(outcome.log_policy[row].detach(), expected, rtol=1e-4, atol=1e-4)
        mass = sum(math.exp(log_prob(trainer, decision.prompt, c.text)) for c in decision.candidates)
        assert outcome.answer_mass[row].item() == pytest.approx(mass, rel=1e-3)
        first = math.exp(outcome.next_token[row, trainer.task.backbone.tokenizer("F").input_ids[0]].item())
        assert first == pytest.approx(math.exp(log_prob(trainer, decision.prompt, "F")), rel=1e-3)
    assert trainer.policy.decide(np.array([0])).next_token is None


def test_the_running_preference_is_that_of_the_policy_that_is_measured() -> None:
    texts = {"female": "F", "male": "Marge"}
    trainer = make_trainer(letters_set(facts=False, letters=texts), length_normalised=True)
    prompts = [d.prompt for d in trainer.task.decisions if d.context == "nurse"]
    shares = []
    for prompt in prompts:  # by the mean per token; by the sum "F" alone is chosen
        scores = torch.tensor([log_prob(trainer, prompt, text) / len(text) for text in texts.values()])
        shares.append(scores.softmax(0))
        assert log_prob(trainer, prompt, "F") - log_prob(trainer, prompt, "Marge") > 3
    learn(trainer, 1)  # whose preference is that of the batch: every decision once
    torch.testing.assert_close(trainer.task.preference[0], torch.stack(shares).mean(0), rtol=1e-4, atol=1e-4)
    assert 0.2 < float(trainer.task.preference[0, 0]) < 0.8


def test_sb3_calls_agree_with_decide() -> None:
    trainer = make_trainer(mixed_set(), ambiguous=3)
    randomise(trainer)
    policy, observations = trainer.policy, torch.tensor([0, 1, 2])
    pi = policy.decide(observations).log_policy.detach().exp()
    actions, values, chosen = policy(observations)
    torch.testing.assert_close(chosen.exp(), pi.gather(1, actions[:, None])[:, 0])
    assert values.tolist() == [0.0, 0.0, 0.0]
    _, again, entropy = policy.evaluate_actions(observations, actions[:, None].float())
    torch.testing.assert_close(again, chosen)
    by_hand = [-sum(p * math.log(p) for p in row if p) for row in pi.tolist()]
    assert entropy.tolist() == pytest.approx(by_hand, rel=1e-5)
    best = pi.argmax(1).tolist()
    assert trainer.predict(np.arange(3), deterministic=True)[0].tolist() == best
    assert trainer.predict(np.array(1), deterministic=True)[0].item() == best[1]
    torch.testing.assert_close(policy.get_distribution(observations).distribution.probs, pi)
    assert policy.predict_values(observations).tolist() == [0.0, 0.0, 0.0]


def test_choices_follow_the_policy_and_never_fall_on_an_absent_candidate() -> None:
    torch.manual_seed(0)
    log_policy = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.1, 0.0]]).log()
    drawn = torch.stack([choose(log_policy) for _ in range(4000)])
    shares = torch.stack([(drawn == k).float().mean(0) for k in range(3)], 1)
    error = (log_policy.exp() * (1 - log_policy.exp()) / 4000).sqrt()
    assert ((shares - log_policy.exp()).abs() <= 4 * error).all()
    assert shares[1, 2] == 0
    assert choose(log_policy, deterministic=True).tolist() == [1, 0]


# What it holds


@pytest.mark.parametrize(("operator", "keys"), [("affine", {"a", "b"}), ("bias", {"b"})])
def test_only_the_operators_are_parameters(operator: str, keys: set[str]) -> None:
    trainer = make_trainer(operator=operator)
    own = {id(value) for value in trainer.policy.steering.tensors().values()}
    assert {id(value) for value in trainer.policy.parameters()} == own
    assert {id(value) for group in trainer.policy.optimizer.param_groups for value in group["params"]} == own
    assert {key.rsplit(".", 1)[-1] for key in trainer.policy.steering.tensors()} == keys
    assert len(own) == 5 * len(keys)  # a tiny Llama has 2 * 2 + 1 norms


def test_the_value_head_is_one_linear_layer_more_and_starts_at_zero() -> None:
    policy = make_trainer(baseline="value").policy
    extra = {name: value for name, value in policy.named_parameters() if not name.startswith("steering.")}
    assert {name: tuple(value.shape) for name, value in extra.items()} == {
        "value_head.weight": (1, 16),
        "value_head.bias": (1,),
    }
    assert not any(value.any() for value in extra.values())


@pytest.mark.parametrize("baseline", ["context", "value", "none"])
def test_nothing_of_the_backbone_is_in_the_state(baseline: str) -> None:
    trainer = make_trainer(baseline=baseline)
    state = trainer.policy.state_dict()
    assert all(key.startswith(("steering.", "value_head.")) or key in ("context_values", "whitening") for key in state)
    backbone = {value.data_ptr() for value in trainer.task.backbone.model.parameters()}
    assert not backbone & {value.data_ptr() for value in state.values() if value.numel()}
    assert not any(module is trainer.task.backbone.model for module in trainer.policy.modules())
    assert (
        sum(value.numel() for value in state.values()) == 2 * 5 * 32 + {"context": 8, "value": 17, "none": 0}[baseline]
    )


@pytest.mark.parametrize("estimator", ["expected", "reinforce", "ppo"])
@pytest.mark.parametrize("baseline", ["context", "value"])
def test_a_step_gives_gradients_to_the_operators_and_none_to_the_backbone(estimator: str, baseline: str) -> None:
    options = {"baseline": baseline, "estimator": estimator, "n_epochs": 1, "learning_rate": 0.01}
    trainer = make_trainer(unambiguous=8, **options)
    model = trainer.task.backbone.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.learn(trainer.env.num_envs, log_interval=None)
    for name, value in trainer.policy.named_parameters():
        assert value.grad is not None, name
        assert value.grad.any(), name
        assert value.any(), name
    for name, value in model.named_parameters():
        assert value.grad is None, name
        assert not value.requires_grad, name
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline is 'mean', expected one of context, value, none"):
        make_trainer(baseline="mean")


# Baselines


def cells(trainer: SteeringPPO) -> Tensor:
    return trainer.policy.context_values


def test_the_context_baseline_moves_a_fifth_of_the_way_to_the_batch_mean() -> None:
    trainer = make_trainer(letters_set(), unambiguous=8)
    task, policy = trainer.task, trainer.policy
    place = {decision.id: index for index, decision in enumerate(task.decisions)}
    handles = np.array([place[i] for i in ("nurse/0", "nurse/1", "pilot/3", "nurse/fact0")])
    policy.update_baseline(handles, torch.tensor([1.0, 0.5, -0.4, -1.0]))
    nurse, pilot = (task.decisions.contexts.index(job) for job in ("nurse", "pilot"))
    expected = torch.zeros(4, 2)
    expected[nurse] = torch.tensor([0.2 * 0.75, 0.2 * -1.0])  # ambiguous, unambiguous
    expected[pilot, 0] = 0.2 * -0.4
    torch.testing.assert_close(cells(trainer), expected)
    policy.update_baseline(handles[:1], torch.tensor([-1.0]), decay=0.5)
    expected[nurse, 0] = 0.5 * 0.15 + 0.5 * -1.0
    torch.testing.assert_close(cells(trainer), expected)
    values = policy.decide(handles).values
    assert values.tolist() == pytest.approx([-0.425, -0.425, -0.08, -0.2])
    assert not values.requires_grad


@pytest.mark.parametrize("baseline", ["value", "none"])
def test_other_baselines_keep_no_running_means(baseline: str) -> None:
    trainer = make_trainer(baseline=baseline)
    trainer.policy.update_baseline(np.arange(3), torch.ones(3))
    assert cells(trainer).numel() == 0
    assert trainer.policy.decide(np.arange(3)).values.tolist() == [0.0, 0.0, 0.0]


def test_the_value_head_reads_what_the_output_layer_reads() -> None:
    trainer = make_trainer(baseline="value")
    randomise(trainer)
    with torch.no_grad():
        trainer.policy.value_head.weight.copy_(torch.linspace(-1, 1, 16)[None])
        trainer.policy.value_head.bias.fill_(0.5)
    backbone, decision = trainer.task.backbone, trainer.task.decisions[3]
    with torch.no_grad():
        ids = backbone.tokenizer(decision.prompt, return_tensors="pt").input_ids
        hidden = backbone.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    values = trainer.policy.decide(np.array([3])).values
    assert values.item() == pytest.approx(float(hidden @ torch.linspace(-1, 1, 16)) + 0.5, rel=1e-4)
    values.sum().backward()
    assert trainer.policy.value_head.weight.grad is not None
    assert all(value.grad is None for value in trainer.policy.steering.parameters())
