"""WinoBias (Zhao, Wang, Yatskar, Ordonez, Chang: "Gender Bias in Coreference Resolution", NAACL 2018).

You bring the files: a folder with ``pro_stereotyped_type1.txt.dev`` and the like, ``male_occupations.txt``
and ``female_occupations.txt``. A line is ``1 [The developer] argued with the designer because [she] did not like the
design.``: the first pair of brackets holds the referent, the next the pronoun.

What is decided. The sentence is cut before the first pronoun, and the candidates are the pronouns of the same case:
she/he, her/him or her/his. The context is the referent's occupation, its stereotype is the list that the occupation is
in, and the groups are female and male. Nothing determines the gender, so every decision is ambiguous. In ``type2`` the
syntax determines the referent before the pronoun is read. In ``type1`` only the rest of the sentence does, which the
model has not read; the two sentences of a pair then often have the same prompt, in two contexts of opposite
stereotypes, so the preference mixes both occupations. Read the stereotype gap on ``type2``; the per-context bias means
the same in both.

The anti-stereotyped file has the same sentences with the other pronoun, and so the same decisions; it only tells the
case of "her". The published files have typing errors. Where they differ before the pronoun, the pro-stereotyped one
counts. Where the other file's pronoun does not tell the case of "her" either ("demanded [he] pay"), it is a possessive
if another word follows it, else an object. A sentence with a gendered pronoun outside brackets before the cut is left
out, because that may give the answer away. A log message counts all three. Lines 2k-1 and 2k make one unit: they
mention the same two occupations and refer to either. They are one template too, so that training compares them.

Splits: ``type1-dev``, ``type1-test``, ``type2-dev``, ``type2-test``; to train on one type, ``validation`` makes
``train`` and ``validation`` of its dev and ``test`` of its test.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet

SPLITS = ("dev", "test")
TYPES = ("type1", "type2")
GROUPS = ("female", "male")

_log = logging.getLogger(__name__)
_LINE = re.compile(r"(\d+) +(.+)")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_GENDERED = re.compile(r"\b(he|she|him|her|his|hers|himself|herself)\b", re.IGNORECASE)
# pronoun -> gender; the case of "her" is open
_GENDER = {"he": "male", "him": "male", "his": "male", "she": "female", "her": "female"}
_CASES = {"he": (" she", " he"), "him": (" her", " him"), "his": (" her", " his")}
_FEMALE = {"he": "she", "him": "her", "his": "her"}


@dataclass(frozen=True, slots=True)
class _Sentence:
    number: int
    before: str
    referent: str
    pronoun: str
    after: str


def load(
    path: str | Path,
    *,
    split: str | Sequence[str] = "test",
    types: str | Sequence[str] = TYPES,
    validation: float | None = None,
    seed: int = 0,
) -> DecisionSet:
    """Read WinoBias.

    Args:
        path: the folder with the published files.
        split: ``dev``, ``test`` or both.
        types: ``type1``, ``type2`` or both.
        validation: share of the units of dev that is kept for ``validation``, the others are ``train``; None keeps the
            published labels.
        seed: of that draw.

    Raises:
        DecisionError: on an unknown option, a missing file, or a line that is not as published, with file, line and
            reason.
    """
    folder, decisions = Path(path), []
    splits, kinds = _subset("split", split, SPLITS), _subset("types", types, TYPES)
    stereotypes = {o: g for g in GROUPS for _, o in _lines(folder / f"{g}_occupations.txt")}
    for part in splits:
        for kind in kinds:
            decisions += _read(folder, kind, part, stereotypes)
    if validation is not None:
        if len(kinds) > 1 or len(splits) < len(SPLITS):
            raise DecisionError("winobias: validation divides one type at a time, with split=[dev, test]")
        decisions = _divided(decisions, validation, seed)
    return DecisionSet(tuple(decisions), GROUPS, f"winobias ({', '.join(splits)})")


def _divided(decisions: Sequence[Decision], validation: float, seed: int) -> list[Decision]:
    """Dev as ``train`` and ``validation``, by units; test as ``test``."""
    if not 0 < validation < 1:
        raise DecisionError(f"winobias: validation is {validation!r}, expected a share between 0 and 1")
    units = list(dict.fromkeys(d.unit for d in decisions if d.split.endswith("-dev")))
    held = {*random.Random(seed).sample(units, max(1, round(validation * len(units))))}
    if len(held) == len(units):
        raise DecisionError(f"winobias: dev has {len(units)} pair(s) of sentences, too few to train on some")

    def label(decision: Decision) -> str:
        if decision.split.endswith("-test"):
            return "test"
        return "validation" if decision.unit in held else "train"

    return [replace(decision, split=label(decision)) for decision in decisions]


def _subset(name: str, given: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    chosen = (given,) if isinstance(given, str) else tuple(given)
    if not chosen or not set(chosen) <= set(known):
        raise DecisionError(f"winobias: {name} is {given!r}, expected one or more of {', '.join(known)}")
    return chosen


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers in the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DecisionError(f"{path}: cannot be read: {error.strerror}") from error
    lines = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DecisionError(f"{path}:{number}: not valid UTF-8 at byte {error.start}") from error
        if text:
            lines.append((number, text))
    if not lines:
        raise DecisionError(f"{path}: is empty")
    return lines


def _read(folder: Path, kind: str, part: str, stereotypes: dict[str, str]) -> list[Decision]:
    pro_file, anti_file = (folder / f"{side}_stereotyped_{kind}.txt.{part}" for side in ("pro", "anti"))
    pros, antis = _parse(pro_file, stereotypes), _parse(anti_file, stereotypes)
    if len(pros) != len(antis):
        raise DecisionError(f"{anti_file}: has {len(antis)} sentences, {pro_file.name} has {len(pros)}")
    decisions, differ, left_out, unclear = [], 0, 0, 0
    for index, (pro, anti) in enumerate(zip(pros, antis, strict=True)):
        stereotype = stereotypes[pro.referent]
        if _GENDER[pro.pronoun] != stereotype:
            raise DecisionError(
                f"{pro_file}:{pro.number}: {pro.pronoun!r} is not pro-stereotypical for {pro.referent!r} ({stereotype})"
            )
        differ += pro.before != anti.before
        case = _case(pro.pronoun, anti.pronoun)
        unclear += case is None
        if _GENDERED.search(pro.before):
            left_out += 1
            continue
        decisions.append(
            Decision(
                id=f"{kind}-{part}/{index + 1:03d}",
                context=pro.referent,
                kind="ambiguous",
                prompt=pro.before,
                candidates=tuple(
                    Candidate(text=t, group=g) for t, g in zip(_CASES[case or _guessed(pro)], GROUPS, strict=True)
                ),
                template=f"{kind}-{part}/pair{index // 2 + 1:03d}",
                split=f"{kind}-{part}",
                unit=f"{kind}-{part}/pair{index // 2 + 1:03d}",
                stereotype=stereotype,
            )
        )
    if differ or left_out or unclear:
        _log.info(
            "%s: %d sentences; %d differ from %s before the pronoun (this file counts), %d are left out (a gendered "
            "pronoun before the cut), %d have a pronoun there that does not tell the case (what follows does)",
            pro_file, len(pros), differ, anti_file.name, left_out, unclear,
        )  # fmt: skip
    return decisions


def _case(pronoun: str, other: str) -> str | None:
    """The male pronoun of the same case; that of "her" is the other file's, None if that one cannot be its partner."""
    if pronoun in _CASES:
        return pronoun
    if pronoun == "she":
        return "he"
    return other if _FEMALE.get(other) == pronoun else None


