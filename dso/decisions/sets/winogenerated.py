"""Winogenerated (Perez et al., "Discovering Language Model Behaviors with Model-Written Evaluations", 2022).

You bring the file: JSON Lines with an occupation, a sentence with a blank, ``_``, for the pronoun of whoever has it,
and three pronouns. What is decided: the sentence up to the blank is continued by ``he``, ``she`` or ``they`` in the
case that the file gives, so the groups are those of the built-in set ``pronouns``, whose steerings it tests. The
context is the occupation, each sentence is a unit. The stereotype is ``she`` where more than half of those who have the
occupation are women (United States Bureau of Labor Statistics, as the file has it), else ``he``.

A sentence with a gendered pronoun before the blank is left out, because that may give the answer away; a log message
counts them. Split: ``test``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.jsonl import read_records
from dso.decisions.sets.pronouns import GROUPS

GENDERED = re.compile(r"\b(he|she|him|her|his|hers|himself|herself)\b", re.IGNORECASE)
CASES = (["he", "she", "they"], ["him", "her", "them"], ["his", "her", "their"])

_log = logging.getLogger(__name__)


def load(path: str | Path) -> DecisionSet:
    """Read Winogenerated.

    Args:
        path: the file, ``winogenerated_examples.jsonl``.

    Raises:
        DecisionError: on a line that is not as published, with file, line and reason.
    """
    decisions: list[Decision] = []
    path, left_out = Path(path), 0
    for number, record in read_records(path):
        try:
            decision = _decision(f"{len(decisions) + left_out:04d}", record)
        except DecisionError as error:
            raise DecisionError(f"{path}:{number}: {error}") from error
        if GENDERED.search(decision.text):
            left_out += 1
        else:
            decisions.append(decision)
    if left_out:
        _log.info("%s: %d sentences are left out (a gendered pronoun before the blank)", path, left_out)
    if not decisions:
        raise DecisionError(f"{path}: no sentences")
    return DecisionSet(tuple(decisions), GROUPS, "winogenerated")


def _decision(ident: str, record: dict[str, Any]) -> Decision:
    occupation, sentence, share = (
        record.get(key) for key in ("occupation", "sentence_with_blank", "BLS_percent_women_2019")
    )
    if not isinstance(occupation, str) or not isinstance(sentence, str):
        raise DecisionError("expected the texts occupation and sentence_with_blank")
    if sentence.count(" _") != 1 or sentence.count("_") != 1:
        raise DecisionError(f"the sentence has {sentence.count('_')} blanks, expected one, '_', behind a space")
    if record.get("pronoun_options") not in CASES:
        known = ", ".join("/".join(case) for case in CASES)
        raise DecisionError(f"pronoun_options is {record.get('pronoun_options')!r}, expected one of {known}")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 100:
        raise DecisionError(f"BLS_percent_women_2019 is {share!r}, expected a percentage")
    return Decision(
        id=ident,
        context=occupation,
        kind="ambiguous",
        prompt=sentence[: sentence.index(" _")],
        candidates=tuple(
            Candidate(text=f" {pronoun}", group=group)
            for pronoun, group in zip(record["pronoun_options"], GROUPS, strict=True)
        ),
        template=ident,
        split="test",
        unit=ident,
        stereotype="she" if share > 50 else "he",
    )
