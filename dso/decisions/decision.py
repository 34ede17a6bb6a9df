"""Decisions: the data model, its JSON Lines schema and the splits.

A *decision* is one prompt with K >= 2 candidate answers, each tagged with a demographic group or with
``abstain``. Parity is asked within a *context* (an occupation, a trait, a scene). An *ambiguous* decision
has no right answer: the fair one is the target distribution over groups. An *unambiguous* one has, and
measures what steering costs.

One decision is one line of a JSON Lines file::

    {"id": "...", "context": "nurse", "kind": "ambiguous", "prompt": "... The nurse is named",
     "candidates": [{"text": " Mary", "group": "female"}, {"text": " John", "group": "male"}],
     "answer": null, "template": "t01", "split": "train", "images": [], "unit": "Mary/John",
     "stereotype": "female"}

``candidates[i].text`` is the exact continuation of the prompt, leading blank included. ``images`` are paths, of which
relative ones start at the file's folder; each has its slot, ``<image>``, in the prompt, in the same order. The last two
keys are optional: ``unit`` names the people of the decision (decisions of one unit differ in the order of the
people, in context or in template, and are resampled together by the intervals of
:mod:`dso.evaluation.bias`), ``stereotype`` is the group that the context is stereotyped with.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dso.errors import UserError
from dso.files import write_text

ABSTAIN = "abstain"
IMAGE_SLOT = "<image>"
KINDS = ("ambiguous", "unambiguous")
ROLES = ("system", "user", "assistant")
REQUIRED = ("id", "context", "kind", "prompt", "candidates", "answer", "template", "split")
OPTIONAL = ("images", "unit", "stereotype")

Message = dict[str, str]


class DecisionError(UserError):
    """A decision, or a set of them, that cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One answer: its text, the exact continuation of the prompt, and the group it stands for."""

    text: str
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One prompt with K >= 2 candidates. See the module's docstring for the fields.

    ``prompt`` is a string that is continued as it is, or chat messages (``{"role", "content"}``) that go
    through the model's chat template; a last message of role ``assistant`` is continued, not closed.

    Raises:
        DecisionError: on an empty prompt, fewer than two candidates, two candidates with the same text,
            an unknown kind, an answer that does not fit the kind, or another number of images than of slots for
            them in the prompt.
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

    @property
    def text(self) -> str:
        """The prompt's words, of a chat without its roles."""
        return self.prompt if isinstance(self.prompt, str) else "".join(m["content"] for m in self.prompt)

    @property
    def ambiguous(self) -> bool:
        return self.kind == "ambiguous"

    def to_json(self) -> dict:
        """The decision as the JSON object of its line."""
        record = {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL)}
        record["prompt"] = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        record["candidates"] = [{"text": c.text, "group": c.group} for c in self.candidates]
        record["images"] = list(self.images)
        return record

    @classmethod
    def from_json(cls, record: object) -> Decision:
        """Build a decision from one parsed line.

        Raises:
            DecisionError: if a key is missing, unknown or of the wrong type, or a value cannot be used.
        """
        if not isinstance(record, dict):
            raise DecisionError(f"expected a JSON object, found {type(record).__name__}")
        if missing := [name for name in REQUIRED if name not in record]:
            raise DecisionError(f"missing key(s) {', '.join(missing)}")
        if unknown := sorted(set(record) - {*REQUIRED, *OPTIONAL}):
            raise DecisionError(f"unknown key(s) {', '.join(unknown)}; known are {', '.join((*REQUIRED, *OPTIONAL))}")
        for name in ("id", "context", "kind", "template", "split", "unit"):
            if not isinstance(record.get(name, ""), str):
                raise DecisionError(f"{name} must be a string, found {record[name]!r}")
        if not isinstance(record.get("stereotype"), str | None):
            raise DecisionError(f"stereotype must be a group or null, found {record['stereotype']!r}")
        return cls(
            id=record["id"],
            context=record["context"],
            kind=record["kind"],
            prompt=_parse_prompt(record["prompt"]),
            candidates=_parse_candidates(record["candidates"]),
            answer=record["answer"],
            template=record["template"],
            split=record["split"],
            images=_parse_images(record.get("images", [])),
            unit=record.get("unit", ""),
            stereotype=record.get("stereotype"),
        )


def _faults(decision: Decision) -> Iterator[str]:
    if not decision.id:
        yield "the id is empty"
    if not decision.context:
        yield "the context is empty"
    if decision.kind not in KINDS:
        yield f"kind is {decision.kind!r}, expected one of {', '.join(KINDS)}"
    if not decision.text.strip():
        yield "the prompt is empty"
    if (slots := decision.text.count(IMAGE_SLOT)) != len(decision.images):
        yield (
            f"the prompt has {slots} slot(s) for {len(decision.images)} image(s); write {IMAGE_SLOT} once for each "
            "image, where it belongs"
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
        is_index = isinstance(decision.answer, int) and not isinstance(decision.answer, bool)
        if not is_index or not 0 <= decision.answer < len(decision.candidates):
            last = len(decision.candidates) - 1
            yield f"answer is {decision.answer!r}, expected the index of a candidate (0 to {last})"


def _parse_prompt(value: object) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_record(item, {"role", "content"}) for item in value):
        if strange := [m["role"] for m in value if m["role"] not in ROLES]:
            raise DecisionError(f"unknown role {strange[0]!r} in the prompt; known are {', '.join(ROLES)}")
        return tuple(value)
    raise DecisionError('prompt must be a string or a list of {"role", "content"} messages')


