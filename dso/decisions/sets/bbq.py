"""BBQ (Parrish et al., "BBQ: A Hand-Built Bias Benchmark for Question Answering", Findings of ACL 2022).

You bring the folder with the published files, ``Age.jsonl`` and so on. A line is a short text about two people, a
question that assumes something about one of them, and three answers: either person, or that it cannot be known.

What is decided. ``{text} Question: {question} Answer:``, with the three answers as candidates; the one that declines is
``abstain``, the groups are the category's own labels (old, nonOld; Muslim, Hindu, ...). Where the text says too little
(``ambig``) the decision is ambiguous; where it tells the answer (``disambig``) it is unambiguous. A context is the
topic of a question (``question_index``) in one polarity: "who is bad with phones" and "who is good with phones" are two
contexts about the same people. Every topic has people of its own, so whom a model names in both polarities alike counts
as bias, be it for the group or for the word that stands for it; the published bias score (``dso benchmark``) is only of
what the polarity changes. The unit is the two people of a topic, the template is the topic. The stereotype is the group
that the stereotype has for the answer: in a negative question the one that the file names, in the other one the other
person's.

Splits: ``train`` and ``validation`` divide the topics of the categories that are trained on, and ``test`` is other
categories whole, so no template, context or unit is in two splits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.jsonl import read_records

STYLES = ("plain", "chat")
SPLITS = ("train", "validation", "test")
UNKNOWN = "unknown"  # the label of the answer that declines
_ANSWERS = ("ans0", "ans1", "ans2")
_TEXTS = ("question_index", "question_polarity", "context_condition", "category", "context", "question", *_ANSWERS)
_KINDS = {"ambig": "ambiguous", "disambig": "unambiguous"}
_POLARITIES = ("neg", "nonneg")


def load(
    path: str | Path,
    *,
    train: Sequence[str] = ("Physical_appearance", "Religion"),
    test: Sequence[str] = ("Age",),
    style: str = "plain",
    validation: float = 0.2,
    couples: Mapping[str, int] | None = None,
    seed: int = 0,
) -> DecisionSet:
    """Read BBQ.

    Args:
        path: the folder with the published files.
        train: categories to train on; a category is a file's name.
        test: categories to measure on, which may not be trained on.
        style: ``plain`` continues the text, ``chat`` asks the question as a user.
        validation: share of the topics of each category in ``train`` that is kept for validation.
        couples: split -> how many pairs of people a topic keeps at most, drawn at random; the published sets have up to
            42.
        seed: of the division and the draw.

    Raises:
        DecisionError: on an unknown option, a category without a file, or a line that is not as published, with file,
            line and reason.
    """
    if style not in STYLES:
        raise DecisionError(f"bbq: style is {style!r}, expected one of {', '.join(STYLES)}")
    if not 0 < validation < 1:
        raise DecisionError(f"bbq: validation is {validation!r}, expected a share between 0 and 1")
    kept = _counts(couples or {})
    trained, tested = _categories("train", train), _categories("test", test)
    if both := sorted({*trained} & {*tested}):
        raise DecisionError(f"bbq: {both[0]} is in train and in test; measure on a category that is not trained on")
    decisions: list[Decision] = []
    for category in (*trained, *tested):
        rng = random.Random(f"{seed} {category}")
        found = _read(Path(path), category, style)
        splits = _divide(rng, found, validation) if category in trained else dict.fromkeys(_topics(found), "test")
        decisions += _labelled(rng, found, splits, kept)
    order = {split: place for place, split in enumerate(SPLITS)}
    decisions.sort(key=lambda decision: order[decision.split])
    return DecisionSet(tuple(decisions), name=f"bbq ({', '.join(trained)}; test {', '.join(tested)})")


def _categories(name: str, given: Sequence[str]) -> tuple[str, ...]:
    chosen = (given,) if isinstance(given, str) else tuple(given)
    if not chosen or len(set(chosen)) < len(chosen):
        raise DecisionError(f"bbq: {name} is {given!r}, expected one or more different categories")
    return chosen


def _counts(couples: Mapping[str, int]) -> Mapping[str, int]:
    for split, count in couples.items():
        if split not in SPLITS or isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise DecisionError(
                f"bbq: couples has {split!r}: {count!r}, expected a whole number of at least 1 for {', '.join(SPLITS)}"
            )
    return couples


def _read(folder: Path, category: str, style: str) -> list[Decision]:
    path = folder / f"{category}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "none"
        raise DecisionError(f"bbq: {path} is not there; categories in that folder: {there}")
    decisions = []
    for number, record in read_records(path):
        try:
            decisions.append(_decision(category, record, style))
        except DecisionError as error:
            raise DecisionError(f"{path}:{number}: {error}") from error
    if not decisions:
        raise DecisionError(f"{path}: is empty")
    return decisions


def _decision(category: str, record: dict[str, Any], style: str) -> Decision:
    """The decision of one line; its split is decided later."""
    if wrong := [key for key in _TEXTS if not isinstance(record.get(key), str)]:
        raise DecisionError(f"{wrong[0]} is {record.get(wrong[0])!r}, expected a text")
    for key, known in (
        ("context_condition", (*_KINDS,)),
        ("question_polarity", _POLARITIES),
        ("category", (category,)),
    ):
        if record[key] not in known:
            raise DecisionError(f"{key} is {record[key]!r}, expected {' or '.join(known)}")
    people, labels = _people(record)
    declines = labels.index(UNKNOWN)
    label, kind = record.get("label"), _KINDS[record["context_condition"]]
    if isinstance(label, bool) or label not in (0, 1, 2):
        raise DecisionError(f"label is {label!r}, expected 0, 1 or 2")
    if (kind == "ambiguous") != (label == declines):
        raise DecisionError(f"label is {label}, which does not fit an item that is {record['context_condition']}")
    polarity, topic = record["question_polarity"], f"{category}/{int(record['question_index']):02d}"
    lead = "" if style == "chat" else " "
    return Decision(
        id=f"{category}/{record.get('example_id')}",
        context=f"{topic}/{polarity}",
        kind=kind,
        prompt=_prompt(record["context"].strip(), record["question"].strip(), style),
        candidates=tuple(
            Candidate(text=lead + record[answer], group=ABSTAIN if label == UNKNOWN else label)
            for answer, label in zip(_ANSWERS, labels, strict=True)
        ),
        answer=label if kind == "unambiguous" else None,
        template=topic,
        unit=f"{topic}/{'/'.join(sorted(people))}",
        stereotype=_stereotype(record, polarity, [label for label in labels if label != UNKNOWN]),
    )


def _people(record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What the two people are called, and the label of each answer."""
    info = record.get("answer_info")
    pairs: list[Any] = [info.get(answer) for answer in _ANSWERS] if isinstance(info, dict) else []
    if len(pairs) != 3 or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)
        for pair in pairs
    ):
        raise DecisionError("answer_info must have [name, label] for ans0, ans1 and ans2")
    labels = [label for _, label in pairs]
    if labels.count(UNKNOWN) != 1 or len(set(labels)) < 3:
        raise DecisionError(f"the labels are {', '.join(labels)}, expected two groups and {UNKNOWN!r} once")
    if not record["question_index"].isdigit():
        raise DecisionError(f"question_index is {record['question_index']!r}, expected a number")
    return [name for name, label in pairs if label != UNKNOWN], labels


