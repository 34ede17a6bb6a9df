"""The data model: a decision, its candidates, and sets of decisions. Files of them are read by :mod:`.jsonl`.

A *decision* is one prompt with K >= 2 candidate answers, each tagged with a demographic group or with ``abstain``.
Parity is asked within a *context* (an occupation, a trait, a scene). An *ambiguous* decision has no right answer: the
fair one is the target distribution over groups. An *unambiguous* one has a right answer, and measures what steering
costs. A *unit* is the people that a decision is about.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from dso.errors import UserError
from dso.files import write_text

ABSTAIN = "abstain"
IMAGE_SLOT = "<image>"
KINDS = ("ambiguous", "unambiguous")
REQUIRED = ("id", "context", "kind", "prompt", "candidates", "answer", "template", "split")
OPTIONAL = ("images", "unit", "stereotype")

Message = dict[str, str]


class DecisionError(UserError):
    """A decision, or a set of decisions, that cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One answer: its text, the exact continuation of the prompt, and the group it stands for."""

    text: str
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One prompt with K >= 2 candidates.

    Attributes:
        id: unique within a set.
        context: what the decision is about, and what parity is asked within.
        kind: ``ambiguous`` or ``unambiguous``.
        prompt: a string that is continued as it is, or chat messages (``{"role", "content"}``) that go through the
            model's chat template; a last message of role ``assistant`` is continued, not closed.
        candidates: the answers.
        answer: index of the right candidate; None if the decision is ambiguous.
        template: the wording.
        split: ``train``, ``test``, ...
        images: paths, in the order of their slots (``<image>``) in the prompt.
        unit: the people that the decision is about. Decisions of one unit differ in the order of the people, in
            context or in template, and are resampled together.
        stereotype: the group that the context is stereotyped with.

    Context, template and unit are kept in Unicode's composed form (NFC), so that "José" is one person however it is
    typed. Prompt and candidates stay as they are.

    Raises:
        DecisionError: on an empty prompt, fewer than two candidates, two candidates with the same text, an unknown
            kind, an answer that does not fit the kind, more or fewer images than slots for them in the prompt, or a
            text with half a character.
    """

    id: str
    context: str
    kind: str
    prompt: str | tuple[Message, ...]
    candidates: tuple[Candidate, ...]
    answer: int | None = None
    template: str = ""
    split: str = "train"
    images: tuple[str, ...] = ()
    unit: str = ""
    stereotype: str | None = None

    def __post_init__(self) -> None:
        for reason in _faults(self):
            raise DecisionError(f"decision {self.id!r}: {reason}")
        for name in ("context", "template", "unit"):
            label = getattr(self, name)
            if not label.isascii():
                object.__setattr__(self, name, unicodedata.normalize("NFC", label))

    @property
    def text(self) -> str:
        """The words of the prompt; of a chat, what is said in it."""
        return self.prompt if isinstance(self.prompt, str) else "".join(m["content"] for m in self.prompt)

    @property
    def ambiguous(self) -> bool:
        """Whether no candidate is right."""
        return self.kind == "ambiguous"

    def to_json(self) -> dict[str, Any]:
        """The decision as the JSON object of its line."""
        record: dict[str, Any] = {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL)}
        record["prompt"] = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        record["candidates"] = [{"text": c.text, "group": c.group} for c in self.candidates]
        record["images"] = list(self.images)
        return record


def _faults(decision: Decision) -> Iterator[str]:
    """Reasons why a decision cannot be used, the first one first."""
    if not decision.id:
        yield "the id is empty"
    if not decision.context:
        yield "the context is empty"
    if decision.kind not in KINDS:
        yield f"kind is {decision.kind!r}, expected one of {', '.join(KINDS)}"
    if not decision.text.strip():
        yield "the prompt is empty"
    for name, text in _texts(decision):
        if half := _half_character(text):
            yield f"the {name} holds {half}, half of a character; write the whole character"
    if (slots := decision.text.count(IMAGE_SLOT)) != len(decision.images):
        yield (
            f"the prompt has {slots} slot(s) for {len(decision.images)} image(s); write {IMAGE_SLOT} once for each "
            "image, at its place in the text"
        )
    if len(decision.candidates) < 2:
        yield f"{len(decision.candidates)} candidate(s), a decision needs at least 2"
    for candidate in decision.candidates:
        if not candidate.text.strip():
            yield "a candidate's text is empty"
        if not candidate.group:
            yield f"candidate {candidate.text!r} has no group"
    texts = Counter(candidate.text for candidate in decision.candidates)
    if twice := [text for text, count in texts.items() if count > 1]:
        yield f"two candidates have the same text {twice[0]!r}"
    if all(candidate.group == ABSTAIN for candidate in decision.candidates):
        yield f"every candidate is {ABSTAIN!r}"
    if decision.kind == "ambiguous" and decision.answer is not None:
        yield f"answer is {decision.answer!r}, but an ambiguous decision has none (null)"
    if decision.kind == "unambiguous":
        answer, last = decision.answer, len(decision.candidates) - 1
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer <= last:
            yield f"answer is {answer!r}, expected the index of a candidate (0 to {last})"


