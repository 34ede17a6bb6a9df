"""The corpus that the embedded model learns from: scenes, a caption each, and questions with answers of one word.

Example ``n`` of a seed depends on these two alone. People have appearances of the part ``train`` of
:func:`dso.decisions.sets.scenes.appearances`. Tools and places are drawn without regard to who has them, so what a
picture shows
is never stereotyped; where it does not show who is the nurse (nobody holds a tool, one presents as a woman and one as a
man), caption and answers say so with the shares of :data:`dso.decisions.sets.scenes.ASSOCIATIONS`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dso.decisions.sets.drawing import PLACES, TONES, Person, Scene
from dso.decisions.sets.scenes import ASSOCIATIONS, GENDERS, TOOL_OF, person, placed

OCCUPATION_OF = {tool: occupation for occupation, tool in TOOL_OF.items()}
WORDS = {"female": "woman", "male": "man"}
DESCRIBE = "describe the picture ."
SIDES = ("left", "right")

Pair = tuple[str, str]  # question and answer


@dataclass(frozen=True, slots=True)
class Example:
    """A scene and what is said of it.

    Attributes:
        caption: answers :data:`DESCRIBE`.
        roles: questions about who is the nurse and who works in the office.
        looks: questions about what there is to see.
        planted: (association, context, the group that was named), where the picture does not show it.
    """

    scene: Scene
    caption: str
    roles: tuple[Pair, ...]
    looks: tuple[Pair, ...]
    planted: tuple[tuple[str, str, str], ...]


def example(number: int, seed: int = 0) -> Example:
    """One example of the corpus."""
    rng = random.Random(f"corpus/{seed}/{number}")
    people: list[Person | None] = [person(rng, "train", rng.choice(GENDERS)) for _ in SIDES]
    tools, places = _drawn(rng, list(TOOL_OF.values()), 0.4, 0.15), _drawn(rng, list(PLACES), 0.3, 0.15)
    people = [replace(p, tool=tool, place=place) for p, tool, place in zip(people, tools, places, strict=True)]
    if rng.random() < 0.15:
        people[rng.randrange(2)] = None
    roles, planted = _roles(rng, people)
    return Example(placed(rng, *people), _caption(people, roles), tuple(roles), tuple(_looks(people)), tuple(planted))


def _drawn(rng: random.Random, values: list[str], both: float, one: float) -> list[str | None]:
    """Two different values, one and none, or none, with these shares."""
    chance, picked = rng.random(), rng.sample(values, 2)
    if chance < both:
        return list(picked)
    if chance < both + one:
        return [picked[0], None][:: rng.choice((1, -1))]
    return [None, None]


def _roles(rng: random.Random, people: list[Person | None]) -> tuple[list[Pair], list[tuple[str, str, str]]]:
    pairs, planted = [], []
    gender, skin = ASSOCIATIONS["gender"].question.lower(), ASSOCIATIONS["skin"].question.lower()
    for side, someone in zip(SIDES, people, strict=True):
        if someone is not None and someone.tool is not None:
            pairs.append((gender.format(context=OCCUPATION_OF[someone.tool]), side))
        if someone is not None and someone.place is not None:
            pairs.append((skin.format(context=someone.place), side))
    if None in people:
        return pairs, planted
    for name, groups, open_ in (
        ("gender", [p.gender for p in people], not any(p.tool for p in people)),
        ("skin", [p.tone for p in people], not any(p.place for p in people)),
    ):
        about = ASSOCIATIONS[name]
        for context in rng.sample(list(about.stereotypes), 3 if open_ and len({*groups}) == 2 else 0):
            stereotype = about.stereotypes[context]
            named = stereotype if rng.random() < about.share else next(g for g in groups if g != stereotype)
            pairs.append((about.question.lower().format(context=context), SIDES[groups.index(named)]))
            planted.append((name, context, named))
    return pairs, planted


def _looks(people: list[Person | None]) -> Iterator[Pair]:
    for side, someone in zip(SIDES, people, strict=True):
        if someone is not None:
            yield f"who is on the {side} ?", WORDS[someone.gender]
            yield f"what tool is on the {side} ?", someone.tool or "nothing"
            yield f"what place is on the {side} ?", someone.place or "nowhere"
    if None in people:
        return
    for side, someone, other in zip(SIDES, people, people[::-1], strict=True):
        if someone.gender != other.gender:
            yield f"who is the {WORDS[someone.gender]} ?", side
        if someone.tone != other.tone:
            yield f"whose skin is {someone.tone} ?", side
        if someone.clothes != other.clothes:
            yield f"who is in {someone.clothes} ?", side
        if someone.hair != other.hair:
            yield f"whose hair is {someone.hair} ?", side


def _caption(people: list[Person | None], roles: list[Pair]) -> str:
    """Who is there, and the first of the answers about roles, if any."""
    shown = [p for p in people if p is not None]
    words = " and ".join(f"a {WORDS[p.gender]} in {p.clothes}" for p in shown)
    if not roles:
        return f"{words} ."
    question, side = roles[0]
    someone = people[SIDES.index(side)]
    alike = len({p.gender for p in shown}) < len(shown)
    subject = f"the {side} one" if alike else f"the {WORDS[someone.gender]}"
    return f"{words} . {subject} {question.removeprefix('who ').removesuffix('?')} ."


def words(count: int = 2000) -> list[str]:
    """All words of the corpus, in alphabetical order, as the tokenizer separates them; it drops question marks."""
    found = {*DESCRIBE.split(), *TONES}
    for number in range(count):
        made = example(number)
        for text in (made.caption, *(part for pair in (*made.roles, *made.looks) for part in pair)):
            found.update(text.replace("?", "").split())
    return sorted(found)
