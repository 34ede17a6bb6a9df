"""BlockSampler: what has to cancel is drawn together, everything is drawn equally often, a state goes on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tiny import JOBS, fact, role, small_set

from dso.decisions.decision import DecisionSet
from dso.decisions.sampler import BlockSampler


@pytest.fixture
def train() -> DecisionSet:
    """4 blocks (couples) of 8 ambiguous decisions (4 jobs x 2 orders), and 8 unambiguous ones."""
    return small_set(("train",))


def unit_of(train: DecisionSet, index: int) -> str:
    return train[index].unit


def test_a_batch_holds_whole_blocks_and_then_unambiguous_decisions(train: DecisionSet) -> None:
    batch = BlockSampler(train, 16, 4).draw()
    assert batch.dtype == np.int64
    assert batch.shape == (20,)
    assert [train[h].ambiguous for h in batch] == [True] * 16 + [False] * 4
    for block in (batch[:8], batch[8:16]):
        assert len({unit_of(train, h) for h in block}) == 1
        assert sorted(block) == [h for h, d in enumerate(train) if d.ambiguous and d.unit == unit_of(train, block[0])]
        # counterbalanced: the woman stands first as often as the man, in every context
        assert Counter((train[h].context, train[h].id[-1]) for h in block) == dict.fromkeys(
            ((job, order) for job in JOBS for order in "01"), 1
        )


def test_every_block_is_drawn_once_before_any_is_drawn_again(train: DecisionSet) -> None:
    sampler = BlockSampler(train, 16, 2, seed=3)
    draws = np.array([sampler.draw() for _ in range(4)])
    ambiguous = [h for h, d in enumerate(train) if d.ambiguous]
    for epoch in (draws[:2, :16], draws[2:, :16]):
        assert sorted(epoch.flatten()) == ambiguous
    assert sorted(draws[:, 16:].flatten()) == [h for h, d in enumerate(train) if not d.ambiguous]


def test_epochs_differ_in_order(train: DecisionSet) -> None:
    sampler = BlockSampler(train, 32, seed=0)
    orders = {tuple(dict.fromkeys(unit_of(train, h) for h in sampler.draw())) for _ in range(8)}
    assert len(orders) > 1


def test_a_batch_that_ends_inside_a_block_is_followed_by_the_rest_of_it(train: DecisionSet) -> None:
    sampler = BlockSampler(train, 12)
    drawn = np.concatenate([sampler.draw() for _ in range(8)])  # 96 = three epochs
    for start in range(0, len(drawn), 8):
        block = drawn[start : start + 8]
        assert len({unit_of(train, h) for h in block}) == 1
        assert len(set(block)) == 8
    assert set(Counter(drawn.tolist()).values()) == {3}


def test_a_batch_may_be_larger_than_the_set(train: DecisionSet) -> None:
    batch = BlockSampler(train, 64).draw()
    assert set(Counter(batch.tolist()).values()) == {2}
    assert len(set(batch[:32])) == 32


def test_other_templates_and_decisions_without_a_unit_are_other_blocks() -> None:
    both = [role(job, "Ann", "Bob", template=t) for job in JOBS for t in ("s", "t")]
    alone = [replace(role(job, "Eve", "Dan"), unit="") for job in JOBS]
    train = DecisionSet((*both, *alone))
    sampler = BlockSampler(train, 1, seed=1)
    keys = []
    for index in (int(sampler.draw()[0]) for _ in range(len(train))):
        decision = train[index]
        keys.append((decision.template, decision.unit) if decision.unit else decision.id)
    runs = [key for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    assert len(runs) == len(set(runs)) == 2 + len(JOBS)


def test_questions_about_the_same_facts_are_drawn_together() -> None:
    """Two questions after each of four statements: their common beginning is computed once."""
    decisions = []
    for asked in ("nurse", "pilot"):
        for swap in (False, True):
            for woman, man in (("Ann", "Bob"), ("Eve", "Dan")):
                nurse, pilot = (man, woman) if swap else (woman, man)
                told = f"{nurse} works in this building as a nurse, and {pilot} as a pilot."
                one = fact(asked, "-", woman, man, swap=swap)
                decisions.append(replace(one, id=f"{one.id}/{asked}", prompt=f"{told} The {asked} is"))
    facts = DecisionSet(tuple(decisions))
    sampler = BlockSampler(facts, 0, 2)
    for _ in range(8):
        first, second = (facts[h].prompt for h in sampler.draw())
        assert first != second
        assert first.split(". The ")[0] == second.split(". The ")[0]


def test_the_seed_decides_the_batches(train: DecisionSet) -> None:
    first, same, other = (BlockSampler(train, 16, 4, seed=s) for s in (5, 5, 6))
    batches = [first.draw() for _ in range(4)]
    assert all(np.array_equal(batch, same.draw()) for batch in batches)
    assert not all(np.array_equal(batch, other.draw()) for batch in batches)
    first.seed(5)
    assert all(np.array_equal(batch, first.draw()) for batch in batches)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_state_goes_on_identically_through_json(train: DecisionSet, before: int) -> None:
    sampler = BlockSampler(train, 12, 3, seed=7)
    for _ in range(before):
        sampler.draw()
    state = json.loads(json.dumps(sampler.state_dict()))
    ahead = [sampler.draw() for _ in range(6)]
    other = BlockSampler(train, 12, 3, seed=99)
    other.draw()
    other.load_state_dict(state)
    assert all(np.array_equal(batch, other.draw()) for batch in ahead)


def test_a_state_is_not_changed_by_what_is_drawn_later(train: DecisionSet) -> None:
    sampler = BlockSampler(train, 12)
    sampler.draw()
    state = sampler.state_dict()
    kept = json.dumps(state)
    sampler.draw()
    assert json.dumps(state) == kept


@pytest.mark.parametrize(("ambiguous", "unambiguous"), [(0, 0), (-1, 4), (4, -1)])
def test_an_empty_batch_is_refused(train: DecisionSet, ambiguous: int, unambiguous: int) -> None:
    with pytest.raises(ValueError, match=f"{ambiguous} ambiguous and {unambiguous} unambiguous decisions is empty"):
        BlockSampler(train, ambiguous, unambiguous)


def test_a_kind_that_the_set_lacks_is_refused_by_name() -> None:
    facts = DecisionSet((fact("nurse", "pilot", "Ann", "Bob"),), ("female", "male"), "facts")
    with pytest.raises(ValueError, match="facts: no ambiguous decisions, so no batch can have 8 of them"):
        BlockSampler(facts, 8, 1)
    assert BlockSampler(facts, 0, 2).draw().tolist() == [0, 0]