def _texts(decision: Decision) -> Iterator[tuple[str, str]]:
    """Every text of a decision, with what it is called."""
    for name in ("id", "context", "template", "split", "unit"):
        yield name, getattr(decision, name)
    yield "prompt", decision.text
    yield "stereotype", decision.stereotype or ""
    for candidate in decision.candidates:
        yield "text of a candidate", candidate.text
        yield "group of a candidate", candidate.group
    for image in decision.images:
        yield "path of an image", image


def _half_character(text: str) -> str | None:
    """The first half of a surrogate pair without its other half, escaped; no tokenizer and no file takes it."""
    if text.isascii():
        return None
    half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    return None if half is None else f"\\u{ord(half):04x}"


@dataclass(frozen=True, slots=True)
class DecisionSet(Sequence[Decision]):
    """Decisions together with the groups that parity is asked between.

    Args:
        decisions: at least one, each with an id of its own.
        groups: the groups, in a fixed order; if none are given, those of the candidates, sorted, without ``abstain``.
        name: what tables call the set.

    Raises:
        DecisionError: if there are no decisions, two share an id, there are fewer than two groups, or a candidate's
            group or a stereotype is not among ``groups``.
    """

    decisions: tuple[Decision, ...]
    groups: tuple[str, ...] = ()
    name: str = "decisions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "decisions", tuple(self.decisions))
        if not self.decisions:
            raise DecisionError(f"{self.name}: no decisions")
        found = sorted({c.group for d in self.decisions for c in d.candidates} - {ABSTAIN})
        object.__setattr__(self, "groups", tuple(self.groups) or tuple(found))
        if len(self.groups) < 2 or len(set(self.groups)) < len(self.groups):
            raise DecisionError(f"{self.name}: groups are {list(self.groups)}, expected at least two different ones")
        known = {*self.groups, ABSTAIN}
        seen: set[str] = set()
        for decision in self.decisions:
            if decision.id in seen:
                raise DecisionError(f"{self.name}: duplicate id {decision.id!r}")
            seen.add(decision.id)
            for candidate in decision.candidates:
                if candidate.group not in known:
                    raise DecisionError(
                        f"{self.name}: decision {decision.id!r} has unknown group {candidate.group!r}; "
                        f"known are {', '.join(sorted(known))}"
                    )
            if decision.stereotype is not None and decision.stereotype not in self.groups:
                raise DecisionError(
                    f"{self.name}: decision {decision.id!r} has stereotype {decision.stereotype!r}, which is not among "
                    f"the groups {', '.join(self.groups)}"
                )

    def __len__(self) -> int:
        return len(self.decisions)

    @overload
    def __getitem__(self, index: int) -> Decision: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Decision, ...]: ...

    def __getitem__(self, index: int | slice) -> Decision | tuple[Decision, ...]:
        return self.decisions[index]

    @property
    def contexts(self) -> tuple[str, ...]:
        """The contexts in order of first appearance."""
        return tuple(dict.fromkeys(d.context for d in self.decisions))

    @property
    def splits(self) -> tuple[str, ...]:
        """The split labels in order of first appearance."""
        return tuple(dict.fromkeys(d.split for d in self.decisions))

    def select(
        self, keep: Callable[[Decision], bool] | None = None, *, split: str | None = None, kind: str | None = None
    ) -> DecisionSet:
        """The decisions of one split, of one kind, or for which ``keep`` is true, with the same groups.

        Raises:
            DecisionError: if none is left; the message lists the splits there are.
        """
        chosen = [
            d
            for d in self.decisions
            if (split is None or d.split == split) and (kind is None or d.kind == kind) and (keep is None or keep(d))
        ]
        if not chosen:
            asked = [f"{key}={value!r}" for key, value in (("split", split), ("kind", kind)) if value is not None]
            asked += ["the condition that was given"] if keep else []
            raise DecisionError(
                f"{self.name}: no decision with {' and '.join(asked)}; splits are {', '.join(self.splits)}"
            )
        return DecisionSet(tuple(chosen), self.groups, self.name)

    def write_jsonl(self, path: str | Path) -> None:
        """Write one decision to a line. Images below the file's folder are written as relative paths."""
        folder = Path(path).absolute().parent
        records = [d.to_json() | {"images": [_below(folder, image) for image in d.images]} for d in self.decisions]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _below(folder: Path, image: str) -> str:
    whole = Path(os.path.abspath(image))
    return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else str(whole)


def check_target(target: Mapping[str, float] | None, groups: Sequence[str]) -> tuple[float, ...]:
    """The fair distribution in the order of ``groups``; uniform when ``target`` is None.

    Raises:
        DecisionError: if a group is missing or unknown, a share is negative, or the shares do not sum to one.
    """
    if target is None:
        return (1.0 / len(groups),) * len(groups)
    if set(target) != set(groups):
        raise DecisionError(f"the target names groups {sorted(target)}, the decisions have {sorted(groups)}")
    try:
        values = tuple(float(target[group]) for group in groups)
    except (TypeError, ValueError) as error:
        raise DecisionError(f"the target's shares must be numbers, found {dict(target)}") from error
    if not all(math.isfinite(v) and v >= 0 for v in values) or abs(sum(values) - 1) > 1e-6:
        raise DecisionError(
            f"the target's shares must be >= 0 and sum to 1, found {dict(target)} (sum {sum(values):g})"
        )
    return values
