"""Two models judging each other: the two rules by hand-made answers, and the whole on tiny models."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import byte_tokenizer, fact, role, small_set, tiny_llama

from dso.decisions.decision import DecisionError, DecisionSet
from dso.decisions.jsonl import read_jsonl
from dso.evaluation.adjudication import JUDGE, adjudicate, agreed, rule, supports
from dso.models.backbone import Backbone

LIMITS = {"support": 0.6, "near": 0.1}


def ruled(decisions, first, second):
    """Rulings on (policy, support) of the first candidate of each decision, by each of two models."""
    said = [
        ([np.array([p, 1 - p]) for p, _ in model], [np.array([s, 1 - s]) for _, s in model])
        for model in (first, second)
    ]
    found = rule(DecisionSet(tuple(decisions), ("female", "male"), "t"), said, **LIMITS)
    return [(r.made.kind, r.made.answer) if r.made else None for r in found]


def test_an_answer_is_a_fact_if_the_other_judge_finds_it_supported():
    asked = [fact("nurse", "pilot", "Ann", "Bob"), fact("nurse", "pilot", "Eve", "Dan", swap=True)]
    assert ruled(asked, [(0.9, 0.7), (0.2, 0.3)], [(0.6, 0.6), (0.4, 0.4)]) == [("unambiguous", 0), ("unambiguous", 1)]
    # Another answer; a judge who finds too little.
    assert ruled(asked, [(0.9, 0.7), (0.2, 0.3)], [(0.4, 0.6), (0.4, 0.41)]) == [None, None]


def test_a_question_is_fair_if_nobody_finds_an_answer_and_both_are_near_equal_shares_over_the_orders():
    asked = [role("nurse", "Ann", "Bob"), role("nurse", "Bob", "Ann", order=1)]
    # By the order alone: 0.9 and 0.15 are 0.525 together.
    assert ruled(asked, [(0.9, 0.5), (0.15, 0.5)], [(0.5, 0.55), (0.5, 0.45)]) == [("ambiguous", None)] * 2
    biased = [(0.9, 0.5), (0.5, 0.5)]  # 0.7
    assert ruled(asked, biased, [(0.5, 0.5), (0.5, 0.5)]) == [None, None]
    # Both within 0.1 of equal shares, 0.16 from each other.
    assert ruled(asked, [(0.58, 0.5), (0.58, 0.5)], [(0.42, 0.5), (0.42, 0.5)]) == [None, None]
    # One judge reads an answer in one order.
    assert ruled(asked, [(0.5, 0.65), (0.5, 0.5)], [(0.5, 0.5), (0.5, 0.5)]) == [None, ("ambiguous", None)]


def test_support_is_the_share_of_a_judges_yes():
    judge, decision = Backbone(tiny_llama(0), byte_tokenizer(), "tiny"), role("nurse", "Ann", "Bob")
    yes = []
    for name in (" Ann", " Bob"):
        prompt = JUDGE.format(text="Ann and Bob: the nurse is", answer=name)
        ids = [judge.tokenizer(prompt + answer, return_tensors="pt").input_ids for answer in (" yes", " no")]
        start = len(judge.tokenizer(prompt).input_ids)
        logs = [
            judge.model(i).logits[0].log_softmax(-1)[range(start - 1, i.shape[1] - 1), i[0, start:]].sum() for i in ids
        ]
        yes.append(float(logs[0].exp() / (logs[0].exp() + logs[1].exp())))
    np.testing.assert_allclose(supports(judge, [decision])[0], np.array(yes) / sum(yes), rtol=1e-4)


def test_what_is_agreed_is_a_file_of_decisions(tmp_path):
    models = [Backbone(tiny_llama(seed), byte_tokenizer(), "tiny") for seed in (0, 1)]
    decisions = small_set(("train",))
    rulings = adjudicate(*models, decisions, support=0.5, near=0.5)
    assert len(rulings) == 40 and all(r.policies.shape == r.supports.shape == (2, 2) for r in rulings)
    kept = agreed(rulings, decisions.groups)
    kept.write_jsonl(tmp_path / "agreed.jsonl")
    assert read_jsonl(tmp_path / "agreed.jsonl").decisions == kept.decisions
    assert {d.id for d in kept} <= {d.id for d in decisions}
    with pytest.raises(DecisionError):
        agreed(adjudicate(*models, decisions, support=1.1, near=0.0), decisions.groups)
