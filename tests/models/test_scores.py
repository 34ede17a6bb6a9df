"""The rule of scoring: candidates that begin one another, KL at every answer position, what a steering states."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.errors import UserError
from dso.evaluation.evaluator import Evaluator
from dso.models.backbone import Backbone
from dso.models.encoded import Encoded, answer_positions, join_positions
from dso.models.scores import Scores, Scoring, kl_divergence, log_stop
from dso.models.scoring import score
from dso.steering.handle import attached
from dso.steering.model import Steering


def decide(prompt, *texts: str, kind: str = "ambiguous") -> Decision:
    candidates = tuple(Candidate(text=text, group=group) for text, group in zip(texts, "abcd", strict=False))
    return Decision(id=f"{prompt}", context="c", kind=kind, prompt=prompt, candidates=candidates)


def moved(model, seed: int, size: float = 0.2, **facts) -> Steering:
    steering = Steering.for_model(model, **facts)
    generator = torch.Generator().manual_seed(seed)
    for value in steering.tensors().values():
        value.data = size * torch.randn(value.shape, generator=generator)
    return steering


# ---------------------------------------------------------------- candidates that begin one another


def test_what_goes_on_to_a_longer_candidate_is_not_the_shorter_one_s():
    # Behind "" token 0 has 0.6; behind 0: token 1 has 0.7, token 2 has 0.2; behind 0 1: token 2 has 0.4.
    table = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]).log()
    rows = {(): 0, (0,): 1, (0, 1): 2}
    assert log_stop(table, rows, [(1,)], (0,)).exp().item() == pytest.approx(0.3)
    assert log_stop(table, rows, [(1,), (2,)], (0,)).exp().item() == pytest.approx(0.1)
    assert log_stop(table, rows, [(1, 2)], (0,)).exp().item() == pytest.approx(1 - 0.7 * 0.4)
    # One that begins another counts once: what goes on to it goes on to both.
    assert log_stop(table, rows, [(1,), (1, 2)], (0,)).exp().item() == pytest.approx(0.3)


def test_where_hardly_anything_stops_the_logarithm_and_its_gradient_are_exact():
    # p(token 1) = 1 - 2e-13, of which float32 knows nothing: 1 - p is 0.
    logits = torch.tensor([[0.0, 30.0, 0.0]], requires_grad=True)
    assert 1 - logits.softmax(-1)[0, 1] == 0
    stop = log_stop(logits.log_softmax(-1), {(0,): 0}, [(1,)], (0,))
    assert stop.item() == pytest.approx(math.log(2) - 30, rel=1e-6)
    stop.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -1.0, 0.5]]))


@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_answers_that_begin_one_another_are_never_worth_more_than_one(layout):
    # Letters of which the second is nearly sure: A, AA and AAA would have 0.98 and more each, 2.9 together.
    model = tiny_llama()
    bias = torch.full((258,), -8.0)
    bias[70] = 8.0
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.1 + bias)
    encoded = [Encoded((5, 6), ((70,), (70, 70), (70, 70, 70)))]
    scores = score(model, encoded, layout=layout, max_tokens=100)
    whole = model(torch.tensor([[5, 6, 70, 70]])).logits[0].log_softmax(-1)[1:, 70].double().exp()
    one, two, three = whole.cumprod(0).tolist()
    assert one > 0.98 and one + two + three > 2.9
    torch.testing.assert_close(
        scores.log_probs[0].exp(), torch.tensor([one - two, two - three, three]), rtol=1e-3, atol=1e-6
    )
    assert scores.answer_mass().item() == pytest.approx(one, rel=1e-5) and one < 1


def test_the_gradient_of_exclusive_candidates_is_that_of_the_difference():
    model = tiny_llama().double()
    norm = model.model.norm.weight.requires_grad_(True)
    scores = score(model, [Encoded((5, 6), ((7,), (7, 8)))], layout="packed", max_tokens=100)
    (found,) = torch.autograd.grad(scores.log_probs[0, 0], [norm])
    table = model(torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)
    p, q = table[1, 7].exp(), table[2, 8].exp()
    (wanted,) = torch.autograd.grad((p - p * q).log(), [norm])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- KL at every answer position


def test_positions_weigh_by_candidate_and_token():
    one, two = Encoded((1,), ((5,), (6,))), Encoded((1,), ((5, 6), (5, 7, 8), (9,)))
    assert one.answer_positions() == {(): 1.0}
    # Thirds by candidate, then halves and thirds by token; both first tokens 5 share the position behind them.
    expected = {(): 1 / 6 + 1 / 9 + 1 / 3, (5,): 1 / 6 + 1 / 9, (5, 7): 1 / 9}
    assert two.answer_positions() == pytest.approx(expected)
    positions = answer_positions([one, two, one])
    assert positions.count == 3 and positions.decision.tolist() == [1, 1]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    weighted = 2 * expected[()] + 4 * expected[(5,)] + 5 * expected[(5, 7)]
    torch.testing.assert_close(positions.mean(values), torch.tensor([1.0, weighted, 3.0]))
    parts = positions.split(values[:, None])
    assert [part[:, 0].tolist() for part in parts] == [[1.0], [2.0, 4.0, 5.0], [3.0]]
    assert torch.equal(join_positions(parts)[:, 0], values)


def test_kl_sees_the_position_where_the_choice_is_made():
    """Both candidates begin with the same token; a steering that changes what comes behind it only."""
    before, after = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    positions = answer_positions([Encoded((1,), ((0, 0), (0, 1)))])
    scores = Scores(torch.zeros(1, 2), torch.full((1, 2), 2), after, None, positions)
    second = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert scores.kl(before).item() == pytest.approx(second / 2)
    assert kl_divergence(after, before)[0].item() == pytest.approx(0.0, abs=1e-7)  # all that the first one says
    with pytest.raises(ValueError, match="score with next_token=True"):
        Scores(torch.zeros(1, 2), torch.ones(1, 2)).kl(before)


def test_answers_of_one_token_have_the_kl_behind_the_prompt_bit_for_bit():
    model = tiny_llama()
    encoded = [Encoded((5, 6), ((7,), (8,))), Encoded((5, 9), ((7,), (8,)))]
    base = score(model, encoded, layout="packed", max_tokens=100, next_token=True)
    with moved(model, 0).on(model):
        found = score(model, encoded, layout="packed", max_tokens=100, next_token=True)
    assert torch.equal(found.kl(base.next_token), kl_divergence(found.next_token, base.next_token))
    assert found.kl(base.next_token).min() > 0.01


# ---------------------------------------------------------------- one rule, used by all


def test_a_steering_is_measured_by_the_rule_that_it_was_trained_with(tmp_path):
    decisions = DecisionSet((decide("The nurse is", " Ann", " Alexander"),), ("a", "b"))
    rule = Scoring(length_normalised=True)
    trained = Backbone(tiny_llama(), byte_tokenizer(), scoring=rule)
    steering = moved(trained.model, 0, scoring=trained.scoring)
    with steering.on(trained.model) as handle:
        wanted = Evaluator(trained, decisions, handle).measure().policy
    steering.save_pretrained(tmp_path / "s")

    read = Steering.from_pretrained(tmp_path / "s")
    assert read.config.scoring == trained.scoring
    plain = Backbone(tiny_llama(), byte_tokenizer())
    with read.on(plain.model) as handle:
        with pytest.raises(UserError, match="length_normalised is True there and False at the model; load the model"):
            Evaluator(plain, decisions, handle)
        unnormalised = plain.score(list(decisions)).policy().exp()[0, 0].item()
    again = Backbone(tiny_llama(), byte_tokenizer(), scoring=read.config.scoring)
    with read.on(again.model) as handle:
        found = Evaluator(again, decisions, handle).measure().policy
    assert found.tolist() == wanted.tolist()
    assert abs(unnormalised - found[0, 0]) > 0.1


def test_a_rule_that_is_none_is_refused():
    for wrong, reason in (
        ({"date": "yesterday"}, "expected YYYY-MM-DD"),
        ({"date": "2024-02-30"}, "expected YYYY-MM-DD"),
        ({"length_normalised": 1}, "expected true or false"),
    ):
        with pytest.raises(UserError, match=reason):
            Scoring(**wrong)


def test_the_base_is_the_base_where_another_steering_is_attached():
    backbone = Backbone(tiny_llama(), byte_tokenizer())
    decisions = DecisionSet(
        (decide("The nurse is", " Ann", " Bob"), decide("The pilot is", " Ann", " Bob")), ("a", "b")
    )
    own, other = moved(backbone.model, 1), moved(backbone.model, 2)
    with own.on(backbone.model) as handle:
        alone = Evaluator(backbone, decisions, handle).curve([0.0, 1.0])
        with other.on(backbone.model, 0.7) as foreign:
            together = Evaluator(backbone, decisions, handle).curve([0.0, 1.0])
            assert (handle.scale, foreign.scale) == (1.0, 0.7)
    assert not attached(backbone.model)
    for one, same in zip(alone, together, strict=True):
        assert (one.policy == same.policy).all() and (one.kl == same.kl).all()
    assert alone[1].kl.min() > 0.01
