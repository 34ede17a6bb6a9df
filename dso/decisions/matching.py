"""Whom a free-form answer names: from a completion to one of the decision's candidates, or to none.

What is read. With ``after``, the text behind its last occurrence (without one, nothing is named); else the whole
completion. Completions, candidates and phrases are compared as :func:`fold` leaves them: in Unicode's composed form,
with every apostrophe and hyphen written the plain way.

What is a mention. A candidate's text, without the blanks around it, as whole words. A word is made of letters, digits
and the marks that combine with them, and an apostrophe or a hyphen inside it belongs to it: "Ann" is not in "Anna" nor
in "Ann-Marie", and "Neil" is not in "O'Neil", but "Ann" is in "Ann's" and in "d'Ann". A mention within a longer one
does not count ("Mary Ann" is not "Mary"), nor does one right after "not" ("It is not Mary, it is John" names John).

What is named, by the rule:

    first    the candidate that is mentioned first, unless a phrase of ``abstentions`` comes before it
    only     the one candidate that is mentioned; none if there are several, or any phrase of ``abstentions``
    start    the candidate that the text begins with, after blanks, quotes, brackets and asterisks

No match is an abstention, and so is a match of a candidate of the group ``abstain``. The rules look at words, not at
meaning: a name that the length limit cut off is not a mention, and "Mary or John" names Mary by the rule ``first`` and
nobody by ``only``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
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
NEGATED = re.compile(r"(?:\bnot|n't)\s+$", re.IGNORECASE)
OPENING = "\"'([{*_`“„«- \t\n"
JOINERS = "\u200c\u200d"  # they shape the letters beside them, in Indic and Arabic scripts
_PLAIN = str.maketrans(
    dict.fromkeys("‘’‛ʼ′＇", "'")  # apostrophes and what is typed for one
    | dict.fromkeys("‐‑⁃−﹣－", "-")  # hyphens, breaking or not, and the minus sign; dashes stay dashes
    | dict.fromkeys("\u00ad\u2060\ufeff", None)  # soft hyphen, word joiner, byte order mark: not to be seen
)
# What may follow a name and its apostrophe: "Ann's", "Ann'll"; and what may come before one: "d'Ann", "dell'Anna".
_ENDINGS = re.compile(r"'(?:s|d|ll|ve|re|m)(?![\w'-])", re.IGNORECASE)
_ELISIONS = re.compile(r"(?:^|[^\w'-])(?:[cdjlmnst]|qu|all|dall|dell|nell|sull)'$")


def fold(text: str) -> str:
    """The text in Unicode's composed form (NFC), with plain apostrophes and hyphens."""
    return unicodedata.normalize("NFC", text).translate(_PLAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matcher:
    """The rule by which a completion stands for a candidate; see the module's docstring.

    Attributes:
        rule: ``first``, ``only`` or ``start``.
        after: what introduces the answer, such as "Answer:"; None reads everything.
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
            raise UserError("the matcher's after is empty, so no answer could follow it; leave it out")
        if not all(phrase.strip() for phrase in self.abstentions):
            raise UserError("the matcher's abstentions hold an empty phrase, which comes before every answer")

    def match(self, completion: str, decision: Decision) -> int | None:
        """The index of the candidate that the completion names, None if it names none."""
        text = fold(completion)
        if self.after is not None:
            _, found, text = text.rpartition(fold(self.after))
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
        """Make sure that every candidate can be named: by its own text, after ``after``.

        Raises:
            DecisionError: naming the first candidate that no completion could name, and why.
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
            (start, end, index)
            for index, candidate in enumerate(decision.candidates)
            for start, end in self._places(fold(candidate.text), text, self.ignore_case)
            if not NEGATED.search(text, 0, start)
        ]
        # "Mary" within "Mary Ann" is no mention of its own.
        longest = [s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o[:2] != s[:2] for o in spans)]
        return sorted(longest)

    def _declined(self, text: str, decision: Decision) -> int | None:
        """Where the first phrase of ``abstentions`` stands, but for those that are a candidate's own words."""
        own = [fold(candidate.text).strip().casefold() for candidate in decision.candidates]
        phrases = [fold(phrase) for phrase in self.abstentions]
        places = [
            start
            for phrase in phrases
            if not any(phrase.casefold() in name for name in own)
            for start, _ in self._places(phrase, text, ignore_case=True)
        ]
        return min(places, default=None)

    def _places(self, words: str, text: str, ignore_case: bool) -> Iterator[tuple[int, int]]:
        """Start and end of the words wherever they stand, whole ones only if ``whole_words`` says so."""
        pattern = r"\s+".join(map(re.escape, words.split()))
        # The group within a lookahead: the next match may begin inside this one.
        for found in re.finditer(f"(?=({pattern}))", text, re.IGNORECASE if ignore_case else re.NOFLAG):
            start, end = found.span(1)
            if not self.whole_words or _stands_alone(text, start, end):
                yield start, end


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether no word goes on before ``start`` or after ``end``; a sign such as "+" at an end is no part of a word."""
    before = text[max(0, start - 2) : start][::-1]
    if _is_part(text[start]) and _goes_on(before) and not _ELISIONS.search(text, 0, start):
        return False
    return not (_is_part(text[end - 1]) and _goes_on(text[end : end + 2]) and not _ENDINGS.match(text, end))


def _goes_on(rest: str) -> bool:
    """Whether a word goes on with ``rest``: with a part of one, or with an apostrophe or a hyphen and such a part."""
    return bool(rest) and _is_part(rest[1:2] if rest[0] in "'-" else rest[0])


def _is_part(character: str) -> bool:
    """Whether a character is a part of a word: a letter, a digit, a combining mark, an underscore or a joiner."""
    return bool(character) and (
        character.isalnum() or character in f"_{JOINERS}" or unicodedata.category(character).startswith("M")
    )
