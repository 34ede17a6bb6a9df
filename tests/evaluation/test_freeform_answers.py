"""Measuring what is said: frequencies, abstention, accuracy and bias of canned answers, counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from answering import LETTERS, TOKENS, speaking_backbone, spoken_set
from tiny import byte_tokenizer, tiny_llama

import dso.evaluation.answers
from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.matching import Matcher
from dso.evaluation.answers import NOBODY, AnswerEvaluator, with_nobody
from dso.evaluation.bias import bias_report
from dso.models.backbone import Backbone
from dso.steering.model import Steering

AH = (Candidate(text=" A", group="female"), Candidate(text=" H", group="male"))
SAID = {
    "nurse/1": ("A", "A", "A", "x"),
    "nurse/2": ("A", "H", "A", "H"),
    "pilot/1": ("H", "H", "H", "H"),
    "pilot/2": ("x", "y", "z", ""),
    "fact/A": ("A", "A", "H", "x"),
    "fact/H": ("H", "H", "H", "H"),
}


def decision(ident: str) -> Decision:
    context, unit = ident.split("/")
    answer = "AH".index(unit) if context == "fact" else None
    return Decision(
        id=ident, context=context, kind="ambiguous" if answer is None else "unambiguous", prompt=f"{ident}?",
        candidates=AH, answer=answer, unit=unit,
    )  # fmt: skip


def decisions() -> DecisionSet:
    return DecisionSet(tuple(map(decision, SAID)), ("female", "male"), "canned")


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> AnswerEvaluator:
    """One whose answers are those of :data:`SAID`."""
    backbone = Backbone(tiny_llama(), byte_tokenizer(), "tiny")
    texts = {backbone.encode(decision(ident)).prompt: list(said) for ident, said in SAID.items()}

    def canned(_: Backbone, prompts, **__) -> list[list[int]]:
        rest = {prompt: list(said) for prompt, said in texts.items()}
        return [backbone.tokenizer(rest[tuple(p)].pop(0)).input_ids or [1] for p in prompts]

    monkeypatch.setattr(dso.evaluation.answers, "sample", canned)
    return AnswerEvaluator(backbone, decisions(), Matcher(), samples=4, max_new_tokens=2)


def test_frequencies_stand_where_probabilities_are_expected(evaluator: AnswerEvaluator) -> None:
    answers = evaluator.measure(0.0)
    assert dict(zip(SAID, answers.texts, strict=True)) == SAID
    assert answers.named.tolist() == [
        [0, 0, 0, -1], [0, 1, 0, 1], [1, 1, 1, 1], [-1, -1, -1, -1], [0, 0, 1, -1], [1, 1, 1, 1],
    ]  # fmt: skip
    assert answers.measurement.policy.tolist() == [
        [0.75, 0, 0.25], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.25, 0.25], [0, 1, 0],
    ]  # fmt: skip
    assert answers.measurement.answer_mass.tolist() == [0.75, 1, 1, 0, 0.75, 1]
    assert answers.measurement.kl.tolist() == [0] * 6


def test_bias_and_abstention_are_those_of_the_frequencies(evaluator: AnswerEvaluator) -> None:
    report = bias_report(evaluator.measure(0.0).measurement.policy, evaluator.decisions, bootstrap=0)
    # Nurses: (0.75 + 0.5) of 1.75 named are A. Pilots: all that are named are H.
    assert report.preferences["nurse"]["female"] == pytest.approx(1.25 / 1.75)
    assert report.context_bias == pytest.approx({"nurse": 2 * (1.25 / 1.75 - 0.5), "pilot": 1.0})
    assert report.abstention == pytest.approx((0.25 + 0 + 0 + 1) / 4)
    assert math.isnan(report.log_odds.bias.value)


def test_accuracy_is_the_share_of_right_answers(evaluator: AnswerEvaluator) -> None:
    found = evaluator.accuracy(evaluator.measure(0.0))
    assert found.value == pytest.approx((2 + 4) / 8)
    assert found.low <= found.value <= found.high


def test_decisions_get_a_candidate_for_nobody() -> None:
    asked = with_nobody(decisions())
    assert all(d.candidates == (*AH, Candidate(text=NOBODY, group=ABSTAIN)) for d in asked)
    assert [d.answer for d in asked] == [d.answer for d in decisions()]


def steered() -> tuple[Backbone, DecisionSet, object]:
    backbone = speaking_backbone()
    steering = Steering.for_model(backbone.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.normal_(0, 0.05)
    return backbone, spoken_set(), steering.attach(backbone.model)


def test_processes_that_share_the_work_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnswerEvaluator, "PORTION", 5)
    backbone, asked, handle = steered()
    whole = AnswerEvaluator(backbone, asked, LETTERS, handle, samples=3, max_new_tokens=TOKENS).measure(1.0)
    parts: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):
        evaluator = AnswerEvaluator(
            backbone, asked, LETTERS, handle, samples=3, max_new_tokens=TOKENS, rank=rank, size=2,
            add=lambda values, rank=rank: parts[rank].append(values.clone()) or values,
        )  # fmt: skip
        evaluator.measure(1.0)
    sums = [first + second for first, second in zip(*parts, strict=True)]
    merged = AnswerEvaluator(
        backbone, asked, LETTERS, handle, samples=3, max_new_tokens=TOKENS, rank=1, size=2, add=lambda _: sums.pop(0)
    ).measure(1.0)
    assert merged.texts == whole.texts
    assert merged.measurement.kl.tolist() == pytest.approx(whole.measurement.kl.tolist())
    assert min(whole.measurement.kl) > 0


def test_measuring_leaves_scale_and_generator_as_they_were() -> None:
    backbone, asked, handle = steered()
    handle.scale = 0.25
    torch.manual_seed(7)
    before = torch.get_rng_state()
    evaluator = AnswerEvaluator(backbone, asked, LETTERS, handle, samples=2, max_new_tokens=TOKENS)
    first, again = evaluator.measure(1.0), evaluator.measure(1.0)
    assert first.texts == again.texts
    assert handle.scale == 0.25
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluator.measure(0.0).texts != first.texts


def test_scale_zero_is_the_base_model() -> None:
    backbone, asked, handle = steered()
    base = AnswerEvaluator(backbone, asked, LETTERS, handle, samples=2, max_new_tokens=TOKENS).measure(0.0)
    handle.detach()
    bare = AnswerEvaluator(backbone, asked, LETTERS, samples=2, max_new_tokens=TOKENS).measure(0.0)
    assert bare.texts == base.texts
    with pytest.raises(ValueError, match=r"scale 1\.0 needs a steering"):
        AnswerEvaluator(backbone, asked, LETTERS, samples=2).measure(1.0)


def test_what_cannot_be_asked_or_read_is_refused_before_anything_is_sampled() -> None:
    backbone, asked, _ = steered()
    pictured = replace(asked[0], prompt="<image> who?", images=("a.png",))
    with pytest.raises(DecisionError, match="has images; free-form answers are for text"):
        AnswerEvaluator(backbone, DecisionSet((pictured, *asked[1:]), asked.groups), LETTERS)
    alike = replace(
        asked[0], candidates=tuple(Candidate(text=t, group=g) for t, g in zip("Aa", asked.groups, strict=True))
    )
    with pytest.raises(DecisionError, match="can never name the candidate 'a'"):
        AnswerEvaluator(backbone, DecisionSet((alike,), asked.groups), Matcher(ignore_case=True))
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        AnswerEvaluator(backbone, asked, LETTERS, max_new_tokens=0)
