"""Splits of a user's own set, and the description of a set."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from itertools import product

import pytest

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.describe import describe, show
from dso.decisions.holdout import hold_out
from dso.decisions.sets import load_decisions

PAIR = (Candidate(text=" Mary", group="female"), Candidate(text=" John", group="male"))


def grid(units: int = 10, templates: int = 10, contexts: int = 10) -> DecisionSet:
    cells = product(range(units), range(templates), range(contexts))
    return DecisionSet(
        tuple(
            Decision(
                id=f"{u}-{t}-{c}",
                context=f"c{c}",
                kind="ambiguous",
                prompt="p",
                candidates=PAIR,
                template=f"t{t}",
                unit=f"u{u}",
            )
            for u, t, c in cells
        )
    )


def test_every_split_of_a_full_grid_has_the_size_of_its_cell(caplog: pytest.LogCaptureFixture) -> None:
    # of 10 each: units 7 train, 1 validation, 2 test; templates 6, 1, 3; contexts 6 seen, 4 held out
    with caplog.at_level(logging.WARNING):
        done = hold_out(grid(), units=0.2, templates=0.3, contexts=0.4, validation=0.1)
    counts = {split: len(done.select(split=split)) for split in done.splits}
    assert counts == {
        "train": 7 * 6 * 6,
        "validation": 1 * 1 * 6,
        "test": 2 * 3 * 6,
        "test-units": 2 * 6 * 6,
        "test-templates": 7 * 3 * 6,
        "test-contexts": 2 * 3 * 4,
    }
    assert f"{1000 - len(done)} of 1000 decisions are left out" in caplog.text


def pairs(units: int, contexts: int = 4) -> DecisionSet:
    """Units of two decisions of one context each, ambiguous and, in other units, unambiguous."""
    return DecisionSet(
        tuple(
            Decision(
                id=f"{kind}-{u}-{version}",
                context=f"c{u % contexts}",
                kind=kind,
                prompt="p",
                candidates=PAIR,
                unit=f"{kind}{u}",
                answer=None if kind == "ambiguous" else 0,
            )
            for kind, u, version in product(("ambiguous", "unambiguous"), range(units), (0, 1))
        )
    )


def test_a_split_keeps_so_many_decisions_of_each_kind_in_whole_units_evenly_over_contexts() -> None:
    done = hold_out(pairs(50), units=0.2, keep={"train": 24, "test": 5})
    train, test = done.select(split="train"), done.select(split="test")
    for kind in ("ambiguous", "unambiguous"):
        drawn = train.select(kind=kind)
        per_context = [len(drawn.select(lambda d, c=context: d.context == c)) for context in drawn.contexts]
        assert per_context == [6, 6, 6, 6]
        assert len(test.select(kind=kind)) == 4  # a fifth would tear a unit
    assert {sum(d.unit == unit for d in train) for unit in {d.unit for d in train}} == {2}
    assert len(done.select(split="validation")) == len(hold_out(pairs(50), units=0.2).select(split="validation"))
    again = hold_out(pairs(50), units=0.2, keep={"train": 24, "test": 5})
    assert [d.id for d in again] == [d.id for d in done]
    assert {d.id for d in hold_out(pairs(50), units=0.2, keep={"train": 24}, seed=1)} != {d.id for d in done}


def test_keeping_more_than_there_are_keeps_all() -> None:
    whole = hold_out(pairs(50), units=0.2)
    assert [d.id for d in hold_out(pairs(50), units=0.2, keep={"train": 10**6})] == [d.id for d in whole]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"tran": 5}, "keep names the split 'tran'; there are test, train, validation"),
        ({"train": 0}, "keep of 'train' is 0, expected a whole number of at least 1"),
        ({"train": 1}, "keep of 'train' is 1, but its smallest unit has 2"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep: dict[str, int], message: str) -> None:
    with pytest.raises(DecisionError, match=message):
        hold_out(pairs(50), units=0.2, keep=keep)


def test_nothing_leaks() -> None:
    done = hold_out(grid(), contexts=0.2, seed=5)
    parts = {split: done.select(split=split) for split in done.splits}
    units, templates = ({s: {getattr(d, key) for d in p} for s, p in parts.items()} for key in ("unit", "template"))
    for split in ("validation", "test", "test-contexts"):
        assert not units[split] & units["train"] and not templates[split] & templates["train"]
    assert not units["test-units"] & units["train"] and templates["test-units"] == templates["train"]
    assert units["test-templates"] == units["train"] and not templates["test-templates"] & templates["train"]
    assert not units["test"] & units["validation"] and not templates["test"] & templates["validation"]
    assert not set(parts["test-contexts"].contexts) & set(parts["train"].contexts)


def test_what_is_not_divided_goes_along() -> None:
    by_template = hold_out(grid(), units=0.0)
    assert {split: len(by_template.select(split=split)) for split in by_template.splits} == {
        "train": 700,
        "validation": 100,
        "test": 200,
    }
    by_context = hold_out(grid(), units=0.0, templates=0.0, contexts=0.3)
    assert {d.split for d in by_context} == {"train", "test-contexts"} and len(by_context) == 1000
    single = hold_out(grid(templates=1), contexts=0.0)
    assert {d.split for d in single} == {"train", "validation", "test"}


def test_people_are_in_one_part_however_their_names_are_typed() -> None:
    composed = [f"{letter}\u00e9{letter}" for letter in "abcdefghij"]
    names = [name for one in composed for name in (one, unicodedata.normalize("NFD", one))]
    assert len(set(names)) == 20
    cells = product(range(20), range(3))
    whole = DecisionSet(
        tuple(
            Decision(
                id=f"{n}-{c}",
                context=f"c{c}",
                kind="ambiguous",
                prompt="p",
                candidates=PAIR,
                template="t",
                unit=names[n],
            )  # fmt: skip
            for n, c in cells
        )
    )
    for seed in range(5):
        done = hold_out(whole, units=0.3, seed=seed)
        assert len(done) == 60
        people = {split: {d.unit for d in done.select(split=split)} for split in done.splits}
        assert {split: len(units) for split, units in people.items()} == {"train": 6, "validation": 1, "test": 3}
        assert sum(map(len, people.values())) == 10


def test_templates_of_one_unit_each_follow_it_and_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    sentences = DecisionSet(
        tuple(
            Decision(
                id=f"{u}-{s}",
                context=f"c{(u + s) % 5}",
                kind="ambiguous",
                prompt="p",
                candidates=PAIR,
                template=f"t{u}-{s}",
                unit=f"u{u}",
            )  # fmt: skip
            for u, s in product(range(20), range(2))
        )
    )
    with caplog.at_level(logging.WARNING):
        done = hold_out(sentences)
    assert not caplog.text and len(done) == 40
    # of 20 units 4 for the test, 2 for validation; two decisions each
    assert Counter(d.split for d in done) == {"train": 28, "validation": 4, "test": 8}
    assert all(len({d.split for d in done if d.unit == unit}) == 1 for unit in {d.unit for d in done})
    by_template = hold_out(sentences, units=0.0)  # whoever divides templates alone, divides them
    assert len(by_template) == 40 and any(
        len({d.split for d in by_template if d.unit == f"u{u}"}) > 1 for u in range(20)
    )


@pytest.mark.skipif("DSO_WINOBIAS" not in os.environ, reason="DSO_WINOBIAS is not set to the folder of WinoBias")
def test_the_published_winobias_is_divided_without_loss() -> None:
    whole = load_decisions("winobias", path=os.environ["DSO_WINOBIAS"])
    done = load_decisions("winobias", path=os.environ["DSO_WINOBIAS"], hold_out={})
    assert len(done) == len(whole) == 792
    assert all(len({d.split for d in done if d.unit == unit}) == 1 for unit in {d.unit for d in done})


def test_the_same_seed_divides_alike() -> None:
    assert (
        hold_out(grid(), seed=2).decisions == hold_out(grid(), seed=2).decisions != hold_out(grid(), seed=3).decisions
    )


@pytest.mark.parametrize(
    ("size", "options", "reason"),
    [
        ({}, {"units": 1.0}, r"units is 1.0, expected a share in \[0, 1\)"),
        ({}, {"validation": -0.1}, "validation is -0.1"),
        ({}, {"units": 0.0, "templates": 0.0}, "nothing is divided"),
        ({"units": 2}, {}, "2 units cannot be divided into 1 for the test, 1 for validation and some for training"),
    ],
)
def test_divisions_that_cannot_be_are_refused(size: dict, options: dict, reason: str) -> None:
    with pytest.raises(DecisionError, match=reason):
        hold_out(grid(**size), **options)


def test_description() -> None:
    chat = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is"})
    sure = Decision(
        id="s",
        context="c1",
        kind="unambiguous",
        prompt=chat,
        candidates=PAIR,
        answer=1,
        split="test",
        stereotype="male",
    )
    whole = DecisionSet((*grid(2, 3, 4), sure), name="mine")
    lines = describe(whole).splitlines()
    assert lines[:5] == [
        "mine: 25 decisions in 4 contexts",
        "groups: female, male",
        "candidates: female 50.0%, male 50.0%",
        "right answers: male 100.0%",
        "stereotypes of contexts: male 1",
    ]
    assert [line.split() for line in lines[-2:]] == [
        ["train", "ambiguous", "24", "4", "2", "3", "0", "0"],
        ["test", "unambiguous", "1", "1", "1", "1", "1", "0"],
    ]
    assert show(sure).splitlines() == [
        "s (unambiguous, context 'c1', template '')",
        "  | [user] Who?",
        "  | [assistant] It is",
        "  ' Mary' (female)",
        "  ' John' (male)  <- right",
    ]
    assert "  | <p>" in show(whole[0], render=lambda d: f"<{d.prompt}>").splitlines()
