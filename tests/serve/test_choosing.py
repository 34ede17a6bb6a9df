"""Which token is chosen, and what is said of its probability."""

from __future__ import annotations

import math

import pytest
import torch

from dso.serve.choosing import Sampling, choose, nucleus, token_scores

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()


def chosen(how: list[Sampling], logits: torch.Tensor = LOGITS) -> list[int]:
    return choose(logits, how, [sampling.generator() for sampling in how])


def first_number(seed: int) -> float:
    return float(torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def by_hand(number: float, shares: list[float]) -> int:
    """The place at which the cumulative share passes a number."""
    total = 0.0
    for place, share in enumerate(shares):
        total += share / sum(shares)
        if number < total:
            return place
    raise AssertionError


def test_temperature_0_takes_the_likeliest() -> None:
    assert chosen([Sampling(0.0), Sampling(0.0)]) == [0, 3]


@pytest.mark.parametrize("seed", range(8))
def test_a_draw_is_the_place_that_its_number_falls_into(seed: int) -> None:
    number = first_number(seed)
    assert chosen([Sampling(seed=seed), Sampling(0.0)]) == [by_hand(number, [0.5, 0.3, 0.15, 0.05]), 3]
    squared = [share**2 for share in (0.05, 0.15, 0.3, 0.5)]  # temperature 1/2
    assert chosen([Sampling(0.0), Sampling(0.5, seed=seed)]) == [0, by_hand(number, squared)]
    assert chosen([Sampling(1.0, 0.8, seed)] * 2) == [by_hand(number, [0.5, 0.3]), 2 + by_hand(number, [0.3, 0.5])]


def test_the_company_of_a_row_does_not_change_its_draw() -> None:
    how = [Sampling(0.7, 0.9, seed) for seed in range(20)]
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert chosen(how, logits) == [chosen([one], row[None])[0] for one, row in zip(how, logits, strict=True)]


def test_a_small_temperature_is_the_likeliest_and_no_infinity() -> None:
    assert chosen([Sampling(1e-6, seed=1)] * 2, 1000 * LOGITS) == [0, 3]


def test_the_nucleus_is_the_likeliest_tokens_that_reach_the_share() -> None:
    rows = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])
    kept = nucleus(rows, torch.tensor([[0.0], [0.5], [0.6]]))
    assert kept.tolist() == [[0, 0.5, 0], [0, 0.5, 0], [0, 0.5, pytest.approx(0.3)]]


def test_scores_are_log_probabilities() -> None:
    scores = token_scores(2 + LOGITS, [1, 3], 2)  # a constant changes no probability
    assert [score.token for score in scores] == [1, 3]
    assert [score.log_prob for score in scores] == pytest.approx([math.log(0.3), math.log(0.5)])
    assert [token for token, _ in scores[0].likeliest] == [0, 1]
    assert [value for _, value in scores[1].likeliest] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert token_scores(LOGITS, [1, 3], 0)[0].likeliest == ()
