"""The blocked estimate of group preferences: hand-derived updates, and names that cancel."""

from __future__ import annotations

import pytest
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


def layout(blocks: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cells of an exact two-way layout, two of three contexts a block: 0.02 in common, (0.06, 0, -0.06) own."""
    own, people = torch.tensor([0.06, 0.0, -0.06]), 0.1 * torch.randn(blocks, generator=generator)
    people = people - people.mean()
    block = torch.arange(blocks).repeat_interleave(2)
    context = torch.stack([torch.arange(blocks) % 3, (torch.arange(blocks) + 1) % 3], 1).flatten()
    return cells(*(0.52 + people[block] + own[context]).tolist()), block, context


def test_it_starts_from_the_base_model_s_layout() -> None:
    base, block, context = layout(30, torch.Generator().manual_seed(0))
    estimate = BlockedPreference(3, HALF)
    estimate.start_from(base, block, context)
    torch.testing.assert_close(estimate.preference[:, 0], torch.tensor([0.58, 0.52, 0.46]), atol=1e-5, rtol=0)
    torch.testing.assert_close(estimate.preference.sum(1), torch.ones(3))


def test_control_variates_take_off_what_the_base_model_knows_of_the_people() -> None:
    base, block, context = layout(30, torch.Generator().manual_seed(0))
    plain, controlled = (BlockedPreference(3, HALF, decay=0.5, context_decay=0.5) for _ in range(2))
    for estimate in (plain, controlled):
        estimate.start_from(base, block, context)
    few, numbers, places = base[:2], torch.tensor([0, 0]), context[:2]
    # The base model itself: its block says nothing new, however far its people are from the mean.
    controlled.update(few, numbers, places, few)
    torch.testing.assert_close(controlled.preference[:, 0], torch.tensor([0.58, 0.52, 0.46]), atol=1e-5, rtol=0)
    plain.update(few, numbers, places)
    assert abs(float(plain.preference[0, 0]) - 0.58) > 0.01
    # A policy that moved every cell by -0.04 is seen to have done so, half of it in the first update.
    controlled.update(few + torch.tensor([-0.04, 0.04]), numbers, places, few)
    torch.testing.assert_close(controlled.preference[:, 0], torch.tensor([0.56, 0.50, 0.44]), atol=1e-5, rtol=0)


def test_the_slope_follows_a_policy_that_evens_its_people_out() -> None:
    base, block, context = layout(30, torch.Generator().manual_seed(0))
    estimate = BlockedPreference(3, HALF, decay=0.5, context_decay=0.5)
    estimate.start_from(base, block, context)
    fair = 0.5 * base + 0.5 * estimate.preference[context]  # half of what the people make a difference of
    for _ in range(20):
        estimate.update(fair, block, context, base)
    assert float(estimate.slope) == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(estimate.preference[:, 0], torch.tensor([0.58, 0.52, 0.46]), atol=1e-3, rtol=0)
