"""The blocked estimate of group preferences: hand-derived updates, and names that cancel."""

from __future__ import annotations

import torch

from envs.preference import BlockedPreference

HALF = torch.tensor([0.5, 0.5])


def cells(*first: float) -> torch.Tensor:
    return torch.tensor([[p, 1 - p] for p in first])


def test_first_block_splits_into_common_and_own_parts_by_hand() -> None:
    estimate = BlockedPreference(3, HALF)
    # One block, contexts 0 and 1 at 0.9 and 0.7: deviations 0.4 and 0.2, their mean 0.3 is common, +-0.1 is own.
    estimate.update(cells(0.9, 0.7), torch.tensor([0, 0]), torch.tensor([0, 1]))
    torch.testing.assert_close(estimate.common, torch.tensor([0.3, -0.3]))
    torch.testing.assert_close(estimate.own[:, 0], torch.tensor([0.1, -0.1, 0.0]))
    torch.testing.assert_close(estimate.preference[:, 0], torch.tensor([0.9, 0.7, 0.8]))


def test_second_block_by_hand() -> None:
    estimate = BlockedPreference(2, HALF, decay=0.5, context_decay=0.5)
    estimate.update(cells(0.9, 0.7), torch.tensor([0, 0]), torch.tensor([0, 1]))
    # Deviations 0.0 and -0.4; less the own parts +-0.1: -0.1 and -0.3, mean -0.2. Common: half way from 0.3 to -0.2.
    # Own errors against the block's mean: 0 + 0.2 - 0.1 = 0.1 and -0.4 + 0.2 + 0.1 = -0.1, taken in by half.
    estimate.update(cells(0.5, 0.1), torch.tensor([0, 0]), torch.tensor([0, 1]))
    torch.testing.assert_close(estimate.common[0], torch.tensor(0.05))
    torch.testing.assert_close(estimate.own[:, 0], torch.tensor([0.15, -0.15]))


def test_what_people_and_templates_do_cancels_exactly_from_the_contexts_own_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.tensor([0.1, 0.0, -0.1])
    estimate = BlockedPreference(3, HALF, decay=0.99, context_decay=0.99)
    for _ in range(50):
        people = 0.2 * torch.randn((), generator=generator)
        estimate.update(cells(*(0.5 + people + own).tolist()), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(estimate.own[:, 0], own, atol=1e-5, rtol=0)
    # A running mean of each context by itself would still be off by 0.2 / sqrt(50) in common.
    assert abs(float(estimate.common[0])) < 3 * 0.2 / 50**0.5


def test_a_block_of_one_context_still_moves_that_context() -> None:
    estimate = BlockedPreference(2, HALF, decay=0.5, context_decay=0.5)
    for _ in range(40):
        estimate.update(cells(0.8, 0.2), torch.tensor([0, 1]), torch.tensor([0, 1]))
    torch.testing.assert_close(estimate.preference[:, 0], torch.tensor([0.8, 0.2]), atol=1e-3, rtol=0)


def test_state_goes_on_where_it_was_and_an_empty_batch_changes_nothing() -> None:
    first = BlockedPreference(2, HALF)
    first.update(cells(0.9, 0.7), torch.tensor([0, 0]), torch.tensor([0, 1]))
    second = BlockedPreference(2, HALF)
    second.load_state_dict(first.state_dict())
    second.update(cells(), torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))
    for estimate in (first, second):
        estimate.update(cells(0.2, 0.4), torch.tensor([0, 0]), torch.tensor([1, 0]))
    assert torch.equal(first.preference, second.preference)
    assert torch.equal(first.seen, second.seen)
