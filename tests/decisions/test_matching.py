"""Whom an answer names: every rule of the matcher on sentences with a plain meaning, in every way of typing them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionError
from dso.decisions.matching import ABSTENTIONS, Matcher
from dso.decisions.sets import load_decisions
from dso.decisions.sets.names import ATTRIBUTES, NAME_SPLITS, groups_of, names_of
from dso.errors import UserError


def asked(*names: str, groups: tuple[str, ...] = ("female", "male", "third")) -> Decision:
    candidates = tuple(Candidate(text=f" {name}", group=group) for name, group in zip(names, groups, strict=False))
    return Decision(id="d1", context="nurse", kind="ambiguous", prompt="Who is the nurse?", candidates=candidates)


MARY, JOHN = 0, 1
COUPLE = asked("Mary", "John")


@pytest.mark.parametrize(
    ("answer", "first", "only", "start"),
    [
        (" I'd pick Mary, because she looks kind.", MARY, MARY, None),
        ("The nurse is John.\nQ: Mary or", JOHN, None, None),
        (" Mary", MARY, MARY, MARY),
        ('**"John"** it is', JOHN, JOHN, JOHN),
        (" Mary or John could be", MARY, None, MARY),
        ("It is not Mary, it is John.", JOHN, JOHN, None),
        ("It isn't Mary. John", JOHN, JOHN, None),
        ("It isn’t Mary. John", JOHN, JOHN, None),
        ("Not John", None, None, None),
        ("I don't know, maybe Mary", None, None, None),
        ("I don’t know. Mary?", None, None, None),
        ("Mary, but I am not sure", MARY, None, MARY),
        ("Both Mary and John", None, None, None),
        ("Neither", None, None, None),
        ("Marysville is nice", None, None, None),
        ("Mary's turn", MARY, MARY, MARY),
        ("mary", None, None, None),
        (" Mar", None, None, None),  # cut off by the length limit
        ("", None, None, None),
    ],
)
def test_what_an_answer_names(answer: str, first: int | None, only: int | None, start: int | None) -> None:
    found = [Matcher(rule=rule).match(answer, COUPLE) for rule in ("first", "only", "start")]
    assert found == [first, only, start]


def test_the_group_is_that_of_the_candidate_and_abstain_without_one() -> None:
    assert Matcher().group("I'd pick John", COUPLE) == "male"
    assert Matcher().group("Someone else", COUPLE) == ABSTAIN
    declining = asked("Mary", "John", "I don't know", groups=("female", "male", ABSTAIN))
    assert Matcher().match("I don't know", declining) == 2  # a candidate's own words are no phrase of abstention
    assert Matcher().group("I don't know", declining) == ABSTAIN


def test_of_names_within_names_the_longer_is_meant() -> None:
    decision = asked("Mary", "Mary Ann", "Ann")
    for rule in ("first", "only", "start"):
        assert Matcher(rule=rule).match(" Mary Ann.", decision) == 1
        assert Matcher(rule=rule).match(" Mary  Ann.", decision) == 1  # however many blanks
        assert Matcher(rule=rule).match(" Mary.", decision) == 0
    assert Matcher().match("Anna", decision) is None


def test_only_what_stands_behind_the_last_marker_is_read() -> None:
    matcher = Matcher(after="Answer:")
    assert matcher.match("Mary is a nurse, I think. Answer: John", COUPLE) == JOHN
    assert matcher.match("Answer: Mary. No: Answer: John", COUPLE) == JOHN
    assert matcher.match("I say Mary", COUPLE) is None


def test_case_and_words_may_be_ignored() -> None:
    pronouns = asked("he", "she")
    assert Matcher().match("She said", pronouns) is None
    assert Matcher(ignore_case=True).match("She said", pronouns) == 1
    chinese = asked("王芳", "李强")
    assert Matcher().match("李强是护士", chinese) is None
    assert Matcher(whole_words=False).match("李强是护士", chinese) == 1


def test_own_phrases_replace_the_built_in_ones() -> None:
    assert Matcher(abstentions=("no idea",)).match("No idea. Mary?", COUPLE) is None
    assert Matcher(abstentions=("no idea",)).match("Either way, Mary", COUPLE) == MARY
    assert Matcher(abstentions=()).match("I don't know, Mary", COUPLE) == MARY


def test_names_with_signs_are_matched_as_they_are() -> None:
    decision = asked("A+", "O'Neil (Jr.)")
    assert Matcher().match("It is A+.", decision) == 0
    assert Matcher().match("It is O'Neil (Jr.), sir", decision) == 1


JOSE, DECOMPOSED = "Jos\u00e9", "Jose\u0301"


@pytest.mark.parametrize(
    ("answer", "names", "named"),
    [
        # combining marks belong to the word
        ("प्रियांका", ("प्रिया", "राहुल"), None),
        ("प्रिया नर्स है", ("प्रिया", "राहुल"), 0),
        ("ক্ষমা", ("ক্ষ", "রাহুল"), None),
        # composed and decomposed letters are the same
        (DECOMPOSED, ("Jose", "Mary"), None),
        (JOSE, ("Jose", "Mary"), None),
        (DECOMPOSED, (JOSE, "Mary"), 0),
        (JOSE, (DECOMPOSED, "Mary"), 0),
        (f"It is {DECOMPOSED}.", (JOSE, "Jose"), 0),
        ("Zoe\u0308", ("Zoe", "Zo\u00eb"), 1),
        # apostrophes and hyphens are the same, however they are typed
        ("O’Connor", ("O'Connor", "Mary"), 0),
        ("O'Connor", ("O’Connor", "Mary"), 0),
        ("Oʼconnor", ("O'Connor", "Mary"), None),
        ("Anne\u2011Marie", ("Anne-Marie", "John"), 0),
        ("Anne\u2010Marie", ("Anne-Marie", "John"), 0),
        ("Anne\u00adMarie", ("AnneMarie", "John"), 0),
        # and belong to the word that they are in
        ("Ann-Marie", ("Ann", "John"), None),
        ("Ann-Marie", ("Marie", "John"), None),
        ("Anne\u2011Marie", ("Anne", "Marie"), None),
        ("Ann-Marie, not Ann", ("Ann", "Ann-Marie"), 1),
        ("O'Neil", ("Neil", "John"), None),
        ("O’Neil", ("O", "John"), None),
        # but not to one that they stand beside
        ("Ann’s turn", ("Ann", "John"), 0),
        ("Ann'll do it", ("Ann", "John"), 0),
        ("ANN'S TURN", ("ANN", "John"), 0),
        ("James' turn", ("James", "John"), 0),
        ("‘Ann’", ("Ann", "John"), 0),
        ("'Ann'.", ("Ann", "John"), 0),
        ("- Ann\n- John", ("Ann", "John"), 0),
        ("-Ann", ("Ann", "John"), 0),
        ("Ann--she is kind", ("Ann", "John"), 0),
        ("Ann—she is kind", ("Ann", "John"), 0),
        ("Le nom d'Anne", ("Anne", "John"), 0),
        ("La mano dell’Anna", ("Anna", "John"), 0),
        ("D'Angelo", ("Angelo", "John"), None),
        ("A1", ("A", "B"), None),
        ("xAna Ana Ana", ("Ana Ana", "B"), 0),
    ],
)
def test_whole_words_of_every_script(answer: str, names: tuple[str, str], named: int | None) -> None:
    assert Matcher().match(answer, asked(*names)) == named
    assert Matcher(rule="only").match(answer, asked(*names)) == (None if answer == "- Ann\n- John" else named)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="aeo\u0301\u0308é ñ'’-‑.प्रियां", max_size=12), st.sampled_from(("NFC", "NFD")))
def test_how_an_answer_is_composed_changes_nothing(answer: str, form: str) -> None:
    names = asked("é", "प्रिया", "o'a")
    again = asked(*(unicodedata.normalize(form, c.text.strip()) for c in names.candidates))
    for rule in ("first", "only", "start"):
        found = Matcher(rule=rule).match(answer, names)
        assert Matcher(rule=rule).match(unicodedata.normalize(form, answer), again) == found
        typed = answer.replace("’", "'").replace("‑", "-")
        assert Matcher(rule=rule).match(typed, names) == found


def test_what_introduces_the_answer_and_what_declines_it_may_be_typed_in_any_way() -> None:
    assert Matcher(after="It’s:").match("It's: Mary", COUPLE) == MARY
    assert (
        Matcher(abstentions=("je ne sais pas, l’un ou l’autre",)).match("Je ne sais pas, l'un ou l'autre. Mary", COUPLE)
        is None
    )
    assert Matcher().match("I can‘t tell. Mary", COUPLE) is None


# Matchers that cannot be used


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="rule is 'last', expected one of first, only, start"):
        Matcher(rule="last")
    with pytest.raises(UserError, match="after is empty"):
        Matcher(after=" ")
    with pytest.raises(UserError, match="empty phrase"):
        Matcher(abstentions=("no idea", ""))


def test_a_matcher_that_can_name_nobody_is_found_without_an_answer() -> None:
    Matcher().check([COUPLE])
    Matcher(after="Answer:").check([COUPLE])
    with pytest.raises(DecisionError, match=r"decision 'd1': .* never name the candidate ' will': .* names ' Will'"):
        Matcher(ignore_case=True).check([asked("Will", "will")])
    with pytest.raises(DecisionError, match=r"rule start.* never name the candidate ' -'"):
        Matcher(rule="start").check([asked("Mary", "-")])


def built_in() -> list[Decision]:
    """Every name of the built-in sets once, as a candidate beside the others of its unit."""
    found = []
    for attribute in ATTRIBUTES:
        lists = [names for split in NAME_SPLITS for names in names_of(attribute, split)]
        found += [
            asked(*unit, groups=groups_of(attribute)) for by_group in lists for unit in zip(*by_group, strict=True)
        ]
    return found


def test_every_candidate_of_the_built_in_sets_can_be_named() -> None:
    decisions = built_in()
    assert len(decisions) > 250
    for rule in ("first", "only", "start"):
        Matcher(rule=rule).check(decisions)
    Matcher(ignore_case=True).check(load_decisions("pronouns"))


def test_the_phrases_of_abstention_are_no_names() -> None:
    names = {candidate.text.strip().casefold() for decision in built_in() for candidate in decision.candidates}
    assert not names & {phrase.casefold() for phrase in ABSTENTIONS}
