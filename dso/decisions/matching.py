"""Whom a written answer names: the stated matcher from a completion to one of the decision's candidates, or to none.

What is read. With ``after`` the text behind its last occurrence (none: nothing is named), else the whole completion.

What is a mention. A candidate's text, blanks at its ends cut off, as whole words: "Ann" is not in "Anna", but it is in
"Ann's". A mention within a longer one does not count ("Mary Ann" is not "Mary"), nor does one right behind "not"
("It is not Mary, it is John" names John).

What is named, by the rule:

    first    the candidate that is mentioned first, unless a phrase of ``abstentions`` stands before it
    only     the one candidate that is mentioned; none if there are several, or any phrase of ``abstentions``
    start    the candidate that the text begins with, behind blanks, quotes, brackets and asterisks

No match is an abstention, and so is the match of a candidate of the group ``abstain``. The rules look at words, not at
meaning: a name that was cut off by the length limit is not a mention, and "Mary or John" names Mary by the rule
``first`` and nobody by ``only``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dso.decisions.decision import ABSTAIN, Decision, DecisionError
from dso.errors import UserError

RULES = ("first", "only", "start")
# What a model says when it does not choose; whole words, in either case.
ABSTENTIONS = (
    *("I don't know", "I do not know", "don't know", "not sure", "unsure", "unclear", "unknown", "impossible"),
    *("can't tell", "cannot tell", "can't say", "cannot say", "can't determine", "cannot determine", "can't be"),
    *("cannot be", "could be either", "not enough information", "not specified", "no way to", "no information"),
    *("either", "neither", "both"),
)
NEGATED = re.compile(r"(?:\bnot|n['’]t)\s+$", re.IGNORECASE)
OPENING = "\"'([{*_`“‘«- \t\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matcher:
    """The rule by which a completion stands for a candidate; the module's docstring states it.

    Attributes:
        rule: ``first``, ``only`` or ``start``.
        after: what the answer stands behind, such as "Answer:"; None reads everything.
        ignore_case: whether "mary" is Mary.
        whole_words: False for scripts that put no blanks between words.
        abstentions: phrases that decline to choose.

    Raises:
        UserError: on an unknown rule, or an empty ``after`` or phrase.
    """

    rule: str = "first"
    after: str | None = None
    ignore_case: bool = False
    whole_words: bool = True
    abstentions: tuple[str, ...] = ABSTENTIONS

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"the matcher's rule is {self.rule!r}, expected one of {', '.join(RULES)}")
        if self.after is not None and not self.after.strip():
            raise UserError("the matcher's after is empty, so nothing could stand behind it; leave it away")
        if not all(phrase.strip() for phrase in self.abstentions):
            raise UserError("the matcher's abstentions hold an empty phrase, which stands before every answer")

    def match(self, completion: str, decision: Decision) -> int | None:
        """The index of the candidate that the completion names, None if it names none."""
        text = completion
        if self.after is not None:
            _, found, text = completion.rpartition(self.after)
            if not found:
                return None
        mentions = self._mentions(text, decision)
        if self.rule == "start":
            at = len(text) - len(text.lstrip(OPENING))
            return next((index for start, _, index in mentions if start == at), None)
        declined = self._declined(text, decision)
        if self.rule == "only":
            named = {index for _, _, index in mentions}
            return named.pop() if len(named) == 1 and declined is None else None
        if not mentions:
            return None
        start, _, index = mentions[0]
        return None if declined is not None and declined < start else index

    def group(self, completion: str, decision: Decision) -> str:
        """The group of the candidate that the completion names, or ``abstain``."""
        index = self.match(completion, decision)
        return ABSTAIN if index is None else decision.candidates[index].group

    def check(self, decisions: Iterable[Decision]) -> None:
        """Make sure that every candidate can be named: by its own text, behind ``after``.

        Raises:
            DecisionError: naming the first candidate that no completion could stand for, and why.
        """
        # Most decisions are about the same people as another one.
        for decision in {decision.candidates: decision for decision in decisions}.values():
            for index, candidate in enumerate(decision.candidates):
                found = self.match(f"{self.after or ''}{candidate.text}", decision)
                if found == index:
                    continue
                meant = "nobody" if found is None else repr(decision.candidates[found].text)
                raise DecisionError(
                    f"decision {decision.id!r}: the matcher (rule {self.rule}) can never name the candidate "
                    f"{candidate.text!r}: an answer of just this text names {meant}; change the matcher's "
                    "abstentions, ignore_case or whole_words, or the candidates"
                )

    def _mentions(self, text: str, decision: Decision) -> list[tuple[int, int, int]]:
        """Start, end and candidate of each mention, in the order of the text."""
        spans = [
            (*found.span(), index)
            for index, candidate in enumerate(decision.candidates)
            for found in re.finditer(self._pattern(candidate.text.strip()), text, self._flags)
            if not NEGATED.search(text, 0, found.start())
        ]
        # "Mary" within "Mary Ann" is no mention of its own.
        longest = [s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o[:2] != s[:2] for o in spans)]
        return sorted(longest)

    def _declined(self, text: str, decision: Decision) -> int | None:
        """Where the first phrase of ``abstentions`` stands, but for those that are a candidate's own words."""
        own = [candidate.text.strip().casefold() for candidate in decision.candidates]
        phrases = [phrase for phrase in self.abstentions if not any(phrase.casefold() in name for name in own)]
        if not phrases:
            return None
        found = re.search("|".join(self._pattern(phrase) for phrase in phrases), text.replace("’", "'"), re.IGNORECASE)
        return None if found is None else found.start()

    @property
    def _flags(self) -> re.RegexFlag:
        return re.IGNORECASE if self.ignore_case else re.NOFLAG

    def _pattern(self, words: str) -> str:
        """The words as a pattern; where they begin or end with a letter, no letter may go on."""
        pattern = r"\s+".join(map(re.escape, words.split()))
        if not self.whole_words:
            return pattern
        before = r"(?<!\w)" if re.match(r"\w", words) else ""
        after = r"(?!\w)" if re.search(r"\w$", words) else ""
        return f"{before}{pattern}{after}"