def _stereotype(record: dict[str, Any], polarity: str, groups: list[str]) -> str | None:
    """The group that the stereotype answers with; None where it names both or neither."""
    named = (record.get("additional_metadata") or {}).get("stereotyped_groups", ())
    told = [group in named for group in groups]
    if told.count(True) != 1:
        return None
    return groups[told.index(polarity == "neg")]


def _prompt(text: str, question: str, style: str) -> str | tuple[dict[str, str], ...]:
    if style == "plain":
        return f"{text}\nQuestion: {question}\nAnswer:"
    return ({"role": "user", "content": f"{text} {question}"},)


def _topics(decisions: Sequence[Decision]) -> list[str]:
    return list(dict.fromkeys(decision.template for decision in decisions))


def _divide(rng: random.Random, decisions: Sequence[Decision], validation: float) -> dict[str, str]:
    """Topic -> its split."""
    topics = _topics(decisions)
    count = max(1, round(validation * len(topics)))
    if count >= len(topics):
        category = topics[0].split("/")[0]
        raise DecisionError(f"bbq: {category} has {len(topics)} topic(s), too few to keep {count} for validation")
    held = {*rng.sample(topics, count)}
    return {topic: "validation" if topic in held else "train" for topic in topics}


def _labelled(
    rng: random.Random, decisions: Sequence[Decision], splits: Mapping[str, str], couples: Mapping[str, int]
) -> list[Decision]:
    units: dict[str, list[str]] = {}
    for decision in decisions:
        members = units.setdefault(decision.template, [])
        if decision.unit not in members:
            members.append(decision.unit)
    kept = {
        unit
        for topic, members in units.items()
        for unit in rng.sample(members, min(len(members), couples.get(splits[topic], len(members))))
    }
    return [replace(d, split=splits[d.template]) for d in decisions if d.unit in kept]
