"""Measurements against a plain loop: policies, answer mass and KL of the base and the steered model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import alone
from tiny import byte_tokenizer, fact, role, tiny_llama

from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.evaluation import evaluator as evaluation
from dso.evaluation.evaluator import Evaluator, Measurement
from dso.models.backbone import Backbone
from dso.models.scores import Scoring, kl_divergence
from dso.steering.config import SteeringError
from dso.steering.model import Steering


def three(prompt: str) -> Decision:
    """A decision with more candidates than the others."""
    texts = zip((" Ann", " Bob", " no one"), ("female", "male", "abstain"), strict=True)
    candidates = tuple(Candidate(text=text, group=group) for text, group in texts)
    return Decision(id=prompt, context="nurse", kind="ambiguous", prompt=prompt, candidates=candidates)


DECISIONS = DecisionSet(
    (
        role("nurse", "Zoe", "Bob"),
        role("pilot", "Ann", "Max"),
        three("A third: the nurse is"),
        fact("nurse", "pilot", "Eve", "Dan"),
        role("nurse", "Bob", "Zoe", order=1),
    ),
    ("female", "male"),
)


def moved(model, seed: int = 0, scoring: Scoring | None = None) -> Steering:
    steering = Steering.for_model(model, scoring=scoring or Scoring())
    generator = torch.Generator().manual_seed(seed)
    for value in steering.tensors().values():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return steering


@torch.no_grad()
def by_hand(backbone: Backbone, steering: Steering | None, scale: float, normalised: bool = False) -> Measurement:
    """Softmax, sum and KL written out from single prompts; the base model is one that no steering is attached to."""
    encoded = [backbone.encode(decision) for decision in DECISIONS]
    base = alone(tiny_llama(), encoded)
    found = base
    if scale:
        model = tiny_llama()
        with steering.on(model, scale):
            found = alone(model, encoded)
    policy, mass, kl, later = np.zeros((5, 3)), np.zeros(5), np.zeros(5), 4
    for n, e in enumerate(encoded):
        count = len(e.candidates)
        log_probs = found.log_probs[n, :count].double().numpy()
        scores = log_probs / [len(c) for c in e.candidates] if normalised else log_probs
        policy[n, :count] = np.exp(scores) / np.exp(scores).sum()
        mass[n] = np.exp(log_probs).sum()
        known = {(): n}  # all begin with a blank, so that they share two positions
        for candidate in e.candidates:
            for place in range(len(candidate)):
                if candidate[:place] not in known:
                    known[candidate[:place]] = later = later + 1
                p, q = (s.next_token[known[candidate[:place]]].double().exp().numpy() for s in (found, base))
                kl[n] += (p * np.log(p / q)).sum() / len(candidate) / count
    return Measurement(policy, mass, kl)


def assert_close(found: Measurement, wanted: Measurement) -> None:
    for name in ("policy", "answer_mass", "kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_curve_equals_the_loop(normalised, keep):
    backbone = Backbone(tiny_llama(), byte_tokenizer(), scoring=Scoring(length_normalised=normalised))
    steering = moved(backbone.model, scoring=backbone.scoring)
    with steering.on(backbone.model, 0.25) as handle:
        evaluator = Evaluator(backbone, DECISIONS, handle, keep_reference=keep)
        curve = evaluator.curve([0.0, 0.5, 1.0])
        again = evaluator.curve([1.0])
        assert handle.scale == 0.25
    for scale, measured in zip((0.0, 0.5, 1.0), curve, strict=True):
        assert_close(measured, by_hand(backbone, steering, scale, normalised))
    assert_close(again[0], curve[2])
    assert curve[0].kl.tolist() == [0.0] * 5
    assert curve[0].policy[0, 2] == 0.0 and curve[0].policy[2, 2] > 0
    assert curve[2].kl.min() > 0.01
    np.testing.assert_allclose(curve[1].policy.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_change_nothing(backbone, monkeypatch, chunk):
    steering = moved(backbone.model)
    with steering.on(backbone.model) as handle:
        whole = Evaluator(backbone, DECISIONS, handle).curve([0.0, 1.0])
        monkeypatch.setattr(evaluation, "CHUNK", chunk)
        for one, other in zip(Evaluator(backbone, DECISIONS, handle).curve([0.0, 1.0]), whole, strict=True):
            assert_close(one, other)


def test_the_order_of_decisions_and_scales_changes_nothing(backbone):
    steering = moved(backbone.model)
    order = [3, 1, 4, 0, 2]
    turned = DecisionSet(tuple(DECISIONS[i] for i in order), DECISIONS.groups)
    with steering.on(backbone.model) as handle:
        plain = Evaluator(backbone, DECISIONS, handle).curve([0.0, 0.5, 1.0])
        other = Evaluator(backbone, turned, handle).curve([1.0, 0.5, 0.0, 1.0])
    for scale, measured in zip((2, 1, 0, 2), other, strict=True):
        wanted = plain[scale]
        assert_close(measured, Measurement(wanted.policy[order], wanted.answer_mass[order], wanted.kl[order]))


def test_the_reference_is_kept_or_run_again(backbone, monkeypatch):
    steering = moved(backbone.model)
    ran = []
    score = backbone.score
    monkeypatch.setattr(backbone, "score", lambda decisions, **kw: ran.append(len(decisions)) or score(decisions, **kw))
    seen = []
    with steering.on(backbone.model) as handle:
        fresh = Evaluator(backbone, DECISIONS, handle, progress=seen.append)
        kept = Evaluator(backbone, DECISIONS, handle, keep_reference=True)
        fresh.measure(1.0)
        fresh.measure(1.0)
        assert ran == [5] * 4 and seen == [5] * 4
        ran.clear()
        first = kept.measure(1.0)
        next(iter(steering.tensors().values())).data.zero_()  # as in training: the operators move on
        second = kept.measure(1.0)
        assert ran == [5] * 3
        assert np.abs(first.policy - second.policy).max() > 1e-3
        assert_close(second, fresh.measure(1.0))


def test_the_base_model_alone(backbone):
    evaluator = Evaluator(backbone, DECISIONS)
    assert_close(evaluator.measure(0.0), by_hand(backbone, None, 0.0))
    with pytest.raises(ValueError, match=r"scales \[0.0, 1.0\] need a steering; without one there is only scale 0"):
        evaluator.curve([0.0, 1.0])


@pytest.mark.parametrize("scale", [0.25, torch.tensor([0.5, 0.25])])
def test_the_scale_is_put_back_also_after_an_error(backbone, monkeypatch, scale):
    with moved(backbone.model).on(backbone.model, scale) as handle:
        evaluator = Evaluator(backbone, DECISIONS, handle)
        evaluator.measure(1.0)
        assert torch.equal(torch.as_tensor(handle.scale), torch.as_tensor(scale))
        with pytest.raises(SteeringError, match="scale is 2"):
            evaluator.curve([0.0, 2.0])
        assert torch.equal(torch.as_tensor(handle.scale), torch.as_tensor(scale))

        def fail(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(backbone, "score", fail)
        with pytest.raises(KeyboardInterrupt):
            evaluator.measure(1.0)
        assert torch.equal(torch.as_tensor(handle.scale), torch.as_tensor(scale))


def test_several_steerings_over_one_pass_of_the_base_model(backbone, monkeypatch):
    first, second = moved(backbone.model, 1), moved(backbone.model, 2)
    ran = []
    score = backbone.score
    monkeypatch.setattr(backbone, "score", lambda decisions, **kw: ran.append(1) or score(decisions, **kw))
    with first.on(backbone.model, 0.1) as one, second.on(backbone.model, 0.2) as other:
        measured = Evaluator(backbone, DECISIONS, one).settings([(other, 1.0), (None, 0.0), (one, 0.5)])
        assert (one.scale, other.scale) == (pytest.approx(0.1), pytest.approx(0.2))
    assert len(ran) == 3
    assert_close(measured[0], by_hand(backbone, second, 1.0))
    assert_close(measured[1], by_hand(backbone, None, 0.0))
    assert_close(measured[2], by_hand(backbone, first, 0.5))


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    # 0.5 ln 2 + 0.5 ln(2/3); the token that both rule out counts nothing
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_a_decision_that_cannot_be_encoded_is_found_before_anything_runs(monkeypatch):
    backbone = Backbone(tiny_llama(), byte_tokenizer())
    backbone.tokenizer.chat_template = None
    chat = Decision(
        id="chat", context="c", kind="ambiguous", prompt=({"role": "user", "content": "Who?"},),
        candidates=(Candidate(text=" A", group="female"), Candidate(text=" B", group="male")),
    )  # fmt: skip
    monkeypatch.setattr(backbone, "score", lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(ValueError, match="'chat'"):
        Evaluator(backbone, DecisionSet((*DECISIONS, chat)))