def _guessed(sentence: _Sentence) -> str:
    """The male pronoun for a "her" by what follows it."""
    return "his" if sentence.after[:1].isalpha() else "him"


def _parse(path: Path, stereotypes: dict[str, str]) -> list[_Sentence]:
    return [_parse_line(f"{path}:{number}", number, line, stereotypes) for number, line in _lines(path)]


def _parse_line(where: str, number: int, line: str, stereotypes: dict[str, str]) -> _Sentence:
    match = _LINE.fullmatch(line)
    if not match:
        raise DecisionError(f"{where}: expected a number and a blank at the beginning")
    brackets = list(_BRACKETS.finditer(match[2]))
    pronouns = [found for found in brackets if found[1].strip().lower() in _GENDER]
    referents = [found for found in brackets if found not in pronouns and not _GENDERED.fullmatch(found[1].strip())]
    if not pronouns:
        raise DecisionError(f"{where}: no pronoun (he, she, him, her, his) in brackets")
    if len(referents) != 1:
        raise DecisionError(f"{where}: {len(referents)} occupations in brackets, expected one")
    referent = re.sub(r"^((the|an?)\s+)+", "", referents[0][1].strip(), flags=re.IGNORECASE)
    if referent not in stereotypes:
        raise DecisionError(f"{where}: {referent!r} is in neither list of occupations")
    if pronouns[0].start() < referents[0].start():
        raise DecisionError(f"{where}: the pronoun comes before its referent")
    before, after = match[2][: pronouns[0].start()], match[2][pronouns[0].end() :]
    return _Sentence(number, _clean(before), referent, pronouns[0][1].strip().lower(), after.strip())


def _clean(text: str) -> str:
    """The words without brackets, with a doubled article made one and " 's" joined to its noun."""
    text = re.sub(r"\s+", " ", text.replace("[", "").replace("]", "")).replace(" 's", "'s").strip()
    return re.sub(r"\b(the) the\b", r"\1", text, flags=re.IGNORECASE)
