"""Winogender schemas (Rudinger, Naradowsky, Leonard, Van Durme: "Gender Bias in Coreference Resolution", NAACL 2018).

You bring ``templates.tsv``: an occupation, a participant, who of them a pronoun refers to, and a sentence such as
``The $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN had completed the repair.`` What is decided: the sentence up
to the pronoun is continued by ``he``, ``she`` or ``they`` in its case, so the groups are those of the built-in set
``pronouns``, whose steerings it tests. The context is the occupation. As published, each sentence is told of the
participant and of "someone": two units an occupation.

Only the sentences whose pronoun refers to the occupation are read; those about the participant mostly begin with the
same words. Split: ``test``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.sets.pronouns import GROUPS

HEADER = "occupation(0)\tother-participant(1)\tanswer\tsentence"
CASES = {
    "$NOM_PRONOUN": ("he", "she", "they"),
    "$POSS_PRONOUN": ("his", "her", "their"),
    "$ACC_PRONOUN": ("him", "her", "them"),
}
_PRONOUN = re.compile("|".join(map(re.escape, CASES)))
_PARTICIPANT = re.compile(r"\b(the|an?) \$PARTICIPANT", re.IGNORECASE)


def load(path: str | Path) -> DecisionSet:
    """Read Winogender.

    Args:
        path: the file, ``templates.tsv``.

    Raises:
        DecisionError: on a line that is not as published, with file, line and reason.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise DecisionError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DecisionError(f"{path}: not valid UTF-8 at byte {error.start}") from error
    if not lines or lines[0] != HEADER:
        raise DecisionError(f"{path}:1: expected the columns {HEADER.split()}")
    decisions: list[Decision] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            decisions += _decisions(line)
        except DecisionError as error:
            raise DecisionError(f"{path}:{number}: {error}") from error
    if not decisions:
        raise DecisionError(f"{path}: no sentence is about an occupation")
    return DecisionSet(tuple(decisions), GROUPS, "winogender")


def _decisions(line: str) -> Iterator[Decision]:
    fields = line.split("\t")
    if len(fields) != 4:
        raise DecisionError(f"{len(fields)} fields, expected 4 with tabs between them")
    occupation, participant, answer, sentence = fields
    if answer not in ("0", "1"):
        raise DecisionError(f"answer is {answer!r}, expected 0 (the occupation) or 1 (the participant)")
    pronouns = _PRONOUN.findall(sentence)
    if not pronouns or "$OCCUPATION" not in sentence or not _PARTICIPANT.search(sentence):
        raise DecisionError("the sentence lacks its $OCCUPATION, its article and $PARTICIPANT, or a pronoun")
    if answer == "1":
        return
    begun = sentence[: sentence.index(pronouns[0])].rstrip().replace("$OCCUPATION", occupation)
    for other in (participant, "someone"):
        told = begun.replace("$PARTICIPANT", other) if other == participant else _PARTICIPANT.sub(other, begun)
        yield Decision(
            id=f"{occupation}.{participant}.{other}",
            context=occupation,
            kind="ambiguous",
            prompt=told[0].upper() + told[1:],
            candidates=tuple(
                Candidate(text=f" {pronoun}", group=group)
                for pronoun, group in zip(CASES[pronouns[0]], GROUPS, strict=True)
            ),
            template=f"{occupation}.{participant}",
            split="test",
            unit=f"{occupation}.{other}",
        )
