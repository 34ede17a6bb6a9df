"""BBQ on an excerpt that the tests write: contexts, groups, splits that share nothing, and lines that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dso.decisions.decision import DecisionError, DecisionSet
from dso.decisions.sets import bbq, load_decisions

PEOPLE = {
    "Age": [("boy", "nonOld"), ("grandfather", "old"), ("girl", "nonOld"), ("grandmother", "old")],
    "Religion": [("Hindu", "Hindu"), ("Muslim", "Muslim"), ("Jew", "Jewish"), ("Sikh", "Sikh")],
}


def items(category: str, topics: int = 5) -> list[dict[str, Any]]:
    """As published: of every topic two pairs of people, in both orders, polarities and conditions."""
    records: list[dict[str, Any]] = []
    for topic in range(1, topics + 1):
        for pair in (PEOPLE[category][:2], PEOPLE[category][2:]):
            for first, second in (pair, pair[::-1]):
                for polarity in ("neg", "nonneg"):
                    for condition in ("ambig", "disambig"):
                        told = "" if condition == "ambig" else f" The {first[0]} did it."
                        records.append(
                            {
                                "example_id": len(records),
                                "question_index": str(topic),
                                "question_polarity": polarity,
                                "context_condition": condition,
                                "category": category,
                                "answer_info": {
                                    "ans0": [*first],
                                    "ans1": ["Can't answer", "unknown"],
                                    "ans2": [*second],
                                },
                                "additional_metadata": {"stereotyped_groups": [pair[1][1]]},
                                "context": f"A {first[0]} met a {second[0]} at place {topic}.{told} ",
                                "question": f"Who was {polarity}?",
                                "ans0": f"The {first[0]}",
                                "ans1": "Can't answer",
                                "ans2": f"The {second[0]}",
                                "label": 1 if condition == "ambig" else 0,
                            }
                        )
    return records


def write(folder: Path, category: str, records: list[dict[str, Any]]) -> None:
    (folder / f"{category}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for category in PEOPLE:
        write(tmp_path, category, items(category))
    return tmp_path


def load(folder: Path, **options: Any) -> DecisionSet:
    return load_decisions("bbq", path=folder, **{"train": ["Religion"], "test": ["Age"], **options})


def test_an_item_becomes_a_decision_by_hand(folder: Path) -> None:
    ambiguous, told, other, *_ = load(folder).select(split="test")
    assert ambiguous.prompt == "A boy met a grandfather at place 1.\nQuestion: Who was neg?\nAnswer:"
    assert [(c.text, c.group) for c in ambiguous.candidates] == [
        (" The boy", "nonOld"), (" Can't answer", "abstain"), (" The grandfather", "old"),
    ]  # fmt: skip
    assert (ambiguous.kind, ambiguous.answer, told.kind, told.answer) == ("ambiguous", None, "unambiguous", 0)
    assert (ambiguous.context, other.context) == ("Age/01/neg", "Age/01/nonneg")
    assert ambiguous.unit == other.unit == "Age/01/boy/grandfather" and ambiguous.template == "Age/01"
    assert (ambiguous.stereotype, other.stereotype) == ("old", "nonOld")
    chat = load(folder, style="chat").select(split="test")[0]
    assert chat.prompt == ({"role": "user", "content": "A boy met a grandfather at place 1. Who was neg?"},)
    assert chat.candidates[0].text == "The boy"


def test_no_topic_person_or_context_is_in_two_splits(folder: Path) -> None:
    decisions = load(folder)
    assert decisions.groups == ("Hindu", "Jewish", "Muslim", "Sikh", "nonOld", "old")
    assert decisions.splits == ("train", "validation", "test")
    parts = [decisions.select(split=split) for split in decisions.splits]
    assert [len(part) for part in parts] == [4 * 16, 16, 5 * 16]
    for look in ("context", "template", "unit"):
        seen = [{getattr(d, look) for d in part} for part in parts]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert load(folder).decisions == decisions.decisions
    assert load(folder, seed=2).decisions != decisions.decisions


def test_couples_keep_so_many_pairs_of_people_a_topic(folder: Path) -> None:
    decisions = load(folder, couples={"test": 1})
    assert len(decisions.select(split="test")) == 5 * 8 and len(decisions.select(split="train")) == 4 * 16


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"test": ["Religion"]}, "Religion is in train and in test"),
        ({"test": ["Nationality"]}, r"Nationality\.jsonl is not there; categories in that folder: Age, Religion"),
        ({"train": []}, "train is .*, expected one or more different categories"),
        ({"style": "poem"}, "style is 'poem'"),
        ({"validation": 1}, "validation is 1, expected a share"),
        ({"validation": 0.99}, r"Religion has 5 topic\(s\), too few to keep 5"),
        ({"couples": {"test": 0}}, "couples has 'test': 0"),
        ({"couples": {"dev": 1}}, "couples has 'dev': 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(folder: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DecisionError, match=reason):
        load(folder, **options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.pop("question"), "question is None, expected a text"),
        (lambda r: r.update(context_condition="clear"), "context_condition is 'clear', expected ambig or disambig"),
        (lambda r: r.update(question_polarity="pos"), "question_polarity is 'pos', expected neg or nonneg"),
        (lambda r: r.update(category="Age"), "category is 'Age', expected Religion"),
        (lambda r: r.update(label=3), "label is 3, expected 0, 1 or 2"),
        (lambda r: r.update(label=0), "label is 0, which does not fit an item that is ambig"),
        (lambda r: r.update(question_index="one"), "question_index is 'one', expected a number"),
        (lambda r: r.update(answer_info={"ans0": ["x", "y"]}), r"answer_info must have \[name, label\]"),
        (lambda r: r["answer_info"].update(ans1=["x", "y"]), "two groups and 'unknown' once"),
        (lambda r: r.update(ans0="The Muslim"), "two candidates have the same text ' The Muslim'"),
    ],
)
def test_a_line_that_is_not_as_published_is_refused_with_file_and_line(
    folder: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    records = items("Religion")
    change(records[2])
    write(folder, "Religion", records)
    with pytest.raises(DecisionError, match=rf"Religion\.jsonl:3: .*{reason}"):
        bbq.load(folder, train=["Religion"])


@pytest.mark.parametrize(
    ("line", "reason"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list"), ("", "is empty")]
)
def test_a_file_that_is_not_json_lines_is_refused(folder: Path, line: str, reason: str) -> None:
    (folder / "Religion.jsonl").write_text(line)
    with pytest.raises(DecisionError, match=rf"Religion\.jsonl.*{reason}"):
        bbq.load(folder, train=["Religion"])