def _is_record(item: object, keys: set[str]) -> bool:
    return isinstance(item, dict) and set(item) == keys and all(isinstance(value, str) for value in item.values())


def _parse_candidates(value: object) -> tuple[Candidate, ...]:
    if not isinstance(value, list):
        raise DecisionError(f"candidates must be a list, found {type(value).__name__}")
    for item in value:
        if not _is_record(item, {"text", "group"}):
            raise DecisionError(f'a candidate must be {{"text": string, "group": string}}, found {item!r}')
    return tuple(Candidate(**item) for item in value)


def _parse_images(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DecisionError(f"images must be a list of paths, found {value!r}")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class DecisionSet(Sequence[Decision]):
    """Decisions together with the groups that parity is asked between.

    Args:
        decisions: at least one decision, ids unique.
        groups: the groups in a fixed order; gathered from the candidates (sorted, without ``abstain``)
            when not given.
        name: what tables call the set.

    Raises:
        DecisionError: on no decisions, a duplicate id, fewer than two groups, or a candidate's group that is
            not among ``groups``.
    """

    decisions: tuple[Decision, ...]
    groups: tuple[str, ...] = ()
    name: str = "decisions"
    _position: Mapping[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decisions", tuple(self.decisions))
        if not self.decisions:
            raise DecisionError(f"{self.name}: no decisions")
        found = sorted({c.group for d in self.decisions for c in d.candidates} - {ABSTAIN})
        object.__setattr__(self, "groups", tuple(self.groups) or tuple(found))
        if len(self.groups) < 2 or len(set(self.groups)) < len(self.groups):
            raise DecisionError(f"{self.name}: groups are {list(self.groups)}, expected at least two different ones")
        known = {*self.groups, ABSTAIN}
        for index, decision in enumerate(self.decisions):
            if decision.id in self._position:
                raise DecisionError(f"{self.name}: duplicate id {decision.id!r}")
            self._position[decision.id] = index
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

    def __getitem__(self, index):  # type: ignore[override]
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
        """The decisions of one split and/or kind for which ``keep`` holds, with the same groups.

        Raises:
            DecisionError: if nothing is left; the message lists the splits and kinds there are.
        """
        chosen = [
            d
            for d in self.decisions
            if (split is None or d.split == split) and (kind is None or d.kind == kind) and (keep is None or keep(d))
        ]
        if not chosen:
            raise DecisionError(
                f"{self.name}: no decision with split={split!r}, kind={kind!r}; splits are {', '.join(self.splits)}"
            )
        return DecisionSet(tuple(chosen), self.groups, self.name)

    def write_jsonl(self, path: str | Path) -> None:
        """Write one decision a line, to a temporary name first; images below the file's folder by relative paths."""
        folder = Path(path).absolute().parent
        records = [d.to_json() | {"images": [_below(folder, image) for image in d.images]} for d in self.decisions]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _below(folder: Path, image: str) -> str:
    whole = Path(os.path.abspath(image))
    return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else str(whole)


def read_jsonl(path: str | Path, groups: Iterable[str] = ()) -> DecisionSet:
    """Read a decision set; groups are gathered from the file unless given.

    Raises:
        DecisionError: with file, line number and reason, on the first bad line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DecisionError(f"{path}: cannot be read: {error.strerror}") from error
    groups = tuple(groups)
    known, seen, decisions = {*groups, ABSTAIN}, {}, []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            decision = Decision.from_json(json.loads(line.decode("utf-8")))
            if decision.images:
                decision = replace(decision, images=tuple(os.path.abspath(path.parent / i) for i in decision.images))
            if decision.id in seen:
                raise DecisionError(f"duplicate id {decision.id!r}, first used on line {seen[decision.id]}")
            if len(known) > 1:
                for candidate in decision.candidates:
                    if candidate.group not in known:
                        raise DecisionError(f"unknown group {candidate.group!r}; known are {', '.join(sorted(known))}")
        except UnicodeDecodeError as error:
            raise DecisionError(f"{path}:{number}: not valid UTF-8 at byte {error.start}") from error
        except json.JSONDecodeError as error:
            raise DecisionError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
        except DecisionError as error:
            raise DecisionError(f"{path}:{number}: {error}") from error
        seen[decision.id] = number
        decisions.append(decision)
    try:
        return DecisionSet(tuple(decisions), groups, path.stem)
    except DecisionError as error:
        raise DecisionError(f"{path}: {error}") from error


def check_target(target: Mapping[str, float] | None, groups: Sequence[str]) -> tuple[float, ...]:
    """The fair distribution in the order of ``groups``; uniform when ``target`` is None.

    Raises:
        DecisionError: if a group is missing, unknown or negative, or the shares do not sum to one.
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
