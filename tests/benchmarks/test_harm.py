"""The cost of a steering on a capability task: figures against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.bench.harm import Cost, compared, prose


def test_changes_are_paired_by_hand() -> None:
    tokens = np.array([4, 4, 2])
    paragraphs = np.array([5, 5])
    base = Cost(np.array([True, True, False]), np.array([8.0, 4.0, 4.0]), tokens, np.ones(2), paragraphs, 0.0)
    steered = Cost(np.array([True, False, False]), np.array([8.0, 4.5, 4.5]), tokens, np.full(2, 2.0), paragraphs, 0.02)
    found = compared(base, steered)
    # One of three is lost: -1/3, with differences 0, -1, 0 of standard deviation 1/sqrt(3).
    half = 1.96 / 3
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["points"] == pytest.approx([-100 / 3, 100 * (-1 / 3 - half), 100 * (-1 / 3 + half)])
    # 16 nats become 17 over 10 tokens: the log of the ratio is 0.1. Questions miss it by -0.4, 0.1 and 0.3.
    error = math.sqrt(0.16 + 0.01 + 0.09) / 10
    ends = (0.1, 0.1 - 1.96 * error, 0.1 + 1.96 * error)
    assert found["perplexity_change"] == pytest.approx([math.exp(x) - 1 for x in ends])
    assert found["perplexity"] == pytest.approx(math.exp(1.7))
    assert found["prose_perplexity"] == pytest.approx(math.exp(0.4))
    assert found["prose_change"] == pytest.approx([math.exp(0.2) - 1] * 3)  # both texts by the same: no error
    same = compared(base, base)
    assert same["points"] == [0, 0, 0]
    assert same["perplexity_change"] == same["prose_change"] == [0, 0, 0]


def test_prose_is_sentences_and_no_question_with_its_answer() -> None:
    found = prose()
    assert len(found) > 80 and len(set(found)) == len(found)
    assert all(len(text) >= 240 and text[0].isupper() and text.endswith(".") for text in found)
    assert not any(mark in text for text in found for mark in ("\n", "::=", ">>>", "Answer:"))
